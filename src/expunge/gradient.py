"""`gradient()`: the sum of per-term gradients over data, exact enough that two of them can be subtracted.

What was removed shows up in a difference of two large, nearly equal sums, so everything here serves that
difference: the model in eval mode, unreduced losses, micro-batches that are the same in both passes, float64
accumulation, and a rounding floor for every entry that says what the difference cannot show.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from expunge import losses, params, progress
from expunge.accumulator import Accumulator
from expunge.batches import (
    Batch,
    Batches,
    LossTerms,
    indexed,
    map_tensors,
    micro_batches,
    require_reiterable,
    to_device,
)
from expunge.errors import ConfigError, MismatchError, NotFinite
from expunge.params import Params
from expunge.probe import checked_terms, probe
from expunge.seeds import keeping_random_state

MICRO_BATCH = 128
_BOUNDARY = 64  # bytes; torch's allocators start every tensor at a multiple of it
_WITHOUT_FLOAT64 = ("mps",)  # device types that cannot hold float64: accumulate on the CPU


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
        at = torch.searchsorted(self.numbers, part.numbers).clamp(max=len(self.numbers) - 1)
        if not torch.equal(self.numbers[at], part.numbers):
            stranger = int(part.numbers[self.numbers[at] != part.numbers][0])
            raise MismatchError(
                f"the retain data has examples at positions {stranger * self.size} to "
                f"{(stranger + 1) * self.size - 1}, where the cached data had none. Positions must be those of "
                "the data that was cached: keep them with the records when others are deleted."
            )
        same = (self.counts[at] == part.counts) & (self.losses[at] == part.losses)
        same &= self.magnitudes[at] == part.magnitudes
        untouched, everything = float(part.magnitudes[same].sum()), float(self.magnitudes.sum())
        share = (everything + float(part.magnitudes.sum()) - 2 * untouched) / everything if everything else 0.0
        return len(self.numbers) - int(same.sum()), share


@dataclass(frozen=True)
class Origin:
    """Where and of what a gradient was taken; gradients of different origin must not be subtracted."""

    weights: str  # fingerprints, see params.fingerprint
    buffers: str
    loss_terms: str  # name

    @classmethod
    def of(cls, model: nn.Module, loss_terms: LossTerms) -> "Origin":
        """The present state of a model."""
        return cls(params.weights_fingerprint(model), params.buffers_fingerprint(model), losses.name_of(loss_terms))

    def require(self, now: "Origin", what: str) -> None:
        """Refuse another origin.

        Raises:
            MismatchError: Says which of weights, buffers and loss differ.
        """
        if self.weights != now.weights:
            raise MismatchError(
                f"{what} was taken at weights {self.weights[:12]}…, the model has {now.weights[:12]}…. One more "
                "update, a checkpoint in lower precision or a cast is enough. Load the weights that were cached, "
                "bit for bit."
            )
        if self.buffers != now.buffers:
            raise MismatchError(
                f"{what} was taken with buffers {self.buffers[:12]}…, the model has {now.buffers[:12]}…: BatchNorm "
                "statistics (or another buffer) have moved since. Load the buffers saved with the weights, and run "
                "no data through the model in train mode."
            )
        if self.loss_terms != now.loss_terms:
            raise MismatchError(
                f"{what} is of the loss {self.loss_terms!r}, and now {now.loss_terms!r} is used. Use the same loss."
            )


@dataclass(frozen=True)
class Gradient:
    """The gradient of a sum of loss terms.

    ``full - retain`` is the gradient of what was removed (for corrected data: of the old version, minus that
    of the new).
    """

    total: Params  # sum over terms, float64
    count: int  # terms
    loss: float  # sum over terms, nats
    noise: Params | None  # rounding floor of each entry of total, in the same unit, float32
    roundoff: float  # unit roundoff of the arithmetic that made it: 2**-24 for float32
    origin: Origin  # the point it was taken at
    micro_batches: MicroBatches | None = None  # None: no positions, or a backward pass that does not repeat
    storage_roundoff: float = 0.0  # unit roundoff of the type the total was stored in, 0 for float64

    @property
    def mean_loss(self) -> float:
        """Nats a term."""
        return self.loss / max(self.count, 1)

    def relative_noise(self) -> float:
        """The predicted relative error: norm of the rounding floor over norm of the total."""
        assert self.noise is not None
        length = params.norm(self.total)
        return params.norm(self.noise) / length if length else math.inf

    def informative(self) -> dict[str, Bool[Tensor, "..."]]:
        """Mark the entries that stand above their rounding floor."""
        assert self.noise is not None
        return {name: self.total[name].abs() > self.noise[name] for name in self.total}

    def __sub__(self, part: "Gradient") -> "Gradient":
        """The gradient of what this one has and the part does not.

        The rounding floor of the result depends on how the two passes were made. Micro-batches that both saw
        alike cancel exactly, so that only the touched ones contribute; without a record of them every
        micro-batch of both passes does.

        Raises:
            MismatchError: Another origin or other parameters, more terms than this one, or positions unknown
                to it.
        """
        self.origin.require(part.origin, "the cached gradient")
        params.require_same_names(self.total, part.total, "the cached gradient", "the gradient of the retain data")
        if part.count > self.count:
            raise MismatchError(
                f"the retain data has {part.count} terms and the cached data had {self.count}. What is left "
                "cannot be more than what there was: check that this cache belongs to this data."
            )
        total = params.subtract(self.total, part.total)
        return Gradient(
            total=total,
            count=self.count - part.count,
            loss=self.loss - part.loss,
            noise=self._noise_of_difference(part, total),
            roundoff=max(self.roundoff, part.roundoff),
            origin=self.origin,
        )

    def _noise_of_difference(self, part: "Gradient", total: Params) -> Params | None:
        if self.noise is None or part.noise is None:
            return None
        mine, theirs = self.micro_batches, part.micro_batches
        if mine is not None and theirs is not None and mine.size == theirs.size:
            # A touched micro-batch was rounded once in each pass, in proportion to its size.
            groups = len(mine.numbers)
            _, touched = mine.touched_by(theirs)
            accumulation = 2**-54 * math.sqrt(groups) / self.roundoff  # of the float64 sums
            noise = {name: _spread(floor) * touched + floor * accumulation for name, floor in self.noise.items()}
        else:
            noise = {name: _spread(floor + part.noise[name].to(floor.device)) for name, floor in self.noise.items()}
        # The removed gradient itself was rounded too, wherever it was summed up.
        own = 32 * max(self.roundoff, part.roundoff)
        return {
            name: floor + (own * total[name].abs() + self.storage_roundoff * self.total[name].abs()).to(floor)
            for name, floor in noise.items()
        }


def _spread(floor: Tensor) -> Tensor:
    """Add a quarter of the mean over the row and over the column.

    A small entry of a weight's gradient is a product with a factor near zero (an activation, a back-propagated
    error), and that factor was rounded like its larger neighbours.
    """
    if not floor.numel():
        return floor
    if floor.ndim < 2:
        return floor + floor.mean() / 4
    matrix = floor.flatten(1)
    return (matrix + (matrix.mean(0, keepdim=True) + matrix.mean(1, keepdim=True)) / 4).view_as(floor)


def gradient(
    model: nn.Module,
    loss_terms: LossTerms,
    data: Batches,
    *,
    parameters: params.Select | None = None,
    micro_batch: int = MICRO_BATCH,
) -> Gradient:
    """Sum the gradients of all loss terms over the data, once through, in eval mode.

    Everything is left as it was found: weights, ``.grad``, ``requires_grad``, training flags, global generators.
    A few examples are tried first, to refuse a loss under which a difference of gradients would mean nothing.

    Args:
        model: Any module. For a cache: the trained model, after its last update.
        loss_terms: Unreduced losses of a batch, shape (terms,).
        data: `Examples`, a map-style `Dataset`, a `DataLoader`, or any re-iterable of batches.
        parameters: Names, or a predicate of name and parameter. By default all that require a gradient.
        micro_batch: Positions a micro-batch, for data with positions; other data keeps its own batches.

    Returns:
        Float64 sums on the model's device (on the CPU for devices without float64).

    Raises:
        ConfigError: Nothing trainable, no data, an unusable loss or micro-batch.
        NonDeterministicLoss: Dropout, noise, random augmentation, or a loss that depends on the batch.
        NotFinite: NaN or infinity in the weights, a loss (names the batch) or the gradient (names the tensor).
    """
    if not isinstance(micro_batch, int) or micro_batch < 1:
        raise ConfigError(f"micro_batch={micro_batch}: it is a whole number of positions, at least one.")
    chosen = params.named_parameters(model, parameters)
    buffers = {n: b.nan_to_num(math.nan, 0, 0) for n, b in model.named_buffers()}  # a mask may hold infinity
    params.require_finite(dict(model.named_parameters()) | buffers, "before the gradient pass")
    device = next(iter(chosen.values())).device
    with keeping_random_state(), _exact_kernels(device), _only_gradients_of(model, chosen):
        require_reiterable(data, "the data")
        probe(model, loss_terms, data, device)
        return _accumulate(model, loss_terms, data, chosen, micro_batch, device)


def _accumulate(
    model: nn.Module,
    loss_terms: LossTerms,
    data: Batches,
    chosen: dict[str, nn.Parameter],
    micro_batch: int,
    device: torch.device,
) -> Gradient:
    sums = Accumulator(chosen, home=torch.device("cpu") if device.type in _WITHOUT_FLOAT64 else None)
    numbers: list[int] = []
    counts: list[int] = []
    found: list[Tensor] = []
    magnitudes: list[Tensor] = []
    repeats = True
    batches, stream = micro_batches(data, micro_batch)
    with progress.task("gradient", batches) as advance:
        for number, each in stream:
            batch = map_tensors(to_device(each, device), _at_boundary)
            terms = _backward(model, loss_terms, batch, sums)
            if not numbers and device.type != "cpu":
                repeats = _backward_repeats(model, loss_terms, batch, sums)
            magnitudes.append(sums.add_up())
            numbers.append(number)
            counts.append(len(terms))
            found.append(terms.to(magnitudes[-1].device).sum(dtype=torch.float64))
            advance()
    if not sum(counts):
        raise ConfigError(
            f"{len(counts)} batches gave no loss term. Are all targets masked, or is the data read only once?"
        )
    loss = torch.stack(found).cpu()
    _require_finite_losses(loss, numbers, micro_batch if indexed(data) else None)
    total = sums.totals()
    params.require_finite(total, "after the gradient pass")
    roundoff = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()) / 2
    groups = MicroBatches(micro_batch, torch.tensor(numbers), torch.tensor(counts), loss, torch.stack(magnitudes).cpu())
    return Gradient(
        total=total,
        count=sum(counts),
        loss=math.fsum(loss.tolist()),
        noise={name: m.mul_(4 * roundoff) for name, m in sums.magnitudes().items()},
        roundoff=roundoff,
        origin=Origin.of(model, loss_terms),
        micro_batches=groups if indexed(data) is not None and repeats else None,
    )


def _at_boundary(tensor: Tensor) -> Tensor:
    """The tensor, copied if it does not start where torch would put a new one.

    A micro-batch is a slice, and a deletion before it moves where it starts in memory. Matrix kernels take another
    path there and round differently, so that untouched micro-batches would not cancel (seen with MKL on AMD).
    """
    return tensor if tensor.data_ptr() % _BOUNDARY == 0 else tensor.clone()


def _backward(model: nn.Module, loss_terms: LossTerms, batch: Batch, sums: Accumulator) -> Tensor:
    """The loss terms of a micro-batch; the gradient of their sum is left with the accumulator."""
    sums.start()
    terms = checked_terms(loss_terms(model, batch))
    terms.backward(torch.ones_like(terms))
    return terms.detach()


def _backward_repeats(model: nn.Module, loss_terms: LossTerms, batch: Batch, sums: Accumulator) -> bool:
    """Whether a second backward pass gives the same bits, as kernels with atomic additions do not."""
    first = [flat.clone() for flat in sums.gradients]
    _backward(model, loss_terms, batch, sums)
    return all(torch.equal(own, again) for own, again in zip(first, sums.gradients, strict=True))


@contextmanager
def _exact_kernels(device: torch.device) -> Iterator[None]:
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
def _only_gradients_of(model: nn.Module, chosen: dict[str, nn.Parameter]) -> Iterator[None]:
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


def _require_finite_losses(losses: Tensor, numbers: list[int], size: int | None) -> None:
    bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    if bad:
        number = numbers[bad[0]]
        where = f" (positions {number * size} to {(number + 1) * size - 1})" if size else ""
        raise NotFinite(
            f"the loss of batch {number}{where} is {float(losses[bad[0]])}; {len(bad)} of {len(losses)} batches are "
            "not finite. Look at the inputs and targets of that batch."
        )
