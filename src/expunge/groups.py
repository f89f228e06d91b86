"""The gradient of each group of neighbouring positions, so that a deletion needs a pass over the touched groups only.

A group is a range of micro-batches. What was read of it is hashed: a group that reads the same again has the same
gradient, and cancels exactly without being computed. ``docs/cache-format.md`` specifies the hash.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from expunge.batches import Batch, Batches, Indexed, indexed, micro_batches
from expunge.errors import ConfigError
from expunge.params import Params
from expunge.passes import Sums

_TOLD_APART = bool | int | float | str | bytes | None  # by their repr


@dataclass(frozen=True)
class Groups:
    """The gradient of each group, at the same weights and over the same parameters as their sum."""

    starts: Int[Tensor, " groups"]  # number of the first micro-batch of each
    examples: Int[Tensor, " groups"]  # how many were read of each
    contents: UInt8[Tensor, "groups 32"]  # SHA-256 of what was read
    totals: Sequence[Params]  # sums over terms, float64

    def of(self, number: int) -> int:
        """The group of a micro-batch."""
        return int(_groups_of(self.starts, number))

    def among(self, numbers: Int[Tensor, " _"], groups: set[int]) -> Bool[Tensor, " _"]:
        """Which micro-batches are in one of some groups."""
        own = _groups_of(self.starts, numbers)
        return torch.isin(own, torch.tensor(sorted(groups), dtype=own.dtype))

    def touched(self, data: Batches, size: int) -> set[int]:
        """The groups of which something is missing or reads differently now.

        A group of fewer examples than before is not read; of the others everything is.

        Args:
            data: With positions.
            size: Positions a micro-batch.
        """
        known = indexed(data)
        assert known is not None
        left = _examples(known, self.starts, size)
        complete = (left == self.examples).tolist()
        reader = Reader(self.starts)
        for _ in reader.passing(micro_batches(data, size, lambda number: complete[self.of(number)])[1]):
            pass
        return set((reader.contents() != self.contents).any(1).nonzero().flatten().tolist())


class Reader:
    """Hashes what is read of each group while it passes by."""

    def __init__(self, starts: Int[Tensor, " groups"]) -> None:
        self._starts = starts
        self._digests = [hashlib.sha256() for _ in starts]

    def passing(self, batches: Iterable[tuple[int, Batch]]) -> Iterator[tuple[int, Batch]]:
        """The same batches."""
        for number, batch in batches:
            digest = self._digests[int(_groups_of(self._starts, number))]
            digest.update(f"{number}\0".encode())
            _update(digest, batch)
            yield number, batch

    def contents(self) -> UInt8[Tensor, "groups 32"]:
        """The hashes so far."""
        return torch.tensor([list(digest.digest()) for digest in self._digests], dtype=torch.uint8)


def ranges(data: Batches, size: int, count: int) -> tuple[Int[Tensor, " groups"], Int[Tensor, " groups"]]:
    """Divide the micro-batches into groups of equally many, in order.

    Returns:
        The number of each group's first micro-batch, and how many examples it has.

    Raises:
        ConfigError: Data without positions, or fewer micro-batches than groups.
    """
    if count < 1:
        raise ConfigError(f"groups={count}: the number of groups is at least 1. Leave groups out to keep none.")
    known = indexed(data)
    if known is None:
        raise ConfigError(
            f"groups={count}: data without positions has no groups. Give Examples(x, y), a map-style Dataset, or a "
            "DataLoader over one."
        )
    numbers = int(known.positions[-1]) // size + 1
    if count > numbers:
        raise ConfigError(
            f"groups={count}: there are {numbers} micro-batches of {size} positions, and a group has at least one. "
            "Take fewer groups, or a smaller micro_batch."
        )
    starts = torch.tensor([numbers * group // count for group in range(count)])
    return starts, _examples(known, starts, size)


def in_groups(
    through: Callable[[Iterable[tuple[int, Batch]]], Sums],
    batches: Iterable[tuple[int, Batch]],
    starts: Int[Tensor, " groups"],
    examples: Int[Tensor, " groups"],
) -> tuple[Sums, Groups]:
    """Go through one group after the other.

    Args:
        through: Goes through micro-batches.
        batches: Each with its number, ascending.
        starts: Number of the first micro-batch of each group.
        examples: How many each has.

    Returns:
        The sums over all groups, and those of each, on the CPU.
    """
    reader = Reader(starts)
    stream = itertools.groupby(reader.passing(batches), lambda pair: int(_groups_of(starts, pair[0])))
    totals: dict[int, Params] = {}
    whole: Sums | None = None
    for group, part in stream:
        found = through(part)
        totals[group] = {name: tensor.cpu() for name, tensor in found.total.items()}
        if whole is None:
            whole = replace(found, total={name: tensor.clone() for name, tensor in found.total.items()})
        else:
            whole = whole.plus_(found)
    assert whole is not None
    nothing = {name: torch.zeros_like(tensor) for name, tensor in next(iter(totals.values())).items()}
    each = [totals.get(group, nothing) for group in range(len(starts))]
    return whole, Groups(starts, examples, reader.contents(), each)


def _groups_of(starts: Int[Tensor, " groups"], numbers: Int[Tensor, "*_"] | int) -> Int[Tensor, "*_"]:
    return torch.searchsorted(starts, numbers, right=True) - 1


def _examples(known: Indexed, starts: Tensor, size: int) -> Tensor:
    return torch.bincount(_groups_of(starts, known.positions // size), minlength=len(starts))


def _update(digest: Any, value: Batch) -> None:
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous()
        digest.update(f"{str(raw.dtype).removeprefix('torch.')}\0{list(raw.shape)}\0".encode())
        digest.update(raw.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        for key, each in value.items():
            digest.update(f"{key!r}\0".encode())
            _update(digest, each)
    elif isinstance(value, list | tuple):
        for each in value:
            _update(digest, each)
    elif isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        digest.update(f"{value.dtype}\0{list(value.shape)}\0".encode())
        digest.update(value.tobytes())
    elif isinstance(value, _TOLD_APART):
        digest.update(f"{value!r}\0".encode())
    else:
        raise ConfigError(
            f"a batch holds a {type(value).__name__}, and groups are compared by what is in their batches, which of it "
            "nobody can tell. Let the collate function give tensors, in tuples, lists or dictionaries, or leave groups "
            "out."
        )
