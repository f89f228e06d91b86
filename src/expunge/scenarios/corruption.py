"""A dataset with faults in it, what is known of them, and how it is corrected."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from expunge import params
from expunge.batches import Examples
from expunge.errors import ConfigError, MismatchError
from expunge.seeds import stream

OnTest = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Corruption:
    """A corrupted copy of a dataset; the dataset itself is left as it was."""

    data: Examples  # inputs and labels: what the original model is trained on
    corrupted: Int[Tensor, " corrupted"]  # positions of the faults, ascending
    on_test: OnTest | None = None  # does to test inputs (batch, …) what was done here; None if labels were

    @cached_property
    def digest(self) -> str:
        """A SHA-256 of the data, the positions of all records and those of the faults, for a configuration to name."""
        tensors = {f"tensor {number}": tensor for number, tensor in enumerate(self.data.tensors)}
        return params.fingerprint({**tensors, "positions": self.data.positions, "corrupted": self.corrupted})


def inputs_and_labels(data: Examples) -> tuple[Tensor, Int[Tensor, " examples"]]:
    """The two tensors of a dataset for classification.

    Raises:
        ConfigError: It does not consist of inputs and class numbers.
    """
    if len(data.tensors) != 2 or data.tensors[1].ndim != 1 or data.tensors[1].is_floating_point():
        shapes = [tuple(tensor.shape) for tensor in data.tensors]
        raise ConfigError(f"data of shapes {shapes}: this scenario needs Examples(inputs, class numbers).")
    return data.tensors[0], data.tensors[1]


def identified(corrupted: Int[Tensor, " corrupted"], gamma: float, seed: int) -> Int[Tensor, " known"]:
    """The faults that are known: round(gamma x corrupted) positions drawn uniformly, ascending.

    For one seed those of a smaller gamma are among those of a larger. The published version of the paper has gamma from
    0.1 to 1.

    Raises:
        ConfigError: A gamma that identifies nothing, or more than there is.
    """
    known = round(gamma * len(corrupted))
    if not 0 < known <= len(corrupted):
        raise ConfigError(
            f"gamma={gamma} identifies {known} of {len(corrupted)} corrupted records: choose a share above 0, up to 1."
        )
    return corrupted[torch.randperm(len(corrupted), generator=stream(seed, "identified"))[:known]].sort().values


def corrected(corruption: Corruption, clean: Examples, known: Int[Tensor, " known"]) -> Examples:
    """The corrupted data with the known faults replaced by what they were; faults that are not known stay.

    To remove the known ones instead, take ``corruption.data.without(known)``.

    Args:
        corruption: The corrupted data.
        clean: The same records before.
        known: Positions to correct.

    Raises:
        MismatchError: The clean data has other positions, or tensors of other shapes.
        ConfigError: A known position that is not in the data.
    """
    data = corruption.data
    same = [a.shape for a in data.tensors] == [a.shape for a in clean.tensors]
    if not same or not torch.equal(data.positions, clean.positions):
        raise MismatchError(
            f"the clean data has {len(clean)} records of shapes {[tuple(t.shape[1:]) for t in clean.tensors]}, the "
            f"corrupted {len(data)} of {[tuple(t.shape[1:]) for t in data.tensors]}, and both must be the same records "
            "at the same positions. Give what the corruption was made from."
        )
    data.only(known)  # refuses what is not there
    rows = torch.isin(data.positions, known)
    tensors = []
    for faulty, right in zip(data.tensors, clean.tensors, strict=True):
        tensor = faulty.clone()
        tensor[rows.to(tensor.device)] = right[rows.to(right.device)].to(tensor)
        tensors.append(tensor)
    return Examples(*tensors, positions=data.positions)


def broadcast(value: float | Float[Tensor, "..."], like: Tensor, what: str) -> Tensor:
    """A number, or one for each channel, as a tensor of the shape and precision of one input.

    Raises:
        ConfigError: Inputs that are not floating-point numbers, or a value that does not fit them.
    """
    if not like.is_floating_point():
        raise ConfigError(f"inputs of {like.dtype}: convert them to floating-point numbers first.")
    shape = like.shape[1:]
    try:
        return torch.as_tensor(value, dtype=like.dtype, device=like.device).broadcast_to(shape)
    except RuntimeError as error:
        raise ConfigError(
            f"{what} has shape {tuple(torch.as_tensor(value).shape)} and one input {tuple(shape)}: give a number, or "
            "a tensor such as (channels, 1, 1) that can be broadcast to an input."
        ) from error
