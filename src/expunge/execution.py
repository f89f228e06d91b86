"""How a training step is carried out: memory layout, number format, compilation. What it computes stays the same."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from expunge import distributed, params, sharding
from expunge.batches import Batch, map_tensors, tensors_of, to_device
from expunge.seeds import keeping_random_state
from expunge.trace import Trace

Precision = Literal["float32", "bfloat16", "fastest"]
Positioned = tuple[Int[Tensor, " _"] | None, Batch]  # a batch, and the positions of its examples if they are known
_TURNS = 3  # steps of each number format before one is chosen; the first of them warms up and does not count


def ahead(batches: Iterable[Positioned], device: torch.device) -> Iterator[Positioned]:
    """The batches on a device; on a GPU, the next is on its way there while the present one is used.

    The copy runs beside the computation if the batch lies in pinned memory, as with ``DataLoader(pin_memory=True)``.
    """
    if device.type != "cuda":
        yield from ((positions, to_device(batch, device)) for positions, batch in batches)
        return
    beside = torch.cuda.Stream(device)
    waiting: list[tuple[Positioned, torch.cuda.Event]] = []

    def arrived() -> Positioned:
        (positions, batch), copied = waiting.pop(0)
        using = torch.cuda.current_stream(device)
        using.wait_event(copied)
        for tensor in tensors_of(batch):
            tensor.record_stream(using)  # or its memory could be used again while a kernel still reads it
        return positions, batch

    for positions, batch in batches:
        with torch.cuda.stream(beside):
            moved = positions, to_device(batch, device)
            waiting.append((moved, beside.record_event()))
        if len(waiting) > 1:
            yield arrived()
    if waiting:
        yield arrived()


def channels_last(batch: Batch) -> Batch:
    """The batch with images laid out pixel by pixel, which convolutions and what follows them then keep.

    Weights stay as they are: a model whose layout changed would give a gradient pass other bits.
    """

    def laid_out(tensor: Tensor) -> Tensor:
        # A copy in any case: contiguous() takes one channel for laid out already, and convolutions do not.
        return tensor.clone(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor

    return map_tensors(batch, laid_out)


class Autocast:
    """Steps in float32, or with matrix products in bfloat16; weights, gradients and losses stay in float32.

    With "fastest", the first steps take turns, and the format whose fastest step is shortest is kept. The choice is
    noted in ``trace.facts["precision"]``. It can differ between machines and between runs, and so can the result.
    """

    def __init__(self, precision: Precision, device: torch.device, trace: Trace) -> None:
        self.device, self.trace = device, trace
        if precision == "fastest":  # unless it was found out before: by this training, or the one that came first
            precision = trace.facts.get("precision", precision)
        self.measuring = precision == "fastest"
        self.low = precision == "bfloat16"
        self.seconds: dict[bool, list[float]] = {False: [], True: []}

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a whole step of training."""
        if not self.measuring:
            yield
            return
        self.low = len(self.seconds[True]) < len(self.seconds[False])
        self._synchronise()
        start = time.perf_counter()
        yield
        self._synchronise()
        self.seconds[self.low].append(time.perf_counter() - start)
        if len(self.seconds[True]) == _TURNS:
            best = {low: min(seconds[1:]) for low, seconds in self.seconds.items()}
            _, everyone = distributed.agreed(lambda: best, lambda own: (own[False], own[True]))
            if everyone:  # all processes compute in one format, and wait for the slowest
                best = {low: max(seconds[low] for seconds in everyone) for low in (False, True)}
            self.low, self.measuring = best[True] < best[False], False
            self.trace.facts["precision"] = "bfloat16" if self.low else "float32"

    def forward(self) -> AbstractContextManager[Any]:
        """Around the forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.low else nullcontext()

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Compiled:
    """`torch.compile` for the forward and backward passes of training; what cannot be compiled runs as it is.

    Only inside ``active()`` is the model's ``forward`` the compiled one: the model that leaves training is the one that
    came, names and all. Compiled are batches of the usual size, in train mode, and models without hooks (compiled code
    would not see a hook that came later). The first failure ends it, with a warning in the trace.

    Args:
        model: Its parameters and buffers are used, not copied.
        size: Examples a batch; others, such as an epoch's last, run uncompiled rather than being compiled again.
        trace: ``facts["compiled_steps"]`` counts; compilation is part of the time of the stage.
    """

    def __init__(self, model: nn.Module, size: int, trace: Trace) -> None:
        self.model, self.size, self.trace = model, size, trace
        self.plain: Callable[..., Any] = model.forward
        self.compiled: Callable[..., Any] | None = None
        in_pieces = sharding.is_sharded(model)
        self.ended = in_pieces or params.plain(model) is not model  # it came compiled
        trace.facts["compiled_steps"] = 0
        warning = "compile=True: a model that FSDP2 has sharded is trained as it is. Leave compile out."
        if in_pieces and warning not in trace.warnings:
            trace.warn(warning)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let calls of the model run compiled inside the block."""
        if self.ended:
            yield
            return
        before = vars(self.model).get("forward")
        self.model.forward = self._forward
        try:
            yield
        finally:
            del self.model.forward
            if before is not None:
                self.model.forward = before

    def _forward(self, *inputs: Any, **named: Any) -> Any:
        first = next((each for each in (*inputs, *named.values()) if isinstance(each, Tensor) and each.ndim), None)
        usual = first is not None and len(first) == self.size and torch.is_grad_enabled() and self.model.training
        if self.ended or not usual or _hooked(self.model):
            return self.plain(*inputs, **named)
        try:
            if self.compiled is None:
                self.compiled = torch.compile(self.plain)
                self._try(self.compiled, *inputs, **named)
            outputs = self.compiled(*inputs, **named)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the compiler, its backend or the C++ compiler raise
            self.ended = True
            self.trace.warn(
                f"compile=True: {type(self.model).__name__} could not be compiled and is trained as it is: "
                f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
            )
            return self.plain(*inputs, **named)
        self.trace.facts["compiled_steps"] += 1
        return outputs

    def _try(self, compiled: Callable[..., Any], *inputs: Any, **named: Any) -> None:
        """Run forward and backward once, so that a failure of either leaves nothing behind."""
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        theta = [p for p in self.model.parameters() if p.requires_grad]
        try:
            with keeping_random_state():
                outputs = [out for out in tensors_of(compiled(*inputs, **named)) if out.requires_grad]
                torch.autograd.grad([out.sum() for out in outputs], theta, allow_unused=True)
        finally:
            with torch.no_grad():
                for name, buffer in self.model.named_buffers():
                    buffer.copy_(buffers[name])


def _hooked(model: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
