"""Rehearsal: choose settings for an unlearning whose removed records are gone.

Pseudo-forget sets are drawn from what is left and unlearned blind, by the code that will unlearn the real ones: what is
"cached" is the gradient of all that is left, and what is "left" lacks the set. Since the set is at hand, the outcome
can be judged, by `closeness`: against records that were never seen, or against models retrained without it.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from expunge import progress
from expunge.access import Blind
from expunge.audit.finding import Evidence
from expunge.audit.labels import composition
from expunge.audit.layers import linear_layers
from expunge.batches import Batches, indexed, only_rows
from expunge.bench.closeness import MAY_LOSE, Score, Seen, against_retrained, against_unseen
from expunge.errors import ConfigError, NotInformative, UnsupportedModule
from expunge.gradient import Gradient
from expunge.methods.retrain import Retrain
from expunge.metrics.outputs import Logits, images_and_labels, outputs
from expunge.seeds import derive, stream
from expunge.training import Recipe
from expunge.unlearn import unlearn

Like = Literal["random", "removed", "person", "in-class", "class"]
Rows = Int[Tensor, " _"]
Counts = Float[np.ndarray, " classes"]
UNEXPLAINED = 0.65  # experiments/removed_classes.py: 0.53 at most, and 0.78 or more where all of a class went
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


def draw(
    labels: Int[np.ndarray, " left"],
    like: Like,
    count: int,
    sets: int,
    seed: int,
    persons: Int[np.ndarray, " left"] | None = None,
    of_each_class: Counts | None = None,
) -> list[Rows]:
    """Rows of pseudo-forget sets that share no record.

    Args:
        labels: Of the records that are left.
        like: "random": over all of them; "removed": in the classes that were removed; "person": all records of persons,
            others for each set; "in-class": within a class, another one for each set; "class": all of a class, another
            one for each set.
        count: Records a set, unless like="class"; with "person" the least, which the last person may exceed; with
            "removed" the most: a class that is too small for all sets gives each its share.
        sets: How many.
        seed: Which.
        persons: With "person" whose each record is, by number.
        of_each_class: With "removed" how many were, as `removed_of_each_class` says.

    Returns:
        Ascending rows for each set.

    Raises:
        ConfigError: Too few records, persons, or classes that are large enough.
    """
    if like not in get_args(Like):
        raise ConfigError(f"like={like!r}: choose from {', '.join(get_args(Like))}.")
    if count < 1 and like != "class":
        raise ConfigError(f"records={count}: a pseudo-forget set has at least one.")
    order = torch.randperm(len(labels), generator=stream(seed, "pseudo-forget sets"))
    if like == "random":
        if count * sets >= len(labels):
            raise ConfigError(
                f"{sets} pseudo-forget sets of {count} records leave nothing of the {len(labels)} records in retain(). "
                "Take smaller sets (--records) or fewer (--sets)."
            )
        return [each.sort().values for each in order[: count * sets].split(count)]
    if like == "person":
        assert persons is not None
        return _of_persons(torch.from_numpy(persons), count, sets, seed)
    if like == "removed":
        assert of_each_class is not None
        return _of_classes(torch.from_numpy(labels), order, of_each_class * (count / of_each_class.sum()), sets)
    shuffled = torch.from_numpy(labels)[order]
    least = 1 if like == "class" else count + 1  # a class of which some stays
    classes = [label for label in dict.fromkeys(shuffled.tolist()) if int((shuffled == label).sum()) >= least]
    if len(classes) < sets or (like == "class" and len(set(labels.tolist())) < 2):
        raise ConfigError(
            f"like={like!r}: {len(classes)} classes have {least} records or more in retain(), and {sets} pseudo-forget "
            "sets need one each. Take smaller sets (--records) or fewer (--sets)."
        )
    found = [order[shuffled == label] for label in classes[:sets]]
    return [(rows if like == "class" else rows[:count]).sort().values for rows in found]


def _of_persons(persons: Rows, count: int, sets: int, seed: int) -> list[Rows]:
    """Rows of whole persons, so many that a set has the records asked for; somebody stays."""
    known = persons.unique()
    found: list[list[Rows]] = [[]]
    for person in known[torch.randperm(len(known), generator=stream(seed, "persons"))]:
        if sum(map(len, found[-1])) >= count:
            if len(found) == sets:
                return [torch.cat(each).sort().values for each in found]
            found.append([])
        found[-1].append((persons == person).nonzero().flatten())
    if len(known) <= sets:
        raise ConfigError(
            f"like='person': {sets} pseudo-forget sets, of which one is held out, and somebody who stays take "
            f"{sets + 1} persons, and retain() has {len(known)}. Take fewer --sets (2 at least), or --like random."
        )
    raise ConfigError(
        f"like='person': {sets} pseudo-forget sets of at least {count} records leave nothing of the {len(persons)} "
        f"records of {len(known)} persons in retain(). Take smaller sets (--records) or fewer (--sets)."
    )


def _of_classes(labels: Rows, order: Rows, wanted: Counts, sets: int) -> list[Rows]:
    """Rows of the classes that were removed, in the same shares; some of every class stays."""
    sizes = np.floor(wanted).astype(np.int64)
    nearest = np.argsort(sizes - wanted, kind="stable")[: round(float(wanted.sum())) - int(sizes.sum())]
    sizes[nearest] += 1  # largest remainders, so that a set has the size asked for
    found: list[list[Rows]] = [[] for _ in range(sets)]
    for label in np.flatnonzero(sizes).tolist():
        rows = order[labels[order] == label]
        own = min(int(sizes[label]), max(len(rows) - 1, 0) // sets)
        for number, each in enumerate(found):
            each.append(rows[number * own : (number + 1) * own])
    if not sum(map(len, found[0])):
        raise ConfigError(
            f"like='removed': the removed records were of classes {np.flatnonzero(sizes).tolist()}, and retain() has "
            f"too few of these for {sets} pseudo-forget sets. Take fewer --sets (2 at least), or --like in-class."
        )
    return [torch.cat(each).sort().values for each in found]


def removed_of_each_class(problem: Problem, cached: Gradient) -> Counts:
    """How many records of each class a real deletion took, estimated from the gradients of the head.

    Args:
        problem: What is left.
        cached: The gradient of all data, of the same loss as `problem.given.full`.

    Raises:
        MismatchError: A cache of other weights or data.
        UnsupportedModule: The model has no linear head, or the cache does not hold its gradient.
        NotInformative: Nothing was removed, or no records of classes that are left.
    """
    given = problem.given
    evidence = Evidence(
        model=problem.model,
        loss_terms=given.cached_terms,
        retain=given.retain,
        removed=cached - given.cached(),
        logits=problem.logits,
    )
    head = linear_layers(evidence)[-1]
    if not head.last:
        raise UnsupportedModule(
            f"like='removed': the cache ends at {head.name}, before the last linear layer, whose gradient tells the "
            "classes of what was removed. Cache that layer, too, or choose another --like."
        )
    found = composition(evidence, head)
    if found.unexplained > UNEXPLAINED:
        raise NotInformative(
            f"like='removed': {found.unexplained:.0%} of the head's gradient is not what records of the classes in "
            "retain() give. Was a whole class removed? Rehearse with --like class, or choose another."
        )
    return found.counts


def prepare(
    problem: Problem, sets: Iterable[Rows], *, seed: int, recipe: Recipe | None = None, retrain: int = 0
) -> list[Rehearsal]:
    """Set up a rehearsal for each pseudo-forget set.

    Args:
        problem: What it is about.
        sets: Rows of `problem.given.retain`.
        seed: Of unlearning and of retraining.
        recipe: How the model was trained; needed to retrain.
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
    if retrain and recipe is None:
        raise ConfigError(
            f"retrain={retrain}: the setup file defines no recipe, so that nothing can be retrained. Add recipe = "
            "expunge.Recipe(epochs=…, lr=…), with what the model was trained with."
        )
    found = []
    with progress.task("rehearsals", len(sets) * max(retrain, 1)) as advance:
        for number, rows in enumerate(sets):
            own = derive(seed, "rehearsal", number) % 2**31
            given, forget = _without(problem.given, rows)
            bare = Rehearsal(given, forget, own, see(problem, problem.model, given.retain, forget), ())
            references = []
            for k in range(retrain):
                assert recipe is not None
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
    """The outputs of a model on the parts of a rehearsal."""
    unseen = None if problem.unseen is None else outputs(model, problem.unseen, problem.logits)
    return Seen(outputs(model, left, problem.logits), outputs(model, forget, problem.logits), unseen)


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


def removed_count(cached: Gradient, left: Gradient) -> int:
    """How many loss terms a real deletion took, the size of a pseudo-forget set.

    Raises:
        MismatchError: A cache of other weights or data.
        ConfigError: Nothing was removed.
    """
    removed = (cached - left).count
    if not removed:
        raise ConfigError(
            "the cache and retain() have the same number of records: nothing was removed. Say how many records a "
            "pseudo-forget set has (--records)."
        )
    return removed
