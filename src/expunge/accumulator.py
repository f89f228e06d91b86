"""The running sums of a gradient pass: of gradients in float64, and of their absolute values in float32.

Two ways, with the same bits. `Flat` has one buffer for each type of parameter, whose views backward adds into: a
network of small tensors then takes a handful of operations a micro-batch, where a few for each tensor would cost a
large part of its backward pass. `Streamed` takes the gradient of each parameter away as soon as backward has completed
it, so that beside the model the device holds the gradient of one parameter at a time and none of the sums.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from expunge.errors import ConfigError
from expunge.params import WITHOUT_FLOAT64, Params

_BOUNDARY = 16  # entries; every view of a flat buffer starts where an allocator might have put it


Place = Literal["device", "cpu"]


@runtime_checkable
class Accumulator(Protocol):
    """Sums gradients, and their absolute values, over micro-batches."""

    def start(self) -> None:
        """Before a backward pass, whatever became of the one before it."""

    def add_up(self) -> Tensor:
        """After it. Uses the gradients up.

        Returns:
            The sum of the absolute values of all entries of this backward pass's gradient, float64.
        """

    def comparing(self) -> None:
        """Let the next backward pass be compared with the sums so far, instead of being added to them."""

    def same(self) -> bool:
        """After it: whether it had the very bits of the only one that was added up before."""

    def totals(self) -> Params:
        """The sums of the gradients, float64."""

    def magnitudes(self) -> Params:
        """The sums of their absolute values, float32."""

    def close(self) -> None:
        """Let go of the parameters."""


@runtime_checkable
class Pool(Protocol):
    """Several processes that each keep a part of the sums."""

    parts: int  # as many as processes

    def ready(self) -> None:
        """Before gradients are exchanged."""

    def rows(self, gradient: Tensor) -> Iterable[Tensor]:
        """The own part of everyone's gradient, in the order of their micro-batches; may be written over."""

    def finish(self, add_up: Callable[[], object]) -> None:
        """Take part in the additions of others until all have finished."""

    def joined(self, part: Tensor) -> Tensor:
        """The parts of all processes."""


class Flat:
    """The sums beside the parameters, in one buffer for each type.

    Args:
        parameters: Their ``.grad`` belong to this object from now on, until someone sets them anew.
        home: Where the sums are, if not beside the parameters: for devices without float64.
        pool: The processes that share the sums, if there are several.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], home: torch.device | None = None, pool: Pool | None = None
    ) -> None:
        kinds: dict[tuple[torch.dtype, torch.device], dict[str, nn.Parameter]] = {}
        for name, p in parameters.items():
            kinds.setdefault((p.dtype, p.device), {})[name] = p
        self._order = list(parameters)
        self._members = list(kinds.values())
        self._pool, parts = pool, pool.parts if pool else 1
        sizes = [-(-sum(map(_padded, members.values())) // parts) for members in self._members]  # of one part
        alike = list(zip(sizes, kinds, strict=True))
        self._gradients = [torch.zeros(parts * size, dtype=dtype, device=device) for size, (dtype, device) in alike]
        self._totals = [torch.zeros(size, dtype=torch.float64, device=home or device) for size, (_, device) in alike]
        self._magnitudes = [
            torch.zeros(size, dtype=torch.float32, device=home or device) for size, (_, device) in alike
        ]
        self._first: list[Tensor] = []  # to compare with, where the sums are not of one process
        # Made once: for small networks, cutting a buffer into views anew took as long as adding it up.
        self._views = [dict(_views(*pair)) for pair in zip(self._members, self._gradients, strict=True)]
        for members, views in zip(self._members, self._views, strict=True):
            for name, view in views.items():
                members[name].grad = view

    def start(self) -> None:
        """Before a backward pass."""
        torch._foreach_zero_(self._gradients)

    def add_up(self) -> Tensor:
        """After it."""
        sizes: Params = {}
        if self._pool:
            self._pool.ready()
            if not self._first and self._gradients[0].device.type != "cpu":
                self._first = [flat.clone() for flat in self._gradients]
        for members, flat, views, total, magnitude in zip(
            self._members, self._gradients, self._views, self._totals, self._magnitudes, strict=True
        ):
            here = flat if self._pool else flat.to(total.device)
            for row in self._pool.rows(here) if self._pool else (here,):
                part = row.to(total.device)
                total.add_(part)
                magnitude.add_(part.abs_())
            if self._pool:
                here.abs_()
            own = views if here is flat else dict(_views(members, here))
            sizes |= {name: view.sum(dtype=torch.float64) for name, view in own.items()}
        return summed(sizes[name] for name in self._order)

    def comparing(self) -> None:
        """Before one that is compared."""
        self.start()

    def same(self) -> bool:
        """After it."""
        before, self._first = self._first or self._totals, []
        pairs = zip(before, self._gradients, strict=True)
        return all(torch.equal(first, flat.to(first)) for first, flat in pairs)

    def totals(self) -> Params:
        """Sums of gradients."""
        if self._pool:
            self.start()
            self._pool.finish(self.add_up)
        return self._by_name(self._totals)

    def magnitudes(self) -> Params:
        """Sums of absolute values."""
        return self._by_name(self._magnitudes)

    def close(self) -> None:
        """Let go of the parameters."""
        for members in self._members:
            for p in members.values():
                p.grad = None

    def _by_name(self, flats: list[Tensor]) -> Params:
        pairs = zip(self._members, map(self._pool.joined, flats) if self._pool else flats, strict=True)
        named = {name: view for members, flat in pairs for name, view in _views(members, flat)}
        return {name: named[name] for name in self._order}


class Streamed:
    """The sums somewhere else, by a hook that runs as soon as the gradient of a parameter is complete.

    Args:
        parameters: Their ``.grad`` belong to this object until it is closed.
        home: Where the sums are.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], home: torch.device) -> None:
        self._parameters, self._home = dict(parameters), home
        self._totals = {n: torch.zeros(p.shape, dtype=torch.float64, device=home) for n, p in parameters.items()}
        self._magnitudes = {n: torch.zeros(p.shape, dtype=torch.float32, device=home) for n, p in parameters.items()}
        self._sizes: Params = {}
        self._differs: set[str] | None = None  # of the parameters seen, while comparing
        self._hooks = [
            p.register_post_accumulate_grad_hook(partial(self._take, name)) for name, p in parameters.items()
        ]

    def start(self) -> None:
        """Before a backward pass."""
        for p in self._parameters.values():
            p.grad = None
        self._sizes.clear()
        self._differs = None

    def add_up(self) -> Tensor:
        """After it."""
        nothing = torch.zeros((), dtype=torch.float64)
        return summed(self._sizes.get(name, nothing) for name in self._totals)

    def comparing(self) -> None:
        """Before one that is compared."""
        self.start()
        self._differs = {name for name, total in self._totals.items() if bool(total.any())}  # until seen again

    def same(self) -> bool:
        """After it."""
        return not self._differs

    def totals(self) -> Params:
        """Sums of gradients."""
        return self._totals

    def magnitudes(self) -> Params:
        """Sums of absolute values."""
        return self._magnitudes

    def close(self) -> None:
        """Let go of the parameters."""
        for hook in self._hooks:
            hook.remove()
        for p in self._parameters.values():
            p.grad = None

    @torch.no_grad()
    def _take(self, name: str, p: Tensor) -> None:
        gradient, p.grad = p.grad, None
        assert gradient is not None
        gradient = (gradient.to_dense() if gradient.layout != torch.strided else gradient).contiguous()
        here = gradient.to(self._home)
        if self._differs is not None:
            same = torch.equal(self._totals[name], here.to(torch.float64))
            (self._differs.discard if same else self._differs.add)(name)
            return
        self._totals[name].add_(here)
        # Summed where the gradient is, as `Flat` does: another device may sum in another order.
        beside = here if gradient.device.type in WITHOUT_FLOAT64 else gradient
        self._sizes[name] = beside.abs_().sum(dtype=torch.float64)
        self._magnitudes[name].add_(here if here is beside else here.abs_())


def sums_of(parameters: Mapping[str, nn.Parameter], on: str | None = None, pool: Pool | None = None) -> Accumulator:
    """Empty sums for the gradients of some parameters.

    Args:
        parameters: At least one.
        on: "device": beside the parameters, all gradients at once. "cpu": on the CPU, one gradient at a time. By
            default on the CPU if they would take more than half of the memory that a GPU has free.
        pool: The processes that share the sums, if there are several. "cpu" then moves no more than the sums.

    Raises:
        ConfigError: Another place.
    """
    if on not in (None, *get_args(Place)):
        raise ConfigError(f"accumulate_on={on!r}: choose from {', '.join(get_args(Place))}, or None.")
    if pool is not None:
        return Flat(parameters, torch.device("cpu") if on == "cpu" else None, pool)
    device = next(iter(parameters.values())).device
    free = _free_memory(device)
    needed = sum(p.numel() * (p.element_size() + 8 + 4) for p in parameters.values())
    if on == "cpu" or (on is None and free is not None and 2 * needed > free):
        return Streamed(parameters, torch.device("cpu"))
    return Flat(parameters, torch.device("cpu") if device.type in WITHOUT_FLOAT64 else None)


def _free_memory(device: torch.device) -> int | None:
    """Bytes that a GPU has free, or None for other devices, which do not say."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def summed(sizes: Iterable[Tensor]) -> Tensor:
    """One after the other, so that both ways give the same bits."""
    found = list(sizes)
    device = found[0].device
    return torch.stack([size.to(device) for size in found]).sum()


def _padded(p: Tensor) -> int:
    return -(-p.numel() // _BOUNDARY) * _BOUNDARY


def _views(members: Mapping[str, nn.Parameter], flat: Tensor) -> Iterator[tuple[str, Tensor]]:
    sizes = [_padded(p) for p in members.values()]
    parts = flat[: sum(sizes)].split(sizes)  # what is behind them makes the parts of several processes equal
    for (name, p), part in zip(members.items(), parts, strict=True):
        yield name, part[: p.numel()].view(p.shape)
