"""How close an unlearned model came to never having seen a set of records that is at hand: the score of a rehearsal."""

import math
from collections.abc import Sequence
from itertools import combinations
from statistics import fmean
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from expunge.errors import ConfigError
from expunge.metrics.classification import accuracy
from expunge.metrics.compare import divergence
from expunge.metrics.outputs import Answers, Outputs, Predictions, average_loss
from expunge.metrics.regression import mean_squared_error, variance

# Share of what is left that may be told wrongly after an unlearning and was not before; of a regression the share of
# the variance of its targets by which its squared error there may rise
MAY_LOSE = 0.01


class Seen(NamedTuple):
    """What a model says of the parts of a rehearsal."""

    left: Answers
    forget: Answers  # the pseudo-forget set
    unseen: Answers | None


class Score(NamedTuple):
    """How far from what was wanted; low is good.

    Against unseen records: in the unit of the losses; the total is the sum unless too much was lost, and 0 is perfect.
    Against retrained models: noise floors; the total is the mean, and 1 is as close as another retrained model: what is
    below it is chance.
    """

    total: float
    forgetting: float  # of the pseudo-forget sets: from never having been seen
    usefulness: float  # of the rest: from what it should be
    lost: float = 0.0  # against unseen records: accuracy on what is left, points; of a regression R², points


def against_unseen(before: Sequence[Seen], after: Sequence[Seen], may_lose: float = MAY_LOSE) -> Score:
    """How close the sets come to never having been seen, and what that costs.

    Formula: forgetting = |mean over all records of all sets of (loss - mean loss of the unseen records of its class)|:
    the sign is kept until the sets are averaged, since a set may be easier or harder by chance. usefulness = mean over
    sets of the rise of the mean loss on what is left, plus that on the unseen records, over the trained model's (a fall
    counts as 0). Unit: nats, of a regression squared units. Where the accuracy on what is left falls by more than
    may_lose, mean over sets, the total is no less than without unlearning, and a nat more for every point beyond: a
    model that knows its data by heart has nats to forget, and would else give up what is left for them. Of a regression
    R² takes the place of accuracy, 1 - squared error / variance of the targets, and that variance the place of a nat.

    Misses: a class that was removed whole, whose unseen records are known as well as the removed ones.

    Raises:
        ConfigError: A class of which there are no unseen records, or a regression whose targets are all the same.
    """
    forgetting = _apart(after)
    rises = [
        max(0.0, average_loss(one) - average_loss(other))
        for own, trained in zip(after, before, strict=True)
        for one, other in ((own.left, trained.left), (own.unseen, trained.unseen))
        if one is not None and other is not None
    ]
    usefulness = sum(rises) / len(after)
    lost = fmean(_lost(each.left, own.left) for each, own in zip(before, after, strict=True))
    total, beyond = forgetting + usefulness, lost - 100 * may_lose
    if beyond > 0:
        total = max(total, _apart(before)) + beyond * _large(before[0].left)
    return Score(total, forgetting, usefulness, lost)


def _lost(trained: Answers, own: Answers) -> float:
    """By how many points accuracy, or R², fell."""
    if isinstance(trained, Outputs) and isinstance(own, Outputs):
        return accuracy(trained) - accuracy(own)
    assert isinstance(trained, Predictions)
    assert isinstance(own, Predictions)
    return 100 * (mean_squared_error(own) - mean_squared_error(trained)) / variance(trained)


def _large(answers: Answers) -> float:
    """What is a large loss: a nat, or the error of a model that knows the mean of the targets alone."""
    return variance(answers) if isinstance(answers, Predictions) else 1.0


def _apart(models: Sequence[Seen]) -> float:
    """How far the sets are from never having been seen, in the unit of the losses."""
    return abs(float(np.concatenate([excess(each) for each in models]).mean()))


def excess(seen: Seen) -> Float[np.ndarray, " forget"]:
    """The loss of each record of a set above the mean loss of the unseen records of its class."""
    means = np.full(seen.forget.labels.max() + 1, math.nan)
    for label in np.unique(seen.forget.labels):
        means[label] = _unseen_loss(seen, int(label))
    result: Float[np.ndarray, " forget"] = seen.forget.losses - means[seen.forget.labels]
    return result


def _unseen_loss(seen: Seen, label: int) -> float:
    """The mean loss of the unseen records of a class."""
    assert seen.unseen is not None
    own = seen.unseen.losses[seen.unseen.labels == label]
    if not len(own):
        raise ConfigError(
            f"test() has no record of class {label}, and pseudo-forget sets have: what one looks like that was never "
            "seen is unknown. Add some to test(), or retrain models to compare with (--retrain 2)."
        )
    return float(own.mean())


def chance(before: Sequence[Seen]) -> float:
    """By how much the forgetting of perfect settings would miss 0 by chance: a standard error.

    From how much losses of unseen records differ within a class, under the trained model, and the number of records.
    """
    deviations, records = [], sum(len(each.forget.labels) for each in before)
    assert before[0].unseen is not None
    losses, labels = before[0].unseen.losses, before[0].unseen.labels
    for label in np.unique(labels):
        own = losses[labels == label]
        deviations.append(own - own.mean())
    return float(np.concatenate(deviations).std() / math.sqrt(records))


def to_forget(before: Sequence[Seen]) -> float:
    """How much better the trained model knows its records than unseen ones: what forgetting has to undo.

    Formula: mean over the classes of the sets' records of (mean loss of the class's unseen records - that of all that
    were trained on). From all records of a class, so that it does not depend on which few are in a set.
    """
    one = before[0]
    losses = np.concatenate([one.left.losses, one.forget.losses])
    labels = np.concatenate([one.left.labels, one.forget.labels])
    apart = {
        label: _unseen_loss(one, int(label)) - losses[labels == label].mean()
        for label in np.unique(np.concatenate([each.forget.labels for each in before]))
    }
    return fmean(float(apart[label]) for each in before for label in each.forget.labels)


def records_needed(before: Sequence[Seen]) -> int | None:
    """Records a set, if there are too few: a size at which chance is a quarter of what there is to forget.

    Too few: what there is to forget is within two standard errors of 0, so that perfect settings could not be told from
    settings that do nothing.

    Returns:
        None if there are enough; 0 if no number is enough, since nothing is there to forget.
    """
    gain, error = to_forget(before), chance(before)
    if gain >= 2 * error:
        return None
    sets = len(before)
    return (
        math.ceil((4 * error / gain) ** 2 * sum(len(each.forget.labels) for each in before) / sets) if gain > 0 else 0
    )


def against_retrained(references: Sequence[Sequence[Seen]], after: Sequence[Seen]) -> Score:
    """How far from retrained models, in distances of two of them from each other.

    Formula: forgetting = ΔFE on the sets, usefulness = NSKL on what is left (of a regression the differences of squared
    error and of predictions), both means over sets and retrained models, divided by the same between two retrained
    models.

    Args:
        references: For each set the retrained models, two or more.
        after: For each set the unlearned model.
    """
    own = [_distances(s, truth) for truths, s in zip(references, after, strict=True) for truth in truths]
    floor = [_distances(*pair) for truths in references for pair in combinations(truths, 2)]
    ratios = [fmean(each[n] for each in own) / fmean(each[n] for each in floor) for n in range(2)]
    return Score(fmean(ratios), *ratios)


def _distances(one: Seen, other: Seen) -> tuple[float, float]:
    """ΔFE and NSKL, of a regression ΔForget MSE and Retain MSD."""
    return abs(average_loss(one.forget) - average_loss(other.forget)), divergence(one.left, other.left)
