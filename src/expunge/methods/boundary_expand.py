"""Boundary expand: move the removed records into a class of their own, then take that class away.

Source: Chen et al., "Boundary Unlearning: Rapid Forgetting of Deep Networks via Shifting the Decision Boundary" (CVPR
2023). Deviations: the shadow unit stands beside the last layer instead of in it, which is the same function, and
pruning it restores the layer's own shape; BatchNorm statistics stay as they are, since the removed records must not
enter them; an epoch after which the loss on the shadow class, or on a few records of
what is left, passes a bound is taken back. The learning rate is that of
boundary shrink.

Needs: classifiers whose logits come from a last linear layer; the removal of whole classes, unless told otherwise.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from expunge import losses
from expunge.access import Sighted
from expunge.batches import Batch
from expunge.methods.classifier import (
    classifying_layer,
    embeddings,
    in_eval_mode,
    inputs_and_labels,
    labelled,
    logits,
    require_whole_classes,
)
from expunge.methods.guard import a_few, require_bound, taking_back
from expunge.seeds import seeded
from expunge.space import Range, Space
from expunge.trace import Trace
from expunge.training import Recipe, mean_loss, train


@dataclass(frozen=True, kw_only=True)
class BoundaryExpand:
    """Train removed records into a shadow class beside the others, then prune it.

    Raises:
        ConfigError: A loss bound that is not positive.
    """

    recipe: Recipe = Recipe(epochs=10, lr=0.01, schedule="constant")
    any_forget_set: bool = False  # go on although classes of removed records are also in what is left
    loss_bound: float = (
        10.0  # mean loss on the shadow class or on what is left, nats a term, after which an epoch is taken back
    )

    def __post_init__(self) -> None:
        require_bound(self.loss_bound)


SPACE: Space = {"recipe.lr": Range(1e-5, 0.1, log=True), "recipe.epochs": Range(1, 20)}


class Expanded(nn.Module):
    """A classifier with one more unit beside its last layer; shares the parameters of the classifier."""

    def __init__(self, model: nn.Module, layer: nn.Linear, seed: int) -> None:
        super().__init__()
        self.model, self.layer = model, layer
        with seeded(seed, "shadow"):
            self.shadow = nn.Linear(layer.in_features, 1, bias=layer.bias is not None)
        self.shadow.to(layer.weight)

    def forward(self, inputs: Tensor) -> Float[Tensor, "examples classes_and_one"]:
        """The logits, and that of the shadow class behind them."""
        with embeddings(self.layer) as seen:
            found = logits(self.model, inputs, "boundary-expand")
        return torch.cat([found, self.shadow(seen[-1])], dim=1)


def boundary_expand(model: nn.Module, given: Sighted, config: BoundaryExpand, *, seed: int, trace: Trace) -> nn.Module:
    """A shadow unit, cross-entropy training of the removed records towards it, and the model without it.

    While it trains, a watcher sees the model with the shadow class; what comes out has the classes of the original.
    ``trace.facts``: shadow_loss, of the removed records on the shadow class after each epoch, nats.

    Raises:
        ConfigError: Classes of the removed records are also in what is left.
        UnsupportedModule: No classifier, or its logits do not come from a linear layer.
    """
    device = next(model.parameters()).device

    with trace.stage("expand", model):
        require_whole_classes(given, "boundary-expand", config.any_forget_set)
        with in_eval_mode(model):
            first = next(labelled(given.forget, device, "boundary-expand"))[0][:8]
        layer = classifying_layer(model, first, "boundary-expand")
        trace.forwarded += len(first)
        expanded = Expanded(model, layer, seed)

    def shadow_class(model: nn.Module, batch: Batch) -> Tensor:
        inputs, labels = inputs_and_labels(batch, "boundary-expand")
        return losses.cross_entropy(model, (inputs, torch.full_like(labels, layer.out_features)))

    def loss_of(now: nn.Module) -> float:
        reached = mean_loss(now, given.forget, shadow_class, trace)
        trace.facts["shadow_loss"].append(reached)
        return max(reached, mean_loss(model, few, given.loss_terms, trace))

    with trace.stage("train", model):
        trace.facts["shadow_loss"], few = [], a_few(given.retain, seed)
        stop = taking_back(expanded, config.loss_bound, loss_of, trace=trace)
        data, recipe = given.forget, config.recipe
        train(expanded, data, shadow_class, recipe, seed=seed, trace=trace, stop=stop, freeze_statistics=True)
    return model  # pruned: the shadow unit was in the wrapper alone
