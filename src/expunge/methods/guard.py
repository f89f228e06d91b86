"""The guard against destroying a model: what brought the loss past a bound is taken back, and that is noted."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from expunge import distributed, params
from expunge.access import Blind
from expunge.batches import Batch, Batches, shuffled
from expunge.errors import ConfigError
from expunge.seeds import keeping_random_state, stream
from expunge.trace import Trace
from expunge.training import StopRule, mean_loss

SLOWER = "Lower the learning rate, or raise loss_bound if the loss is that large by nature."
DESTROYED = "the model is destroyed"
LESS_ASCENT = "Lower the learning rate of the ascent for a finer end."


def require_bound(loss_bound: float) -> None:
    """Refuse a bound on the loss that cannot be one.

    Raises:
        ConfigError: It is no positive number.
    """
    if not 0 < loss_bound < math.inf:
        raise ConfigError(f"loss_bound={loss_bound}: must be a positive number of nats a term.")


class MeanOfEpoch:
    """The mean over the loss terms of an epoch, of all processes together: `loss_of` where not all terms count."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._count = 0

    def add(self, terms: Tensor) -> None:
        """Count the terms of a batch in."""
        self._sums.append(terms.detach().sum())
        self._count += terms.numel()

    def __call__(self, _: nn.Module) -> float:
        """The mean, 0 of nothing; what follows is of the next epoch."""
        total, count = distributed.summed([float(torch.stack(self._sums).sum()) if self._sums else 0.0, self._count])
        self._sums.clear()
        self._count = 0
        return total / count if count else 0.0


def taking_back(
    model: nn.Module,
    bound: float,
    loss_of: Callable[[nn.Module], float] | None = None,
    *,
    trace: Trace,
    what: str = "the epoch",
    cure: str = SLOWER,
) -> StopRule:
    """A stop rule that restores the last good state, weights and buffers, once the loss passes the bound.

    It looks at whole epochs. A loss that becomes NaN or infinite within one ends `train` with `NotFinite`.

    Args:
        model: The module that is trained; its state now is the first good one.
        bound: Mean loss, nats a term.
        loss_of: The loss to look at; without it, the mean training loss of the epoch, which costs nothing and is a
            step late.
        trace: Gets a warning with the reason and the cure.
        what: What is taken back, for the reason it gives.
        cure: What to do about it.
    """
    last = {name: tensor.clone() for name, tensor in params.state(model).items()}

    @torch.no_grad()
    def stop(model: nn.Module, training_loss: float) -> str | None:
        reached = loss_of(model) if loss_of else training_loss
        state = params.state(model)
        if not reached <= bound:
            for name, tensor in state.items():
                tensor.copy_(last[name])
            reason = f"the loss {reached:.3g} passed the bound {bound:g}; {what} was taken back"
            trace.warn(f"{trace.method}: {reason}. {cure}")
            return reason
        for name, tensor in state.items():
            last[name].copy_(tensor)
        return None

    return stop


def keeping_what_is_left(model: nn.Module, given: Blind, bound: float, trace: Trace, epochs: int) -> StopRule:
    """Go back to the last good state if training ends with the loss on a few records of what is left past the bound.

    An epoch in between may pass it: at a high learning rate the first one often does, and what follows is fine. Where
    that loss is large to begin with, by its nature or after an ascent, twice as much is the bound.

    Args:
        model: The module that is trained; its state now is the first good one.
        given: With what is left.
        bound: Mean loss, nats a term.
        trace: Gets a warning with the reason and the cure, and counts the forward passes.
        epochs: How many there will be.
    """
    few = a_few(given.retain, trace.seed)
    limit = max(bound, 2 * mean_loss(model, few, given.loss_terms, trace))
    good = {name: tensor.clone() for name, tensor in params.state(model).items()}
    epoch = good_epoch = 0

    @torch.no_grad()
    def stop(model: nn.Module, _: float) -> str | None:
        nonlocal epoch, good_epoch
        epoch += 1
        reached, state = mean_loss(model, few, given.loss_terms, trace), params.state(model)
        if reached <= limit:
            good_epoch = epoch
            for name, tensor in state.items():
                good[name].copy_(tensor)
        elif epoch == epochs:
            for name, tensor in state.items():
                tensor.copy_(good[name])
            reason = f"the loss {reached:.3g} passed the bound {limit:g}; all after epoch {good_epoch} was taken back"
            trace.warn(f"{trace.method}: {reason}. {SLOWER}")
            return reason
        return None

    return stop


def a_few(data: Batches, seed: int) -> list[Batch]:
    """A few hundred records at random, or the first batch of data without positions: enough to see a wreck."""
    with keeping_random_state():
        return [next(shuffled(data, 256, stream(seed, "guard"))[1])]


def note_what_was_lost(before: nn.Module, after: nn.Module, given: Blind, trace: Trace) -> None:
    """Warn if a model lost a tenth or more of what training had gained on what is left; a few tell, off the clock."""
    few = a_few(given.retain, trace.seed)
    was, now = (mean_loss(model, few, given.loss_terms) for model in (before, after))
    if now <= 2 * was + 0.1:  # the rule; only in doubt is an untrained model built
        return
    went = f"{trace.method}: the loss on what is left went from {was:.3g} to {now:.3g} a term"
    try:
        fresh = given.fresh_model(trace.seed, before).to(next(before.parameters()).device)
        untrained = mean_loss(fresh, few, given.loss_terms)
    except Exception as error:  # whatever `fresh` raises: what is done must not be lost for want of a comparison
        trace.warn(f"{went}. How an untrained model does cannot be told: fresh() failed ({error}).")
        return
    went += f", and an untrained model has {untrained:.3g}"
    if not now < 0.9 * untrained:
        trace.warn(f"{went}: {DESTROYED}. Choose weaker settings, or fewer steps.")
    elif now - was >= 0.1 * (untrained - was):
        trace.warn(
            f"{went}: {(now - was) / (untrained - was):.0%} of what training had gained there is lost. Fine-tune for "
            "longer, as the model was trained, or choose weaker settings: `expunge rehearse` finds some."
        )


def note_if_nothing_was_learned(trace: Trace) -> None:
    """Warn if a training from scratch ended no better than it began: there is no better state to go back to."""
    if len(trace.losses) < 2:  # of a single step only the loss before it is known
        return
    last_epoch = trace.losses[trace.epoch_ends[-2] if len(trace.epoch_ends) > 1 else 0 :]
    first, reached = trace.losses[0], sum(last_epoch) / len(last_epoch)
    if reached >= first:
        trace.warn(
            f"{trace.method}: training from scratch ended at a loss of {reached:.3g}, where it began at {first:.3g}: "
            "nothing was learned. Lower the learning rate."
        )
