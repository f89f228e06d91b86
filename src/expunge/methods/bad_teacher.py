"""Bad teacher: imitate an untrained network on the removed records, and the original on what is left.

Source: Chundawat et al., "Can Bad Teaching Induce Forgetting? Unlearning in Deep Networks Using an Incompetent
Teacher" (AAAI 2023). Deviations: Adam is AdamW without weight decay; BatchNorm's statistics follow what is left only,
since the removed records must not enter them; an epoch whose mean divergence on what is left passes a bound is taken
back.

Needs: classifiers.
"""

import copy
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from expunge import params
from expunge.access import Sighted
from expunge.batches import Batch, LossTerms
from expunge.errors import ConfigError
from expunge.methods.classifier import inputs_and_labels, logits
from expunge.methods.together import Together, train_on_pairs
from expunge.space import Range, Space
from expunge.trace import Trace
from expunge.training import Recipe


@dataclass(frozen=True, kw_only=True)
class BadTeacher:
    """Learn from two teachers: an untrained one for the removed records, the original for what is left.

    Raises:
        ConfigError: A value that cannot work.
    """

    temperature: float = 1.0  # T: divides the logits of teachers and student
    retain_share: float = 0.3  # of what is left that takes part, in (0, 1]
    recipe: Recipe = Recipe(epochs=1, lr=1e-4, optimizer="adamw", weight_decay=0.0, schedule="constant")
    loss_bound: float = 5.0  # mean divergence on what is left in an epoch, nats, after which it is taken back

    def __post_init__(self) -> None:
        for name in ("temperature", "loss_bound"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)}: must be a positive number.")
        if not 0 < self.retain_share <= 1:
            raise ConfigError(f"retain_share={self.retain_share}: must be in (0, 1], a share of what is left.")


SPACE: Space = {
    "recipe.lr": Range(1e-5, 1e-2, log=True),
    "recipe.epochs": Range(1, 5),
    "retain_share": Range(0.1, 1.0),
    "temperature": Range(1.0, 4.0),
}


def bad_teacher(model: nn.Module, given: Sighted, config: BadTeacher, *, seed: int, trace: Trace) -> nn.Module:
    """Distillation from two frozen teachers; ``trace.forwarded`` counts what they look at.

    Raises:
        UnsupportedModule: No classifier.
        MismatchError: ``fresh`` builds another architecture.
    """
    with trace.stage("teachers", model):
        good = teacher(model)
        bad = teacher(given.fresh_model(seed, model).to(next(model.parameters()).device))
        params.require_same_names(dict(good.named_parameters()), dict(bad.named_parameters()), "the model", "fresh()")
    with trace.stage("train", model):
        train_on_pairs(
            model,
            Together(given.retain, given.forget, config.recipe.batch_size, seed, config.retain_share),
            imitating(good, config.temperature, "bad-teacher", trace),
            imitating(bad, config.temperature, "bad-teacher", trace),
            config.recipe,
            seed=seed,
            trace=trace,
            loss_bound=config.loss_bound,
        )
    return model


def teacher(model: nn.Module) -> nn.Module:
    """A frozen copy in eval mode, which shares no storage with the model."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def imitating(of: nn.Module, temperature: float, method: str, trace: Trace) -> LossTerms:
    """The divergence of the model from a teacher on each example, as loss terms; counts the teacher's work."""

    def terms(model: nn.Module, batch: Batch) -> Tensor:
        inputs, _ = inputs_and_labels(batch, method)
        return divergence(taught(of, inputs, method, trace), logits(model, inputs, method), temperature)

    return terms


@torch.no_grad()
def taught(of: nn.Module, inputs: Tensor, method: str, trace: Trace) -> Tensor:
    """What a teacher says; counts its work."""
    trace.forwarded += len(inputs)
    return logits(of, inputs, method)


def divergence(
    wanted: Float[Tensor, "examples classes"], said: Float[Tensor, "examples classes"], temperature: float
) -> Float[Tensor, " examples"]:
    """T² KL(teacher ‖ student) of softmax(logits / T), nats an example.

    The factor T² keeps the size of gradients independent of the temperature (Hinton et al., 2015).
    """
    wide = params.wide(said.device)
    p, q = (functional.log_softmax(each.to(wide) / temperature, dim=1) for each in (wanted, said))
    return temperature**2 * (p.exp() * (p - q)).sum(1)
