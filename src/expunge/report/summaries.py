"""Mean, spread and interval over repetitions, and how methods and numbers are written."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev

import numpy as np

from expunge.errors import ConfigError
from expunge.metrics.stats import t_interval
from expunge.rows import EVALUATION, SQUARED, Row

ORIGINAL, REFERENCE, FLOOR = "original", "retrain", "retrain again"
LABELS = {
    REFERENCE: "retrain (reference)",
    FLOOR: "noise floor (two retrains)",
    "reload": "RELOAD",
    "gradient-ascent": "gradient ascent",
}
_MOST = {"%": 100.0, "points": 100.0, "fraction": 1.0}
LARGE = 1e6  # from here on numbers have an exponent
_DECIMALS = {"%": 2, "points": 2, "s": 1}  # 3 for every other unit


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One metric of one method in one scenario, over repetitions."""

    scenario: str
    method: str
    blind: bool | None  # None: not known
    metric: str
    unit: str
    values: tuple[float, ...]  # one a repetition, in the order of `seeds`
    seeds: tuple[int, ...]
    over: str = "seed"  # what a repetition is

    @property
    def n(self) -> int:
        """Number of repetitions."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Mean over repetitions."""
        return fmean(self.values)

    @property
    def sd(self) -> float | None:
        """Sample standard deviation (n - 1); None for one repetition, NaN if a value is not finite."""
        if not all(map(math.isfinite, self.values)):
            return math.nan
        return stdev(self.values) if self.n > 1 else None

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """95 % t-interval of the mean; None for one repetition. It ends at 0, and for shares at 100 % or 1.

        Raises:
            MissingExtra: SciPy is not installed.
        """
        if self.sd is None or not math.isfinite(self.sd):
            return None
        found, most = t_interval(np.array(self.values)), _MOST.get(self.unit, math.inf)
        low = max(found.low, 0.0) if min(self.values) >= 0 else found.low
        return low, min(found.high, most) if max(self.values) <= most else found.high


def blind_throughout(each: Iterable[bool | None]) -> bool | None:
    """False if one is not blind, else None if of one it is not known, else True."""
    found = set(each)
    return False if False in found else None if None in found else True


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """Group measured rows by scenario, method and metric, in order of first appearance.

    Rows from other sources (a paper's table) are left out.

    Raises:
        ConfigError: A seed has two values of the same metric.
    """
    groups: dict[tuple[str, str, str], dict[int, Row]] = {}
    for row in rows:
        if row.source != "measured":
            continue
        group = groups.setdefault((row.scenario, row.method, row.metric), {})
        if row.seed in group:
            raise ConfigError(
                f"{row.scenario}: {row.method} has two values of {row.metric} for seed {row.seed}. Give the rows of "
                "one run of one experiment."
            )
        group[row.seed] = row
    return [
        Summary(
            scenario=scenario,
            method=method,
            blind=blind_throughout(row.blind for row in group.values()),
            metric=metric,
            unit=next(iter(group.values())).unit,
            values=tuple(row.value for _, row in sorted(group.items())),
            seeds=tuple(sorted(group)),
            over="retrained model" if next(iter(group.values())).experiment == EVALUATION else "seed",
        )
        for (scenario, method, metric), group in groups.items()
    ]


def order(methods: Iterable[str]) -> list[str]:
    """Methods in order of first appearance, the noise floor right after the reference."""
    listed = list(dict.fromkeys(methods))
    if REFERENCE in listed and FLOOR in listed:
        listed.remove(FLOOR)
        listed.insert(listed.index(REFERENCE) + 1, FLOOR)
    return listed


def label(method: str) -> str:
    """A method's name for readers."""
    return LABELS.get(method, method)


def number(value: float, unit: str) -> str:
    """A number with the decimals of its unit; fewer for large ones, and small ones do not pass for zero."""
    if abs(value) >= LARGE:
        return f"{value:.3g}"
    if unit == SQUARED and abs(value) < 100:  # of an unknown scale
        return f"{value:#.3g}".rstrip(".")
    decimals = _DECIMALS.get(unit, 3) if abs(value) < 100 or unit == "%" else 0
    least = 10.0**-decimals
    return f"<{least:.{decimals}f}" if 0 < value < least / 2 else f"{value:.{decimals}f}"


def repetitions(summaries: Iterable[Summary]) -> str:
    """How many repetitions stand behind the numbers: "3 seeds", or for a single model "3 retrained models"."""
    summaries = list(summaries)
    over = summaries[0].over
    if over != "seed":  # one model against many retrained ones, and these against each other
        pairs = max((s.n for s in summaries if s.method == FLOOR), default=0)
        count = max((s.n for s in summaries if s.method != FLOOR), default=0)
        if count == 1 and not pairs:
            return "a single comparison"
        floor = f", the noise floor over {_counted(pairs, 'pair')} of them" if pairs else ""
        return _counted(count, over) + floor
    counts = sorted({summary.n for summary in summaries})
    return _counted(counts[0], over) if len(counts) == 1 else f"{counts[0]} to {_counted(counts[-1], over)}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
