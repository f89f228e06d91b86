"""A gradient pass over several processes: micro-batches are dealt out, and their gradients added in one order.

A sum of floats depends on its order. So that any number of processes gives the bits of one, each process owns a part of
the sums, is sent that part of every micro-batch's gradient, and adds them in the order of their numbers. Only gradients
travel, as they do in training; under FSDP2 they travel in its own reduce-scatter, taken apart into its summands.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from expunge import distributed, sharding
from expunge.accumulator import Accumulator, summed, sums_of
from expunge.batches import Batch, Batches, indexed, micro_batches
from expunge.errors import OutOfMemory
from expunge.params import Params
from expunge.passes import MicroBatches, Sums, TooLarge

T = TypeVar("T")

_CONTRIBUTES, _FINISHED, _FAILED, _TOO_LARGE = range(4)
_NOBODY = -1  # the number of a micro-batch that only keeps the others company


def dealt(
    data: Batches, size: int, sums: Accumulator, only: Callable[[int], bool] | None = None
) -> tuple[int | None, Iterator[tuple[int, Batch]]]:
    """The micro-batches of this process, in turn: how many, and each with its number.

    Where a forward pass takes all processes, one that has none in the last turn goes through the first one of that
    turn, under the number -1.

    Args:
        data: All of it, the same on every process.
        size: Positions a micro-batch.
        sums: What their gradients go into.
        only: Which numbers are wanted, by default all.
    """
    known = indexed(data)
    if distributed.world() == 1 or known is None:
        count, batches = micro_batches(data, size, only)
        return (count, batches) if distributed.world() == 1 else (None, own(batches, sums))
    numbers = [n for n in torch.unique_consecutive(known.positions // size).tolist() if only is None or only(n)]
    turns = list(_in_turn(zip(numbers, numbers, strict=True), company=isinstance(sums, Sharded)))
    wanted = {read for _, read, _ in turns}
    _, batches = micro_batches(data, size, wanted.__contains__)
    pairs = zip(turns, batches, strict=True)
    return len(turns), _told(((number, batch, many) for (number, _, many), (_, batch) in pairs), sums)


def own(batches: Iterable[tuple[int, Batch]], sums: Accumulator | None = None) -> Iterator[tuple[int, Batch]]:
    """The share of this process of batches that every process reads."""
    return _told(_in_turn(batches, company=isinstance(sums, Sharded)), sums)


def _in_turn(everything: Iterable[tuple[int, T]], company: bool) -> Iterator[tuple[int, T, int]]:
    """Number, what it is of, and how many processes have one in this turn."""
    numbered = iter(everything)
    while turn := list(itertools.islice(numbered, distributed.world())):
        if len(turn) > distributed.rank():
            yield *turn[distributed.rank()], len(turn)
        elif company:
            yield _NOBODY, turn[0][1], len(turn)


def _told(turns: Iterable[tuple[int, Batch, int]], sums: Accumulator | None) -> Iterator[tuple[int, Batch]]:
    for number, batch, contributors in turns:
        if isinstance(sums, Sharded):
            sums.contributors = contributors
        yield number, batch


def pooled_sums(model: nn.Module, parameters: Mapping[str, nn.Parameter], on: str | None) -> Accumulator:
    """Empty sums, for one process or several.

    Args:
        model: That the parameters are of.
        parameters: At least one.
        on: Where the sums are, see `sums_of`. Those of sharded parameters are beside them.
    """
    if sharding.is_sharded(model):
        return Sharded(model, parameters)
    return sums_of(parameters, on, Dealt() if distributed.world() > 1 else None)


def pooled(work: Callable[[], Sums], *, in_step: bool) -> Sums:
    """Do a pass over the own micro-batches, and put together what all processes found.

    Args:
        work: The pass.
        in_step: Whether its forward passes take all processes. A failure inside one cannot be told to the others,
            who wait for it in there: it ends this process, and they end with it.

    Raises:
        TooLarge: Memory ran out on some process.
        OutOfMemory: It did, and nothing can be tried again.
        ProcessFailed: The pass failed on another one.
    """
    if distributed.world() == 1:
        return work()
    try:
        found = work()
    except TooLarge as error:
        if in_step:
            raise OutOfMemory(
                f"{error.examples} examples do not fit in memory ({error}). Give a smaller micro_batch; the second "
                "pass must use the same."
            ) from error
        if not isinstance(error, _Elsewhere):
            _call(_TOO_LARGE, error.examples or 0)
        raise
    except Exception as error:
        if not in_step and not distributed.is_known(error):
            _call(_FAILED, error=error)
        raise
    seen = found.seen.where(found.seen.numbers != _NOBODY)
    columns = (seen.counts, seen.losses, seen.magnitudes)
    rows = zip(seen.numbers.tolist(), *(column.tolist() for column in columns), strict=True)
    everything = distributed.merged({number: row for number, *row in rows})
    counts, losses, magnitudes = zip(*everything.values(), strict=True) if everything else ((), (), ())
    together = MicroBatches(
        seen.size,
        torch.tensor(list(everything), dtype=torch.int64),
        torch.tensor(counts, dtype=torch.int64),
        torch.tensor(losses, dtype=torch.float64),
        torch.tensor(magnitudes, dtype=torch.float64),
    )
    repeats = all(each for (each,) in distributed.counts([found.repeats]))
    return Sums(found.total, found.magnitudes, together, repeats)


class _Elsewhere(TooLarge):
    """Memory ran out on some process, and all know."""


def _call(state: int, examples: int = 0, error: Exception | None = None) -> list[int]:
    """What every process says of itself before gradients travel, so that nobody waits for one that failed.

    Raises:
        TooLarge: Memory ran out somewhere.
        ProcessFailed: Some other process failed.
    """
    states, most = zip(*distributed.counts([state, examples]), strict=True)
    if _FAILED in states:
        distributed.tell(error)
    if _TOO_LARGE in states:
        raise _Elsewhere(max(most) or None, f"on process {states.index(_TOO_LARGE)} of {len(states)}")
    return list(states)


class Dealt:
    """The processes of a pass over a model that each of them has: each owns an equal part of the entries."""

    def __init__(self) -> None:
        self.parts = distributed.world()
        self._states: list[int] = []
        self._own = _CONTRIBUTES
        self._received: dict[torch.dtype, Tensor] = {}

    def ready(self) -> None:
        """Hear who contributes."""
        self._states = _call(self._own)

    def rows(self, gradient: Tensor) -> Iterator[Tensor]:
        """Send each process its part, and take the own part of everyone's."""
        if all(state == _FINISHED for state in self._states):
            return
        received = self._received.setdefault(gradient.dtype, torch.empty_like(gradient))
        dist.all_to_all_single(received, gradient)
        for row, state in zip(received.view(self.parts, -1), self._states, strict=True):
            if state == _CONTRIBUTES:
                yield row

    def finish(self, add_up: Callable[[], object]) -> None:
        """Take part until everyone has finished."""
        self._own = _FINISHED
        while not self._states or any(state != _FINISHED for state in self._states):
            add_up()

    def joined(self, part: Tensor) -> Tensor:
        """The parts in their order."""
        whole = part.new_empty(self.parts * len(part))
        dist.all_gather(list(whole.chunk(self.parts)), part)
        return whole


class Sharded:
    """Sums for a model that FSDP2 has sharded: each process owns the entries that are its own.

    FSDP2 adds the gradients of all processes in a reduce-scatter. For the time of a pass it is given an exchange of the
    summands in its place, which are then added in the order of the micro-batches. All processes go through each turn
    together, whether or not they have a micro-batch of their own.

    Args:
        model: That the parameters are of.
        parameters: Their ``.grad`` belong to this object until it is closed.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.contributors = distributed.world()  # of this turn: so many, from the first process on
        self._parameters, self._exchange = dict(parameters), _summands()
        self._totals: Params = {n: torch.zeros_like(p.detach(), dtype=torch.float64) for n, p in parameters.items()}
        self._magnitudes: Params = {n: torch.zeros_like(p.detach(), dtype=torch.float32) for n, p in parameters.items()}
        self._sizes: Params = {}
        self._last: Params = {}  # gradients of this turn, where they are to be compared
        self._first: Params | None = None
        self._comparing = False
        self._hooks = [
            p.register_post_accumulate_grad_hook(partial(self._take, name)) for name, p in parameters.items()
        ]
        self._before = [(module, *_communication(module)) for module in sharding.fsdp_modules(model)]
        for module, *_ in self._before:
            module.set_custom_reduce_scatter(self._exchange)
            module.set_gradient_divide_factor(1.0)

    def start(self) -> None:
        """Before a backward pass."""
        self._sizes.clear()
        self._comparing = False

    def add_up(self) -> Tensor:
        """After it."""
        nothing = torch.zeros((), dtype=torch.float64)
        return summed(self._sizes.get(name, nothing) for name in self._totals)

    def comparing(self) -> None:
        """Before one that is compared."""
        self.start()
        self._comparing, self._differs = True, False

    def same(self) -> bool:
        """After it."""
        first, self._first = self._first, None
        return first is not None and not self._differs

    def totals(self) -> Params:
        """Sums of gradients, sharded as their parameters are."""
        return self._totals

    def magnitudes(self) -> Params:
        """Sums of absolute values."""
        return self._magnitudes

    def close(self) -> None:
        """Let go of the parameters, and give FSDP2 its reduce-scatter back."""
        for hook in self._hooks:
            hook.remove()
        for module, reduce_scatter, factor in self._before:
            module.set_custom_reduce_scatter(reduce_scatter)
            module.set_gradient_divide_factor(factor)
        for p in self._parameters.values():
            p.grad = None

    @torch.no_grad()
    def _take(self, name: str, p: Tensor) -> None:
        gradient, p.grad = p.grad, None
        assert gradient is not None
        rows, own = self._exchange.of(gradient)
        device = sharding.here(self._totals[name]).device
        if self._comparing:
            self._differs |= not torch.equal(own, self._last[name])
            return
        total, magnitude = sharding.here(self._totals[name]), sharding.here(self._magnitudes[name])
        for row in rows[: self.contributors]:
            part = row.to(device).view_as(total)
            total.add_(part)
            magnitude.add_(part.abs())
        if own.device.type != "cpu" and self._first is None:
            self._last[name] = own.clone()
        self._sizes[name] = own.abs().sum(dtype=torch.float64)


def _summands() -> Any:
    """What FSDP2 calls in place of its reduce-scatter; a class of torch's that is not imported before it is needed."""
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives

    base: Any = _fsdp_collectives.DefaultReduceScatter

    class Summands(base):  # type: ignore[misc]
        """Everyone's gradients of the own entries, apart instead of added."""

        def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, **_: Any) -> None:
            self._apart = torch.empty_like(input_tensor)
            dist.all_to_all_single(self._apart, input_tensor, group=group)
            self._own, self._next = input_tensor, 0
            output_tensor.zero_()

        def of(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
            """Of the next parameter: a row for each process with its gradient here; the whole gradient of this one."""
            local, processes = sharding.here(gradient), distributed.world()
            if processes == 1:  # nothing is exchanged
                return local.reshape(1, -1), local.flatten()
            padded = -(-len(gradient) // processes) * (gradient.numel() // max(len(gradient), 1))
            columns = slice(self._next, self._next + padded)
            self._next += padded
            apart, own = self._apart.view(processes, -1)[:, columns], self._own.view(processes, -1)[:, columns]
            return apart[:, : local.numel()], own.reshape(-1)[: gradient.numel()]

    return Summands()


def _communication(module: Any) -> tuple[Any, float | None]:
    """What a module of FSDP2 reduces its gradients with, and by what it divides them."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    groups = [state._fsdp_param_group] if groups is None else groups  # torch 2.11
    groups = [group for group in groups if group is not None]
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

    if not groups:
        return DefaultReduceScatter(), None
    return groups[0]._reduce_scatter_comm, groups[0].gradient_divide_factor
