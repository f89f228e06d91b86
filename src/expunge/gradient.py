"""`gradient()`: the sum of per-term gradients over data, exact enough that two of them can be subtracted.

What was removed shows up in a difference of two large, nearly equal sums, so everything here serves that
difference: the model in eval mode, unreduced losses, micro-batches that are the same in both passes, float64
accumulation, and a rounding floor for every entry that says what the difference cannot show.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from expunge import distributed, losses, params, progress, sharding
from expunge.accumulator import Accumulator, Place
from expunge.batches import Batch, Batches, LossTerms, indexed, micro_batches, require_reiterable
from expunge.checkpointing import recomputing, repeated_modules
from expunge.errors import ConfigError, MismatchError, NotFinite
from expunge.groups import Groups, in_groups, ranges
from expunge.params import Params
from expunge.passes import MicroBatches, Sums, exact_kernels, fitting, noticing_memory, only_gradients_of, sweep
from expunge.pooling import dealt, own, pooled, pooled_sums
from expunge.probe import EXAMPLES, probe
from expunge.seeds import keeping_random_state

MICRO_BATCH = 128


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
                "bit for bit; after an unlearning cache again, of what was left."
            )
        if self.buffers != now.buffers:
            raise MismatchError(
                f"{what} was taken with buffers {self.buffers[:12]}…, the model has {now.buffers[:12]}…: BatchNorm "
                "statistics (or another buffer) have moved since. Load the buffers saved with the weights, and run "
                "no data through the model in train mode."
            )
        if self.loss_terms != now.loss_terms:
            raise MismatchError(
                f"{what} is of the loss {self.loss_terms!r}, and now {now.loss_terms!r} is used. Use the same loss, or "
                "say of which the cache is: Blind(cached_loss=…), in a setup file cached_loss = …"
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
    groups: Groups | None = None  # the gradient of each range of micro-batches, if it was asked for
    recomputed: tuple[str, ...] = ()  # modules whose activations were computed again; the second pass does the same

    def __repr__(self) -> str:
        entries = sum(tensor.numel() for tensor in self.total.values())
        parts = f", {len(self.groups.totals)} groups" if self.groups else ""
        return (
            f"Gradient({self.count} terms of {self.origin.loss_terms}, mean {self.mean_loss:.4g}, {entries} entries in "
            f"{len(self.total)} tensors{parts})"
        )

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

    def placed_like(self, model: nn.Module) -> "Gradient":
        """The same, in pieces where FSDP2 has sharded the model."""
        named = params.named_parameters(model, self.total)
        total = {name: sharding.placed_like(tensor, named[name]) for name, tensor in self.total.items()}
        noise = self.noise and {n: sharding.placed_like(tensor, named[n]) for n, tensor in self.noise.items()}
        kept = self.groups if not sharding.is_sharded(model) else None
        return replace(self, total=total, noise=noise, groups=kept)

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

    def comparable(self, part: "Gradient") -> tuple[Tensor, Tensor] | None:
        """The losses of micro-batches from which no term is missing in a part, here and there.

        Returns:
            None where they say nothing: positions are not known in both, or terms were corrected and none removed.
        """
        mine, theirs = self.micro_batches, part.micro_batches
        if mine is None or theirs is None or mine.size != theirs.size or self.count == part.count:
            return None
        return mine.losses_of_as_many(theirs)

    def doubts(self, part: "Gradient") -> str:
        """Why the difference to a part may be void or coarse, though all that can be required holds; "" for no reason.

        Micro-batches from which no term is missing read as they did, but for some that were corrected. Where most are
        off by more than a thousandth (rounding on another machine is far below), it is another loss of the same name,
        or the records are not where they were. Where each micro-batch lost a term, the sum is all there is to go by: no
        loss that is never negative has a larger one over a part, unless records were corrected as well. Nothing is told
        where terms were corrected and none removed.
        """
        mine, theirs, pair = self.micro_batches, part.micro_batches, self.comparable(part)
        if mine is None or theirs is None or pair is None:
            return ""
        before, now = pair
        moved = (before - now).abs() > 1e-3 * before.abs()
        name = self.origin.loss_terms
        if len(before) > 1 and 2 * int(moved.sum()) > len(before):
            first = int(moved.nonzero()[0])
            return (
                f"{int(moved.sum())} of {len(before)} micro-batches with as many terms as in the cache have another "
                f"loss than they had (the first {float(before[first]):.4g}, now {float(now[first]):.4g}). Are the "
                f"model's code, the loss {name!r} or the preprocessing others? Then the difference means nothing: "
                "use those of the cache. Were positions counted anew after the deletion? Then nothing cancels exactly: "
                "give what is left with the positions it had."
            )
        never_negative = bool((mine.losses >= 0).all() and (theirs.losses >= 0).all())
        if not len(before) and never_negative and self.loss < part.loss:
            return (
                f"the loss of all data was {self.loss:.4g} when it was cached, and that of what is left is "
                f"{part.loss:.4g}. Unless records were corrected as well, it is another loss of the name {name!r}, or "
                "the data changed, and the difference means nothing: use the loss and the data of the cache."
            )
        return ""

    def _noise_of_difference(self, part: "Gradient", total: Params) -> Params | None:
        if self.noise is None or part.noise is None:
            return None
        mine, theirs = self.micro_batches, part.micro_batches
        aligned = mine is not None and theirs is not None and mine.size == theirs.size
        if aligned:
            assert mine is not None
            assert theirs is not None
            # A touched micro-batch was rounded once in each pass, in proportion to its size.
            _, touched = mine.touched_by(theirs)
            accumulation = 2**-54 * math.sqrt(len(mine.numbers)) / self.roundoff  # of the float64 sums
        # The removed gradient itself was rounded too, wherever it was summed up.
        own = 32 * max(self.roundoff, part.roundoff)
        noise = {}
        for name, floor in self.noise.items():
            if aligned:
                passes = spread(floor) * touched + floor * accumulation
            else:
                passes = spread(floor + part.noise[name].to(floor.device))
            stored = self.storage_roundoff * self.total[name].abs()
            noise[name] = passes + (own * total[name].abs() + stored).to(passes)
        return noise


def spread(floor: Tensor) -> Tensor:
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
    micro_batch: int | None = None,
    accumulate_on: Place | None = None,
    groups: int | None = None,
    checkpoint: bool | Iterable[str] = False,
) -> Gradient:
    """Sum the gradients of all loss terms over the data, once through, in eval mode.

    Everything is left as it was found: weights, ``.grad``, ``requires_grad``, training flags, global generators.
    A few examples are tried first, to refuse a loss under which a difference of gradients would mean nothing.

    Args:
        model: Any module. For a cache: the trained model, after its last update.
        loss_terms: Unreduced losses of a batch, shape (terms,).
        data: `Examples`, a map-style `Dataset`, a `DataLoader`, or any re-iterable of batches.
        parameters: Names, or a predicate of name and parameter. By default all that require a gradient.
        micro_batch: Positions a micro-batch, for data with positions; other data keeps its own batches. By default
            128, halved until it fits in memory: the result says what it came to, and the second pass must use the
            same. A number given here is kept: what does not fit goes through the model in parts, with a warning.
        accumulate_on: "device": sums beside the model, 16 bytes an entry in float32. "cpu": sums on the CPU, and of
            gradients only one parameter's at a time on the device; slower for small tensors, and the same bits. By
            default on the CPU if the sums would take more than half of the memory that a GPU has free.
        groups: Keep the gradient of each of so many ranges of positions besides, 8 bytes an entry each. After a
            deletion only the ranges that lost a record are computed again; see `second_pass`.
        checkpoint: Modules, by names or patterns, whose activations are computed again in the backward pass, which
            takes less memory and one forward pass more; True for the blocks of the longest list of modules. The second
            pass of an unlearning does the same.

    Returns:
        Float64 sums on the model's device (on the CPU for devices without float64).

    Raises:
        ConfigError: Nothing trainable, no data, an unusable loss or micro-batch, groups or modules that cannot be.
        OutOfMemory: A single example does not fit.
        NonDeterministicLoss: Dropout, noise, random augmentation, or a loss that depends on the batch.
        NotFinite: NaN or infinity in the weights, a loss (names the batch) or the gradient (names the tensor).
    """
    return take(
        model,
        loss_terms,
        data,
        parameters=parameters,
        micro_batch=micro_batch,
        accumulate_on=accumulate_on,
        groups=groups,
        checkpoint=checkpoint,
    )


def take(
    model: nn.Module,
    loss_terms: LossTerms,
    data: Batches,
    *,
    parameters: params.Select | None = None,
    micro_batch: int | None = None,
    accumulate_on: str | None = None,
    groups: int | None = None,
    checkpoint: bool | Iterable[str] = False,
    only: Callable[[int], bool] | None = None,
) -> Gradient:
    """`gradient()` over some of the micro-batches, perhaps none: those whose number is wanted."""
    losses.require_loss_terms(loss_terms)
    if micro_batch is not None and (not isinstance(micro_batch, int) or micro_batch < 1):
        raise ConfigError(f"micro_batch={micro_batch}: it is a whole number of positions, at least one.")
    sharding.settle(model)
    sharded = sharding.is_sharded(model)
    if groups is not None and sharded:
        raise ConfigError(
            f"groups={groups}: gradients of groups are not kept of a model that FSDP2 has sharded. Leave groups out; "
            "the second pass then goes through all that is left."
        )
    chosen = params.named_parameters(model, parameters)
    known = indexed(data)
    if known is not None:
        distributed.require_alike("data", params.fingerprint({"positions": known.positions}))
    if groups is not None:
        ranges(data, micro_batch or MICRO_BATCH, groups)  # refuses them before anything is computed
    buffers = {n: b.nan_to_num(math.nan, 0, 0) for n, b in model.named_buffers()}  # a mask may hold infinity
    params.require_finite(dict(model.named_parameters()) | buffers, "before the gradient pass")
    device = next(iter(chosen.values())).device

    def probed(few: int | None) -> None:
        assert few is not None
        with noticing_memory(few):
            probe(model, loss_terms, data, device, few)
            sharding.settle(model)

    def empty() -> Accumulator:
        with noticing_memory(1):
            return pooled_sums(model, chosen, accumulate_on)

    def whole(at_once: int | None) -> Gradient:
        size = (at_once or MICRO_BATCH) if micro_batch is None else micro_batch
        sums = empty() if groups is None else None
        batches, stream = dealt(data, size, sums, only) if sums else micro_batches(data, size, only)
        with progress.task("gradient", batches) as advance:

            def through(own: Iterable[tuple[int, Batch]], sums: Accumulator) -> Sums:
                work = partial(sweep, model, loss_terms, own, sums, size=size, at_once=at_once, advance=advance)
                return pooled(work, in_step=sharded)

            if sums is not None:
                found, parts = through(stream, sums), None
            else:
                assert groups is not None
                found, parts = in_groups(lambda each: through(own(each), empty()), stream, *ranges(data, size, groups))
        aligned = indexed(data) is not None and found.repeats
        if groups is not None and not aligned:
            warnings.warn(
                f"groups={groups}: a second backward pass gave other bits on this device, so that nothing would cancel "
                "exactly: no groups are kept, and a deletion takes a whole pass. Take the cache on a CPU to have them.",
                stacklevel=4,
            )
        finished = _finished(model, loss_terms, found, parts, aligned=aligned, whole=only is None)
        return replace(finished, recomputed=tuple(repeated))

    repeated = repeated_modules(model, checkpoint)
    again = recomputing(repeated.values())
    with (
        distributed.failing_together(),
        keeping_random_state(),
        exact_kernels(device),
        only_gradients_of(model, chosen),
        again,
    ):
        require_reiterable(data, "the data")
        start = None if indexed(data) is None or sharded else micro_batch or MICRO_BATCH
        fitting(probed, EXAMPLES, device)
        result, at_once = fitting(whole, start, device)
    if micro_batch is not None and at_once is not None and at_once < micro_batch:
        warnings.warn(
            f"micro-batches of {micro_batch} examples do not fit in memory and went through the model {at_once} at "
            "a time. Their gradients have other bits than whole ones: against a pass on a larger machine nothing "
            "cancels, and the rounding floor rises to say so.",
            stacklevel=3,
        )
    return result


def _finished(
    model: nn.Module, loss_terms: LossTerms, found: Sums, parts: Groups | None, *, aligned: bool, whole: bool
) -> Gradient:
    """The gradient that a pass found."""
    seen = found.seen
    if whole and not int(seen.counts.sum()):
        raise ConfigError(
            f"{len(seen.counts)} batches gave no loss term. Are all targets masked, or is the data read only once?"
        )
    _require_finite_losses(seen, aligned)
    params.require_finite(found.total, "after the gradient pass")
    roundoff = max(torch.finfo(dtype).eps for dtype in sharding.computed_in(model)) / 2
    origin = Origin.of(model, loss_terms)
    distributed.require_alike("weights, buffers or loss", str(origin))
    return Gradient(
        total=found.total,
        count=int(seen.counts.sum()),
        loss=math.fsum(seen.losses.tolist()),
        noise={name: m.mul_(4 * roundoff) for name, m in found.magnitudes.items()},
        roundoff=roundoff,
        origin=origin,
        micro_batches=seen if aligned else None,
        groups=parts if aligned else None,
    )


def _require_finite_losses(seen: MicroBatches, aligned: bool) -> None:
    bad = (~torch.isfinite(seen.losses)).nonzero().flatten().tolist()
    if bad:
        number = int(seen.numbers[bad[0]])
        where = f" (positions {number * seen.size} to {(number + 1) * seen.size - 1})" if aligned else ""
        raise NotFinite(
            f"the loss of batch {number}{where} is {float(seen.losses[bad[0]])}; {len(bad)} of {len(seen.losses)} "
            "batches are not finite. Look at the inputs and targets of that batch."
        )
