"""L1-sparse fine-tuning: keep training on what is left, and pull all weights towards zero.

Source: Jia et al., "Model Sparsity Can Simplify Machine Unlearning" (NeurIPS 2023): fine-tuning with α_t ‖θ‖₁ added to
the mean loss, α_t decaying linearly to 0. Deviations: an epoch whose mean loss, without the penalty, passes a bound is
taken back. Weights become small, not exactly zero, as in the paper: nothing is cut off.

Needs: any loss.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expunge import params
from expunge.access import Blind
from expunge.batches import Batch
from expunge.errors import ConfigError
from expunge.methods.guard import MeanOfEpoch, require_bound, taking_back
from expunge.space import Range, Space
from expunge.trace import Trace
from expunge.training import Recipe, train


@dataclass(frozen=True, kw_only=True)
class L1Sparse:
    """Fine-tune on what is left with a penalty on the absolute values of all weights.

    Raises:
        ConfigError: A value that cannot work.
    """

    alpha: float = 5e-4  # α: nats a term for each unit of ‖θ‖₁, in the first epoch
    recipe: Recipe = Recipe(epochs=10, lr=0.01)
    loss_bound: float = 5.0  # mean loss of an epoch without the penalty, nats a term, past which it is taken back

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise ConfigError(f"alpha={self.alpha}: must be 0 (plain fine-tuning) or positive.")
        require_bound(self.loss_bound)


SPACE: Space = {"alpha": Range(1e-6, 1e-2, log=True), "recipe.lr": Range(0.003, 0.3, log=True)}


def l1_sparse(model: nn.Module, given: Blind, config: L1Sparse, *, seed: int, trace: Trace) -> nn.Module:
    """Fine-tuning with α_t ‖θ‖₁, where α_t = α (1 - t / T) in epoch t = 0, …, T - 1.

    ``trace.losses`` holds losses with the penalty. ``trace.facts``: l1_before and l1_after (‖θ‖₁).
    """
    theta = params.named_parameters(model)
    epoch, plain = 0, MeanOfEpoch()

    def penalised(model: nn.Module, batch: Batch) -> Tensor:
        terms = given.loss_terms(model, batch)
        plain.add(terms)
        strength = config.alpha * (1 - epoch / config.recipe.epochs)
        return terms + strength * l1_norm(theta) if strength else terms

    guard = taking_back(model, config.loss_bound, plain, trace=trace)

    def stop(model: nn.Module, training_loss: float) -> str | None:
        nonlocal epoch
        reason = guard(model, training_loss)
        epoch += 1
        return reason

    trace.facts["l1_before"] = float(l1_norm(theta).detach())
    with trace.stage("train", model):
        train(model, given.retain, penalised, config.recipe, seed=seed, trace=trace, stop=stop)
    trace.facts["l1_after"] = float(l1_norm(theta).detach())
    return model


def l1_norm(theta: dict[str, nn.Parameter]) -> Tensor:
    """‖θ‖₁ over all entries, with a gradient: their signs."""
    return torch.stack([p.abs().sum() for p in theta.values()]).sum()
