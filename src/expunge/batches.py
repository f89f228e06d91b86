"""What data looks like to the library: batches, and examples that keep their position for life.

Any object that can be iterated again and again over batches will do. Data with positions does better: a
gradient pass then puts every example into the same micro-batch, ``position // size``, however many others
were deleted, and micro-batches that nothing was deleted from cancel *exactly* in a difference of two passes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from expunge.errors import ConfigError, MismatchError
from expunge.seeds import keeping_random_state

Batch = Any  # whatever the caller's loss takes: a tensor, or tensors in a tuple, list or dictionary
LossTerms = Callable[[nn.Module, Batch], Tensor]  # unreduced losses, shape (terms,), in nats
Rows = slice | Int[Tensor, " _"]  # of the examples at hand, counted from 0


@runtime_checkable
class Indexed(Protocol):
    """Examples at known positions, in ascending order."""

    positions: Int[Tensor, " _"]  # where each example stood in the original data

    def fetch(self, rows: Sequence[Rows]) -> Iterator[Batch]:
        """One batch for each of the given selections of rows."""
        ...


class Examples:
    """Examples in memory as tensors that share their first dimension.

    Args:
        *tensors: For example inputs and labels; the batch a loss sees is the tuple of their rows.
        positions: Where each example stood in the original data, counted from 0 and ascending; by default
            0, 1, 2, … Keep them with the data when records are deleted (``without`` does).

    Raises:
        MismatchError: Lengths that differ.
        ConfigError: No tensor, or positions that do not ascend.
    """

    def __init__(self, *tensors: Tensor, positions: Tensor | None = None) -> None:
        if not tensors or not all(isinstance(tensor, Tensor) and tensor.ndim for tensor in tensors):
            got = ", ".join(type(tensor).__name__ for tensor in tensors) or "nothing"
            raise ConfigError(
                f"Examples({got}): it needs at least one tensor with one row an example, such as (x, y). Convert "
                "arrays and lists with torch.as_tensor(…)."
            )
        count = len(tensors[0])
        positions = torch.arange(count) if positions is None else positions
        lengths = [len(tensor) for tensor in (*tensors, positions)]
        if set(lengths) != {count}:
            raise MismatchError(
                f"the tensors and positions have {lengths} rows; every example needs one row in each of them."
            )
        self.tensors = tensors
        self.positions = _ascending(positions)

    def __len__(self) -> int:
        return len(self.positions)

    def fetch(self, rows: Sequence[Rows]) -> Iterator[tuple[Tensor, ...]]:
        """One tuple of tensors for each selection of rows; a slice comes as a view, not a copy."""
        on = {device: _moved(rows, device) for device in {tensor.device for tensor in self.tensors}}
        for number in range(len(rows)):
            yield tuple(tensor[on[tensor.device][number]] for tensor in self.tensors)

    def only(self, positions: Tensor) -> "Examples":
        """The examples at these positions."""
        return self._where(torch.isin(self.positions, self._known(positions)))

    def without(self, positions: Tensor) -> "Examples":
        """The examples that are left when those at these positions are deleted."""
        return self._where(~torch.isin(self.positions, self._known(positions)))

    def to(self, device: torch.device | str) -> "Examples":
        """The same examples on another device."""
        return Examples(*(tensor.to(device) for tensor in self.tensors), positions=self.positions)

    def _where(self, mask: Tensor) -> "Examples":
        return Examples(*(t[mask.to(t.device)] for t in self.tensors), positions=self.positions[mask])

    def _known(self, positions: Tensor) -> Tensor:
        positions = torch.as_tensor(positions)
        if positions.numel() and (positions.dtype == torch.bool or positions.is_floating_point()):
            raise ConfigError(
                f"positions are whole numbers, not {positions.dtype}. For a mask, give mask.nonzero()[:, 0]."
            )
        positions = positions.to(self.positions)
        unknown = positions[~torch.isin(positions, self.positions)]
        if len(unknown):
            raise ConfigError(
                f"position {int(unknown[0])} is not among these {len(self)} examples ({len(unknown)} such). "
                "Positions count from 0 in the original data and stay with their records."
            )
        return positions


@dataclass
class _FromDataset:
    """A map-style dataset, read by a DataLoader in the order we ask for."""

    dataset: Dataset[Any]
    positions: Int[Tensor, " _"]
    indices: Int[Tensor, " _"]  # what to ask the dataset for
    options: dict[str, Any]

    def fetch(self, rows: Sequence[Rows]) -> Iterator[Batch]:
        samples = [self.indices[each].tolist() for each in rows]
        yield from DataLoader(self.dataset, batch_sampler=samples, **self.options)


Batches = Examples | Dataset[Any] | Iterable[Batch]


def indexed(data: Batches) -> Indexed | None:
    """The data as examples at known positions, or None if it is just an iterable of batches.

    A map-style ``Dataset`` counts from 0, a ``Subset`` (also of a subset) keeps the positions in the whole, and a
    ``DataLoader`` over either is read in the order of its dataset, with its workers and its collate function.

    Raises:
        ConfigError: A DataLoader that leaves out the last batch, or draws its own samples.
    """
    if isinstance(data, Examples):
        return data
    options: dict[str, Any] = {}
    if isinstance(data, DataLoader):
        if data.drop_last:
            raise ConfigError(
                "DataLoader(drop_last=True) leaves out examples, and others after a deletion. "
                "Every example counts once: use drop_last=False."
            )
        whole = type(data.batch_sampler) is BatchSampler and (
            type(data.sampler) is SequentialSampler
            or (type(data.sampler) is RandomSampler and not data.sampler.replacement
                and data.sampler.num_samples == len(data.dataset))  # type: ignore[arg-type]
        )  # fmt: skip
        if not whole:
            return None
        options = {
            "num_workers": data.num_workers,
            "collate_fn": data.collate_fn,
            "pin_memory": data.pin_memory,
            "prefetch_factor": data.prefetch_factor,
            "worker_init_fn": data.worker_init_fn,
            "multiprocessing_context": data.multiprocessing_context,
            "timeout": data.timeout,
        }
        data = data.dataset
    if not (isinstance(data, Dataset) and hasattr(data, "__len__")) or isinstance(data, IterableDataset):
        return None
    positions, within = torch.arange(len(data)), data
    while isinstance(within, Subset):
        positions, within = torch.as_tensor(within.indices, dtype=torch.int64)[positions], within.dataset
    positions, order = positions.sort()
    return _FromDataset(data, _ascending(positions), order, options)


def only_rows(data: Batches, rows: Int[Tensor, " _"]) -> Batches:
    """Some of the examples, at the positions they have.

    Args:
        data: With positions.
        rows: Which, counted from 0 in the order of their positions, ascending.

    Raises:
        ConfigError: Data without positions.
    """
    known = indexed(data)
    if isinstance(known, Examples):
        return known.only(known.positions[rows])
    if not isinstance(known, _FromDataset):
        raise ConfigError(
            f"a {type(data).__name__} without positions cannot be divided: nobody knows which example is where. Give "
            "Examples(x, y), a Dataset, or a DataLoader over one."
        )
    subset = Subset(known.dataset, known.indices[rows].tolist())
    return DataLoader(subset, data.batch_size or 1, **known.options) if isinstance(data, DataLoader) else subset


def require_reiterable(data: Batches, what: str) -> None:
    """Refuse data that is used up by one pass, or that is empty.

    Raises:
        ConfigError: An iterator, something that cannot be iterated, or data without a batch.
    """
    known = indexed(data)
    if known is None:
        if not hasattr(data, "__iter__"):
            raise ConfigError(
                f"{what} is a {type(data).__name__}, which holds no batches. Give Examples(x, y), a Dataset, a "
                "DataLoader, or a list of batches."
            )
        with keeping_random_state():
            once = iter(data) is iter(data)  # true of an iterator, and of anything that hands out the same one again
        if once:
            raise ConfigError(
                f"{what} is a {type(data).__name__} that can be read only once, and unlearning reads the data "
                "several times. Give Examples(x, y), a DataLoader, or a list of batches."
            )
    with keeping_random_state():
        empty = not (len(known.positions) if known is not None else any(True for _ in plain(data)))
    if empty:
        raise ConfigError(f"{what} is empty: there is nothing left to learn from.")


def plain(data: Batches) -> Iterable[Batch]:
    """Data without positions, as the iterable of batches that it is."""
    assert isinstance(data, Iterable)
    return data


def _count(data: Batches) -> int | None:
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:  # a DataLoader over a stream has a __len__ that raises
        return None


def micro_batches(
    data: Batches, size: int, only: Callable[[int], bool] | None = None
) -> tuple[int | None, Iterator[tuple[int, Batch]]]:
    """Batches for a gradient pass: how many (if known), and each with its number.

    For data with positions, batch number ``position // size``; numbers without an example are skipped. For
    other data its own batches, counted from 0.

    Args:
        data: Any.
        size: Positions a micro-batch.
        only: Which numbers are wanted, by default all. Of data with positions the others are not read.
    """
    known = indexed(data)
    if known is None:
        if only is None:
            return _count(data), enumerate(plain(data))
        return None, ((number, batch) for number, batch in enumerate(plain(data)) if only(number))
    groups, counts = torch.unique_consecutive(known.positions // size, return_counts=True)
    bounds = [0, *counts.cumsum(0).tolist()]
    numbers = groups.tolist()
    wanted = [at for at, number in enumerate(numbers) if only is None or only(number)]
    rows = [slice(bounds[at], bounds[at + 1]) for at in wanted]
    return len(rows), zip((numbers[at] for at in wanted), known.fetch(rows), strict=True)


def described(batch: object) -> str:
    """What a batch is, for a message: types and shapes, keys of a dictionary."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}"
    kind = type(batch).__name__
    if isinstance(batch, Mapping):
        parts = ", ".join(f"{key!r}: {described(value)}" for key, value in batch.items())
        return f"{kind} {{{parts}}}"
    if isinstance(batch, tuple | list):
        return f"{kind} ({', '.join(map(described, batch))})"
    return kind


def in_rows(data: Batches, size: int) -> Iterator[Batch]:
    """Batches of so many examples in their order, wherever gaps are; of data without positions its own batches."""
    known = indexed(data)
    if known is None:
        return iter(plain(data))
    return iter(known.fetch([slice(start, start + size) for start in range(0, len(known.positions), size)]))


def shuffled(data: Batches, size: int, generator: torch.Generator) -> tuple[int | None, Iterator[Batch]]:
    """Batches for a training epoch: how many (if known), and the batches in a random order.

    Data without positions keeps its own batches in its own order. A last batch of one example joins the one
    before it, since BatchNorm cannot train on one.
    """
    count, batches = positioned(data, size, generator)
    return count, (batch for _, batch in batches)


def positioned(
    data: Batches, size: int, generator: torch.Generator, share: Callable[[int], slice] = slice
) -> tuple[int | None, Iterator[tuple[Int[Tensor, " _"] | None, Batch]]]:
    """The same as `shuffled`, each batch with the positions of its examples (None for data without positions).

    Args:
        data: What is trained on.
        size: Examples a batch.
        generator: Draws the order.
        share: Of a batch with so many rows, those to read; the positions are of all of them.
    """
    known = indexed(data)
    if known is None:
        return _count(data), ((None, _shared(batch, share)) for batch in plain(data))
    rows = drawn(len(known.positions), size, generator)
    parts = [each[share(len(each))] for each in rows]
    return len(rows), zip((known.positions[each] for each in rows), known.fetch(parts), strict=True)


def _shared(batch: Batch, share: Callable[[int], slice]) -> Batch:
    length = length_of(batch)
    if length is None or len(range(length)[share(length)]) == length:
        return batch
    return map_tensors(batch, lambda tensor: tensor[share(length)])


def drawn(count: int, size: int, generator: torch.Generator) -> list[Int[Tensor, " _"]]:
    """The rows of each batch of an epoch over ``count`` examples, in random order; no last batch of one."""
    rows = list(torch.randperm(count, generator=generator).split(size)) if count else []
    if len(rows) > 1 and len(rows[-1]) == 1:
        rows[-2:] = [torch.cat(rows[-2:])]
    return rows


def _moved(rows: Sequence[Rows], device: torch.device) -> Sequence[Rows]:
    """Selections of rows on a device, all in one copy: with a copy a batch, the host would wait for each."""
    chosen = [each for each in rows if isinstance(each, Tensor)]
    if device.type == "cpu" or not chosen:
        return rows
    moved = iter(torch.cat(chosen).to(device).split([len(each) for each in chosen]))
    return [next(moved) if isinstance(each, Tensor) else each for each in rows]


def map_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """Apply a function to every tensor of a batch, keeping its structure."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, change) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map_tensors(value, change) for value in batch)
    return batch


def tensors_of(batch: Batch) -> list[Tensor]:
    """Every tensor of a batch, in order."""
    found: list[Tensor] = []
    map_tensors(batch, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def length_of(batch: Batch) -> int | None:
    """The number of examples, if every tensor has the same first dimension."""
    lengths = {len(tensor) if tensor.ndim else -1 for tensor in tensors_of(batch)}
    return lengths.pop() if len(lengths) == 1 and -1 not in lengths else None


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    """Some examples of a batch whose tensors have one row an example."""
    return map_tensors(batch, lambda tensor: tensor[start:stop])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))


def _ascending(positions: Tensor) -> Tensor:
    positions, dtype = positions.cpu(), positions.dtype
    whole = not positions.is_floating_point() and dtype != torch.bool and positions.ndim == 1
    if not whole or not bool((positions.to(torch.int64).diff() > 0).all()):
        raise ConfigError(
            "positions must be whole numbers in ascending order without repetition: where each example stood in "
            f"the original data. Got dtype {positions.dtype}, shape {tuple(positions.shape)}, starting "
            f"{positions.flatten()[:5].tolist()}. Sort records and positions together."
        )
    if len(positions) and int(positions[0]) < 0:
        raise ConfigError(f"positions start at {int(positions[0])}: they count from 0.")
    return positions.to(torch.int64)
