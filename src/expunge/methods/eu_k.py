"""EU-k: forget the last k layers altogether, and train them from scratch on what is left.

Source: Goel et al., "Towards Adversarial Evaluations for Inexact Machine Unlearning" (2022), exact unlearning of the
last k layers; epochs, learning rate and k as in the RELOAD paper's baseline. Deviations: one cosine descent of the
learning rate from 0.1 instead of warm restarts from 0.1 to 0.005, and batches of 128 instead of 64. What counts as a
layer is in ``leaf_layers.py``.

Needs: any loss.
"""

from dataclasses import dataclass

import torch
from torch import nn

from expunge.access import Blind
from expunge.errors import ConfigError
from expunge.methods.guard import note_if_nothing_was_learned
from expunge.methods.leaf_layers import last_layers, only_training
from expunge.space import Range, Space
from expunge.trace import Trace
from expunge.training import Recipe, train


@dataclass(frozen=True, kw_only=True)
class EUk:
    """Re-initialise the last k layers and train them on what is left.

    Raises:
        ConfigError: k is below 1.
    """

    k: int = 3  # weight layers that start anew, counted from the output
    recipe: Recipe = Recipe(epochs=62, lr=0.1)

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"k={self.k}: at least 1 layer must be trained.")


SPACE: Space = {"k": Range(1, 7), "recipe.lr": Range(0.003, 0.3, log=True)}


def eu_k(model: nn.Module, given: Blind, config: EUk, *, seed: int, trace: Trace) -> nn.Module:
    """Fresh values in the last k weight layers, running statistics included, then training of these layers only.

    ``trace.facts``: weight_layers (how many the model has), trained_layers (names of the last k).

    Raises:
        ConfigError: The model has fewer than k weight layers.
        MismatchError: ``fresh`` builds another architecture.
    """
    with trace.stage("re-initialise", model):
        layers = last_layers(model, given, config.k, "eu-k", trace)
        reinitialise_(model, layers, given.fresh_model(seed, model))
    with trace.stage("train", model), only_training(model, layers, given.loss_terms) as terms:
        train(model, given.retain, terms, config.recipe, seed=seed, trace=trace)
        note_if_nothing_was_learned(trace)
    return model


@torch.no_grad()
def reinitialise_(model: nn.Module, layers: list[nn.Module], fresh: nn.Module) -> None:
    """Values of an untrained model in the layers: trainable parameters, and the buffers that a checkpoint keeps."""
    untrained = fresh.state_dict()
    chosen = set(layers)
    for prefix, module in model.named_modules():
        if module in chosen:
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                full = f"{prefix}.{name}" if prefix else name
                if full in untrained and (tensor.requires_grad or not isinstance(tensor, nn.Parameter)):
                    tensor.copy_(untrained[full])
