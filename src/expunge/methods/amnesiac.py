"""Amnesiac unlearning: give the removed records wrong labels, and keep training on them and on what is left.

Source: Graves, Nagisetty and Ganesh, "Amnesiac Machine Learning" (AAAI 2021). The method here is the paper's
relabelling; its other idea, to take back the logged updates of the batches that held removed records, needs a log
kept at training: `UpdateLog` in ``update_log.py``.

Deviations: Adam is AdamW without weight decay. BatchNorm's statistics
follow what is left only, since the removed records must not enter them. An epoch whose mean loss on what is left passes
a bound is taken back. The relabelled records are held in memory.

Needs: classifiers. (The log: any model, any loss, data with positions.)
"""

from dataclasses import dataclass

import torch
from torch import nn

from expunge.access import Sighted
from expunge.batches import Batches, Examples
from expunge.errors import UnsupportedModule
from expunge.methods.classifier import in_eval_mode, labelled, logits
from expunge.methods.guard import require_bound
from expunge.methods.together import Together, train_on_pairs
from expunge.seeds import stream
from expunge.space import Range, Space
from expunge.trace import Trace
from expunge.training import Recipe


@dataclass(frozen=True, kw_only=True)
class Amnesiac:
    """Train on the removed records with wrong labels, and on what is left.

    Raises:
        ConfigError: A loss bound that is not positive.
    """

    recipe: Recipe = Recipe(epochs=3, lr=1e-4, batch_size=128, optimizer="adamw", weight_decay=0.0, schedule="constant")
    loss_bound: float = 5.0  # mean loss of an epoch on what is left, nats a term, after which it is taken back

    def __post_init__(self) -> None:
        require_bound(self.loss_bound)


SPACE: Space = {"recipe.lr": Range(1e-5, 1e-2, log=True), "recipe.epochs": Range(1, 10)}


def amnesiac(model: nn.Module, given: Sighted, config: Amnesiac, *, seed: int, trace: Trace) -> nn.Module:
    """Relabelling, then training on both.

    Raises:
        UnsupportedModule: No classifier, or one of a single class.
    """
    with trace.stage("relabel", model):
        wrong = relabelled(model, given.forget, "amnesiac", seed, trace)
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
        )
    return model


@torch.no_grad()
def relabelled(model: nn.Module, data: Batches, method: str, seed: int, trace: Trace) -> Examples:
    """The data with a random label each that is not its own, drawn once; in memory, on the CPU.

    Raises:
        UnsupportedModule: No classifier, or one of a single class.
    """
    with in_eval_mode(model):
        parts = list(labelled(data, torch.device("cpu"), method))
        few = parts[0][0][:2].to(next(model.parameters()).device)
        classes = logits(model, few, method).shape[1]
    trace.forwarded += len(few)
    if classes < 2:
        raise UnsupportedModule(f"{method} gives records a wrong label, and a model of {classes} class has none.")
    labels = torch.cat([own for _, own in parts])
    shift = torch.randint(1, classes, labels.shape, generator=stream(seed, "wrong labels"))
    return Examples(torch.cat([inputs for inputs, _ in parts]), ((labels + shift) % classes).to(labels.dtype))
