"""SalUn: give the removed records wrong labels, and let only the weights move that their loss depends on most.

Source: Fan et al., "SalUn: Empowering Machine Unlearning via Gradient-Based Weight Saliency in Both Image
Classification and Generation" (ICLR 2024; 2023). Deviations: the gradient behind the mask is exact (a sum over records
in eval mode, not of batch means), and the mask has exactly the share of entries that was asked for. Entries outside
the mask are put back after every step, and so is what the optimiser remembers of them, since weight decay and momentum
would move them. Wrong labels are drawn once. BatchNorm's statistics follow what is left only. An epoch whose mean loss
on what is left passes a bound is taken back.

Needs: classifiers. The relabelled records are held in memory.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from expunge import params
from expunge.access import Sighted
from expunge.errors import ConfigError
from expunge.gradient import gradient
from expunge.methods.amnesiac import relabelled
from expunge.methods.choice import decimal
from expunge.methods.guard import require_bound
from expunge.methods.together import Together, train_on_pairs
from expunge.params import Params
from expunge.space import Range, Space
from expunge.trace import Trace
from expunge.training import AfterStep, Recipe, Step


@dataclass(frozen=True, kw_only=True)
class SalUn:
    """Train on wrong labels for the removed records and on what is left, moving only the most salient weights.

    Raises:
        ConfigError: A value that cannot work.
    """

    share: float = 0.5  # of all weights that may move: those with the largest |gradient| of the forget loss, in (0, 1]
    recipe: Recipe = Recipe(epochs=10, lr=0.013, batch_size=256)
    loss_bound: float = 5.0  # mean loss of an epoch on what is left, nats a term, after which it is taken back

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"share={self.share}: must be in (0, 1]; 1 lets every weight move.")
        require_bound(self.loss_bound)


SPACE: Space = {"share": Range(0.1, 0.9), "recipe.lr": Range(1e-3, 0.1, log=True), "recipe.epochs": Range(1, 20)}


def salun(model: nn.Module, given: Sighted, config: SalUn, *, seed: int, trace: Trace) -> nn.Module:
    """Mask, relabelling, then training of the masked weights on both.

    ``trace.facts``: salient_count (entries that may move).

    Raises:
        UnsupportedModule: No classifier, or one of a single class.
        ConfigError: A share that is no weight at all.
    """
    with trace.stage("mask", model):
        removed = gradient(model, given.loss_terms, given.forget)
        trace.backwarded += removed.count
        salient = mask(removed.total, config.share)
        trace.facts["salient_count"] = params.count(salient)
    with trace.stage("relabel", model):
        wrong = relabelled(model, given.forget, "salun", seed, trace)
    with trace.stage("train", model):
        train_on_pairs(
            model,
            Together(given.retain, wrong, config.recipe.batch_size, seed),
            given.loss_terms,
            given.loss_terms,
            config.recipe,
            seed=seed,
            trace=trace,
            loss_bound=config.loss_bound,
            after_step=keeping(params.named_parameters(model), salient),
        )
    return model


def mask(removed: Params, share: float) -> dict[str, Bool[Tensor, "..."]]:
    """Mark exactly this share of all entries: those with the largest absolute gradient.

    Raises:
        ConfigError: It is none of them.
    """
    wanted = math.floor(decimal(share) * params.size(removed))
    if not wanted:
        raise ConfigError(
            f"share={share} of {params.size(removed)} weights is none, and nothing would change. Raise it."
        )
    return params.smallest({name: total.abs().neg_() for name, total in removed.items()}, wanted)


def keeping(theta: dict[str, nn.Parameter], movable: dict[str, Tensor]) -> AfterStep:
    """Undo what every step does to the entries that may not move, and what the optimiser remembers of them."""
    before = params.snapshot(theta)
    fixed = {name: ~movable[name].to(p.device) for name, p in theta.items()}

    @torch.no_grad()
    def restore(step: Step) -> None:
        for name, p in theta.items():
            p.copy_(torch.where(fixed[name], before[name], p))
            for remembered in step.optimizer.state[p].values():
                if isinstance(remembered, Tensor) and remembered.shape == p.shape:
                    remembered.masked_fill_(fixed[name], 0)

    return restore
