"""How well a regression fits a split, and how far it is from a retrained one.

Every function takes stored `Predictions` and returns one number, in squared units of the target, summed over its
numbers where it has several.
"""

import numpy as np

from expunge.errors import ConfigError
from expunge.metrics.classification import same_examples
from expunge.metrics.outputs import Predictions


def mean_squared_error(split: Predictions) -> float:
    """Retain MSE, Forget MSE and Test MSE.

    Formula: mean over examples of ‖prediction - target‖². Unit: squared units of the target. Direction: low on retain
    and test data; on the forget set neither high nor low is good, only close to the retrained model's. 0 means: every
    prediction is exact.
    """
    return float(split.losses.mean())


def mean_squared_difference(a: Predictions, b: Predictions) -> float:
    """Retain MSD on the retain set, Forget MSD on the forget set.

    Formula: mean over examples of ‖prediction - prediction of the other model‖². Unit: squared units of the target.
    Direction: low. 0 means: the two models predict the same for every example. Misses: on which side the model errs.

    Raises:
        MismatchError: The two were not measured on the same examples.
    """
    same_examples(a, b)
    return float(np.square(a.values - b.values).sum(axis=1).mean())


def varies(split: Predictions) -> bool:
    """Whether not all targets are the same."""
    return bool((split.targets != split.targets[0]).any())


def variance(split: Predictions) -> float:
    """How far targets are from their mean: the error of a model that knows nothing but that.

    Formula: mean over examples of ‖target - mean target‖². Unit: squared units of the target.

    Raises:
        ConfigError: All targets are the same.
    """
    if not varies(split):
        raise ConfigError(
            f"all {len(split.targets)} targets are {split.targets[0].tolist()}: there is nothing to predict. Check "
            "what the setup file returns as targets."
        )
    return float(np.square(split.targets - split.targets.mean(axis=0)).sum(axis=1).mean())


def r_squared(split: Predictions) -> float:
    """Test R².

    Formula: 1 - `mean_squared_error` / `variance`. Unit: a fraction. Direction: high. 1 means: every prediction is
    exact; 0: no better than the mean target; below 0: worse.

    Raises:
        ConfigError: All targets are the same.
    """
    return 1 - mean_squared_error(split) / variance(split)
