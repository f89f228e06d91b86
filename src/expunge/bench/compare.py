"""Every method on the digits, with one budget: what `expunge compare` runs."""

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from torch import nn

from expunge.bench import runs
from expunge.bench.case import Case, Result, attempt, curves, measure, standards
from expunge.bench.entries import Entry, chosen, entries, rehearsed
from expunge.bench.required import nearest
from expunge.bench.situations import FAULTY, FULL, LEADING, REMOVED, SCENARIOS, Situation, Size, situation_of
from expunge.errors import ConfigError, NotFinite, NotInformative
from expunge.report import rich_tables
from expunge.report.summaries import FLOOR, REFERENCE
from expunge.rows import Row
from expunge.trace import Watch

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = {
    "removal": ("ΔFE", "ΔFMIA", "NSKL", "Cost"),
    "class-removal": ("ΔFA", "ΔFE", "NSKL", "Cost"),
    "label-correction": ("NSKL", "FSKL", "Cost"),
}
OVERVIEW = "all scenarios"


def run(out: Path, seeds: int, methods: Sequence[str] = (), size: Size = FULL) -> Path:
    """Run every scenario for every seed and draw the page; seeds that are done already are not run again.

    Args:
        out: Folder for runs.
        seeds: 0, 1, … seeds - 1.
        methods: Names of those who take part; empty for all that the rehearsal chose settings for.
        size: How much data, and how long it is trained on.

    Returns:
        The path of the page.

    Raises:
        ConfigError: Fewer than three seeds, or a name that nobody has.
    """
    taking_part = _named(methods, size)
    cases = {scenario: partial(case, scenario, taking_part, size) for scenario in SCENARIOS}
    return runs.carry_out("compare", out, config(methods, size), cases, seeds)


def rows(out: Path, methods: Sequence[str] = (), size: Size = FULL) -> list[Row]:
    """All rows of the run of a configuration."""
    return runs.rows_of(out, config(methods, size))


def config(methods: Sequence[str] = (), size: Size = FULL) -> dict[str, Any]:
    """Everything that a run depends on."""
    taking_part = _named(methods, size)
    settings = {
        scenario: {e.name: chosen(scenario, e.name) for e in taking_part if scenario not in e.unfit}
        for scenario in SCENARIOS
    }
    return {**asdict(size), "removed": REMOVED, "faulty": FAULTY, "budget": asdict(size.budget), "settings": settings}


def case(scenario: str, taking_part: Iterable[Entry], size: Size, folder: Path, seed: int) -> Case:
    """Train, delete or correct, retrain twice, let everyone unlearn, measure."""
    del folder  # nothing needs to be on disk
    situation = situation_of(scenario, seed, size)
    results = standards(situation, size.recipe)
    facts: list[tuple[str, str, object]] = []
    moments: list[tuple[str, nn.Module]] = []
    for entry in taking_part:
        if scenario in entry.unfit:
            facts.append((entry.name, "took no part", entry.unfit[scenario]))
            continue
        watch = (lambda name, now: moments.append((name, copy.deepcopy(now)))) if entry.name == "reload" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are in the trace, and become facts
            try:
                results[entry.name] = take_part(entry, situation, watch)
            except (NotFinite, NotInformative) as error:
                facts.append((entry.name, "failed", str(error)))
    found = measure("compare", situation, results)
    found.facts += facts
    measured = {row.method for row in found.rows}
    for entry in taking_part:
        if entry.name in measured:
            found.describe(entry.name, results[entry.name], resets=entry.name == "reload")
    if "reload" in measured:
        found.curves += curves(situation, moments, results["reload"].trace)
    return found


def take_part(entry: Entry, situation: Situation, watch: Watch | None = None) -> Result:
    """Unlearn with the settings that the rehearsal chose; caching counts if the method needs a cached gradient."""
    return attempt(
        situation.original,
        situation.given_with(entry.cached_loss),
        entry.configured(chosen(situation.scenario, entry.name), situation.removed_classes),
        situation.seed,
        blind=entry.blind,
        caching=situation.caching if entry.cached_loss else 0.0,
        watch=watch,
    )


def tables(rows: Sequence[Row]) -> list["Table"]:
    """A table of distances for each scenario, and one over all of them, for a terminal."""
    scenarios = [scenario for scenario in SHOWN if any(row.scenario == scenario for row in rows)]
    single = [table for scenario in scenarios for table in rich_tables(rows, scenario, SHOWN[scenario])]
    return [*single, *rich_tables(overview(rows), OVERVIEW)]


def overview(rows: Sequence[Row]) -> list[Row]:
    """How far from retraining everyone is in each scenario, in noise floors, and the mean cost.

    A distance is the mean of two: that on what was removed (ΔFE) or corrected (FSKL) and that on what is left (NSKL),
    each over the mean, over seeds, of the same distance between two retrained models. The noise floor is 1 by
    definition.
    """
    found: list[Row] = []
    for scenario, leading in LEADING.items():
        pair = (leading, "NSKL")
        mine = [row for row in rows if row.scenario == scenario and row.metric in pair]
        floor = {m: fmean(row.value for row in mine if (row.method, row.metric) == (FLOOR, m)) for m in pair if mine}
        grouped: dict[tuple[str, int], dict[str, Row]] = {}
        for row in mine:
            grouped.setdefault((row.method, row.seed), {})[row.metric] = row
        for both in grouped.values():
            value = fmean(both[metric].value / floor[metric] for metric in pair)
            changes: dict[str, Any] = {"metric": f"Δ {scenario}", "value": value, "unit": "floors", "split": ""}
            found.append(replace(both[leading], scenario=OVERVIEW, **changes))
    order = list(dict.fromkeys(row.method for row in rows))
    found += _mean_costs(rows)
    return sorted(found, key=lambda row: order.index(row.method))


def _mean_costs(rows: Iterable[Row]) -> list[Row]:
    """The cost of everyone, mean over scenarios."""
    grouped: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row.metric == "Cost":
            grouped.setdefault((row.method, row.seed), []).append(row)
    return [
        replace(costs[0], scenario=OVERVIEW, value=fmean(row.value for row in costs))
        for costs in grouped.values()
        if costs[0].method != REFERENCE
    ]


def _named(methods: Sequence[str], size: Size) -> list[Entry]:
    """Those who take part.

    Raises:
        ConfigError: A name that nobody has.
    """
    known: Mapping[str, Entry] = entries(size.budget)
    unknown = [name for name in methods if name not in known]
    if unknown:
        raise ConfigError(
            f"methods={unknown}: nobody of that name takes part.{nearest(unknown[0], known)} Choose from "
            f"{', '.join(known)}."
        )
    wanted = methods or rehearsed()
    return [entry for name, entry in known.items() if name in wanted]
