"""FT: keep training on what is left, and hope that the rest is forgotten.

Source: Warnecke et al., "Machine Unlearning of Features and Labels" (NDSS 2023) and the RELOAD paper's baseline.
Deviations: training that ends with the loss on a few records of what is left past a bound goes back to its last good
epoch.

Needs: any loss.
"""

from dataclasses import dataclass

from torch import nn

from expunge.access import Blind
from expunge.methods.further import train_further
from expunge.methods.guard import keeping_what_is_left, require_bound
from expunge.space import Choice, Range, Space
from expunge.trace import Trace
from expunge.training import Recipe


@dataclass(frozen=True, kw_only=True)
class FineTune:
    """Train the trained model on what is left.

    Raises:
        ConfigError: A loss bound that is not positive.
    """

    recipe: Recipe = Recipe(epochs=10, lr=0.01)  # as in SalUn (Fan et al., 2023)
    loss_bound: float = 5.0  # mean loss on what is left, nats a term, past which the end is taken back

    def __post_init__(self) -> None:
        require_bound(self.loss_bound)


SPACE: Space = {
    "recipe.lr": Range(0.003, 0.3, log=True),
    "recipe.schedule": Choice(("cosine", "one-cycle")),
}


def fine_tune(model: nn.Module, given: Blind, config: FineTune, *, seed: int, trace: Trace) -> nn.Module:
    """Training, from where the model is."""
    with trace.stage("train", model):
        stop = keeping_what_is_left(model, given, config.loss_bound, trace, config.recipe.epochs)
        train_further(model, given, config.recipe, seed=seed, trace=trace, stop=stop)
    return model
