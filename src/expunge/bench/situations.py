"""The digits when something was deleted or corrected: the trained model, what a method is given, what is judged."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from expunge.access import Sighted
from expunge.batches import Examples, LossTerms
from expunge.bench import digits_setup
from expunge.data.digits import CLASSES, digits
from expunge.gradient import gradient
from expunge.losses import cross_entropy
from expunge.scenarios.labels import wrong_labels
from expunge.scenarios.removal import class_removal, members, random_removal
from expunge.seeds import seeded
from expunge.training import Recipe, train

REMOVED, FAULTY = 0.1, 0.2  # share that is removed; share with a wrong label


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much data, and how long it is trained on."""

    train: int = 100  # training images
    recipe: Recipe = Recipe(epochs=60, lr=0.05, batch_size=32)  # of the original and of retraining

    @property
    def budget(self) -> Recipe:
        """The most that an unlearning may train: a fifth of the epochs of retraining."""
        return Recipe(epochs=max(self.recipe.epochs // 5, 1), lr=0.1, batch_size=self.recipe.batch_size)


FULL = Size()


@dataclass(frozen=True, kw_only=True)
class Situation:
    """A trained model on the day that data was deleted or corrected."""

    scenario: str
    seed: int
    original: nn.Module
    given: Sighted  # with the cached gradient; a blind method gets the blind part of it
    caching: float  # seconds that a gradient took
    parts: dict[str, Examples]  # retain, forget, test: what a judge looks at
    unseen: Examples  # test records like the removed ones: what an attacker has to tell them from
    removed_class: int | None = None

    def given_with(self, cached_loss: LossTerms | None) -> Sighted:
        """What a method is given that wants a gradient of this loss: taken now, unless it is that of training."""
        if cached_loss is None or cached_loss is self.given.cached_terms:
            return self.given
        assert self.given.original is not None
        full = gradient(self.original, cached_loss, self.given.original)
        return replace(self.given, full=full, cached_loss=cached_loss)


def removal(seed: int, size: Size = FULL) -> Situation:
    """A tenth of the records removed, at random."""
    split = digits(size.train, seed=seed)
    removed = random_removal(size.train, REMOVED, seed)
    retain, forget = split.train.without(removed), split.train.only(removed)
    parts = {"retain": retain, "forget": forget, "test": split.test}
    return _situation("removal", seed, size, split.train, retain, forget, parts, split.test)


def whole_class(seed: int, size: Size = FULL) -> Situation:
    """All records of one digit removed; which digit, the last figure of the seed says."""
    split = digits(size.train, seed=seed)
    gone = seed % CLASSES
    removed = class_removal(split.train.tensors[1], gone)
    retain, forget = split.train.without(removed), split.train.only(removed)
    of_class = members(split.test.tensors[1], gone)
    parts = {"retain": retain, "forget": forget, "test": split.test.without(of_class)}
    unseen = split.test.only(of_class)
    return _situation("class-removal", seed, size, split.train, retain, forget, parts, unseen, removed_class=gone)


def label_correction(seed: int, size: Size = FULL) -> Situation:
    """A fifth of the labels was wrong, and is corrected."""
    split = digits(size.train, seed=seed)
    images, labels = split.train.tensors
    faulty_labels, faulty = wrong_labels(labels, CLASSES, FAULTY, seed)
    before = Examples(images, faulty_labels)
    parts = {"retain": split.train, "forget": split.train.only(faulty), "test": split.test}
    return _situation("label-correction", seed, size, before, split.train, before.only(faulty), parts, split.test)


SITUATIONS: dict[str, Callable[[int, Size], Situation]] = {
    "removal": removal,
    "class-removal": whole_class,
    "label-correction": label_correction,
}


# What the distance on the removed or corrected records is. Retrained models fit corrected records, so that their losses
# say next to nothing.
LEADING = {"removal": "ΔFE", "class-removal": "ΔFE", "label-correction": "FSKL"}


def train_original(data: Examples, seed: int, recipe: Recipe = FULL.recipe) -> nn.Module:
    """The model before anything was deleted or corrected."""
    with seeded(seed, "original"):
        model = digits_setup.model(seed)
    train(model, data, cross_entropy, recipe, seed=seed)
    return model


def _situation(
    scenario: str,
    seed: int,
    size: Size,
    before: Examples,
    retain: Examples,
    forget: Examples,
    parts: dict[str, Examples],
    unseen: Examples,
    *,
    removed_class: int | None = None,
) -> Situation:
    original = train_original(before, seed, size.recipe)
    start = time.perf_counter()
    full = gradient(original, cross_entropy, before)
    caching = time.perf_counter() - start
    return Situation(
        scenario=scenario,
        seed=seed,
        original=original,
        given=Sighted(
            retain=retain,
            forget=forget,
            original=before,
            loss_terms=cross_entropy,
            fresh=digits_setup.model,
            full=full,
        ),
        caching=caching,
        parts=parts,
        unseen=unseen,
        removed_class=removed_class,
    )
