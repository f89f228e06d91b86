"""What an experiment is about: a dataset, a model, how it is trained, and what is removed or corrected."""

import hashlib
import inspect
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from expunge.bench.required import is_whole, require, require_settings
from expunge.data import OWN, READERS, read
from expunge.data.digits import COUNT
from expunge.data.images import ImageData
from expunge.errors import ConfigError, MismatchError
from expunge.models import MODELS, build
from expunge.seeds import derive
from expunge.training import Recipe

Kind = Literal[
    "random", "in-class", "class", "neighbours", "sequence",
    "cross-backdoor", "distributed-backdoor", "feature-backdoor", "flipped-labels", "random-labels", "noise",
]  # fmt: skip
Family = Literal["removal", "class-removal", "label-correction", "input-correction"]  # what methods may be unfit for
_PATTERNS: tuple[Kind, ...] = ("cross-backdoor", "distributed-backdoor", "feature-backdoor")
_FAULTS: tuple[Kind, ...] = (*_PATTERNS, "flipped-labels", "random-labels", "noise")
_OF_A_CLASS: tuple[Kind, ...] = ("in-class", "class")
_OF_ALL: tuple[Kind, ...] = ("random", "neighbours", "sequence", "random-labels", "noise")
NOTE = "NOTE"  # a text file beside the data that says in what it differs from the official files


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is removed or corrected; docs/scenarios.md has the kinds.

    Raises:
        ConfigError: A value that cannot work, or that this kind has no use for.
    """

    kind: Kind
    amount: float = 0.0  # a share of the training images, each time; of a class or pairs: of theirs, or how many
    classes: tuple[int, ...] = ()  # backdoors: whose images have the pattern; of a class: which, or the seed says
    pairs: tuple[tuple[int, int], ...] = ()  # flipped labels: classes that are taken for each other
    gamma: float = 1.0  # corrections: share of the faults that are known
    known_are: Literal["corrected", "removed"] = "corrected"  # corrections: what becomes of known faults
    round: int = 1  # sequence: the how-many-th deletion; the model is what the one before left

    def __post_init__(self) -> None:
        require(self.kind in get_args(Kind), "kind", self.kind, f"choose from {', '.join(get_args(Kind))}")
        for name in ("amount", "gamma"):
            require(isinstance(getattr(self, name), int | float), name, getattr(self, name), "give a number")
        require(is_whole(self.round, 1), "round", self.round, "count deletions from 1")
        taken = {
            "amount": self.of_all or self.kind in ("flipped-labels", "in-class"),
            "classes": self.kind in (*_PATTERNS, *_OF_A_CLASS),
            "pairs": self.kind == "flipped-labels",
            "gamma": self.corrects,
            "known_are": self.corrects,
            "round": self.kind == "sequence",
        }
        for each in fields(self):
            value = getattr(self, each.name)
            if not taken.get(each.name, True):
                require(value == each.default, each.name, value, f"{self.kind} has none. Leave it out")
        self._require_amount()
        if self.classes or self.kind in _PATTERNS:
            self._require_classes()
        if taken["pairs"]:
            self._require_pairs()
        require(0 < self.gamma <= 1, "gamma", self.gamma, "choose a share above 0, up to 1")
        become = ("corrected", "removed")
        require(self.known_are in become, "known_are", self.known_are, f"choose from {', '.join(become)}")

    def _require_amount(self) -> None:
        kind, amount = self.kind, self.amount
        if self.of_all or kind == "flipped-labels":
            whole = "the training images" if self.of_all else "the images of these classes"
            require(0 < amount < 1, "amount", amount, f"{kind} takes a share of {whole}, above 0 and below 1")
        elif kind == "in-class":
            fine = 0 < amount < 1 or (amount >= 1 and float(amount).is_integer())
            require(fine, "amount", amount, "of a class it is how many images, a whole number, or a share below 1")
        if kind == "sequence" and amount * self.round >= 1:
            raise ConfigError(
                f"amount={amount}, round={self.round}: {self.round} deletions of {100 * amount:g} % each. They "
                "must take some and leave some."
            )

    def _require_classes(self) -> None:
        classes = self.classes
        fine = isinstance(classes, tuple) and all(is_whole(each, 0) for each in classes)
        if self.kind in _OF_A_CLASS:
            require(fine and len(classes) == 1, "classes", classes, "name one, as (3,), or leave it to the seed")
            return
        require(fine and len(classes) > 0, "classes", classes, "name those whose images get the pattern, as (0, 1)")
        require(len(set(classes)) == len(classes), "classes", classes, "name every class once")

    def _require_pairs(self) -> None:
        pairs = self.pairs
        fine = isinstance(pairs, tuple) and all(
            isinstance(pair, tuple) and len(pair) == 2 and all(is_whole(each, 0) for each in pair) for pair in pairs
        )
        require(fine and len(pairs) > 0, "pairs", pairs, "name classes two by two, as ((0, 2), (3, 5))")
        named = self.named_classes
        require(len(set(named)) == len(named), "pairs", pairs, "name every class once")

    @property
    def name(self) -> str:
        """As tables call it."""
        size = f" {self.amount:g}" if self.amount >= 1 else f" {100 * self.amount:g} %" if self.amount else ""
        if self.kind == "sequence":
            return f"deletion {self.round} of{size} each"
        if not self.corrects:
            return f"{self.kind}{size}" + "".join(f", class {label}" for label in self.classes)
        known = "" if self.mended else f", {100 * self.gamma:g} % known"
        return f"{self.kind.replace('-', ' ')}{size}{',' if size else ''} {self.known_are}{known}"

    @property
    def corrects(self) -> bool:
        """Whether what is judged is a correction; else records are removed."""
        return self.kind in _FAULTS

    @property
    def of_all(self) -> bool:
        """Whether the amount is a share of all training images."""
        return self.kind in _OF_ALL

    @property
    def on_inputs(self) -> bool:
        """Whether the faults are in the inputs, so that test images can have them, too; else in labels."""
        return self.kind in (*_PATTERNS, "noise")

    @property
    def named_classes(self) -> tuple[int, ...]:
        """Those whose images have faults, or are removed; none where that is left to the seed, or to chance."""
        return self.classes or tuple(label for pair in self.pairs for label in pair)

    @property
    def family(self) -> Family:
        """What methods may be unfit for."""
        if not self.corrects:
            return "class-removal" if self.kind == "class" else "removal"
        return "input-correction" if self.on_inputs else "label-correction"

    @property
    def mended(self) -> bool:
        """Whether all faults are corrected: what is left is then the same data, whatever the faults were."""
        return self.corrects and self.known_are == "corrected" and self.gamma == 1

    @property
    def before(self) -> tuple[object, ...]:
        """What the original model depends on: faults in its data, if there are any, but not what is removed later."""
        if not self.corrects:
            return ()
        return (self.kind, self.classes, *((self.pairs, self.amount) if self.amount else ()))


@dataclass(frozen=True, kw_only=True)
class Task:
    """Data, model, training and scenario; with a seed it is a situation that methods can be compared in.

    Raises:
        ConfigError: A value that cannot work.
    """

    dataset: str  # one of `data.READERS`, or digits, or a file of one's own in the folder of datasets: pets.npz
    model: str  # one of `models.MODELS`
    settings: tuple[tuple[str, Any], ...] = ()  # of the model, beside the number of classes and channels
    recipe: Recipe  # of the original and of retraining
    scenario: Scenario
    train: int = 0  # training images, drawn anew for each seed; 0: all
    test: int = 0  # test images, the same for all seeds; 0: all
    threads: int = 1  # of torch: results depend on them
    device: str = "cpu"
    fingerprint: str = ""  # of the data: `located` fills it in
    called: str = ""  # in tables, where one experiment has several of a scenario; by default as the scenario is

    def __post_init__(self) -> None:
        datasets = ("digits", *READERS)
        known = self.dataset in datasets or str(self.dataset).endswith(OWN)
        cure = f"choose from {', '.join(datasets)}, or name a file that ends in {OWN} in the folder of datasets"
        require(known, "dataset", self.dataset, cure)
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
        require(isinstance(self.called, str), "called", self.called, "write a name for tables, or leave it out")
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
            signature.bind(**sizes_of(self.model, 0, 0), **dict(self.settings))
        except TypeError as error:
            raise ConfigError(
                f"model={self.model!r}, settings={self.settings!r}: {error}. An experiment gives classes and channels; "
                f"this model takes {', '.join(signature.parameters)}."
            ) from error

    @property
    def name(self) -> str:
        """As tables call it."""
        return self.called or self.scenario.name

    @property
    def about(self) -> str:
        """Data and model in words."""
        sizes = f"{self.train or 'all'} training images"
        settings = "".join(f", {name} {value}" for name, value in self.settings)
        return f"{self.dataset}, {sizes}, {self.model}{settings}"


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
            "EXPUNGE_DATA" + ("." if task.dataset.endswith(OWN) else f", or get them: expunge data get {task.dataset}.")
        )
    found, fingerprint = _read(task.dataset, folder)
    if task.fingerprint not in ("", fingerprint):
        raise MismatchError(
            f"{task.dataset} in {folder} is not the data that this run was planned with: its images or labels differ. "
            "Restore it, or run `expunge bench run` again to plan with the new data."
        )
    return found


def untrained(task: Task, classes: int, channels: int, seed: int) -> nn.Module:
    """A model of the task, on its device."""
    sizes = sizes_of(task.model, classes, channels)
    return build(task.model, seed=seed, **sizes, **dict(task.settings)).to(task.device)


def sizes_of(model: str, classes: int, channels: int) -> dict[str, int]:
    """What an experiment gives a model beside its settings: not an MLP, whose widths say all of it."""
    taken = inspect.signature(MODELS[model]).parameters
    return {name: size for name, size in (("classes", classes), ("channels", channels)) if name in taken}


def seed_of(stage: str, seed: int, number: int = 1) -> int:
    """The seed of a model: the original, or a retrained model by its number."""
    return derive(seed, stage, number) % 2**31


@lru_cache(maxsize=2)
def _read(dataset: str, folder: Path) -> tuple[ImageData, str]:
    """The dataset and a SHA-256 of its pixels and labels."""
    found, digest = read(dataset, folder), hashlib.sha256()
    for part in (found.train, found.test):
        if part is not None:
            digest.update(part.pixels.numpy().tobytes() + part.labels.numpy().tobytes())
    return found, digest.hexdigest()
