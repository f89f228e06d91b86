"""The digits when something was deleted or corrected: the trained model, what a method is given, what is judged."""

import time
from dataclasses import dataclass, replace

from torch import nn

from expunge.access import Sighted
from expunge.batches import Examples, LossTerms
from expunge.bench import digits_setup
from expunge.bench.records import records_of
from expunge.bench.tasks import Scenario, Task
from expunge.gradient import gradient
from expunge.losses import cross_entropy
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
    removed_classes: tuple[int, ...] = ()  # of which nothing is left

    def given_with(self, cached_loss: LossTerms | None) -> Sighted:
        """What a method is given that wants a gradient of this loss: taken now, unless it is that of training."""
        if cached_loss is None or cached_loss is self.given.cached_terms:
            return self.given
        assert self.given.original is not None
        full = gradient(self.original, cached_loss, self.given.original)
        return replace(self.given, full=full, cached_loss=cached_loss)


SCENARIOS = {
    "removal": Scenario(kind="random", amount=REMOVED),
    "class-removal": Scenario(kind="class"),
    "label-correction": Scenario(kind="random-labels", amount=FAULTY),
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


def situation_of(scenario: str, seed: int, size: Size = FULL) -> Situation:
    """Train, and cache the gradient; then something is deleted or corrected.

    Args:
        scenario: One of `SCENARIOS`.
        seed: Of the data, the training, and what is removed; its last figure is the digit that is.
        size: How much data, and how long it is trained on.
    """
    task = Task(
        dataset="digits",
        model="convnet",  # that of `digits_setup`
        settings=(("widths", (16, 32)),),
        recipe=size.recipe,
        scenario=SCENARIOS[scenario],
        train=size.train,
    )
    records = records_of(task, seed, None)
    original = train_original(records.before, seed, size.recipe)
    start = time.perf_counter()
    full = gradient(original, cross_entropy, records.before)
    caching = time.perf_counter() - start
    return Situation(
        scenario=scenario,
        seed=seed,
        original=original,
        given=Sighted(
            retain=records.retain,
            forget=records.forget,
            original=records.before,
            loss_terms=cross_entropy,
            fresh=digits_setup.model,
            full=full,
        ),
        caching=caching,
        parts=records.parts,
        unseen=records.unseen,
        removed_classes=records.removed_classes,
    )
