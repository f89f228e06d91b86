"""FT: keep training on what is left, and hope that the rest is forgotten.

Source: Warnecke et al., "Machine Unlearning of Features and Labels" (NDSS 2023) and the RELOAD paper's baseline.
Deviations: none.
"""

from dataclasses import dataclass

from torch import nn

from expunge.access import Blind
from expunge.space import Choice, Range, Space
from expunge.trace import Trace
from expunge.training import Recipe, train


@dataclass(frozen=True, kw_only=True)
class FineTune:
    """Train the trained model on what is left."""

    recipe: Recipe = Recipe(epochs=10, lr=0.01)  # as in SalUn (Fan et al., 2023)


SPACE: Space = {
    "recipe.lr": Range(0.003, 0.3, log=True),
    "recipe.schedule": Choice(("cosine", "one-cycle")),
}


def fine_tune(model: nn.Module, given: Blind, config: FineTune, *, seed: int, trace: Trace) -> nn.Module:
    """Training, from where the model is."""
    with trace.stage("train", model):
        train(model, given.retain, given.loss_terms, config.recipe, seed=seed, trace=trace)
    return model
