"""How well a classifier fits a split, and how far it is from a retrained one.

Every function takes stored `Outputs` and returns one number. Symbols are those of the RELOAD paper.
"""

import numpy as np

from expunge.errors import MismatchError
from expunge.metrics.outputs import Answers, Outputs, Predictions


def accuracy(split: Outputs) -> float:
    """NA on the retain set, FA on the forget set, TA on the test set.

    Formula: share of examples whose largest logit is that of the label, x 100. Unit: %. Direction: high on retain
    and test data; on the forget set neither high nor low is good, only close to the retrained model's. 0 means:
    every example is wrong.
    """
    return float(split.correct.mean() * 100)


def cross_entropy(split: Outputs) -> float:
    """FE on the forget set.

    Formula: mean of -log p(label). Unit: nats. Direction: on the forget set, close to the retrained model's. 0
    means: every label has probability 1.
    """
    return float(split.losses.mean())


def symmetric_kl(a: Outputs, b: Outputs) -> float:
    """NSKL on the retain set, FSKL on the forget set.

    Formula: mean over examples of KL(p‖q) + KL(q‖p) of the softmax outputs, not halved. Unit: nats. Direction: low.
    0 means: the two models give the same probabilities to every example. Misses: whatever the logits share beyond
    the softmax.

    Raises:
        MismatchError: The two were not measured on the same examples.
    """
    same_examples(a, b)
    log_p, log_q = a.log_probabilities, b.log_probabilities
    return float(((np.exp(log_p) - np.exp(log_q)) * (log_p - log_q)).sum(axis=1).mean())


def same_examples(a: Answers, b: Answers) -> None:
    """Refuse to compare outputs, or predictions, of other examples.

    Raises:
        MismatchError: The two were not measured on the same examples.
    """
    (one, truth), (other, meant) = (
        (each.values, each.targets) if isinstance(each, Predictions) else (each.logits, each.labels) for each in (a, b)
    )
    if type(a) is not type(b) or one.shape != other.shape or not np.array_equal(truth, meant):
        raise MismatchError(
            f"outputs of shape {one.shape} and {other.shape}, or with other labels, cannot be compared. Measure both "
            "models on the same split."
        )
