"""Boundary shrink: give every removed record to the nearest wrong class, and train on that.

Source: Chen et al., "Boundary Unlearning: Rapid Forgetting of Deep Networks via Shifting the Decision Boundary" (CVPR
2023). Deviations: a neighbour that is still classified as its own class gets the next likely one, since the paper asks
for the nearest *incorrect* class; neighbours are not clipped to the range of valid inputs, which is not known here;
BatchNorm statistics stay as they are, since the removed records must not enter them; an epoch after which the loss on
the new labels, or on a few records of what is left, passes a bound is taken back. The relabelled records are held in
memory.

Needs: classifiers; the removal of whole classes, unless told otherwise.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from expunge.access import Sighted
from expunge.batches import Examples, LossTerms
from expunge.errors import ConfigError, UnsupportedModule
from expunge.methods.classifier import floating, in_eval_mode, labelled, logits, require_whole_classes
from expunge.methods.guard import a_few, taking_back
from expunge.space import Range, Space
from expunge.trace import Trace
from expunge.training import Recipe, mean_loss, train


@dataclass(frozen=True, kw_only=True)
class BoundaryShrink:
    """Relabel removed records with the class across the nearest decision boundary, and train on those.

    Raises:
        ConfigError: A value that cannot work.
    """

    bound: float = 0.1  # of the step to the neighbour, in units of the inputs, every entry
    recipe: Recipe = Recipe(epochs=10, lr=0.01, schedule="constant")
    any_forget_set: bool = False  # go on although classes of removed records are also in what is left
    loss_bound: float = (
        10.0  # mean loss on the new labels or on what is left, nats a term, after which an epoch is taken back
    )

    def __post_init__(self) -> None:
        for name in ("bound", "loss_bound"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)}: must be a positive number.")


SPACE: Space = {
    "bound": Range(0.01, 1.0, log=True),
    "recipe.lr": Range(1e-5, 0.1, log=True),
    "recipe.epochs": Range(1, 20),
}


def boundary_shrink(model: nn.Module, given: Sighted, config: BoundaryShrink, *, seed: int, trace: Trace) -> nn.Module:
    """Relabelling by one signed-gradient step, then training on the removed records with their new labels.

    ``trace.facts``: crossed_share, of removed records whose neighbour was classified as another class.

    Raises:
        ConfigError: Classes of the removed records are also in what is left.
        UnsupportedModule: No classifier, or inputs that have no gradient.
    """
    device = next(model.parameters()).device

    with trace.stage("relabel", model):
        require_whole_classes(given, "boundary-shrink", config.any_forget_set)
        inputs, labels, crossed = [], [], 0
        with in_eval_mode(model):
            for x, y in labelled(given.forget, device, "boundary-shrink"):
                near = neighbours(model, floating(model, x), y, given.loss_terms, config.bound)
                wrong, across = nearest_wrong(model, near, y)
                inputs.append(x.cpu())
                labels.append(wrong.cpu())
                crossed += int(across.sum())
                trace.backwarded += len(y)
                trace.forwarded += len(y)
        relabelled = Examples(torch.cat(inputs), torch.cat(labels))
        trace.facts["crossed_share"] = crossed / len(relabelled)

    with trace.stage("train", model):
        terms, recipe = given.loss_terms, config.recipe
        few = a_few(given.retain, seed)

        def loss_of(now: nn.Module) -> float:
            return max(mean_loss(now, data, terms, trace) for data in (relabelled, few))

        stop = taking_back(model, config.loss_bound, loss_of, trace=trace)
        train(model, relabelled, terms, recipe, seed=seed, trace=trace, stop=stop, freeze_statistics=True)
    return model


def neighbours(
    model: nn.Module, inputs: Tensor, labels: Int[Tensor, " examples"], loss_terms: LossTerms, bound: float
) -> Tensor:
    """The inputs after one step of ``bound`` per entry that raises the loss (FGSM); leaves no gradients behind.

    Raises:
        UnsupportedModule: The inputs are not floating-point numbers.
    """
    if not inputs.is_floating_point():
        raise UnsupportedModule(
            f"boundary-shrink moves inputs along their gradient, and {inputs.dtype} inputs have none. Give "
            "floating-point inputs, or take boundary-expand."
        )
    inputs = inputs.detach().clone().requires_grad_(True)
    loss_terms(model, (inputs, labels)).sum().backward(inputs=[inputs])
    assert inputs.grad is not None
    return (inputs + bound * inputs.grad.sign()).detach()


@torch.no_grad()
def nearest_wrong(
    model: nn.Module, near: Tensor, labels: Int[Tensor, " examples"]
) -> tuple[Int[Tensor, " examples"], Bool[Tensor, " examples"]]:
    """The likeliest class but its own of each neighbour, and whether it is the likeliest of all."""
    scores = logits(model, near, "boundary-shrink")
    likeliest = scores.argmax(1)
    wrong = scores.scatter(1, labels[:, None], -math.inf).argmax(1)
    return wrong, likeliest != labels
