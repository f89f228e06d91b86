"""Faulty labels, to be corrected."""

import torch
from jaxtyping import Int
from torch import Tensor

from expunge.scenarios.removal import random_removal
from expunge.seeds import stream


def wrong_labels(
    labels: Int[Tensor, " examples"], classes: int, fraction: float, seed: int
) -> tuple[Int[Tensor, " examples"], Int[Tensor, " faulty"]]:
    """Give a random part of the examples a label drawn uniformly from the wrong classes.

    Returns:
        A copy of the labels with the faults in it, and the positions of the faults, ascending.

    Raises:
        ConfigError: A fraction that changes nothing or everything.
    """
    faulty = random_removal(len(labels), fraction, seed)
    shift = torch.randint(1, classes, (len(faulty),), generator=stream(seed, "wrong labels"))
    changed = labels.clone()
    changed[faulty] = (labels[faulty] + shift) % classes
    return changed, faulty
