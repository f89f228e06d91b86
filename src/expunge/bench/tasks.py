"""What an experiment is about: a dataset, a model, how it is trained, and what is removed or corrected."""

import hashlib
import inspect
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from expunge.batches import Examples
from expunge.bench.required import is_whole, require, require_settings
from expunge.data import READERS, read
from expunge.data.digits import CLASSES, COUNT, digits
from expunge.data.images import ImageData, Images, Normalisation, normalisation, to_examples
from expunge.errors import ConfigError, MismatchError
from expunge.models import MODELS, build
from expunge.scenarios.backdoors import cross_backdoor
from expunge.scenarios.corruption import corrected, identified
from expunge.scenarios.removal import in_class_removal, members, random_removal
from expunge.seeds import derive, stream
from expunge.training import Recipe

Kind = Literal["random", "in-class", "sequence", "cross-backdoor"]
NOTE = "NOTE"  # a text file beside the data that says in what it differs from the official files


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is removed or corrected.

    Raises:
        ConfigError: A value that cannot work, or that this kind has no use for.
    """

    kind: Kind
    amount: float = 0.0  # random, sequence: share of the training images, each time; in-class: how many
    classes: tuple[int, ...] = ()  # cross-backdoor: whose images get the cross
    gamma: float = 1.0  # cross-backdoor: share of the faults that are known
    known_are: Literal["corrected", "removed"] = "corrected"  # cross-backdoor: what becomes of known faults
    round: int = 1  # sequence: the how-many-th deletion; the model is what the one before left

    def __post_init__(self) -> None:
        kind, amount = self.kind, self.amount
        require(kind in get_args(Kind), "kind", kind, f"choose from {', '.join(get_args(Kind))}")
        for name in ("amount", "gamma"):
            require(isinstance(getattr(self, name), int | float), name, getattr(self, name), "give a number")
        require(is_whole(self.round, 1), "round", self.round, "count deletions from 1")
        if kind in ("random", "sequence"):
            share = "of a removal it is the share of the training images, above 0 and below 1"
            require(0 < amount < 1, "amount", amount, share)
        elif kind == "in-class":
            whole = amount >= 1 and float(amount).is_integer()
            require(whole, "amount", amount, "of a class it is how many images are removed: a whole number, 1 or more")
        if kind == "sequence":
            if amount * self.round >= 1:
                raise ConfigError(
                    f"amount={amount}, round={self.round}: {self.round} deletions of {100 * amount:g} % each. They "
                    "must take some and leave some."
                )
        else:
            require(self.round == 1, "round", self.round, f"only a sequence has rounds, and not {kind}")
        if self.corrects:
            require(amount == 0, "amount", amount, "a backdoor has none: its images are those of `classes`")
            self._require_classes()
            require(0 < self.gamma <= 1, "gamma", self.gamma, "choose a share above 0, up to 1")
            become = ("corrected", "removed")
            require(self.known_are in become, "known_are", self.known_are, f"choose from {', '.join(become)}")
            return
        for name, without in (("classes", ()), ("gamma", 1), ("known_are", "corrected")):
            value = getattr(self, name)
            require(value == without, name, value, f"only a cross-backdoor has this, and not {kind}. Leave it out")

    def _require_classes(self) -> None:
        classes = self.classes
        fine = isinstance(classes, tuple) and all(is_whole(each, 0) for each in classes)
        require(fine and len(classes) > 0, "classes", classes, "name those whose images get the cross, as (0, 1)")
        require(len(set(classes)) == len(classes), "classes", classes, "name every class once")

    @property
    def name(self) -> str:
        """As tables call it."""
        if self.kind == "random":
            return f"random {100 * self.amount:g} %"
        if self.kind == "in-class":
            return f"in-class {self.amount:g}"
        if self.kind == "sequence":
            return f"deletion {self.round} of {100 * self.amount:g} % each"
        known = "" if self.known_are == "corrected" and self.gamma == 1 else f", {100 * self.gamma:g} % known"
        return f"cross backdoor {self.known_are}{known}"

    @property
    def corrects(self) -> bool:
        """Whether what is judged is a correction; else records are removed."""
        return self.kind == "cross-backdoor"

    @property
    def before(self) -> tuple[object, ...]:
        """What the original model depends on: faults in its data, if there are any, but not what is removed later."""
        return (self.kind, self.classes) if self.corrects else ()


SPARE = 2000  # images
NONE_TO_SPARE = (
    "a tuning without a forget set judges by training images that no model of its seed saw, not by the test images "
    "that are reported, and here are none"
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """Data, model, training and scenario; with a seed it is a situation that methods can be compared in.

    Raises:
        ConfigError: A value that cannot work.
    """

    dataset: str  # one of `data.READERS`, or digits
    model: str  # one of `models.MODELS`
    settings: tuple[tuple[str, Any], ...] = ()  # of the model, beside the number of classes and channels
    recipe: Recipe  # of the original and of retraining
    scenario: Scenario
    train: int = 0  # training images, drawn anew for each seed; 0: all
    test: int = 0  # test images, the same for all seeds; 0: all
    threads: int = 1  # of torch: results depend on them
    device: str = "cpu"
    fingerprint: str = ""  # of the data: `located` fills it in

    def __post_init__(self) -> None:
        datasets = ("digits", *READERS)
        require(self.dataset in datasets, "dataset", self.dataset, f"choose from {', '.join(datasets)}")
        require(isinstance(self.recipe, Recipe), "recipe", self.recipe, "write Recipe(epochs=…, lr=…)")
        require(self.recipe.epochs >= 1, "recipe.epochs", self.recipe.epochs, "an original must train: 1 or more")
        require(isinstance(self.scenario, Scenario), "scenario", self.scenario, "write Scenario(kind=…)")
        for name in ("train", "test"):
            require(
                is_whole(getattr(self, name), 0), name, getattr(self, name), "give a number of images, or 0 for all"
            )
        if self.dataset == "digits":
            some = f"of the {COUNT} digits give 1 to {COUNT - 1}: the others are the test images"
            require(0 < self.train < COUNT, "train", self.train, some)
            require(
                self.test == 0,
                "test",
                self.test,
                "the digits that are not trained on are the test images: leave it out",
            )
        require(is_whole(self.threads, 1), "threads", self.threads, "give 1 or more")
        self._require_device()
        self._require_model()

    def _require_device(self) -> None:
        try:
            torch.device(self.device)
        except (RuntimeError, TypeError) as error:
            raise ConfigError(f"device={self.device!r}: torch has none of this name. Write cpu or cuda.") from error

    def _require_model(self) -> None:
        require(self.model in MODELS, "model", self.model, f"choose from {', '.join(MODELS)}")
        require_settings(self.settings)
        signature = inspect.signature(MODELS[self.model])
        try:
            signature.bind(classes=0, channels=0, **dict(self.settings))
        except TypeError as error:
            raise ConfigError(
                f"model={self.model!r}, settings={self.settings!r}: {error}. An experiment gives classes and channels; "
                f"this model takes {', '.join(signature.parameters)}."
            ) from error

    @property
    def about(self) -> str:
        """Data and model in words."""
        sizes = f"{self.train or 'all'} training images"
        settings = "".join(f", {name} {value}" for name, value in self.settings)
        return f"{self.dataset}, {sizes}, {self.model}{settings}"


@dataclass(frozen=True, kw_only=True)
class Records:
    """The data of a task and a seed."""

    classes: int
    before: Examples  # what the original is trained on
    retain: Examples  # what is left, or its corrected form: what retraining is trained on
    forget: Examples  # what methods that are not blind see: removed records, or faulty ones
    parts: dict[str, Examples]  # what models are judged on, by split
    unseen: Examples  # test records like the removed ones: what an attacker has to tell them from
    triggered: Examples | None = None  # what is left with the trigger of a backdoor and true labels, for rehearsals


def located(task: Task, folder: Path | None) -> Task:
    """The task with the fingerprint of its data, so that other data makes another run.

    Raises:
        MissingData: Files of the dataset are not in the folder.
        ConfigError: No folder was given.
    """
    if task.dataset == "digits":
        return task
    images(task, folder)
    assert folder is not None
    return replace(task, fingerprint=_read(task.dataset, folder)[1])


def note_of(folder: Path | None) -> str:
    """What the file NOTE beside the data says of it, on one line; "" without one."""
    path = folder / NOTE if folder is not None else None
    return " ".join(path.read_text(encoding="utf-8").split()) if path is not None and path.exists() else ""


def images(task: Task, folder: Path | None) -> ImageData:
    """The whole dataset of a task.

    Raises:
        ConfigError: No folder was given.
        MissingData: Files of the dataset are not in it.
        MismatchError: They are not those that the task was planned with.
    """
    if folder is None:
        raise ConfigError(
            f"{task.dataset} is read from files. Say where they are with --data DIR or in the environment variable "
            f"EXPUNGE_DATA, or get them: expunge data get {task.dataset}."
        )
    found, fingerprint = _read(task.dataset, folder)
    if task.fingerprint not in ("", fingerprint):
        raise MismatchError(
            f"{task.dataset} in {folder} is not the data that this run was planned with: its images or labels differ. "
            "Restore it, or run `expunge bench run` again to plan with the new data."
        )
    return found


@lru_cache(maxsize=2)  # one stage after the other asks for the same
def records(task: Task, seed: int, folder: Path | None) -> Records:
    """What a scenario makes of the data of a task; the same for the same task and seed. Nobody may change it."""
    if task.dataset == "digits":
        split = digits(task.train, seed=seed)
        clean, test, classes, white = split.train, split.test, CLASSES, torch.ones(1, 1, 1)
    else:
        found = images(task, folder)
        if found.test is None:
            raise ConfigError(f"{task.dataset} has no test images, and models are judged on some.")
        chosen, scale = _drawn(task, found, seed)
        clean = to_examples(chosen, scale)
        test = to_examples(_some(found.test, task.test, stream(0, "test images")), scale)
        classes, white = len(found.classes), scale.white
    return (
        _removed(task, seed, clean, test, classes)
        if not task.scenario.corrects
        else _planted(task, seed, clean, test, classes, white)
    )


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


def untrained(task: Task, classes: int, channels: int, seed: int) -> nn.Module:
    """A model of the task, on its device."""
    return build(task.model, seed=seed, classes=classes, channels=channels, **dict(task.settings)).to(task.device)


def seed_of(stage: str, seed: int, number: int = 1) -> int:
    """The seed of a model: the original, or a retrained model by its number."""
    return derive(seed, stage, number) % 2**31


def _removed(task: Task, seed: int, clean: Examples, test: Examples, classes: int) -> Records:
    labels = clean.tensors[1]
    if task.scenario.kind == "sequence":
        return _again(task, seed, clean, test, classes)
    if task.scenario.kind == "random":
        gone, unseen = random_removal(len(clean), task.scenario.amount, seed), test
    else:
        label = seed % classes
        gone = in_class_removal(labels, label, count=int(task.scenario.amount), seed=seed)
        unseen = test.only(members(test.tensors[1], label))
    retain, forget = clean.without(gone), clean.only(gone)
    parts = {"retain": retain, "forget": forget, "test": test}
    return Records(classes=classes, before=clean, retain=retain, forget=forget, parts=parts, unseen=unseen)


def _again(task: Task, seed: int, clean: Examples, test: Examples, classes: int) -> Records:
    """Judged is what was removed so far; methods see what is removed now."""
    order = torch.randperm(len(clean), generator=stream(seed, "sequence"))
    share, now = round(task.scenario.amount * len(clean)), task.scenario.round
    if not 0 < share * now < len(clean):
        raise ConfigError(
            f"amount={task.scenario.amount}, round={now}: {now} deletions of {share} of {len(clean)} images each. They "
            "must take some and leave some."
        )
    before, gone = clean.without(order[: share * (now - 1)]), order[: share * now]
    retain = clean.without(gone)
    parts = {"retain": retain, "forget": clean.only(gone), "test": test}
    forget = clean.only(order[share * (now - 1) : share * now])
    return Records(classes=classes, before=before, retain=retain, forget=forget, parts=parts, unseen=test)


def _planted(task: Task, seed: int, clean: Examples, test: Examples, classes: int, white: Tensor) -> Records:
    scenario = task.scenario
    faulty = cross_backdoor(clean, scenario.classes, value=white)
    known = identified(faulty.corrupted, scenario.gamma, seed)
    assert faulty.on_test is not None
    domain = test.only(torch.isin(test.tensors[1], torch.tensor(scenario.classes)).nonzero()[:, 0])
    retain = corrected(faulty, clean, known) if scenario.known_are == "corrected" else faulty.data.without(known)
    on_test, left = (Examples(faulty.on_test(part.tensors[0]), part.tensors[1]) for part in (test, retain))
    return Records(
        classes=classes,
        before=faulty.data,
        retain=retain,
        forget=faulty.data.only(known),
        parts={"retain": retain, "forget": clean.only(known), "test": test, "triggered": on_test, "domain": domain},
        unseen=test,
        triggered=left,
    )


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


@lru_cache(maxsize=2)
def _read(dataset: str, folder: Path) -> tuple[ImageData, str]:
    """The dataset and a SHA-256 of its pixels and labels."""
    found, digest = read(dataset, folder), hashlib.sha256()
    for part in (found.train, found.test):
        if part is not None:
            digest.update(part.pixels.numpy().tobytes() + part.labels.numpy().tobytes())
    return found, digest.hexdigest()
