"""Two runs compared, row by row: what is the same bit for bit, what changed, and what changed beyond noise."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

from expunge.errors import ConfigError
from expunge.metrics.stats import holm, paired
from expunge.report.verdicts import LEVEL
from expunge.rows import Row, read_rows

TIMED = ("Cost",)  # wall time is never the same twice
State = Literal["identical", "changed", "beyond noise", "only in A", "only in B"]


@dataclass(frozen=True)
class Cell:
    """A metric of a method in a scenario, in two runs."""

    scenario: str
    method: str
    metric: str
    unit: str
    state: State
    seeds: int  # that both have
    before: float | None  # means over these seeds; of a cell that one run lacks, over its own
    after: float | None
    p: float | None = None  # of no difference, paired over seeds, after Holm's correction over all cells


def rows_of(run: Path) -> list[Row]:
    """The measured rows of a run folder, or of a file of rows.

    Raises:
        ConfigError: There are none.
    """
    path = run / "rows.csv" if run.is_dir() else run
    if not path.exists():
        raise ConfigError(f"{path}: no such rows. Name a run folder, or a CSV file of rows.")
    found = [row for row in read_rows(path) if row.source == "measured"]
    if not found:
        raise ConfigError(f"{path} holds no measured row: there is nothing to compare.")
    return found


def compare(before: Iterable[Row], after: Iterable[Row]) -> list[Cell]:
    """Every cell of two runs, in order of first appearance.

    With the same seeds the same code gives the same bits on a CPU, so that whatever is not identical changed. Beyond
    noise: the seeds agree on the direction (paired t-test at 5 %, Holm over all cells that changed).
    """
    first, second = _grouped(before), _grouped(after)
    changed: dict[tuple[str, str, str], float] = {}
    for key in first.keys() & second.keys():
        seeds = sorted(first[key].keys() & second[key].keys())
        one, other = ([each[key][seed].value for seed in seeds] for each in (first, second))
        if one != other and len(seeds) > 1:
            changed[key] = paired(other, one).p
    ordered = [key for key in {**first, **second} if key in changed]
    adjusted = dict(zip(ordered, holm([changed[key] for key in ordered]), strict=True))
    return [_cell(key, first.get(key, {}), second.get(key, {}), adjusted.get(key)) for key in {**first, **second}]


def _cell(key: tuple[str, str, str], first: dict[int, Row], second: dict[int, Row], p: float | None) -> Cell:
    seeds = sorted(first.keys() & second.keys())
    unit = next(iter((first or second).values())).unit
    if not seeds:
        sides = [fmean(row.value for row in each.values()) if each else None for each in (first, second)]
        return Cell(*key, unit, "only in A" if first else "only in B", 0, *sides)
    one, other = ([each[seed].value for seed in seeds] for each in (first, second))
    state: State = "identical" if one == other else "changed" if p is None or not p <= LEVEL else "beyond noise"
    return Cell(*key, unit, state, len(seeds), fmean(one), fmean(other), p)


def _grouped(rows: Iterable[Row]) -> dict[tuple[str, str, str], dict[int, Row]]:
    found: dict[tuple[str, str, str], dict[int, Row]] = {}
    for row in rows:
        found.setdefault((row.scenario, row.method, row.metric), {})[row.seed] = row
    return found
