"""Rehearsal: choose settings for an unlearning whose removed records are gone.

Pseudo-forget sets are drawn from what is left and unlearned blind, by the code that will unlearn the real ones: what is
"cached" is the gradient of all that is left, and what is "left" lacks the set. Since the set is at hand, the outcome
can be judged, by `closeness`: against records that were never seen, or against models retrained without it.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from expunge import progress
from expunge.access import Blind
from expunge.batches import Batches, indexed, only_rows
from expunge.bench.closeness import MAY_LOSE, Score, Seen, against_retrained, against_unseen
from expunge.bench.pseudo_sets import Rows
from expunge.errors import ConfigError
from expunge.methods.retrain import Retrain
from expunge.metrics.outputs import Logits, answers, images_and_labels
from expunge.seeds import derive
from expunge.training import Recipe
from expunge.unlearn import unlearn

LEAST_REFERENCES = 2  # the noise floor is the distance between two


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A trained model on the day after a deletion, and what is left of its data."""

    model: nn.Module
    given: Blind  # `full` is the gradient of what is left: the rehearsal's stand-in for a cache
    unseen: Batches | None = None  # records like the training data that nothing was trained on
    logits: Logits = images_and_labels


@dataclass(frozen=True)
class Rehearsal:
    """A pseudo-forget set, what a method is given when it is removed, and what it is judged by."""

    given: Blind
    forget: Batches
    seed: int  # of the unlearning
    before: Seen  # by the trained model
    references: tuple[Seen, ...]  # by models retrained without it


def prepare(
    problem: Problem, sets: Iterable[Rows], *, seed: int, recipe: Recipe | None = None, retrain: int = 0
) -> list[Rehearsal]:
    """Set up a rehearsal for each pseudo-forget set.

    Args:
        problem: What it is about.
        sets: Rows of `problem.given.retain`.
        seed: Of unlearning and of retraining.
        recipe: How the model was trained; None: with the loop of one's own in what is given.
        retrain: How many models to retrain for each set; 0: judge against unseen records.

    Raises:
        ConfigError: Nothing to judge by: neither unseen records nor retrained models, or a single one.
    """
    sets = list(sets)
    if retrain == 0 and problem.unseen is None:
        raise ConfigError(
            "there is nothing to judge a rehearsal by: the setup file defines no test(), records that nothing was "
            "trained on. Add it, or retrain models to compare with (--retrain 2)."
        )
    if retrain and retrain < LEAST_REFERENCES:
        raise ConfigError(
            f"retrain={retrain}: nobody knows how far two retrained models are apart. Take {LEAST_REFERENCES} or "
            "more, or 0 to judge against test()."
        )
    if retrain and recipe is None and problem.given.train_from_scratch is None:
        raise ConfigError(
            f"retrain={retrain}: the setup file defines no recipe, so that nothing can be retrained. Add recipe = "
            "expunge.Recipe(epochs=…, lr=…), with what the model was trained with, or a loop of your own, def "
            "train_from_scratch(model, data, seed)."
        )
    found = []
    with progress.task("rehearsals", len(sets) * max(retrain, 1)) as advance:
        for number, rows in enumerate(sets):
            own = derive(seed, "rehearsal", number) % 2**31
            given, forget = _without(problem.given, rows)
            bare = Rehearsal(given, forget, own, see(problem, problem.model, given.retain, forget), ())
            references = []
            for k in range(retrain):
                done = unlearn(problem.model, given, Retrain(recipe=recipe), seed=derive(own, "retrain", k) % 2**31)
                references.append(see(problem, done.model, given.retain, forget))
                advance()
            found.append(replace(bare, references=tuple(references)))
            if not retrain:
                advance()
    return found


def _without(given: Blind, rows: Rows) -> tuple[Blind, Batches]:
    forget, known = only_rows(given.retain, rows), indexed(given.retain)
    assert known is not None  # or only_rows had refused
    kept = torch.ones(len(known.positions), dtype=torch.bool)
    kept[rows] = False
    return replace(given, retain=only_rows(given.retain, kept.nonzero()[:, 0])), forget


def see(problem: Problem, model: nn.Module, left: Batches, forget: Batches) -> Seen:
    """What a model says of the parts of a rehearsal."""
    parts = {"left": left, "forget": forget} | ({} if problem.unseen is None else {"unseen": problem.unseen})
    found = answers(model, parts, problem.logits)
    return Seen(found["left"], found["forget"], found.get("unseen"))


def rehearse(problem: Problem, rehearsals: Sequence[Rehearsal], config: object) -> list[Seen]:
    """Unlearn every pseudo-forget set with some settings.

    Raises:
        NotFinite: NaN or infinity in what came out.
        ConfigError: Settings that the method or the model refuses.
    """
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that settings do nothing, or too much, is what their score says
        for each in rehearsals:
            model = unlearn(problem.model, each.given, config, seed=each.seed).model
            found.append(see(problem, model, each.given.retain, each.forget))
    return found


def score(rehearsals: Sequence[Rehearsal], after: Sequence[Seen], may_lose: float = MAY_LOSE) -> Score:
    """Judge what was unlearned, against retrained models if there are any, else against unseen records."""
    if rehearsals[0].references:
        return against_retrained([each.references for each in rehearsals], after)
    return against_unseen([each.before for each in rehearsals], after, may_lose)
