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
  * Rewinding (SCRUB+R) keeps a copy of every epoch. Of two that are equally near the reference, the later one is taken.
    ``rewind=True`` is the paper's: the reference is the error of the final model on validation records of the classes
    that were removed. ``rewind_to`` is a number in its place.

Needs: classifiers.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expunge.access import Sighted
from expunge.batches import Batch, Batches
from expunge.errors import ConfigError, UnsupportedModule
from expunge.methods.bad_teacher import divergence, imitating, taught, teacher
from expunge.methods.classifier import classes_in, in_eval_mode, inputs_and_labels, labelled, logits
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
    rewind: bool = (
        False  # SCRUB+R: return to the epoch whose forget error is nearest the final one on validation records
    )
    rewind_to: float | None = None  # return to the epoch whose forget error is nearest this share of records instead
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
        if self.rewind and self.rewind_to is not None:
            raise ConfigError(
                f"rewind=True, rewind_to={self.rewind_to}: give one reference, that of validation records or a number."
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
    rewinding also forget_errors (after each epoch), rewind_reference (an error) and rewound_to (which epoch, counted
    from 1).

    Raises:
        UnsupportedModule: No classifier.
        ConfigError: Rewinding without validation records of the classes that were removed.
    """
    rewinding = config.rewind or config.rewind_to is not None
    unseen = _validation(given) if config.rewind else None
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
    epochs: list[tuple[float, dict[str, Tensor]]] = []  # forget error and state after each

    def disobey(model: nn.Module, batch: Batch) -> Tensor:
        terms = imitate(model, batch)
        passed.append(terms.detach())
        return -terms

    def obey(model: nn.Module, batch: Batch) -> Tensor:
        wanted = taught(original, inputs_and_labels(batch, "scrub")[0], "scrub", trace)
        with answers(model) as said:
            losses = given.loss_terms(model, batch)
        if len(said) != 1 or said[0].shape[:1] != losses.shape:
            raise UnsupportedModule(
                f"scrub needs a loss that calls the model once and returns a term an example; this one called it "
                f"{len(said)} times and returned {len(losses)} terms. Take another method, or change loss_terms."
            )
        return config.loss_weight * losses + config.obey_weight * divergence(wanted, said[0], config.temperature)

    def after_epoch(model: nn.Module, _: float) -> None:
        if passed:
            trace.facts["forget_divergence"].append(float(torch.cat(passed).mean()))
            passed.clear()
        if rewinding:
            state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
            epochs.append((error(model, given.forget, trace), state))

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
    if epochs:
        with trace.stage("rewind", model):
            reference = config.rewind_to
            if reference is None:
                assert unseen is not None
                reference = error(model, unseen, trace, classes=classes_in(given.forget, "scrub"))
            errors = [reached for reached, _ in epochs]
            nearest = min(range(len(epochs)), key=lambda epoch: (abs(errors[epoch] - reference), -epoch))
            model.load_state_dict(epochs[nearest][1])
            trace.facts |= {"forget_errors": errors, "rewind_reference": reference, "rewound_to": nearest + 1}
    return model


@contextmanager
def answers(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the model says, so that a loss and a divergence can share one pass."""
    said: list[Tensor] = []
    handle = model.register_forward_hook(lambda _, __, found: said.append(found))
    try:
        yield said
    finally:
        handle.remove()


@torch.no_grad()
def error(model: nn.Module, data: Batches, trace: Trace, classes: set[int] | None = None) -> float:
    """The share of examples (of some classes) that are classified wrong, in eval mode."""
    wrong, count = 0, 0
    device = next(model.parameters()).device
    wanted = None if classes is None else torch.tensor(sorted(classes), device=device)
    with in_eval_mode(model):
        for inputs, labels in labelled(data, device, "scrub"):
            rows = torch.ones_like(labels, dtype=torch.bool) if wanted is None else torch.isin(labels, wanted)
            if rows.any():
                wrong += int((logits(model, inputs[rows], "scrub").argmax(1) != labels[rows]).sum())
                count += int(rows.sum())
    trace.forwarded += count
    return wrong / max(count, 1)


def _validation(given: Sighted) -> Batches:
    """Validation records, some of them of the classes that were removed.

    Raises:
        ConfigError: There are none.
    """
    if given.validation is None:
        raise ConfigError(
            "rewind=True needs validation records that nothing was trained on, and validation=None. Give "
            "Sighted(validation=…), on the command line validation() in the setup file, or a number: rewind_to=0.1."
        )
    removed, held = classes_in(given.forget, "scrub"), classes_in(given.validation, "scrub")
    if not removed & held:
        raise ConfigError(
            f"rewind=True: the validation records are of classes {sorted(held)}, the removed ones of "
            f"{sorted(removed)}. Give validation records of the classes that were removed."
        )
    return given.validation
