"""The gradient of what is left, computed the way the cached one was, so that the two can be subtracted."""

import math
from typing import Any, NamedTuple

import torch
from torch import nn

from expunge import params
from expunge.accumulator import Place
from expunge.batches import Batches, LossTerms, indexed, micro_batches, to_device
from expunge.errors import MismatchError
from expunge.gradient import MICRO_BATCH, Gradient, gradient, take
from expunge.groups import Groups
from expunge.losses import name_of
from expunge.passes import MicroBatches, exact_kernels
from expunge.probe import checked_terms
from expunge.seeds import keeping_random_state


class SecondPass(NamedTuple):
    """The gradient of what is left, and what it took."""

    gradient: Gradient
    computed: int  # terms that went forward and backward
    looked_at: int  # terms that went forward alone
    groups: int  # of the cached gradient, that were computed; 0 if it has none
    compared: int  # micro-batches that were computed with as many terms as they had, so that their losses can tell


def second_pass(
    full: Gradient, model: nn.Module, loss_terms: LossTerms, data: Batches, *, accumulate_on: Place | None = None
) -> SecondPass:
    """The gradient of other data at the weights of a cached gradient, with its parameters and micro-batches.

    If the cached one has groups, only those are computed of which something is missing or reads differently; the others
    are taken from it, and cancel exactly whatever machine computed them. They are still read, to be compared with
    their hashes, and one micro-batch of them goes forward, to be compared with its loss. The rounding floor of the
    result is then one from above: it counts the touched groups twice.

    Args:
        full: Of all data.
        model: With the weights and buffers that it was taken at.
        loss_terms: The loss that it was taken of.
        data: What is left, or its corrected form, with the positions it had.
        accumulate_on: As of `gradient`.

    Returns:
        What ``full - …`` subtracts, and how much of it was computed.

    Raises:
        MismatchError: Other weights, buffers or loss than those of the cached gradient; a micro-batch of an untouched
            group has another loss.
        ConfigError, OutOfMemory, NonDeterministicLoss, NotFinite: As of `gradient`.
    """
    known, groups = full.micro_batches, full.groups
    size = known.size if known is not None else MICRO_BATCH
    alike: dict[str, Any] = {
        "parameters": full.total,
        "micro_batch": size,
        "accumulate_on": accumulate_on,
        "checkpoint": full.recomputed,
    }
    if known is None or groups is None or indexed(data) is None:
        whole = gradient(model, loss_terms, data, **alike)
        pair = full.comparable(whole)
        compared = len(pair[0]) if pair else 0
        return SecondPass(whole, whole.count, 0, len(groups.totals) if groups is not None else 0, compared)
    touched = groups.touched(data, size)
    part = take(model, loss_terms, data, **alike, only=lambda number: groups.of(number) in touched)
    full.origin.require(part.origin, "the cached gradient")
    pair, kept = full.comparable(part), known.where(~groups.among(known.numbers, touched))
    compared, looked_at = len(pair[0]) if pair else 0, 0
    if len(kept.numbers):
        compared, looked_at = compared + 1, _require_same_loss(kept, model, loss_terms, data)
    return SecondPass(_patched(full, part, kept, groups, touched), part.count, looked_at, len(touched), compared)


def _require_same_loss(kept: MicroBatches, model: nn.Module, loss_terms: LossTerms, data: Batches) -> int:
    """Refuse a first micro-batch that has another loss, though it reads as it did: by more than rounding elsewhere.

    Returns:
        How many terms it has.
    """
    number, then = int(kept.numbers[0]), float(kept.losses[0])
    device = next(model.parameters()).device
    ((_, batch),) = micro_batches(data, kept.size, lambda each: each == number)[1]
    with exact_kernels(device), params.restoring_modes(model), keeping_random_state(), torch.no_grad():
        model.eval()
        terms = checked_terms(loss_terms(model, to_device(batch, device)))
    now = float(terms.sum(dtype=params.wide(terms.device)))
    if not abs(then - now) <= 1e-3 * abs(then):
        raise MismatchError(
            f"micro-batch {number} reads as it did when the gradient was cached, and its loss is {now:.4g}, where it "
            f"was {then:.4g}: the model's code, or the loss {name_of(loss_terms)!r}, is another. Use those of the "
            "cache."
        )
    return len(terms)


def _patched(full: Gradient, part: Gradient, untouched: MicroBatches, groups: Groups, touched: set[int]) -> Gradient:
    """The whole, with the touched groups as they are now."""
    assert full.noise is not None
    assert part.noise is not None
    removed = {name: -tensor.to(full.total[name].device) for name, tensor in part.total.items()}
    for group in sorted(touched):
        for name, tensor in groups.totals[group].items():
            removed[name].add_(tensor.to(removed[name].device))
    return Gradient(
        total=params.subtract(full.total, removed),
        count=int(untouched.counts.sum()) + part.count,
        loss=math.fsum(untouched.losses.tolist()) + part.loss,
        noise={name: floor + part.noise[name].to(floor.device) for name, floor in full.noise.items()},
        roundoff=part.roundoff,
        origin=part.origin,
        micro_batches=untouched.joined(part.micro_batches) if part.micro_batches is not None else None,
    )
