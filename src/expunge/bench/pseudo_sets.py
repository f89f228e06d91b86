"""Pseudo-forget sets: records of what is left that stand in for those that were removed."""

from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from expunge.access import Blind
from expunge.audit.finding import Evidence
from expunge.audit.labels import UNEXPLAINED, composition
from expunge.audit.layers import linear_layers
from expunge.errors import ConfigError, NotInformative, UnsupportedModule
from expunge.gradient import Gradient
from expunge.metrics.outputs import Logits, images_and_labels
from expunge.seeds import stream

Like = Literal["random", "removed", "person", "in-class", "class"]
Rows = Int[Tensor, " _"]
Counts = Float[np.ndarray, " classes"]
SHOWN = 10  # classes in a message


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
    counts = torch.bincount(labels, minlength=len(sizes)).numpy()
    held = np.minimum(sizes, np.maximum(counts - 1, 0) // sets)
    if 2 * held.sum() < sizes.sum():
        short = ", ".join(f"class {n}: {sizes[n]} of {counts[n]}" for n in np.flatnonzero(held < sizes)[:SHOWN])
        raise ConfigError(
            f"like='removed': {sets} pseudo-forget sets take more than retain() has of the classes that "
            f"were removed ({short} for each set). Take smaller sets (--records), fewer (--sets, 2 at "
            "least), or --like in-class."
        )
    own = [order[labels[order] == label] for label in range(len(sizes))]
    found = [
        [rows[number * size : (number + 1) * size] for rows, size in zip(own, held.tolist(), strict=True)]
        for number in range(sets)
    ]
    return [torch.cat(each).sort().values for each in found]


def removed_of_each_class(
    model: nn.Module, given: Blind, removed: Gradient, logits: Logits = images_and_labels
) -> Counts:
    """How many records of each class a real deletion took, estimated from the gradients of the head.

    Args:
        model: The trained model.
        given: What is left.
        removed: The cached gradient less that of what is left.
        logits: Where logits and labels are in a batch.

    Raises:
        UnsupportedModule: No linear head with a gradient in the cache, or no class number for each record.
        NotInformative: Nothing was removed, or nothing of classes that are left.
    """
    if not removed.count:
        raise NotInformative(
            "like='removed': the cache and retain() have the same number of records: nothing was removed since it was "
            "made. Choose another --like; a cache made after the deletion is of no use to a blind method."
        )
    evidence = Evidence(model=model, loss_terms=given.cached_terms, retain=given.retain, removed=removed, logits=logits)
    try:
        head = linear_layers(evidence)[-1]
        if not head.last:
            raise UnsupportedModule(f"the cache ends at {head.name}, before the last linear layer.")
        found = composition(evidence, head)
    except (UnsupportedModule, NotInformative) as error:
        raise type(error)(
            f"like='removed': the classes are told from the gradient of the last linear layer, and here they are not: "
            f"{error} Choose another --like."
        ) from error
    if found.unexplained > UNEXPLAINED:
        gone = np.flatnonzero(found.kept == 0)[:SHOWN].tolist()
        cause = f" retain() has no record of class {', '.join(map(str, gone))}." if gone else ""
        raise NotInformative(
            f"like='removed': {found.unexplained:.0%} of the head's gradient is not what records of the classes "
            f"in retain() give.{cause} Was a whole class removed? Rehearse with --like class --retrain 2, or choose "
            "another."
        )
    return found.counts


def removed_count(removed: Gradient, terms: float = 1.0) -> int:
    """How many records a real deletion took, the size of a pseudo-forget set.

    Args:
        removed: The cached gradient less that of what is left.
        terms: Of the loss, of a record that is left, on average.

    Raises:
        ConfigError: Nothing was removed.
    """
    if not removed.count:
        raise ConfigError(
            "the cache and retain() have the same number of records. Either nothing was removed yet: then say how many "
            "records a pseudo-forget set has (--records). Or the cache was made after the deletion: no blind method "
            "can use it, nor settings for one. Or records were corrected, and none removed: a rehearsal removes some, "
            "and says nothing of a correction; take the method's defaults, and fine-tuning beside it."
        )
    return max(round(removed.count / terms), 1)
