"""Backdoors: a pattern in the inputs of some classes, which a model learns as a shortcut to their labels.

The paper puts a cross into the corner of every training image of two classes and leaves the labels as they are; a model
then takes any test image with a cross for one of the two. Its grid has two more patterns: random pixels, and random
entries of the input.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from expunge.batches import Examples
from expunge.errors import ConfigError
from expunge.scenarios.corruption import Corruption, broadcast, inputs_and_labels
from expunge.scenarios.removal import members
from expunge.seeds import stream

CROSS = 5  # pixels, height and width


@dataclass(frozen=True)
class Trigger:
    """A pattern: which entries of an input it writes, and what; a function from inputs (batch, …) to a copy with it."""

    where: Bool[Tensor, "..."]
    value: Float[Tensor, "..."]

    def __call__(self, inputs: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """The inputs with the pattern; everything else in them is unchanged."""
        return torch.where(self.where.to(inputs.device), self.value.to(inputs), inputs)


def cross_backdoor(data: Examples, classes: Sequence[int], *, value: float | Float[Tensor, "..."]) -> Corruption:
    """An X in the 5 x 5 pixels at the bottom right of every image of the classes, in all channels; labels stay.

    Args:
        data: Images (examples, channels, height, width) and labels.
        classes: Whose images; the paper has two.
        value: Of the pixels of the X: the brightest input, 1 for images in [0, 1], or a tensor (channels, 1, 1).

    Raises:
        ConfigError: Images smaller than the cross, a class that does not occur, or a value that does not fit.
    """
    where = torch.zeros(_image(data), dtype=torch.bool)
    if min(where.shape[1:]) < CROSS:
        raise ConfigError(
            f"images of {where.shape[1]} x {where.shape[2]}: a cross needs {CROSS} x {CROSS} pixels. Take "
            "distributed_backdoor()."
        )
    diagonal = torch.eye(CROSS, dtype=torch.bool)
    where[:, -CROSS:, -CROSS:] = diagonal | diagonal.flip(0)
    return _planted(data, classes, where, value)


def distributed_backdoor(
    data: Examples, classes: Sequence[int], *, value: float | Float[Tensor, "..."], seed: int, pixels: int = 10
) -> Corruption:
    """The same pixels, drawn uniformly over the image, in all channels of every image of the classes; labels stay.

    Args:
        data: Images (examples, channels, height, width) and labels.
        classes: Whose images.
        value: Of the pixels: the brightest input, or a tensor (channels, 1, 1).
        seed: Which pixels.
        pixels: How many; ten in the paper's grid.

    Raises:
        ConfigError: More pixels than there are, a class that does not occur, or a value that does not fit.
    """
    channels, height, width = _image(data)
    where = _drawn(height * width, pixels, seed, "pixels").reshape(height, width).expand(channels, -1, -1)
    return _planted(data, classes, where, value)


def feature_backdoor(
    data: Examples, classes: Sequence[int], *, value: float | Float[Tensor, "..."], seed: int, entries: int = 10
) -> Corruption:
    """The same entries of the input, drawn uniformly, in every record of the classes; labels stay.

    Args:
        data: Inputs of any shape, and labels. In an image an entry is one channel of a pixel.
        classes: Whose records.
        value: Of the entries: the largest input, or a tensor that can be broadcast to an input.
        seed: Which entries.
        entries: How many; ten in the paper's grid.

    Raises:
        ConfigError: More entries than there are, a class that does not occur, or a value that does not fit.
    """
    shape = inputs_and_labels(data)[0].shape[1:]
    return _planted(data, classes, _drawn(shape.numel(), entries, seed, "entries").reshape(shape), value)


def _image(data: Examples) -> tuple[int, int, int]:
    shape = inputs_and_labels(data)[0].shape
    if len(shape) != 4:
        raise ConfigError(
            f"inputs of shape {tuple(shape)}: this backdoor needs images (examples, channels, height, width). For "
            "other inputs take feature_backdoor()."
        )
    return shape[1], shape[2], shape[3]


def _drawn(count: int, chosen: int, seed: int, what: str) -> Bool[Tensor, " count"]:
    if not 0 < chosen <= count:
        raise ConfigError(f"{what}={chosen}: an input has {count} {what}; choose from 1 to {count}.")
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.randperm(count, generator=stream(seed, "backdoor", what))[:chosen]] = True
    return mask


def _planted(
    data: Examples, classes: Sequence[int], where: Bool[Tensor, "..."], value: float | Float[Tensor, "..."]
) -> Corruption:
    inputs, labels = inputs_and_labels(data)
    if not classes:
        raise ConfigError("classes is empty: a backdoor needs at least one class whose records have it.")
    trigger = Trigger(where, broadcast(value, inputs, "value").cpu())
    rows = torch.cat([members(labels, label) for label in dict.fromkeys(classes)]).sort().values
    changed = inputs.clone()
    changed[rows.to(inputs.device)] = trigger(inputs[rows.to(inputs.device)])
    return Corruption(Examples(changed, labels, positions=data.positions), data.positions[rows], trigger)
