"""GA: climb the loss on the removed records.

Source: Thudi et al., "Unrolling SGD" (2022); Graves et al., "Amnesiac Machine Learning" (2021). Deviations:
ascent has no minimum to converge to, so it ends before the epoch that passes a bound on the loss; BatchNorm statistics
stay as they are, since the removed records must not enter them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expunge import params
from expunge.access import Sighted
from expunge.batches import Batch
from expunge.errors import ConfigError
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
    loss_bound: float = 5.0  # mean loss on the removed records, nats a term, at which to end

    def __post_init__(self) -> None:
        if not 0 < self.loss_bound < math.inf:
            raise ConfigError(f"loss_bound={self.loss_bound}: must be a positive number of nats a term.")


SPACE: Space = {"recipe.lr": Range(1e-5, 0.1, log=True), "recipe.epochs": Range(1, 20)}


def gradient_ascent(model: nn.Module, given: Sighted, config: GradientAscent, *, seed: int, trace: Trace) -> nn.Module:
    """Descent on the negated loss, until the bound or the last epoch."""
    theta = params.named_parameters(model)
    last = params.snapshot(theta)

    def negated(model: nn.Module, batch: Batch) -> Tensor:
        return -given.loss_terms(model, batch)

    @torch.no_grad()
    def stop(model: nn.Module, _: float) -> str | None:
        reached = mean_loss(model, given.forget, given.loss_terms, trace)
        if not reached <= config.loss_bound:
            for name, p in theta.items():
                p.copy_(last[name])
            return f"the loss {reached:.3g} passed the bound {config.loss_bound:g}; the epoch was taken back"
        last.update(params.snapshot(theta))
        return None

    with trace.stage("train", model):
        train(model, given.forget, negated, config.recipe, seed=seed, trace=trace, stop=stop, freeze_statistics=True)
    return model
