"""Retraining from scratch on what is left: the yardstick, and the only exact answer.

Source: by definition (Cao & Yang, 2015, call it the naive solution). Deviations: none.

Needs: any loss.
"""

from dataclasses import dataclass

from torch import nn

from expunge.access import Blind
from expunge.methods.guard import note_if_nothing_was_learned
from expunge.space import Space
from expunge.trace import Trace
from expunge.training import Recipe, train


@dataclass(frozen=True, kw_only=True)
class Retrain:
    """Train an untrained model on what is left, with the recipe of the original."""

    recipe: Recipe
    resume: str | None = None  # a file from which a retraining that was interrupted goes on, see `train`


SPACE: Space = {}  # the recipe is that of the original


def retrain(model: nn.Module, given: Blind, config: Retrain, *, seed: int, trace: Trace) -> nn.Module:
    """Fresh weights for every module, then training; the trained model only says which device and mode."""
    device = next(model.parameters()).device
    model = given.fresh_model(seed, model).to(device).train(model.training)
    with trace.stage("train", model):
        train(model, given.retain, given.loss_terms, config.recipe, seed=seed, trace=trace, resume=config.resume)
        note_if_nothing_was_learned(trace)
    return model
