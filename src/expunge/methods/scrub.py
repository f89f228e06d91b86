"""SCRUB: disobey the original model on the removed records, obey it on what is left.

Source: Kurmanji et al., "Towards Unbounded Machine Unlearning" (NeurIPS 2023). The student starts as a copy of its
teacher, the original. In some epochs a pass over the removed records maximises the divergence between the two; in all
of them a pass over what is left minimises γ loss + α divergence.

Deviations:
  * The first pass that maximises belongs to the second epoch, not to the first. Where student and teacher are equal
    the gradient of their divergence is exactly zero: without BatchNorm or dropout in train mode the first such pass
    would do nothing (or, with Adam, blow up rounding errors). ``disobey_at_once=True`` is the paper to the letter.
  * BatchNorm's statistics follow what is left only, since the removed records must not enter them.
  * Adam with weight decay is AdamW. Both kinds of pass have the same batch size.
  * An epoch whose mean loss on what is left passes a bound is taken back.
  * The paper's rewinding (SCRUB+R) takes the error of the final model on unseen records of the forget classes for its
    reference; here that is a number that the caller gives (``rewind_to``), since methods are given no such records.

Needs: classifiers.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from expunge.access import Sighted
from expunge.batches import Batch, Batches
from expunge.errors import ConfigError
from expunge.methods.bad_teacher import imitating, teacher
from expunge.methods.classifier import in_eval_mode, labelled, logits
from expunge.methods.together import Apart, train_on_pairs
from expunge.space import Range, Space
from expunge.trace import Trace
from expunge.training import Recipe


@dataclass(frozen=True, kw_only=True)
class Scrub:
    """A student that disobeys the original model on the removed records and obeys it on what is left.

    The defaults are the paper's for small models. For large ones it has SGD at 5e-4, γ 0.99, α 0.001, m 2, T 4 and 3
    epochs.

    Raises:
        ConfigError: A value that cannot work.
    """

    recipe: Recipe = Recipe(epochs=10, lr=5e-4, optimizer="adamw", weight_decay=0.1, schedule="constant")
    forget_epochs: int = 3  # m: epochs that also have a pass over the removed records, or as many as fit in
    loss_weight: float = 1.0  # γ: of the loss on what is left
    obey_weight: float = 0.5  # α: of the divergence from the teacher on what is left
    temperature: float = 2.0  # T: divides the logits of teacher and student
    rewind_to: float | None = None  # forget error (share wrong) of the epoch to return to in the end; None: the last
    disobey_at_once: bool = False  # a first pass over the removed records where the divergence has no gradient
    loss_bound: float = 5.0  # mean loss of an epoch on what is left, nats a term, after which it is taken back

    def __post_init__(self) -> None:
        for name in ("temperature", "loss_bound"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)}: must be a positive number.")
        for name in ("loss_weight", "obey_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)}: must be 0 or more.")
        if self.loss_weight == self.obey_weight == 0:
            raise ConfigError("loss_weight=0, obey_weight=0: nothing would keep what is left. Give one of them.")
        if self.forget_epochs < 1:
            raise ConfigError(f"forget_epochs={self.forget_epochs}: must be at least 1; without, nothing is forgotten.")
        least = 1 if self.disobey_at_once else 2
        if self.recipe.epochs < least:
            raise ConfigError(
                f"recipe.epochs={self.recipe.epochs}: must be at least {least}. The first epoch only has a pass over "
                "what is left, unless disobey_at_once=True."
            )
        if self.rewind_to is not None and not 0 <= self.rewind_to <= 1:
            raise ConfigError(f"rewind_to={self.rewind_to}: must be in [0, 1], a share of records classified wrong.")


SPACE: Space = {
    "recipe.lr": Range(1e-5, 1e-2, log=True),
    "forget_epochs": Range(1, 5),
    "obey_weight": Range(0.001, 1.0, log=True),
    "temperature": Range(1.0, 4.0),
}


def scrub(model: nn.Module, given: Sighted, config: Scrub, *, seed: int, trace: Trace) -> nn.Module:
    """Distillation that alternates; ``trace.losses`` has the negated divergence in passes over the removed records.

    ``trace.facts``: forget_divergence (mean of each such pass, nats: 0 would be a pass that did nothing); with
    ``rewind_to`` also forget_errors (after each epoch) and rewound_to (which epoch, counted from 1).

    Raises:
        UnsupportedModule: No classifier.
    """
    with trace.stage("teacher", model):
        original = teacher(model)
    imitate = imitating(original, config.temperature, "scrub", trace)
    first = 0 if config.disobey_at_once else 1
    pairs = Apart(
        given.retain,
        given.forget,
        config.recipe.batch_size,
        seed,
        turns=lambda epoch: first <= epoch < first + config.forget_epochs,
    )
    passed: list[Tensor] = []
    trace.facts["forget_divergence"] = []
    rewind = Rewind(config.rewind_to)

    def disobey(model: nn.Module, batch: Batch) -> Tensor:
        terms = imitate(model, batch)
        passed.append(terms.detach())
        return -terms

    def obey(model: nn.Module, batch: Batch) -> Tensor:
        return config.loss_weight * given.loss_terms(model, batch) + config.obey_weight * imitate(model, batch)

    def after_epoch(model: nn.Module, _: float) -> None:
        if passed:
            trace.facts["forget_divergence"].append(float(torch.cat(passed).mean()))
            passed.clear()
        if config.rewind_to is not None:
            rewind.consider(model, error(model, given.forget, trace))

    with trace.stage("train", model):
        train_on_pairs(
            model,
            pairs,
            obey,
            disobey,
            config.recipe,
            seed=seed,
            trace=trace,
            loss_bound=config.loss_bound,
            stop=after_epoch,
        )
    if rewind.errors:
        with trace.stage("rewind", model):
            rewind.go(model)
            trace.facts |= {"forget_errors": rewind.errors, "rewound_to": rewind.epoch}
    return model


@dataclass
class Rewind:
    """Remembers the epoch whose forget error is nearest to a target, the later of two that are equally near."""

    target: float | None
    errors: list[float] = field(default_factory=list)  # after each epoch
    epoch: int = 0  # of the nearest, counted from 1
    state: dict[str, Tensor] = field(default_factory=dict)  # its weights and buffers

    def consider(self, model: nn.Module, error: float) -> None:
        """Another epoch has ended."""
        assert self.target is not None
        self.errors.append(error)
        if not self.state or abs(error - self.target) <= abs(self.errors[self.epoch - 1] - self.target):
            self.epoch = len(self.errors)
            self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def go(self, model: nn.Module) -> None:
        """Back to that epoch."""
        for name, tensor in model.state_dict().items():
            tensor.copy_(self.state[name])


@torch.no_grad()
def error(model: nn.Module, data: Batches, trace: Trace) -> float:
    """The share of examples classified wrong, in eval mode."""
    wrong, count = 0, 0
    with in_eval_mode(model):
        for inputs, labels in labelled(data, next(model.parameters()).device, "scrub"):
            wrong += int((logits(model, inputs, "scrub").argmax(1) != labels).sum())
            count += len(labels)
    trace.forwarded += count
    return wrong / max(count, 1)
