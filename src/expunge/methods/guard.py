"""The guard against destroying a model: what brought the loss past a bound is taken back, and that is noted."""

from collections.abc import Callable

import torch
from torch import nn

from expunge.trace import Trace
from expunge.training import StopRule

SLOWER = "Lower the learning rate, or raise loss_bound if the loss is that large by nature."
LESS_ASCENT = "Lower the learning rate of the ascent for a finer end."


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

    Args:
        model: The module that is trained; its state now is the first good one.
        bound: Mean loss, nats a term.
        loss_of: The loss to look at; without it, the mean training loss of the epoch, which costs nothing and is a
            step late.
        trace: Gets a warning with the reason and the cure.
        what: What is taken back, for the reason it gives.
        cure: What to do about it.
    """
    last = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def stop(model: nn.Module, training_loss: float) -> str | None:
        reached = loss_of(model) if loss_of else training_loss
        state = model.state_dict()
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


def note_if_nothing_was_learned(trace: Trace) -> None:
    """Warn if a training from scratch ended no better than it began: there is no better state to go back to."""
    if not trace.losses:
        return
    last_epoch = trace.losses[trace.epoch_ends[-2] if len(trace.epoch_ends) > 1 else 0 :]
    first, reached = trace.losses[0], sum(last_epoch) / len(last_epoch)
    if reached >= first:
        trace.warn(
            f"{trace.method}: training from scratch ended at a loss of {reached:.3g}, where it began at {first:.3g}: "
            "nothing was learned. Lower the learning rate."
        )
