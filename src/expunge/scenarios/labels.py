"""Faulty labels, to be corrected."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from expunge.batches import Examples
from expunge.errors import ConfigError
from expunge.scenarios.corruption import Corruption, inputs_and_labels
from expunge.scenarios.removal import members, random_removal
from expunge.seeds import stream

CIFAR10_PAIRS = ((0, 2), (3, 5), (1, 9))  # airplane and bird, cat and dog, automobile and truck


def wrong_labels(
    labels: Int[Tensor, " examples"], classes: int, fraction: float, seed: int
) -> tuple[Int[Tensor, " examples"], Int[Tensor, " faulty"]]:
    """Give a random part of the examples a label drawn uniformly from the wrong classes.

    Returns:
        A copy of the labels with the faults in it, and the positions of the faults, ascending.

    Raises:
        ConfigError: A fraction that changes nothing or everything, or no second class.
    """
    if classes < 2:
        raise ConfigError(f"classes={classes}: a wrong label needs at least two classes.")
    faulty = random_removal(len(labels), fraction, seed)
    shift = torch.randint(1, classes, (len(faulty),), generator=stream(seed, "wrong labels")).to(labels.device)
    changed = labels.clone()
    changed[faulty] = (labels[faulty] + shift) % classes
    return changed, faulty


def randomly_labelled(data: Examples, classes: int, fraction: float, seed: int) -> Corruption:
    """A copy of the data with `wrong_labels` in it.

    Raises:
        ConfigError: A fraction that changes nothing or everything, or no second class.
    """
    inputs, labels = inputs_and_labels(data)
    changed, rows = wrong_labels(labels, classes, fraction, seed)
    return Corruption(Examples(inputs, changed, positions=data.positions), data.positions[rows])


def flipped_labels(data: Examples, pairs: Sequence[tuple[int, int]], fraction: float, seed: int) -> Corruption:
    """Exchange labels within pairs of classes, both ways: records of a get the label b, and records of b the label a.

    Args:
        data: Inputs and labels.
        pairs: Classes that are taken for each other; `CIFAR10_PAIRS` in the paper's grid.
        fraction: Share of each of these classes that is mislabelled, drawn uniformly. The paper does not
            say which; with 1 the two classes of a pair only change their names.
        seed: Which records.

    Raises:
        ConfigError: No pair, a class in two places or without a record, or a fraction that changes none of a class.
    """
    inputs, labels = inputs_and_labels(data)
    mentioned = [label for pair in pairs for label in pair]
    if not pairs or len(set(mentioned)) != len(mentioned):
        raise ConfigError(f"pairs={list(pairs)}: give at least one pair, and every class in one place only.")
    changed, faulty = labels.clone(), []
    for label, other in [(a, b) for a, b in pairs] + [(b, a) for a, b in pairs]:
        own = members(labels, label)
        count = round(fraction * len(own))
        if not 0 < count <= len(own):
            raise ConfigError(f"fraction={fraction} mislabels {count} of the {len(own)} records of class {label}.")
        order = torch.randperm(len(own), generator=stream(seed, "flipped labels", label))
        faulty.append(own[order[:count]])
        changed[faulty[-1].to(labels.device)] = other
    rows = torch.cat(faulty).sort().values
    return Corruption(Examples(inputs, changed, positions=data.positions), data.positions[rows])
