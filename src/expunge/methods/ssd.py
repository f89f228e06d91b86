"""SSD: shrink the weights that matter far more to the removed records than to all of the data. No training.

Source: Foster et al., "Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening" (AAAI 2024;
2023). The importance F of a weight is the mean over records of its squared gradient (the diagonal of the empirical
Fisher information): F_f over the removed records, F_D over all data. Where F_f > α F_D, θ becomes
θ min(λ F_D / F_f, 1).

Deviations: importances are taken in eval mode. ``squares="batch-means"`` is the published code, which squares the mean
gradient of each batch instead; it is faster, and smaller by a factor that depends on the batch. F_D may be kept from
the end of training (`importance`). Without it, and without the original data at hand, all data is what is left together
with the removed records, which are read once.

Needs: any loss.
"""

import math
from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from expunge import params
from expunge.access import Sighted
from expunge.batches import Batches, LossTerms, in_rows, require_reiterable, to_device
from expunge.errors import ConfigError
from expunge.gradient import Origin
from expunge.importance import Importance, Squares
from expunge.methods.classifier import in_eval_mode
from expunge.methods.guard import taking_back
from expunge.methods.per_example import squared_gradients
from expunge.params import Params
from expunge.space import Range, Space
from expunge.trace import Trace
from expunge.training import mean_loss


@dataclass(frozen=True, kw_only=True)
class SSD:
    """Dampen the weights that matter far more to the removed records than to all of the data.

    Raises:
        ConfigError: A value that cannot work.
    """

    selection: float = 10.0  # α: how many times as important to the removed records a weight must be
    dampening: float = 1.0  # λ: scales what is left of a dampened weight
    squares: Squares = "records"  # the gradient of every record is squared, or only the mean of every batch
    batch_size: int = 128  # examples a batch-mean, for data with positions
    loss_bound: float = 5.0  # mean loss on what is left, nats a term, past which the dampening is taken back

    def __post_init__(self) -> None:
        for name in ("selection", "dampening", "loss_bound"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)}: must be a positive number.")
        if self.squares not in get_args(Squares):
            raise ConfigError(f"squares={self.squares!r}: choose from {', '.join(get_args(Squares))}.")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size={self.batch_size}: must be at least 1.")


# The removed records are part of all data, so that F_f / F_D is at most n / n_f: 10 if a tenth was removed. From there
# on nothing is selected.
SPACE: Space = {"selection": Range(1.0, 10.0, log=True), "dampening": Range(0.1, 5.0, log=True)}


def ssd(model: nn.Module, given: Sighted, config: SSD, *, seed: int, trace: Trace) -> nn.Module:  # noqa: ARG001
    """Two importances, then one multiplication; every seed gives the same.

    ``trace.facts``: dampened_count (entries), dampened_norm (Euclidean norm of what was taken off), retain_loss
    (mean, nats a term, after the dampening).

    Raises:
        MismatchError: The kept importance was taken at other weights or buffers, or of something else.
    """
    theta = params.named_parameters(model)

    def loss_of(now: nn.Module) -> float:
        trace.facts["retain_loss"] = reached = mean_loss(now, given.retain, given.loss_terms, trace)
        return reached

    cure = "Raise selection or dampening."
    check = taking_back(model, config.loss_bound, loss_of, trace=trace, what="the dampening", cure=cure)

    def of(data: Batches) -> Importance:
        return importance(
            model, given.loss_terms, data, squares=config.squares, batch_size=config.batch_size, trace=trace
        )

    with trace.stage("importance", model):
        removed = of(given.forget)
        if given.importance is not None:
            full = given.importance
            full.require_like(removed)
        elif given.original is not None:
            full = of(given.original)
        else:
            full = of(given.retain) + removed

    with trace.stage("dampen", model):
        before = params.snapshot(theta)
        part = removed.mean()
        whole = {name: each.to(part[name]) for name, each in full.mean().items()}
        chosen = dampen_(theta, part, whole, config.selection, config.dampening)
        count = params.count(chosen)
        change = params.subtract(before, params.snapshot(theta))
        trace.facts |= {"dampened_count": count, "dampened_norm": params.norm(change)}
        trace.stopped = f"{count} of {params.size(chosen)} entries dampened"
        if not count:
            most = full.count / removed.count
            hint = f"No weight can be, from {most:.3g} on: that is how many of all data there are for a removed one. "
            trace.warn(
                f"no entry is {config.selection:g} times as important to the removed records as to all data, so "
                f"nothing was changed. {hint if config.selection >= most else ''}Lower selection."
            )

    with trace.stage("check", model):
        trace.stopped = check(model, math.nan) or trace.stopped
    return model


def importance(
    model: nn.Module,
    loss_terms: LossTerms,
    data: Batches,
    *,
    squares: Squares = "records",
    batch_size: int = 128,
    trace: Trace | None = None,
) -> Importance:
    """How much the loss on some data depends on each weight, in eval mode; the model is left as it was found.

    Taken of all data when training ends, and kept, it spares SSD all passes but one over the removed records.

    Args:
        model: Any module; the parameters that require a gradient take part.
        loss_terms: Unreduced losses of a batch; for "records" as many for every example.
        data: Any; for "records" batches whose tensors all have an example a row.
        squares: The gradient of every record is squared, or only the mean gradient of every batch.
        batch_size: Examples a batch-mean, for data with positions; other data keeps its own batches.
        trace: Where to count the terms, as ``backwarded``.

    Returns:
        Sums in float64 (float32 on devices without it), with the fingerprints of the model.

    Raises:
        UnsupportedModule: For "records": the model, the loss or the batches cannot be taken apart into examples.
        NonDeterministicLoss: For "records": dropout, noise, or a loss that depends on the batch.
        NotFinite: A loss or a gradient is NaN or infinite.
        ConfigError: Data that is empty or can be read only once, or settings that `SSD` refuses, too.
    """
    SSD(squares=squares, batch_size=batch_size)
    require_reiterable(data, "the data")
    counter = Trace("importance", 0)
    if squares == "records":
        total = squared_gradients(model, loss_terms, data, trace=counter)
        count = counter.backwarded
    else:
        total, count = squared_batch_means(model, loss_terms, data, batch_size, counter)
    if trace is not None:
        trace.backwarded += counter.backwarded
    params.require_finite(total, "squared gradients of the loss")
    return Importance(total, count, squares, batch_size, Origin.of(model, loss_terms))


def squared_batch_means(
    model: nn.Module, loss_terms: LossTerms, data: Batches, size: int, trace: Trace
) -> tuple[Params, int]:
    """The squared gradient of the mean loss of every batch, in eval mode, summed; and the number of batches."""
    theta = params.named_parameters(model)
    device = next(iter(theta.values())).device
    wide = params.wide(device)
    total = {name: torch.zeros_like(p, dtype=wide) for name, p in theta.items()}
    count = 0
    with in_eval_mode(model), torch.enable_grad():
        for batch in in_rows(data, size):
            terms = loss_terms(model, to_device(batch, device))
            grads = torch.autograd.grad(terms.mean(), list(theta.values()), allow_unused=True)
            for name, grad in zip(theta, grads, strict=True):
                if grad is not None:
                    total[name] += grad.to(wide).square()
            trace.backwarded += len(terms)
            count += 1
    return total, count


@torch.no_grad()
def dampen_(
    theta: dict[str, nn.Parameter], removed: Params, full: Params, selection: float, dampening: float
) -> dict[str, Bool[Tensor, "..."]]:
    """θ ← θ min(λ F_D / F_f, 1) where F_f > α F_D; returns where."""
    chosen = {}
    for name, p in theta.items():
        chosen[name] = removed[name] > selection * full[name]
        factor = (dampening * full[name] / removed[name]).clamp(max=1)
        p.copy_(torch.where(chosen[name], p * factor, p))
    return chosen
