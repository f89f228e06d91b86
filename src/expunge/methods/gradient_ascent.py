"""GA: climb the loss on the removed records.

Source: Thudi et al., "Unrolling SGD" (2022); Graves et al., "Amnesiac Machine Learning" (2021). Deviations:
ascent has no minimum to converge to, so it ends before the epoch that passes a bound on the loss; BatchNorm statistics
stay as they are, since the removed records must not enter them. The bound is half as much again as models retrained
without a class have on it (8 to 10 nats on the digits), and far below a wreck, at hundreds.

Needs: any loss.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from expunge.access import Sighted
from expunge.batches import Batch
from expunge.methods.guard import LESS_ASCENT, require_bound, taking_back
from expunge.space import Range, Space
from expunge.trace import Trace
from expunge.training import Recipe, mean_loss, train


@dataclass(frozen=True, kw_only=True)
class GradientAscent:
    """Gradient ascent on the removed records, which must still be there.

    Raises:
        ConfigError: A loss bound that is not positive.
    """

    recipe: Recipe = Recipe(epochs=5, lr=1e-3, momentum=0.9, weight_decay=0.0, schedule="constant")
    loss_bound: float = 15.0  # mean loss on the removed records, nats a term, at which to end: see above

    def __post_init__(self) -> None:
        require_bound(self.loss_bound)


SPACE: Space = {"recipe.lr": Range(1e-5, 0.1, log=True), "recipe.epochs": Range(1, 20)}


def gradient_ascent(model: nn.Module, given: Sighted, config: GradientAscent, *, seed: int, trace: Trace) -> nn.Module:
    """Descent on the negated loss, until the bound or the last epoch."""
    forget, terms = given.forget, given.loss_terms

    def negated(model: nn.Module, batch: Batch) -> Tensor:
        return -terms(model, batch)

    with trace.stage("train", model):
        stop = taking_back(
            model, config.loss_bound, lambda now: mean_loss(now, forget, terms, trace), trace=trace, cure=LESS_ASCENT
        )
        train(model, forget, negated, config.recipe, seed=seed, trace=trace, stop=stop, freeze_statistics=True)
    return model
