"""The gradient of what is left, computed the way the cached one was, so that the two can be subtracted."""

import math
from typing import Any, NamedTuple

import torch
from torch import nn

from expunge import params
from expunge.accumulator import Place
from expunge.batches import Batches, LossTerms, indexed
from expunge.gradient import MICRO_BATCH, Gradient, gradient, take
from expunge.groups import Groups
from expunge.passes import MicroBatches


class SecondPass(NamedTuple):
    """The gradient of what is left, and what it took."""

    gradient: Gradient
    computed: int  # terms that went forward and backward
    groups: int  # of the cached gradient, that were computed; 0 if it has none


def second_pass(
    full: Gradient, model: nn.Module, loss_terms: LossTerms, data: Batches, *, accumulate_on: Place | None = None
) -> SecondPass:
    """The gradient of other data at the weights of a cached gradient, with its parameters and micro-batches.

    If the cached one has groups, only those are computed of which something is missing or reads differently; the others
    are taken from it, and cancel exactly whatever machine computed them. They are still read, to be compared with
    their hashes. The rounding floor of the result is then one from above: it counts the touched groups twice.

    Args:
        full: Of all data.
        model: With the weights and buffers that it was taken at.
        loss_terms: The loss that it was taken of.
        data: What is left, or its corrected form, with the positions it had.
        accumulate_on: As of `gradient`.

    Returns:
        What ``full - …`` subtracts, and how much of it was computed.

    Raises:
        MismatchError: Other weights, buffers or loss than those of the cached gradient.
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
        return SecondPass(whole, whole.count, len(groups.totals) if groups is not None else 0)
    touched = groups.touched(data, size)
    part = take(model, loss_terms, data, **alike, only=lambda number: groups.of(number) in touched)
    full.origin.require(part.origin, "the cached gradient")
    return SecondPass(_patched(full, part, known, groups, touched), part.count, len(touched))


def _patched(full: Gradient, part: Gradient, known: MicroBatches, groups: Groups, touched: set[int]) -> Gradient:
    """The whole, with the touched groups as they are now."""
    assert full.noise is not None
    assert part.noise is not None
    removed = {name: -tensor.to(full.total[name].device) for name, tensor in part.total.items()}
    for group in sorted(touched):
        for name, tensor in groups.totals[group].items():
            removed[name].add_(tensor.to(removed[name].device))
    kept = torch.tensor([groups.of(number) not in touched for number in known.numbers.tolist()])
    untouched = known.where(kept)
    return Gradient(
        total=params.subtract(full.total, removed),
        count=int(untouched.counts.sum()) + part.count,
        loss=math.fsum(untouched.losses.tolist()) + part.loss,
        noise={name: floor + part.noise[name].to(floor.device) for name, floor in full.noise.items()},
        roundoff=part.roundoff,
        origin=part.origin,
        micro_batches=untouched.joined(part.micro_batches) if part.micro_batches is not None else None,
    )
