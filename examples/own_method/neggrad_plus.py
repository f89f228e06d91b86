"""NegGrad+: descend on what is left and ascend on the removed records, in the same steps.

Source: Kurmanji et al., "Towards Unbounded Machine Unlearning" (2023). Deviations: an epoch whose mean loss on what
is left passes a bound is taken back and ends the training; BatchNorm's statistics follow what is left alone.

Needs: any loss.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from expunge.access import Sighted
from expunge.batches import Batch
from expunge.errors import ConfigError
from expunge.methods import Method
from expunge.methods.together import Together, train_on_pairs
from expunge.space import Range, Space
from expunge.trace import Trace
from expunge.training import Recipe


@dataclass(frozen=True, kw_only=True)
class NegGradPlus:
    """Gradient descent on what is left and ascent on the removed records at once.

    Raises:
        ConfigError: A weight outside of (0, 1].
    """

    beta: float = 0.95  # weight of the mean loss on what is left; 1 - beta is that of the loss on the removed records
    recipe: Recipe = Recipe(epochs=5, lr=0.01)
    loss_bound: float = 5.0  # mean loss of an epoch on what is left, nats a term, after which it is taken back

    def __post_init__(self) -> None:
        if not 0 < self.beta <= 1:
            raise ConfigError(f"beta={self.beta}: must be in (0, 1]; 1 is fine-tuning on what is left.")


SPACE: Space = {"beta": Range(0.8, 1.0), "recipe.lr": Range(1e-3, 0.1, log=True), "recipe.epochs": Range(1, 10)}


def neggrad_plus(model: nn.Module, given: Sighted, config: NegGradPlus, *, seed: int, trace: Trace) -> nn.Module:
    """Steps on batches that have a part of each, in proportion to their sizes.

    A batch is averaged over all its terms. The terms of the removed records weigh more than their number, so that the
    two means stand to each other as 1 - beta to beta.
    """
    pairs = Together(given.retain, given.forget, config.recipe.batch_size, seed)
    against = (1 - config.beta) / config.beta * len(pairs.kept) / pairs.removed

    def climbing(model: nn.Module, batch: Batch) -> Tensor:
        return -against * given.loss_terms(model, batch)

    with trace.stage("train", model):
        train_on_pairs(
            model,
            pairs,
            given.loss_terms,
            climbing,
            config.recipe,
            seed=seed,
            trace=trace,
            loss_bound=config.loss_bound,
        )
    return model


METHOD = Method("neggrad-plus", NegGradPlus, neggrad_plus, SPACE)
