"""Relearn time: a model that only hides what it knew has it back sooner than one that never knew it."""

import copy
from dataclasses import dataclass

from torch import nn

from expunge.batches import Batches, LossTerms
from expunge.errors import ConfigError
from expunge.training import Recipe, mean_loss, train


@dataclass(frozen=True)
class Relearning:
    """How long it took to be back."""

    epochs: int | None  # over the removed records until the loss is down; None: not within the recipe's epochs
    losses: tuple[float, ...]  # mean loss on the removed records, nats: before, and after each epoch


def relearn_time(
    model: nn.Module, forget: Batches, loss_terms: LossTerms, recipe: Recipe, *, target: float, seed: int = 0
) -> Relearning:
    """Train on the removed records until their loss is at the original's again.

    Formula: epochs until the mean loss, in eval mode, is at most the target. Unit: epochs. Direction: close to the
    retrained model's; fewer mean that traces are left. 0 means: it is there already. Misses: how long depends on the
    recipe. Use a small learning rate, so that it takes several epochs.

    Args:
        model: Unlearned or retrained; left as it was.
        forget: The removed records.
        loss_terms: Their loss.
        recipe: How to train, with a constant learning rate; its epochs are the limit.
        target: The original model's mean loss on the removed records, with a margin: nats.
        seed: Order of the records.

    Source: Golatkar et al., Eternal Sunshine of the Spotless Net (2020); Tarun et al. (2023) as an "anamnesis index".

    Raises:
        ConfigError: No epoch, or a schedule under which the pace depends on the limit.
        NotFinite: A loss became NaN or infinite.
    """
    if recipe.epochs < 1 or recipe.schedule != "constant":
        raise ConfigError(
            f"epochs={recipe.epochs}, schedule={recipe.schedule!r}: relearning needs an epoch at least, and a constant "
            "learning rate, or the limit would set the pace."
        )
    student = copy.deepcopy(model)
    losses = [mean_loss(student, forget, loss_terms)]

    def stop(now: nn.Module, _: float) -> str | None:
        losses.append(mean_loss(now, forget, loss_terms))
        return "relearned" if losses[-1] <= target else None

    if losses[0] > target:
        train(student, forget, loss_terms, recipe, seed=seed, stop=stop)
    return Relearning(len(losses) - 1 if losses[-1] <= target else None, tuple(losses))
