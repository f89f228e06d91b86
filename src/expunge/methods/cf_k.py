"""CF-k: keep training the last k layers on what is left, and freeze the others.

Source: Goel et al., "Towards Adversarial Evaluations for Inexact Machine Unlearning" (2022), catastrophic forgetting in
the last k layers; epochs, learning rate and k as in the RELOAD paper's baseline. Deviations: one cosine descent of the
learning rate from 0.1 instead of warm restarts from 0.1 to 0.005, and batches of 128 instead of 64; training
that ends with the loss on a few records of what is left past a bound goes back to its last good epoch. What counts as a
layer is in ``leaf_layers.py``.

Needs: any loss.
"""

from dataclasses import dataclass

from torch import nn

from expunge.access import Blind
from expunge.errors import ConfigError
from expunge.methods.guard import keeping_what_is_left, require_bound
from expunge.methods.leaf_layers import last_layers, only_training
from expunge.space import Range, Space
from expunge.trace import Trace
from expunge.training import Recipe, train


@dataclass(frozen=True, kw_only=True)
class CFk:
    """Train the last k layers of the trained model on what is left.

    Raises:
        ConfigError: k is below 1, or a loss bound that is not positive.
    """

    k: int = 3  # weight layers that are trained, counted from the output
    recipe: Recipe = Recipe(epochs=31, lr=0.1)
    loss_bound: float = 5.0  # mean loss on what is left, nats a term, past which the end is taken back

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"k={self.k}: at least 1 layer must be trained.")
        require_bound(self.loss_bound)


SPACE: Space = {"k": Range(1, 7), "recipe.lr": Range(0.003, 0.3, log=True)}


def cf_k(model: nn.Module, given: Blind, config: CFk, *, seed: int, trace: Trace) -> nn.Module:
    """Fine-tuning of the last k weight layers; BatchNorm statistics of the others stay.

    ``trace.facts``: weight_layers (how many the model has), trained_layers (names of the last k).

    Raises:
        ConfigError: The model has fewer than k weight layers.
    """
    with trace.stage("freeze", model):
        layers = last_layers(model, given, config.k, "cf-k", trace)
    with trace.stage("train", model), only_training(model, layers, given.loss_terms) as terms:
        stop = keeping_what_is_left(model, given, config.loss_bound, trace, config.recipe.epochs)
        train(model, given.retain, terms, config.recipe, seed=seed, trace=trace, stop=stop)
    return model
