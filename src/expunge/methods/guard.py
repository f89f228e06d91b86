"""The guard against destroying a model: an epoch after which the loss is past a bound is taken back."""

from collections.abc import Callable

import torch
from torch import nn

from expunge.training import StopRule


def taking_back(
    model: nn.Module, bound: float, loss_of: Callable[[nn.Module], float] | None = None, *, what: str = "the epoch"
) -> StopRule:
    """A stop rule that restores the last good state, weights and buffers, once the loss passes the bound.

    Args:
        model: The module that is trained; its state now is the first good one.
        bound: Mean loss, nats a term.
        loss_of: The loss to look at; without it, the mean training loss of the epoch, which costs nothing and is a
            step late.
        what: What is taken back, for the reason it gives.
    """
    last = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def stop(model: nn.Module, training_loss: float) -> str | None:
        reached = loss_of(model) if loss_of else training_loss
        state = model.state_dict()
        if not reached <= bound:
            for name, tensor in state.items():
                tensor.copy_(last[name])
            return f"the loss {reached:.3g} passed the bound {bound:g}; {what} was taken back"
        for name, tensor in state.items():
            last[name].copy_(tensor)
        return None

    return stop
