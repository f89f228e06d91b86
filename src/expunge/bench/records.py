"""What a scenario makes of the data of a task: records that are left, removed, corrected, and judged."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from expunge.batches import Examples
from expunge.bench.tasks import Scenario, Task, images
from expunge.data.digits import CLASSES, digits
from expunge.data.images import ImageData, Images, Normalisation, normalisation, to_examples
from expunge.errors import ConfigError
from expunge.scenarios.backdoors import cross_backdoor, distributed_backdoor, feature_backdoor
from expunge.scenarios.corruption import Corruption, corrected, identified
from expunge.scenarios.covariates import noisy_inputs
from expunge.scenarios.labels import flipped_labels, randomly_labelled
from expunge.scenarios.removal import class_removal, in_class_removal, neighbour_removal, random_removal
from expunge.seeds import stream

Bounds = tuple[Tensor, Tensor]  # the inputs of black and of white pixels
SPARE = 2000  # images
NONE_TO_SPARE = (
    "a tuning without a forget set judges by training images that no model of its seed saw, not by the test images "
    "that are reported, and here are none"
)


@dataclass(frozen=True, kw_only=True)
class Records:
    """The data of a task and a seed."""

    classes: int
    before: Examples  # what the original is trained on
    retain: Examples  # what is left, or its corrected form: what retraining is trained on
    forget: Examples  # what methods that are not blind see: removed records, or faulty ones
    parts: dict[str, Examples]  # what models are judged on, by split
    unseen: Examples  # test records like the removed ones: what an attacker has to tell them from
    bounds: Bounds
    removed_classes: tuple[int, ...] = ()  # of which nothing is left
    triggered: Examples | None = None  # what is left with the trigger or noise and true labels, for rehearsals


@lru_cache(maxsize=2)  # one stage after the other asks for the same
def records_of(task: Task, seed: int, folder: Path | None) -> Records:
    """What a scenario makes of the data of a task; the same for the same task and seed. Nobody may change it."""
    if task.dataset == "digits":
        split = digits(task.train, seed=seed)
        clean, test, classes, bounds = split.train, split.test, CLASSES, (torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    else:
        found = images(task, folder)
        if found.test is None:
            raise ConfigError(f"{task.dataset} has no test images, and models are judged on some.")
        chosen, scale = _drawn(task, found, seed)
        clean = to_examples(chosen, scale)
        test = to_examples(_some(found.test, task.test, stream(0, "test images")), scale)
        classes, bounds = len(found.classes), (scale.black, scale.white)
    make = _corrected if task.scenario.corrects else _again if task.scenario.kind == "sequence" else _removed
    return make(task.scenario, seed, clean, test, classes, bounds)


def spare(task: Task, seed: int, folder: Path | None) -> Examples:
    """Images of the training set that nothing of this seed was trained on, ``SPARE`` at most.

    Rehearsals without a forget set judge by them, since test images are for what is reported.

    Raises:
        ConfigError: There are none.
    """
    found = images(task, folder)
    if not 0 < task.train < len(found.train):
        raise ConfigError(f"train={task.train}: {NONE_TO_SPARE}. Take fewer than {len(found.train)}, which are all.")
    order = torch.randperm(len(found.train), generator=stream(seed, "training images"))
    rows = order[task.train : task.train + SPARE].sort().values
    return to_examples(Images(found.train.pixels[rows], found.train.labels[rows]), _drawn(task, found, seed)[1])


def _removed(scenario: Scenario, seed: int, clean: Examples, test: Examples, classes: int, bounds: Bounds) -> Records:
    """Of a class, unseen are test records of it; where all of it goes, the others are the test."""
    inputs, labels = clean.tensors
    unseen, whole = test, scenario.kind == "class"
    if scenario.kind == "random":
        gone = random_removal(len(clean), scenario.amount, seed)
    elif scenario.kind == "neighbours":
        gone = neighbour_removal(inputs, scenario.amount, seed)
    else:
        label = scenario.named_classes[0] if scenario.named_classes else seed % classes
        gone = _of_class(scenario, labels, label, seed)
        alike = (test.tensors[1] == label).nonzero()[:, 0]
        if not len(alike):
            raise ConfigError(
                f"seed {seed} removes records of class {label}, and no test image is of it. Take more test images."
            )
        unseen, test = test.only(alike), test.without(alike) if whole else test
    retain, forget = clean.without(gone), clean.only(gone)
    return Records(
        classes=classes,
        before=clean,
        retain=retain,
        forget=forget,
        parts={"retain": retain, "forget": forget, "test": test},
        unseen=unseen,
        bounds=bounds,
        removed_classes=(label,) if whole else (),
    )


def _of_class(scenario: Scenario, labels: Tensor, label: int, seed: int) -> Int[Tensor, " removed"]:
    if scenario.kind == "class":
        return class_removal(labels, label)
    if scenario.amount < 1:
        return in_class_removal(labels, label, fraction=scenario.amount, seed=seed)
    return in_class_removal(labels, label, count=int(scenario.amount), seed=seed)


def _again(scenario: Scenario, seed: int, clean: Examples, test: Examples, classes: int, bounds: Bounds) -> Records:
    """Judged is what was removed so far; methods see what is removed now."""
    order = torch.randperm(len(clean), generator=stream(seed, "sequence"))
    share, now = round(scenario.amount * len(clean)), scenario.round
    if not 0 < share * now < len(clean):
        raise ConfigError(
            f"amount={scenario.amount}, round={now}: {now} deletions of {share} of {len(clean)} images each. They "
            "must take some and leave some."
        )
    before, gone = clean.without(order[: share * (now - 1)]), order[: share * now]
    retain = clean.without(gone)
    parts = {"retain": retain, "forget": clean.only(gone), "test": test}
    forget = clean.only(order[share * (now - 1) : share * now])
    return Records(
        classes=classes, before=before, retain=retain, forget=forget, parts=parts, unseen=test, bounds=bounds
    )


def _corrected(scenario: Scenario, seed: int, clean: Examples, test: Examples, classes: int, bounds: Bounds) -> Records:
    """Judged are the corrected records; test images as they are, and with the fault if inputs had it."""
    faulty = _faulty(scenario, seed, clean, classes, bounds)
    known = identified(faulty.corrupted, scenario.gamma, seed)
    retain = corrected(faulty, clean, known) if scenario.known_are == "corrected" else faulty.data.without(known)
    parts, triggered = {"retain": retain, "forget": clean.only(known), "test": test}, None
    if faulty.on_test is not None:
        parts["noisy" if scenario.kind == "noise" else "triggered"], triggered = (
            Examples(faulty.on_test(part.tensors[0]), part.tensors[1])
            for part in (test, clean.only(retain.positions))  # noise on noise would be another
        )
    if scenario.named_classes:
        of_these = torch.isin(test.tensors[1], torch.tensor(scenario.named_classes))
        parts["domain"] = test.only(of_these.nonzero()[:, 0])
    return Records(
        classes=classes,
        before=faulty.data,
        retain=retain,
        forget=faulty.data.only(known),
        parts=parts,
        unseen=test,
        bounds=bounds,
        triggered=triggered,
    )


def _faulty(scenario: Scenario, seed: int, clean: Examples, classes: int, bounds: Bounds) -> Corruption:
    """The data with its faults; bounds are the inputs of black and white pixels."""
    (black, white), where = bounds, scenario.classes
    match scenario.kind:
        case "cross-backdoor":
            return cross_backdoor(clean, where, value=white)
        case "distributed-backdoor":
            return distributed_backdoor(clean, where, value=white, seed=seed)
        case "feature-backdoor":
            return feature_backdoor(clean, where, value=white, seed=seed)
        case "flipped-labels":
            return flipped_labels(clean, scenario.pairs, scenario.amount, seed)
        case "random-labels":
            return randomly_labelled(clean, classes, scenario.amount, seed)
        case _:
            return noisy_inputs(clean, scenario.amount, seed, span=white - black)


def _drawn(task: Task, found: ImageData, seed: int) -> tuple[Images, Normalisation]:
    chosen = _some(found.train, task.train, stream(seed, "training images"))
    return chosen, normalisation(chosen)


def _some(found: Images, count: int, generator: torch.Generator) -> Images:
    """That many of the images, in the order of the files."""
    if not count or count == len(found):
        return found
    if count > len(found):
        raise ConfigError(f"{count} images are asked for, and there are {len(found)}.")
    rows = torch.randperm(len(found), generator=generator)[:count].sort().values
    return Images(found.pixels[rows], found.labels[rows])
