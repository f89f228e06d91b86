"""What may be said of a distance to retraining: within δ, beyond δ, or undecided. And of two methods: who is closer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from expunge.definitions import define
from expunge.metrics.stats import equivalence, floor_margin, holm, non_inferiority, paired
from expunge.report.summaries import FLOOR, REFERENCE, Summary

LEVEL = 0.05  # of every test, after Holm's correction over the distances of one scenario


@dataclass(frozen=True)
class Verdict:
    """Where a method stands on one distance."""

    state: Literal["within", "beyond", "open"]
    margin: float  # δ, in the unit of the distance
    p: float  # of "it is δ or further from retraining", after Holm's correction: small where it is within
    p_beyond: float  # of "it is δ or nearer", the same


@dataclass(frozen=True)
class Difference:
    """The distance of one method less that of another, over the same repetitions."""

    mean: float
    interval: tuple[float, float]  # 95 %
    p: float  # of no difference, after Holm's correction


def verdicts(summaries: Iterable[Summary]) -> dict[tuple[str, str], Verdict]:
    """A verdict on every distance of a scenario that has one, by method and metric.

    δ is the 95 % quantile of the noise floor (`stats.floor_margin`). "Within" is the outcome of a test of equivalence:
    of the signed differences to the retrained models where a metric is a difference (Δ…), of the distances themselves
    where it is a divergence. "Beyond" is the same t-test turned round, of a divergence on a log scale: its spread
    grows with its size, and one that is ten to a thousand times δ would pass for undecided. (The mean of logarithms
    lies below the logarithm of the mean, so what is beyond there is beyond.) Both families are corrected by Holm's
    method over all the distances given, so give all of a scenario, shown or not, and the values that they are
    differences of: without these a Δ is taken for a distance, whose test is laxer.

    None is given for fewer than two repetitions, without two distances between retrained models, if these are all 0,
    and for values that are not finite.
    """
    found = {(s.method, s.metric): s for s in summaries}
    tested: dict[tuple[str, str], tuple[float, float, float]] = {}
    for (method, metric), summary in found.items():
        floor = found.get((FLOOR, metric))
        if method == FLOOR or floor is None or define(metric).kind != "distance":
            continue
        if _testable(summary) and _testable(floor):
            a_gap = metric.startswith("Δ") and summary.unit != "floors"  # which are means of distances
            shape: Literal["gap", "divergence"] = "gap" if a_gap else "divergence"
            margin = floor_margin(floor.values, shape=shape).delta
            if margin > 0:
                values = np.array(summary.values)
                if shape == "divergence":
                    tested[method, metric] = margin, *_test_divergence(values, margin)
                else:
                    tested[method, metric] = margin, *_test_gap(_signed(found, method, metric), values, margin)
    near = holm([near for _, near, _ in tested.values()])
    far = holm([far for *_, far in tested.values()])
    return {
        key: Verdict("within" if p <= LEVEL else "beyond" if q <= LEVEL else "open", margin, p, q)
        for (key, (margin, *_)), p, q in zip(tested.items(), near, far, strict=True)
    }


def differences(found: Mapping[tuple[str, str], Summary], subject: str) -> dict[tuple[str, str], Difference]:
    """The distances of a method less those of every other, paired by repetition; by the other method and metric."""
    compared = {}
    for (method, metric), other in found.items():
        own = found.get((subject, metric))
        if own is None or define(metric).kind != "distance" or method in (subject, FLOOR, REFERENCE):
            continue
        if own.seeds == other.seeds and _testable(own) and _testable(other):
            compared[method, metric] = paired(own.values, other.values)
    adjusted = holm([each.p for each in compared.values()])
    return {
        key: Difference(each.difference, (each.interval.low, each.interval.high), p)
        for (key, each), p in zip(compared.items(), adjusted, strict=True)
    }


def _testable(summary: Summary) -> bool:
    return summary.n > 1 and bool(np.isfinite(summary.values).all())


def _signed(
    found: Mapping[tuple[str, str], Summary], method: str, metric: str
) -> Float[np.ndarray, " repetitions"] | None:
    """Method less retrained model of the metric that a Δ is the difference of; None where it is not at hand."""
    own, reference = (found.get((who, metric.removeprefix("Δ"))) for who in (method, REFERENCE))
    if not metric.startswith("Δ") or own is None or reference is None:
        return None
    seeds, theirs = found[method, metric].seeds, dict(zip(reference.seeds, reference.values, strict=True))
    # One model against many retrained ones has a single value, whatever the number of the retrained one.
    mine = dict(zip(own.seeds, own.values, strict=True)) if own.n > 1 else dict.fromkeys(seeds, own.values[0])
    if not {*seeds} <= mine.keys() & theirs.keys():
        return None
    return np.array([mine[seed] - theirs[seed] for seed in seeds])


def _test_gap(
    signed: Float[np.ndarray, " repetitions"] | None, distances: Float[np.ndarray, " repetitions"], margin: float
) -> tuple[float, float]:
    """P of "at δ or further", p of "at δ or nearer"."""
    if signed is None:
        return non_inferiority(distances, margin).p, _beyond(distances, margin)
    return equivalence(signed, margin).p, _beyond(signed * (1 if signed.mean() >= 0 else -1), margin)


def _test_divergence(distances: Float[np.ndarray, " repetitions"], margin: float) -> tuple[float, float]:
    """The same."""
    near = non_inferiority(distances, margin).p
    return near, _beyond(np.log(distances), float(np.log(margin))) if distances.all() else _beyond(distances, margin)


def _beyond(values: Float[np.ndarray, " repetitions"], margin: float) -> float:
    over = paired(values, np.full_like(values, margin))
    return over.p / 2 if over.difference > 0 else 1 - over.p / 2
