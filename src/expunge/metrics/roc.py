"""How well an attack's scores tell removed records from unseen ones, and how sure that is."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from expunge.errors import ConfigError
from expunge.metrics.stats import Interval, require_finite, scipy_special, t_interval

LOW_RATES = (0.01, 0.001)  # false-positive rates at which an attack that is right about a few records shows
FOLDS = 5  # of a threshold that is chosen and judged on other records
Scores = Float[np.ndarray, " _"]
Clusters = Int[np.ndarray, " _"]


@dataclass(frozen=True)
class TruePositives:
    """The share of members found at a low rate of false alarms."""

    at: float  # highest false-positive rate allowed
    value: float | None  # None: too few unseen records to see such a rate
    interval: Interval | None  # of the share at this threshold: Clopper-Pearson, or over clusters
    actual: Interval | None  # of the false-positive rate that the threshold really has; None with clusters or turns
    reason: str = ""  # why there is no value


@dataclass(frozen=True)
class Attack:
    """How often an attack was right. Chance is 0.5 for the first two, the false-positive rate for the others."""

    accuracy: float  # balanced: mean of the shares of members and of unseen records told correctly
    auc: float  # area under the ROC curve: P(score of a member > score of an unseen record)
    n: int  # members
    unseen: int  # records that were never trained on
    accuracy_interval: Interval
    auc_interval: Interval
    true_positives: tuple[TruePositives, ...]  # at 1 % and at 0.1 % false positives


def judge(
    members: Scores,
    unseen: Scores,
    *,
    threshold: float | None = None,
    clusters: tuple[Clusters, Clusters] | None = None,
    turns: tuple[Clusters, Clusters] | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> Attack:
    """Turn scores of records whose membership is known into an `Attack`; high scores say "member".

    - AUC: DeLong's interval on the scale of log(a / (1 - a)); at an AUC of 0 or 1, where DeLong's has no width, the
      one that as many perfect decisions as the smaller side has records would give.
    - Balanced accuracy: above the threshold is "member". Without a threshold it is chosen on four fifths of the
      records and judged on the fifth, five times. Interval: Wilson's of both shares, combined (Newcombe).
    - True positives at a low false-positive rate: the threshold is an unseen record's score, so the interval is of
      the members above it, and ``actual`` says which false-positive rates it may have (a beta distribution; not with
      clusters, whose scores are not independent, nor with turns, each of which has a threshold of its own). A rate of
      which the unseen records (of a turn) hold less than one is not given.

    Args:
        members: Scores of the records in question.
        unseen: Scores of records that were never trained on.
        threshold: If the attack has one of its own.
        clusters: For members and for unseen records: which scores belong together, for example to one model. The
            intervals then count clusters, not scores.
        turns: For members and for unseen records: by which of several fits a score was given, each on what the others
            judge. Only scores of the same fit are then ranked against each other, in the AUC and for true positives.
            Chance differences that one fit finds are those that the others confirm, so the average over k turns is no
            surer than one turn: intervals are √k wider.
        level: Of the intervals.
        seed: Of the folds that choose a threshold.

    Source: DeLong et al. (1988); with clusters Obuchowski (1997).

    Raises:
        ConfigError: Fewer than five scores, or two clusters, on a side.
        NotFinite: NaN or infinity among the scores.
        MissingExtra: SciPy is not installed.
    """
    if min(len(members), len(unseen)) < FOLDS:
        raise ConfigError(f"{len(members)} members and {len(unseen)} unseen records: an attack needs {FOLDS} of each.")
    require_finite("scores", members, unseen)
    right = _right(members, unseen, threshold, seed)
    repeated = 1 if turns is None else len(np.unique(turns[0]))
    below, above = np.empty(len(members)), np.empty(len(unseen))
    fits = turns or (np.zeros(len(members), dtype=np.int64), np.zeros(len(unseen), dtype=np.int64))
    for turn in np.unique(fits[0]):
        mine = fits[0] == turn, fits[1] == turn
        below[mine[0]], above[mine[1]] = placements(members[mine[0]], unseen[mine[1]])
    auc, auc_interval = area(below, above, clusters=clusters, repeated=repeated, level=level)
    return Attack(
        accuracy=float(right[0].mean() + right[1].mean()) / 2,
        auc=auc,
        n=len(members),
        unseen=len(unseen),
        accuracy_interval=_balanced(right, clusters, repeated, level),
        auc_interval=auc_interval,
        true_positives=tuple(
            _true_positives(members, unseen, rate, clusters, fits, repeated, level) for rate in LOW_RATES
        ),
    )


def placements(members: Scores, unseen: Scores) -> tuple[Scores, Scores]:
    """For each member the share of unseen records below it, for each unseen record of members above it; ties half."""
    _special()
    from scipy.stats import rankdata as rank

    both = rank(np.concatenate([members, unseen]))
    below = (both[: len(members)] - rank(members)) / len(unseen)
    above = 1 - (both[len(members) :] - rank(unseen)) / len(members)
    return below, above


def area(
    below: Scores,
    above: Scores,
    *,
    clusters: tuple[Clusters, Clusters] | None = None,
    repeated: int = 1,
    level: float = 0.95,
) -> tuple[float, Interval]:
    """The area under the ROC curve and its interval, from `placements`; see `judge`."""
    auc = float(below.mean())
    sides = clusters or (np.arange(len(below)), np.arange(len(above)))
    counts = [_groups(side)[1] for side in sides]
    variance = 0.0
    for values, side, count in zip((below, above), sides, counts, strict=True):
        sums = np.bincount(_groups(side)[0], weights=values - auc, minlength=count)
        variance += count / (count - 1) * float((sums**2).sum()) / len(values) ** 2
    if not 0 < auc < 1:
        few = ((1 - level) / 2) ** (repeated / min(counts))
        return auc, Interval(few, 1.0, level) if auc == 1 else Interval(0.0, 1 - few, level)
    middle = np.log(auc / (1 - auc))
    quantile = (
        _special().ndtri((1 + level) / 2) if clusters is None else _special().stdtrit(min(counts) - 1, (1 + level) / 2)
    )
    half = float(quantile) * np.sqrt(variance * repeated) / (auc * (1 - auc))
    low, high = 1 / (1 + np.exp(-(middle - half))), 1 / (1 + np.exp(-(middle + half)))
    return auc, Interval(float(low), float(high), level)


def wilson(hits: float, of: int, level: float = 0.95) -> Interval:
    """Wilson's interval of a rate: honest also near 0 and 1 and for small numbers."""
    z, rate = float(_special().ndtri((1 + level) / 2)), hits / of
    middle, scale = rate + z**2 / (2 * of), 1 + z**2 / of
    half = z * np.sqrt(rate * (1 - rate) / of + z**2 / (4 * of**2))
    return Interval(max(0.0, float((middle - half) / scale)), min(1.0, float((middle + half) / scale)), level)


def balanced(shares: tuple[float, float], numbers: tuple[int, int], level: float = 0.95) -> Interval:
    """Newcombe's interval of the mean of two independent rates, from Wilson's of each."""
    singles = [wilson(share * number, number, level) for share, number in zip(shares, numbers, strict=True)]
    middle = sum(shares) / 2
    down = np.sqrt(sum((share - each.low) ** 2 for share, each in zip(shares, singles, strict=True))) / 2
    up = np.sqrt(sum((each.high - share) ** 2 for share, each in zip(shares, singles, strict=True))) / 2
    return Interval(max(0.0, float(middle - down)), min(1.0, float(middle + up)), level)


def _balanced(
    right: tuple[Scores, Scores], clusters: tuple[Clusters, Clusters] | None, repeated: int, level: float
) -> Interval:
    if clusters is None:
        return balanced((float(right[0].mean()), float(right[1].mean())), (len(right[0]), len(right[1])), level)
    halves = [_over_clusters(values, side, repeated, level) for values, side in zip(right, clusters, strict=True)]
    middle = sum(each.low + each.high for each in halves) / 4
    half = np.sqrt(sum(((each.high - each.low) / 2) ** 2 for each in halves)) / 2
    return Interval(max(0.0, float(middle - half)), min(1.0, float(middle + half)), level)


def _right(members: Scores, unseen: Scores, threshold: float | None, seed: int) -> tuple[Scores, Scores]:
    """1 for each record that was told correctly, 0 for the others."""
    if threshold is not None:
        return (members > threshold).astype(np.float64), (unseen <= threshold).astype(np.float64)
    generator = np.random.default_rng(seed)
    fold = [generator.permutation(len(side)) % FOLDS for side in (members, unseen)]
    found = np.empty(len(members)), np.empty(len(unseen))
    for number in range(FOLDS):
        chosen = _best_threshold(members[fold[0] != number], unseen[fold[1] != number])
        found[0][fold[0] == number] = members[fold[0] == number] > chosen
        found[1][fold[1] == number] = unseen[fold[1] == number] <= chosen
    return found


def _best_threshold(members: Scores, unseen: Scores) -> float:
    """Where the balanced accuracy is largest; between two scores, and in the middle of equally good ones."""
    values = np.unique(np.concatenate([members, unseen]))
    found = 1 - np.searchsorted(np.sort(members), values, side="right") / len(members)
    correct = np.searchsorted(np.sort(unseen), values, side="right") / len(unseen)
    best = np.flatnonzero(found + correct >= (found + correct).max() - 1e-12)
    middle = int(best[len(best) // 2])
    following = min(middle + 1, len(values) - 1)
    return float(values[middle] / 2 + values[following] / 2)


def _true_positives(
    members: Scores,
    unseen: Scores,
    rate: float,
    clusters: tuple[Clusters, Clusters] | None,
    fits: tuple[Clusters, Clusters],
    repeated: int,
    level: float,
) -> TruePositives:
    found = np.empty(len(members))
    for turn in np.unique(fits[0]):
        others = unseen[fits[1] == turn]
        allowed = int(np.floor(rate * len(others) + 1e-9))
        if allowed < 1:
            needed = f"it takes {1 / rate:.0f}{'' if repeated == 1 else ' for each fit'}."
            reason = f"{len(others)} unseen records cannot show a false-positive rate of {rate:g}: {needed}"
            return TruePositives(rate, None, None, None, reason)
        threshold = np.partition(others, len(others) - allowed - 1)[len(others) - allowed - 1]
        found[fits[0] == turn] = members[fits[0] == turn] > threshold
    tail, beta = (1 - level) / 2, _special().betaincinv
    if clusters is None:
        hits, misses = int(found.sum()), int(len(found) - found.sum())
        low = float(beta(hits, misses + 1, tail)) if hits else 0.0
        high = float(beta(hits + 1, misses, 1 - tail)) if misses else 1.0
        interval = Interval(low, high, level)
    else:
        interval = _over_clusters(found, clusters[0], repeated, level)
    if clusters is not None or repeated > 1:
        return TruePositives(rate, float(found.mean()), interval, None)
    least, most = (float(beta(allowed + 1, len(unseen) - allowed, p)) for p in (tail, 1 - tail))
    return TruePositives(rate, float(found.mean()), interval, Interval(least, most, level))


def _over_clusters(values: Scores, side: Clusters, repeated: int, level: float) -> Interval:
    groups, count = _groups(side)
    means = np.bincount(groups, weights=values, minlength=count) / np.bincount(groups, minlength=count)
    found = t_interval(means, level)
    middle, half = (found.low + found.high) / 2, np.sqrt(repeated) * (found.high - found.low) / 2
    return Interval(max(0.0, float(middle - half)), min(1.0, float(middle + half)), level)


def _groups(side: Clusters) -> tuple[Clusters, int]:
    names, groups = np.unique(side, return_inverse=True)
    if len(names) < 2:
        raise ConfigError(f"{len(names)} cluster of scores: a spread over clusters needs at least 2 on each side.")
    return groups, len(names)


def _special() -> Any:
    return scipy_special("membership attacks")
