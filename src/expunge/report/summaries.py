"""Mean, spread and interval over seeds, and how methods and numbers are written."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

from expunge.definitions import define
from expunge.errors import ConfigError
from expunge.rows import Row

ORIGINAL, REFERENCE, FLOOR = "original", "retrain", "retrain again"
LABELS = {
    REFERENCE: "retrain (reference)",
    FLOOR: "noise floor (two retrains)",
    "reload": "RELOAD",
    "gradient-ascent": "gradient ascent",
}
_DECIMALS = {"%": 2, "points": 2, "s": 1}  # 3 for every other unit
_STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706)  # 97.5 % quantiles for 1 to 5 degrees of freedom


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One metric of one method in one scenario, over seeds."""

    scenario: str
    method: str
    blind: bool
    metric: str
    unit: str
    values: tuple[float, ...]  # one a seed

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return fmean(self.values)

    @property
    def sd(self) -> float | None:
        """Sample standard deviation over seeds (n - 1); None for one seed, NaN if a value is not finite."""
        if not all(map(math.isfinite, self.values)):
            return math.nan
        return stdev(self.values) if self.n > 1 else None

    @property
    def half_width(self) -> float | None:
        """Half of the 95 % t-interval of the mean; None for one seed."""
        return None if self.sd is None else student(self.n - 1) * self.sd / math.sqrt(self.n)


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
            blind=all(row.blind for row in group.values()),
            metric=metric,
            unit=next(iter(group.values())).unit,
            values=tuple(row.value for _, row in sorted(group.items())),
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
    decimals = _DECIMALS.get(unit, 3) if abs(value) < 100 or unit == "%" else 0
    least = 10.0**-decimals
    return f"<{least:.{decimals}f}" if 0 < value < least / 2 else f"{value:.{decimals}f}"


def at_floor(summary: Summary, floor: Summary | None) -> bool:
    """Whether a distance is, on average, no larger than that of a second retrained model."""
    compared = floor is not None and summary is not floor and define(summary.metric).kind == "distance"
    return compared and floor is not None and summary.mean <= floor.mean


def seeds(summaries: Iterable[Summary]) -> str:
    """How many seeds stand behind the numbers."""
    counts = sorted({summary.n for summary in summaries})
    span = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{span} seed{'s' if counts[-1] > 1 else ''}"


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to four digits (expansion of Abramowitz and Stegun, 26.7.5)."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    z = NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, 1))
