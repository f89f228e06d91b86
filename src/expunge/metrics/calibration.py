"""Do the probabilities mean what they say?"""

import numpy as np

from expunge.errors import ConfigError
from expunge.metrics.outputs import Outputs


def expected_calibration_error(split: Outputs, *, bins: int = 15) -> float:
    """ECE: how far the largest probability is from the share of times it is right.

    Formula: Σ over bins of (examples in it / examples) · |accuracy - mean confidence|, bins of equal width over the
    largest probability, each with its upper edge. Unit: fraction in [0, 1]. Direction: low. 0 means: of what is said
    with 80 %, 80 % is right. Misses: opposite errors inside a bin cancel; with few examples it is above 0 by chance.

    Source: Guo et al., On Calibration of Modern Neural Networks (2017).

    Raises:
        ConfigError: No bin.
    """
    if bins < 1:
        raise ConfigError(f"bins={bins}: at least 1.")
    confidence = np.exp(split.log_probabilities.max(axis=1))
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gap = np.bincount(place, weights=split.correct - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))


def brier(split: Outputs) -> float:
    """Brier score: squared error of the probabilities.

    Formula: mean over examples of Σ over classes of (p - [class is the label])². Unit: fraction, 0 to 2. Direction:
    low. 0 means: every label has probability 1. Misses: whether an error comes of bad ranking or bad calibration.

    Source: Brier, Verification of forecasts expressed in terms of probability (1950).
    """
    probabilities = np.exp(split.log_probabilities)
    own = probabilities[np.arange(len(split.labels)), split.labels]
    return float(((probabilities**2).sum(axis=1) - 2 * own + 1).mean())
