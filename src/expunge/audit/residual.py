"""What an unlearned model still remembers: attacks that need no shadow models.

Each compares the unlearned model with retrained ones where there are any: a retrained model never saw the records, and
what an attack finds there is not memory. Without one, only differences to unseen records and to the original can be
named, and the verdict says so.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from expunge.audit.quantise import quantised
from expunge.batches import Batches, LossTerms
from expunge.errors import NotFinite
from expunge.metrics.classification import accuracy
from expunge.metrics.membership import loss_attack, matched_by_class, times_matched, unit_of_losses
from expunge.metrics.outputs import Answers, Logits, Outputs, answers, average_loss, forward, images_and_labels, outputs
from expunge.metrics.relearning import Relearning, relearn_time
from expunge.metrics.roc import FOLDS, Attack
from expunge.training import Recipe, mean_loss

Memory = Literal["a trace was found", "cannot tell", "no trace found"]
MEMORY: tuple[Memory, ...] = ("a trace was found", "cannot tell", "no trace found")  # worst first
GRIDS = ((8, True), (8, False), (4, True), (4, False))  # bits, a grid per channel
MARGIN = 0.05  # of the original's loss on the removed records, for "back where it was": share above it
SOONER = 0.8  # of the epochs of the soonest retrained model: fewer are a trace
FASTER = (10, 100)  # times the learning rate of relearning, until some model learns the records in time
RELEARN = Recipe(epochs=50, lr=0.003, batch_size=32, momentum=0.0, weight_decay=0.0, schedule="constant")


@dataclass(frozen=True)
class Remembered:
    """What one test says."""

    test: str
    verdict: Memory
    words: str
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"test": self.test, "verdict": self.verdict, "words": self.words, "numbers": dict(self.numbers)}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model in question, and what to compare it with."""

    unlearned: nn.Module
    loss_terms: LossTerms
    original: nn.Module | None = None
    retrained: Sequence[nn.Module] = ()
    logits: Logits = images_and_labels


def membership(subject: Subject, forget: Batches, test: Batches | None, *, seed: int = 0) -> Remembered:
    """Are removed records told from unseen ones, of a classifier of the same classes, by their loss?

    Args:
        subject: With retrained models, the yardstick: records that are easy are told there, too.
        forget: The removed records.
        test: Records that were never in the data, at least as many of each class as were removed; None: none are known.
        seed: Of the attack, and of which unseen records are compared.
    """
    name = "membership by loss"
    if test is None:
        return Remembered(
            name, "cannot tell", "There are no unseen records to compare with: let the setup file define test().", {}
        )
    both = answers(subject.unlearned, {"forget": forget, "test": test}, subject.logits)
    removed, pool = both["forget"], both["test"]
    sizes = {"removed": len(removed.labels), "unseen": len(pool.labels)}
    if min(sizes.values()) < FOLDS:
        words = f"{sizes['removed']} removed and {sizes['unseen']} unseen records: the attack needs {FOLDS} of each."
        return Remembered(name, "cannot tell", words, sizes)
    if not times_matched(removed.labels, pool.labels):
        words = "Fewer unseen records were given than removed ones"
        if isinstance(pool, Outputs):
            words += " of some class, and an attack on other classes tells classes apart"
        words += ". Let test() return more records, or forget() fewer."
        return Remembered(name, "cannot tell", words, sizes)
    rows = matched_by_class(removed.labels, pool.labels, times=None, seed=seed)

    def attacked(members: Answers, unseen: Answers) -> Attack:
        unit = unit_of_losses(unseen)
        return loss_attack(members.losses / unit, unseen.losses[rows] / unit, seed=seed)

    attack = attacked(removed, pool)
    references = [
        attacked(*(forward(model, data, subject.logits) for data in (forget, test))).auc for model in subject.retrained
    ]
    low, high = attack.auc_interval.low, attack.auc_interval.high
    numbers = sizes | {"AUC": attack.auc, "AUC interval": [low, high], "AUC of retrained": references}
    numbers["unseen compared"] = len(rows)
    like = " of the same classes" if isinstance(pool, Outputs) else ""
    words = f"AUC {attack.auc:.2f} [{low:.2f}, {high:.2f}] against unseen records{like}"
    if low <= max([*references, 0.5]):
        against = f"that of retrained models, up to {max(references):.2f}" if references else "chance, 0.50"
        return Remembered(name, "no trace found", f"{words}: not clearly above {against}.", numbers)
    if not references:
        words += ": above chance, as easy records are in any model. Only retrained models tell (--retrained)."
        return Remembered(name, "cannot tell", words, numbers)
    words += f", retrained models up to {max(references):.2f}. Removed records are told better than they should be."
    return Remembered(name, "a trace was found", words, numbers)


def relearning(subject: Subject, forget: Batches, *, recipe: Recipe = RELEARN, seed: int = 0) -> Remembered:
    """Are the removed records learned again sooner than by a model that never saw them?

    Args:
        subject: With the original, whose loss on the records is the target; and retrained models, the yardstick.
        forget: The removed records.
        recipe: Constant learning rate, small enough that it takes several epochs. Where nobody learns the records in
            time, it is tried ten and a hundred times as large.
        seed: Order of the records.
    """
    name = "relearning"
    if subject.original is None:
        words = "Needs the original model, to know the loss that counts as learned again (--original)."
        return Remembered(name, "cannot tell", words)
    mean = mean_loss(subject.original, forget, subject.loss_terms)
    target = mean + MARGIN * abs(mean)
    limit = recipe.epochs
    try:
        own, *others = _relearned(subject, forget, recipe, target, seed)
    except NotFinite as error:
        words = (
            f"A learning rate of {recipe.lr:g} is too large for this loss, so that nothing is learned again: {error}"
        )
        return Remembered(name, "cannot tell", words, {"learning rate": recipe.lr})
    lr = recipe.lr
    for faster in FASTER:
        if any(each.epochs is not None for each in (own, *others)):
            break
        try:
            own, *others = _relearned(subject, forget, replace(recipe, lr=recipe.lr * faster), target, seed)
        except NotFinite:  # too fast: what was found before stays
            break
        lr = recipe.lr * faster

    def epochs(count: int | None) -> str:
        return f"more than {limit}" if count is None else str(count)

    numbers = {
        "epochs": own.epochs,
        "epochs of retrained": [other.epochs for other in others],
        "limit": limit,
        "learning rate": lr,
        "loss before": own.losses[0],
        "target": target,
    }
    took = f"{epochs(own.epochs)} epochs"
    if not others:
        words = f"The original's loss is back after {took}. Without a retrained model nobody knows if that is soon."
        return Remembered(name, "cannot tell", words, numbers)
    lengths = [limit + 1 if other.epochs is None else other.epochs for other in others]
    length = limit + 1 if own.epochs is None else own.epochs
    if length > limit and min(lengths) > limit:
        words = f"No model has the original's loss back after {limit} epochs, at learning rates up to {lr:g}."
        return Remembered(name, "cannot tell", words, numbers)
    few, many = (epochs(None if end > limit else end) for end in (min(lengths), max(lengths)))
    words = f"The original's loss is back after {took}; retrained models take {few}"
    words += "." if few == many else f" to {many}."
    if length == 0:
        words += " It never left."
    found = length < min(lengths) * SOONER
    if not found and min(lengths) > limit:
        words += " How many more was not tried, so that nobody knows if that is soon."
        return Remembered(name, "cannot tell", words, numbers)
    return Remembered(name, "a trace was found" if found else "no trace found", words, numbers)


def _relearned(subject: Subject, forget: Batches, recipe: Recipe, target: float, seed: int) -> list[Relearning]:
    """Of the model in question and of the retrained ones."""
    return [
        relearn_time(model, forget, subject.loss_terms, recipe, target=target, seed=seed)
        for model in (subject.unlearned, *subject.retrained)
    ]


def quantisation(subject: Subject, forget: Batches, test: Batches | None = None) -> Remembered:
    """Does rounding the weights to 8 or 4 bits bring the removed records back?

    Args:
        subject: With retrained models, the yardstick.
        forget: The removed records.
        test: Records that were never in the data. Where the few removed targets of a regression are all 0 or 1, these
            tell that it is one.
    """
    name, rows = "quantisation", []
    worst_excess, at = -math.inf, ""
    splits = {"forget": forget} | ({} if test is None else {"test": test})
    before = answers(subject.unlearned, splits, subject.logits)["forget"]
    base = [forward(model, forget, subject.logits) for model in subject.retrained]
    for bits, per_channel in GRIDS:
        own = _rounded(subject.unlearned, bits, per_channel, forget, subject)
        drops = [
            average_loss(now) - average_loss(_rounded(model, bits, per_channel, forget, subject))
            for model, now in zip(subject.retrained, base, strict=True)
        ]
        grid = f"{bits} bits, per {'channel' if per_channel else 'tensor'}"
        drop = average_loss(before) - average_loss(own)
        rows.append({"grid": grid, **_fit(own), "loss fell by": drop, "of retrained": drops})
        excess = drop - max([*drops, 0.0])
        if excess > worst_excess:
            worst_excess, at = excess, grid
    numbers = {**_fit(before), "grids": rows}
    margin = max(0.1 * average_loss(before), 2 * _standard_error(before))
    words = f"The loss on removed records is {average_loss(before):.3g} {before.unit}, and "
    if worst_excess > margin:
        words += f"falls by {worst_excess:.3g} more than it should when weights are rounded to {at}."
        return Remembered(name, "a trace was found", words, numbers)
    words += f"rounding weights lowers it by no more than {max(worst_excess, 0):.2g}"
    words += " beyond that of retrained models." if base else "; there is no retrained model to compare with."
    return Remembered(name, "no trace found", words, numbers)


def trigger(subject: Subject, triggered: Batches, test: Batches | None) -> Remembered:
    """Does a corrected backdoor of a classifier still open?

    Args:
        subject: With retrained models, the yardstick; without, accuracy on ``test``.
        triggered: Inputs with the trigger, and their true labels.
        test: Inputs without it.

    Raises:
        ConfigError: The model is a regression.
    """
    name = "trigger"
    own = outputs(subject.unlearned, triggered, subject.logits)
    references = [accuracy(outputs(model, triggered, subject.logits)) for model in subject.retrained]
    numbers: dict[str, Any] = {"accuracy with trigger": accuracy(own), "of retrained": references}
    if references:
        level, against = sum(references) / len(references), "retrained models have"
    elif test is not None:
        level, against = accuracy(outputs(subject.unlearned, test, subject.logits)), "without the trigger it has"
        numbers["accuracy without trigger"] = level
    else:
        words = f"Accuracy with the trigger is {accuracy(own):.1f} %. There is nothing to compare with."
        return Remembered(name, "cannot tell", words, numbers)
    error = 100 * math.sqrt(max(level / 100 * (1 - level / 100), 0.25 / len(own.labels)) / len(own.labels))
    found = level - accuracy(own) > 2 * error
    words = f"Accuracy with the trigger is {accuracy(own):.1f} %, {against} {level:.1f} %."
    words += " The trigger still works." if found else " That is no less than chance allows."
    return Remembered(name, "a trace was found" if found else "no trace found", words, numbers)


def _rounded(model: nn.Module, bits: int, per_channel: bool, forget: Batches, subject: Subject) -> Answers:
    return forward(quantised(model, bits, per_channel=per_channel), forget, subject.logits)


def _fit(measured: Answers) -> dict[str, float]:
    accurate = {"forget accuracy": accuracy(measured)} if isinstance(measured, Outputs) else {}
    return {"forget loss": average_loss(measured), **accurate}


def _standard_error(measured: Answers) -> float:
    return float(measured.losses.std() / math.sqrt(len(measured.losses)))
