"""Can an attacker tell removed records from records that were never seen, by the loss alone?"""

from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int

from expunge.errors import ConfigError, MissingExtra
from expunge.metrics.outputs import Answers, Predictions
from expunge.metrics.roc import FOLDS, Attack, area, balanced, judge, placements
from expunge.metrics.stats import Interval, require_finite
from expunge.seeds import derive

DRAWS = 10
_MANY = 10_000  # records a side, of which one sample says enough


def loss_attack(
    members: Float[np.ndarray, " members"], unseen: Float[np.ndarray, " unseen"], *, seed: int = 0
) -> Attack:
    """FMIA and AUC: a logistic regression on the loss of each record, members 1, unseen records 0.

    As in the released code of the RELOAD paper: equally many of both (the larger side is sampled down), five
    stratified splits; each record is judged by a regression that was fitted without it. All of this ten times with
    other samples, since one sample of a few records says little; once from 10,000 records on.

    Formula: share of records judged correctly; area under the ROC curve of its scores. Unit: fraction in [0, 1].
    Direction: close to the retrained model's, which is near 0.5. 0.5 means: the loss tells nothing. Misses: attacks
    that know the difficulty of a record (LiRA, RMIA) see more.

    Intervals: of the AUC, that of the loss itself on all records (`roc.area`), of which any logistic regression is a
    monotone function, in the direction that tells the two apart; widened to the AUC where the regressions, fitted on
    few records, do worse than the loss could. Of true positives, those of `roc.judge` for each record's mean score
    over the draws in which it was judged; of the accuracy, Newcombe's.

    Args:
        members: Losses of the records in question, nats.
        unseen: Losses of records that were never trained on, nats.
        seed: Which records are sampled and how they are split.

    Raises:
        MissingExtra: scikit-learn is not installed.
        ConfigError: Fewer than five records on a side.
        NotFinite: NaN or infinity among the losses.
    """
    try:
        from sklearn import config_context
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import roc_auc_score
        from sklearn.model_selection import StratifiedKFold
    except ImportError as error:
        raise MissingExtra("membership attacks need scikit-learn: pip install 'expunge[eval]'.") from error
    count = min(len(members), len(unseen))
    if count < FOLDS:
        raise ConfigError(f"{len(members)} members and {len(unseen)} unseen records: an attack needs {FOLDS} of each.")
    require_finite("losses", members, unseen)
    truth = np.repeat([1, 0], count)
    draws = DRAWS if count < _MANY else 1
    right, areas, sides = np.zeros(2), [], (members, unseen)
    sums, times = ([np.zeros(len(side)) for side in sides] for _ in range(2))
    # a third of the time would go into looking again and again whether these numbers are finite
    with config_context(assume_finite=True, skip_parameter_validation=True):
        for draw in range(draws):
            generator = np.random.default_rng([seed, draw])
            drawn = [generator.choice(len(side), count, replace=False) for side in sides]
            losses = np.concatenate([side[rows] for side, rows in zip(sides, drawn, strict=True)])[:, None]
            for fit, held in StratifiedKFold(FOLDS, shuffle=True, random_state=draw).split(losses, truth):
                attack = LogisticRegression().fit(losses[fit], truth[fit])
                scores = attack.decision_function(losses[held])
                areas.append(roc_auc_score(truth[held], scores))
                for number, kind in enumerate((1, 0)):
                    mine = truth[held] == kind
                    rows = drawn[number][held[mine] - number * count]
                    sums[number][rows] += scores[mine]
                    times[number][rows] += 1
                    right[number] += np.count_nonzero((scores[mine] > 0) == kind)
    mean_scores = [total[seen > 0] / seen[seen > 0] for total, seen in zip(sums, times, strict=True)]
    shares = right / (count * draws)
    return replace(
        judge(mean_scores[0], mean_scores[1], threshold=0.0),
        accuracy=float(right.sum()) / (2 * count * draws),
        auc=float(np.mean(areas)),
        n=count,
        auc_interval=_of_the_loss(members, unseen, float(np.mean(areas))),
        accuracy_interval=balanced((float(shares[0]), float(shares[1])), (count, count)),
    )


def _of_the_loss(members: Float[np.ndarray, " members"], unseen: Float[np.ndarray, " unseen"], auc: float) -> Interval:
    below, above = placements(-members, -unseen)
    smaller, found = area(below, above)  # above 0.5: losses of members are the smaller ones
    low, high = (found.low, found.high) if smaller >= 0.5 else (1 - found.high, 1 - found.low)
    return Interval(min(low, auc), max(high, auc), found.level)


def unit_of_losses(unseen: Answers) -> float:
    """What to divide losses by for `loss_attack`: the mean squared error of unseen records, of a classifier 1 (nat).

    The regression of the attack is drawn towards 0, so that it would be another one of targets in cents than in euros.
    """
    return (float(unseen.losses.mean()) or 1.0) if isinstance(unseen, Predictions) else 1.0


def matched_by_class(
    wanted: Int[np.ndarray, " members"], pool: Int[np.ndarray, " unseen"], *, times: int | None = 1, seed: int = 0
) -> Int[np.ndarray, " matched"]:
    """Draw unseen records in the proportions that the classes have among the removed ones.

    Without it an attack on records of few classes tells classes apart, not members from unseen records.

    Args:
        wanted: Labels of the removed records.
        pool: Labels of the unseen records.
        times: Unseen records a removed one; None for as many as the pool has for every class.
        seed: Which are drawn.

    Returns:
        Rows of the pool, ascending.

    Raises:
        ConfigError: The pool has too few records of a class.
    """
    generator = np.random.default_rng(derive(seed, "matched by class"))
    many = max(1, times_matched(wanted, pool)) if times is None else times
    rows = [np.zeros(0, dtype=np.int64)]
    for label, count in zip(*np.unique(wanted, return_counts=True), strict=True):
        found = np.flatnonzero(pool == label)
        if len(found) < many * count:
            raise ConfigError(
                f"{count} removed records of class {label} and {len(found)} unseen ones: matching needs {many} unseen "
                "a removed one. Take a larger pool, or attack fewer of the removed records."
            )
        rows.append(generator.choice(found, many * count, replace=False))
    return np.sort(np.concatenate(rows))


def times_matched(wanted: Int[np.ndarray, " members"], pool: Int[np.ndarray, " unseen"]) -> int:
    """How many unseen records a removed one `matched_by_class` can draw; 0: a class has too few."""
    classes, counts = np.unique(wanted, return_counts=True)
    return min((int((pool == label).sum() // count) for label, count in zip(classes, counts, strict=True)), default=0)
