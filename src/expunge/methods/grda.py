"""GRDA: step up the loss on the original data and down the loss on the corrected data, both at once.

Source: "Blind Unlearning: Unlearning Without a Forget Set", section 4.3 (Gradient Difference Ascent, a baseline for
corrections). Deviations: the paper moves "in the opposite direction" of ∇L(D) - ∇L(D_new), "fitting D_new", from a
gradient update, that is θ + η (∇L(D) - ∇L(D_new)): the other sign would fit D. An epoch is one step over all data,
``lr`` / ``batch_size`` times the difference of the summed gradients: as far as one epoch of mini-batches goes, to
first order. Gradients are taken in eval mode, so BatchNorm statistics stay as they are. A step after which the loss on
what is left passes a bound is taken back, and ends it.

Needs: all of the original data beside what is left (or its corrected form), at every step; any loss.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from expunge import params
from expunge.access import Sighted
from expunge.errors import ConfigError, ForgetSetAccessed
from expunge.gradient import gradient
from expunge.methods.guard import taking_back
from expunge.space import Range, Space
from expunge.trace import Trace
from expunge.training import mean_loss


@dataclass(frozen=True, kw_only=True)
class GRDA:
    """Steps along the gradient on the original data minus that on the corrected data.

    Raises:
        ConfigError: A value that cannot work.
    """

    epochs: int = 10  # steps, each over all data
    lr: float = 1e-3  # η: learning rate on the mean loss of a batch
    batch_size: int = 128  # examples in such a batch: a step is lr / batch_size times a sum over all data
    loss_bound: float = 5.0  # mean loss on what is left, nats a term, at which to end

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ConfigError(f"epochs={self.epochs}, batch_size={self.batch_size}: must be at least 1.")
        for name, value in (("lr", self.lr), ("loss_bound", self.loss_bound)):
            if not 0 < value < math.inf:
                raise ConfigError(f"{name}={value}: must be a positive number.")


SPACE: Space = {"lr": Range(1e-4, 3.0, log=True), "epochs": Range(1, 20)}


def grda(model: nn.Module, given: Sighted, config: GRDA, *, seed: int, trace: Trace) -> nn.Module:  # noqa: ARG001
    """θ ← θ + η (g_D - g_new) / batch, once an epoch, with both gradients at the present θ.

    ``trace.losses`` holds the mean loss on what is left before each step. Nothing is drawn: every seed gives the same.

    Raises:
        ForgetSetAccessed: The original data was not given.
        MismatchError: What is left has more terms than the original data, or positions that it has not.
    """
    original = given.original
    if original is None:
        raise ForgetSetAccessed(
            "original=None: grda needs the gradient of all of the original data at every step and was not given it. "
            "Give Sighted(original=…), or take reload, which makes one such step from a cached gradient."
        )
    theta = params.named_parameters(model)
    stop = taking_back(
        model,
        config.loss_bound,
        lambda now: mean_loss(now, given.retain, given.loss_terms, trace),
        trace=trace,
    )
    trace.stopped = f"all {config.epochs} epochs done"
    with trace.stage("steps", model):
        for epoch in range(config.epochs):
            full = gradient(model, given.loss_terms, original)  # at θ, not at θ*: no cache can help
            retain = gradient(model, given.loss_terms, given.retain)
            trace.backwarded += full.count + retain.count
            trace.losses.append(retain.mean_loss)
            trace.epoch_ends.append(len(trace.losses))
            with torch.no_grad():
                for name, direction in (full - retain).total.items():
                    theta[name].add_((config.lr / config.batch_size * direction).to(theta[name]))
            trace.show(f"epoch {epoch + 1}", model)
            reason = stop(model, retain.mean_loss)
            if reason:
                trace.stopped = reason
                break
    return model
