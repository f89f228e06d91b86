"""A pass over micro-batches: forward and backward through each, its gradient added up, and what was seen in it noted.

Which micro-batches a pass goes through is its caller's choice: `gradient` goes through all of them, or group by group;
several processes may each go through a share, and their `Sums` are added up.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from expunge import params
from expunge.accumulator import Accumulator
from expunge.batches import Batch, LossTerms, length_of, map_tensors, rows_of, to_device
from expunge.errors import MismatchError, OutOfMemory
from expunge.params import Params
from expunge.probe import checked_terms

_BOUNDARY = 64  # bytes; torch's allocators start every tensor at a multiple of it
_NO_ROOM = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


Found = TypeVar("Found")


@dataclass(frozen=True)
class MicroBatches:
    """Which groups of positions a pass went through, and what it saw in each."""

    size: int  # micro-batch number = position // size
    numbers: Int[Tensor, " groups"]  # ascending; groups without an example are absent
    counts: Int[Tensor, " groups"]  # terms
    losses: Float[Tensor, " groups"]  # sums, nats, float64
    magnitudes: Float[Tensor, " groups"]  # sum of |g| over all entries of the group's gradient, float64

    def touched_by(self, part: "MicroBatches") -> tuple[int, float]:
        """Which of these groups the other pass saw differently, or not at all.

        Another number of threads can change the bits of a gradient and leave those of its loss, hence both count.

        Returns:
            How many, and what share of the magnitudes of all groups they make up: theirs here plus theirs there.
        """
        at = self._places(part)
        same = (self.counts[at] == part.counts) & (self.losses[at] == part.losses)
        same &= self.magnitudes[at] == part.magnitudes
        untouched, everything = float(part.magnitudes[same].sum()), float(self.magnitudes.sum())
        share = (everything + float(part.magnitudes.sum()) - 2 * untouched) / everything if everything else 0.0
        return len(self.numbers) - int(same.sum()), share

    def losses_of_as_many(self, part: "MicroBatches") -> tuple[Tensor, Tensor]:
        """The losses of the groups that have as many terms in the other pass, here and there."""
        at = self._places(part)
        as_many = self.counts[at] == part.counts
        return self.losses[at][as_many], part.losses[as_many]

    def where(self, mask: Tensor) -> "MicroBatches":
        """Some of them."""
        return MicroBatches(self.size, self.numbers[mask], self.counts[mask], self.losses[mask], self.magnitudes[mask])

    def joined(self, other: "MicroBatches") -> "MicroBatches":
        """These and others, in ascending order; no number may be in both."""
        pairs = zip(self._columns(), other._columns(), strict=True)
        numbers, *more = (torch.cat(pair) for pair in pairs)
        order = numbers.argsort()
        return MicroBatches(self.size, numbers[order], *(column[order] for column in more))

    def _places(self, part: "MicroBatches") -> Int[Tensor, " groups"]:
        """Where the groups of the other pass are among these."""
        at = torch.searchsorted(self.numbers, part.numbers).clamp(max=len(self.numbers) - 1)
        if not torch.equal(self.numbers[at], part.numbers):
            stranger = int(part.numbers[self.numbers[at] != part.numbers][0])
            raise MismatchError(
                f"the retain data has examples at positions {stranger * self.size} to "
                f"{(stranger + 1) * self.size - 1}, where the cached data had none. Positions must be those of "
                "the data that was cached: keep them with the records when others are deleted."
            )
        return at

    def _columns(self) -> tuple[Tensor, ...]:
        return self.numbers, self.counts, self.losses, self.magnitudes


@dataclass(frozen=True)
class Sums:
    """What a pass found; of two passes over different micro-batches everything adds up."""

    total: Params  # sums of gradients, float64
    magnitudes: Params  # sums of the absolute values of each micro-batch's gradient, float32
    seen: MicroBatches
    repeats: bool  # whether a second backward pass gave the same bits

    def plus_(self, other: "Sums") -> "Sums":
        """Both together; what is here is changed."""
        for mine, theirs in ((self.total, other.total), (self.magnitudes, other.magnitudes)):
            for name, tensor in mine.items():
                tensor.add_(theirs[name])
        return Sums(self.total, self.magnitudes, self.seen.joined(other.seen), self.repeats and other.repeats)


class TooLarge(Exception):
    """So many examples do not fit in memory at once; None if they cannot be told apart."""

    def __init__(self, examples: int | None, reason: str) -> None:
        super().__init__(reason)
        self.examples = examples


@contextmanager
def noticing_memory(examples: int | None) -> Iterator[None]:
    """Turn whatever torch raises when memory runs out inside the block into one exception.

    Raises:
        TooLarge: Says with how many examples it happened.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in reason for sign in _NO_ROOM):
            raise TooLarge(examples, reason) from error
        raise


def fitting(
    whole: Callable[[int | None], Found], at_once: int | None, device: torch.device
) -> tuple[Found, int | None]:
    """Do something with as many examples at once as fit in memory, found by halving.

    Args:
        whole: From its beginning, with at most so many examples at once, or as many as a batch has.
        at_once: To begin with.
        device: Whose cached memory is given back before another trial.

    Returns:
        The result, and how many it were in the end.

    Raises:
        OutOfMemory: A single example is too many.
    """
    while True:
        try:
            return whole(at_once), at_once
        except TooLarge as error:
            too_many, reason = min(error.examples or 0, at_once or error.examples or 0), str(error)
            if too_many <= 1:
                what = "one example" if error.examples else "a batch that cannot be divided into examples"
                raise OutOfMemory(
                    f"{what} does not fit in memory beside the model ({reason}). Give accumulate_on='cpu', recompute "
                    "activations with checkpoint=…, choose fewer parameters, or take a device with more memory."
                ) from error
        # Behind the handler, since the traceback holds on to the tensors that took the memory.
        at_once = at_once or too_many
        while at_once >= too_many:
            at_once //= 2
        if device.type == "cuda":
            torch.cuda.empty_cache()


def sweep(
    model: nn.Module,
    loss_terms: LossTerms,
    batches: Iterable[tuple[int, Batch]],
    sums: Accumulator,
    *,
    size: int,
    at_once: int | None,
    advance: Callable[[], None],
) -> Sums:
    """Go through micro-batches, inside `exact_kernels` and `only_gradients_of`.

    Args:
        model: In eval mode.
        loss_terms: Unreduced losses.
        batches: Each with its number.
        sums: Empty; closed at the end.
        size: Positions a micro-batch.
        at_once: Examples that go through the model together. A larger micro-batch goes through in parts, whose
            gradients are rounded one by one.
        advance: Called after each.

    Raises:
        TooLarge: Memory ran out; the sums are lost.
    """
    device = next(model.parameters()).device
    numbers: list[int] = []
    counts: list[int] = []
    losses: list[Tensor] = []
    magnitudes: list[Tensor] = []
    repeats = True
    with closing(sums):
        for number, batch in batches:
            terms, magnitude = [], []
            for part in _parts(batch, at_once):
                with noticing_memory(length_of(part)):
                    here = map_tensors(to_device(part, device), _at_boundary)
                    terms.append(_backward(model, loss_terms, here, sums.start))
                    magnitude.append(sums.add_up())
                    if not numbers and len(terms) == 1 and device.type != "cpu":
                        _backward(model, loss_terms, here, sums.comparing)
                        repeats = sums.same()
            numbers.append(number)
            counts.append(sum(map(len, terms)))
            found = [each.to(magnitude[0].device).sum(dtype=torch.float64) for each in terms]
            losses.append(_added(found))
            magnitudes.append(_added(magnitude))
            advance()
        empty = torch.zeros(0, dtype=torch.float64)
        seen = MicroBatches(
            size,
            torch.tensor(numbers, dtype=torch.int64),
            torch.tensor(counts, dtype=torch.int64),
            torch.stack(losses).cpu() if losses else empty,
            torch.stack(magnitudes).cpu() if magnitudes else empty,
        )
        return Sums(sums.totals(), sums.magnitudes(), seen, repeats)


def _parts(batch: Batch, at_once: int | None) -> Iterator[Batch]:
    length = length_of(batch)
    if at_once is None or length is None or length <= at_once:
        yield batch
        return
    for start in range(0, length, at_once):
        yield rows_of(batch, start, start + at_once)


def _added(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def _at_boundary(tensor: Tensor) -> Tensor:
    """The tensor, copied if it does not start where torch would put a new one.

    A micro-batch is a slice, and a deletion before it moves where it starts in memory. Matrix kernels take another
    path there and round differently, so that untouched micro-batches would not cancel (seen with MKL on AMD).
    """
    return tensor if tensor.data_ptr() % _BOUNDARY == 0 else tensor.clone()


def _backward(model: nn.Module, loss_terms: LossTerms, batch: Batch, start: Callable[[], None]) -> Tensor:
    """The loss terms of a micro-batch; the gradient of their sum is left with the accumulator."""
    start()
    terms = checked_terms(loss_terms(model, batch))
    terms.backward(torch.ones_like(terms))
    return terms.detach()


@contextmanager
def exact_kernels(device: torch.device) -> Iterator[None]:
    """On a GPU: full float32 instead of TF32, and kernels that repeat bit for bit where there are any."""
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    kernels: list[Any] = [cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul]
    precisions = [kernel.fp32_precision for kernel in kernels]
    deterministic = cudnn.deterministic
    try:
        cudnn.deterministic = True
        for kernel in kernels:
            kernel.fp32_precision = "ieee"
        yield
    finally:
        cudnn.deterministic = deterministic
        for kernel, precision in zip(kernels, precisions, strict=True):
            kernel.fp32_precision = precision


@contextmanager
def layer_by_layer() -> Iterator[None]:
    """Attention as its layers say, and not torch's one kernel for inference: no hook sees into it, nor does vmap."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def only_gradients_of(model: nn.Module, chosen: dict[str, nn.Parameter]) -> Iterator[None]:
    """Eval mode, and gradients of the chosen parameters only; everything restored behind the block."""
    before = [(p, p.grad) for p in model.parameters()]
    for p, _ in before:
        p.grad = None
    try:
        with params.restoring_modes(model), params.requiring_gradients(model, chosen.values()), torch.enable_grad():
            model.eval()
            yield
    finally:
        for p, grad in before:
            p.grad = grad
