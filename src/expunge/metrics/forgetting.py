"""Too little or too much: forgetting with a sign, and how much a model knows beyond an untrained one.

A removed record may be remembered (its loss is below what a model that never saw it gives) or conspicuously forgotten
(above it, the "Streisand effect": the unusual loss gives the record away). A mean over records lets the two cancel, so
each is its own number here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from expunge.errors import ConfigError
from expunge.metrics.classification import same_examples
from expunge.metrics.outputs import Answers, Outputs


@dataclass(frozen=True)
class Forgetting:
    """Two distances, neither of which can hide the other. In the unit of the losses, 0 or more."""

    under: float  # mean over records of what the loss lacks to that of a model that never saw them
    over: float  # mean over records of what it has too much


def signed_forgetting(model: Answers, retrained: Sequence[Answers]) -> Forgetting:
    """Under- and over-forgetting, record by record against retrained models.

    Formula: with d = loss under the model - mean loss under the retrained models, a record: under = mean of
    max(0, -d), over = mean of max(0, d). Unit: nats, of a regression squared units. Direction: low. 0 means: no
    record is remembered (or: is conspicuous). over - under is the signed ΔFE, over + under the mean |d|. Misses: two
    retrained models are not at 0 either; compare with theirs.

    Args:
        model: Outputs, or predictions, on the removed records.
        retrained: Those of one or more retrained models on the same records.

    Raises:
        MismatchError: Outputs of other examples.
        ConfigError: No retrained model.
    """
    if not retrained:
        raise ConfigError("no retrained model: forgetting is too little or too much only against one.")
    for each in retrained:
        same_examples(model, each)
    gap = model.losses - np.mean([each.losses for each in retrained], axis=0)
    return Forgetting(under=float(np.maximum(-gap, 0).mean()), over=float(np.maximum(gap, 0).mean()))


def against_unseen(forget: Float[np.ndarray, " removed"], unseen: Float[np.ndarray, " unseen"]) -> Forgetting:
    """The same without a retrained model: removed records against unseen ones of the same kind.

    Formula: quantile by quantile, under = ∫ max(0, Q_unseen - Q_forget), over = ∫ max(0, Q_forget - Q_unseen) of the
    two distributions of losses; the sum is their Wasserstein-1 distance. Unit: that of the losses. Direction: low. 0
    means: removed records are no easier (no harder) than unseen ones. Misses: only removed records drawn like the
    unseen ones have the same losses after retraining; a few records differ from many by chance.

    Args:
        forget: Losses of the removed records.
        unseen: Losses of records that were never trained on, best of the same classes (`matched_by_class`).

    Raises:
        ConfigError: No record on a side.
    """
    if not len(forget) or not len(unseen):
        raise ConfigError(f"{len(forget)} removed and {len(unseen)} unseen records: each side needs some.")
    sides = [np.sort(side) for side in (forget, unseen)]
    ends = np.unique(np.concatenate([np.arange(1, len(side) + 1) / len(side) for side in sides]))
    widths = np.diff(ends, prepend=0.0)
    middles = ends - widths / 2
    low, high = (side[np.minimum((middles * len(side)).astype(np.int64), len(side) - 1)] for side in sides)
    gap = low - high
    return Forgetting(
        under=float((np.maximum(-gap, 0) * widths).sum()), over=float((np.maximum(gap, 0) * widths).sum())
    )


def zero_retrain_forgetting(model: Outputs, untrained: Outputs) -> float:
    """ZRF: how much like an untrained model the model is on the removed records; no retraining needed.

    Formula: 1 - mean Jensen-Shannon divergence (base 2) between the outputs of the model and of an untrained one.
    Unit: fraction in [0, 1]. Direction: close to the retrained model's. 1 means: outputs like an untrained model's.
    Misses: a retrained model still classifies ordinary records; 1 is then too much forgetting, not the goal.

    Args:
        model: Outputs on the removed records.
        untrained: Outputs of a freshly initialised model of the same kind on them.

    Source: Chundawat et al., Can Bad Teaching Induce Forgetting? (2023).

    Raises:
        MismatchError: Outputs of other examples.
    """
    same_examples(model, untrained)
    logs = np.stack([model.log_probabilities, untrained.log_probabilities])
    middle = np.logaddexp(logs[0], logs[1]) - np.log(2)
    divergence = (np.exp(logs) * (logs - middle)).sum(axis=2).mean(axis=0) / np.log(2)
    return float(1 - divergence.mean())
