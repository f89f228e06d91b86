"""Two runs compared, row by row: what is the same bit for bit, what changed, and what changed beyond noise."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

import numpy as np

from expunge.errors import ConfigError
from expunge.metrics.stats import holm, paired
from expunge.report.summaries import Summary, summarise
from expunge.report.verdicts import LEVEL
from expunge.rows import Row, read_rows

Key = tuple[str, str, str]  # scenario, method, metric
State = Literal["identical", "changed", "beyond noise", "only in A", "only in B", "no seed in both"]


@dataclass(frozen=True)
class Cell:
    """A metric of a method in a scenario, in two runs."""

    scenario: str
    method: str
    metric: str
    unit: str
    state: State
    seeds: int  # that both have
    alone: tuple[tuple[int, ...], tuple[int, ...]]  # seeds that A alone has, and B alone
    before: float | None  # means over the seeds that both have; of a cell that one run lacks, over its own
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
    noise: the seeds agree on the direction (paired t-test at 5 %, Holm over all cells that changed). What is not finite
    is compared, and not tested.

    Raises:
        ConfigError: A run has two values of a metric for the same seed.
    """
    first, second = _by_cell(before), _by_cell(after)
    changed: dict[Key, float] = {}
    for key in first.keys() & second.keys():
        one, other = _pairs(first[key], second[key])
        if len(one) > 1 and _moved(one, other) and np.isfinite([one, other]).all():
            changed[key] = paired(other, one).p
    ordered = [key for key in {**first, **second} if key in changed]
    adjusted = dict(zip(ordered, holm([changed[key] for key in ordered]), strict=True))
    return [_cell(first.get(key), second.get(key), adjusted.get(key)) for key in {**first, **second}]


def _cell(first: Summary | None, second: Summary | None, p: float | None) -> Cell:
    either = first or second
    assert either is not None
    named = (either.scenario, either.method, either.metric, either.unit)
    seeds, others = (set() if each is None else set(each.seeds) for each in (first, second))
    alone = (tuple(sorted(seeds - others)), tuple(sorted(others - seeds)))
    state: State
    if first is None or second is None or not seeds & others:
        state = "only in A" if second is None else "only in B" if first is None else "no seed in both"
        means = (None if each is None else each.mean for each in (first, second))
        return Cell(*named, state, 0, alone, *means)
    one, other = _pairs(first, second)
    state = "beyond noise" if p is not None and p <= LEVEL else "changed" if _moved(one, other) else "identical"
    return Cell(*named, state, len(one), alone, fmean(one), fmean(other), p)


def _pairs(first: Summary, second: Summary) -> tuple[list[float], list[float]]:
    """Values of the seeds that both have."""
    mine, theirs = (dict(zip(each.seeds, each.values, strict=True)) for each in (first, second))
    seeds = sorted(mine.keys() & theirs.keys())
    return [mine[seed] for seed in seeds], [theirs[seed] for seed in seeds]


def _moved(one: Sequence[float], other: Sequence[float]) -> bool:
    return not np.array_equal(one, other, equal_nan=True)


def _by_cell(rows: Iterable[Row]) -> dict[Key, Summary]:
    return {(s.scenario, s.method, s.metric): s for s in summarise(rows)}
