"""Whether a task fits its data: asked when an experiment is planned, before anything is trained."""

from functools import cache
from pathlib import Path
from typing import Any

import torch

from expunge.bench.tasks import Task, images, sizes_of
from expunge.data.digits import CLASSES, SIDE
from expunge.errors import ConfigError
from expunge.models import build


def require_fit(task: Task, folder: Path | None) -> None:
    """Refuse sizes that the data does not have, a scenario that takes none or all of it, and a model it does not suit.

    Args:
        task: What is planned.
        folder: Where datasets are.

    Raises:
        ConfigError: It does not fit; or no folder was given.
        MissingData: The data is not there.
    """
    if task.dataset == "digits":
        count, classes = task.train, CLASSES
        shape: tuple[int, ...] = (1, SIDE, SIDE)
    else:
        found = images(task, folder)
        if found.test is None:
            raise ConfigError(f"{task.dataset} has no test images, and models are judged on some.")
        for name, asked, there in (("train", task.train, len(found.train)), ("test", task.test, len(found.test))):
            if asked > there:
                raise ConfigError(f"{name}={asked}: {task.dataset} has {there} such images. Take fewer, or 0 for all.")
        count, classes = task.train or len(found.train), len(found.classes)
        shape = tuple(found.train.pixels.shape[1:])
    _require_some(task, count, classes)
    _require_model(task.model, task.settings, classes, shape)


def _require_some(task: Task, count: int, classes: int) -> None:
    """Refuse a scenario that takes none or all of the training images."""
    scenario = task.scenario
    if scenario.of_all:
        each = round(scenario.amount * count)
        if not 0 < each * scenario.round < count:
            raise ConfigError(
                f"amount={scenario.amount} is {each} of {count} training images at a time: it must take some and leave "
                "some."
            )
        if round(scenario.gamma * each) == 0:
            raise ConfigError(
                f"gamma={scenario.gamma} of {each} faults is none, and some must be known. Raise gamma or amount."
            )
    elif scenario.amount < 1 and scenario.kind in ("in-class", "flipped-labels"):
        least = count // classes
        few = round(scenario.amount * least)
        if few == 0 or (few == least and scenario.kind == "in-class"):
            raise ConfigError(
                f"amount={scenario.amount} of a class: the smallest of {classes} classes has no more than {least} of "
                f"{count} training images, of which this is {few}. It must take some and leave some: choose another "
                "share, or train on more."
            )
    elif scenario.kind == "in-class" and scenario.amount * classes >= count:
        raise ConfigError(
            f"amount={scenario.amount:g} images of one class: the smallest of {classes} classes has no more than "
            f"{count // classes} of {count} training images, and some of it must stay. Remove fewer, or train on more."
        )
    if len(scenario.classes) == classes and scenario.known_are == "removed" and scenario.gamma == 1:
        raise ConfigError(f"classes={scenario.classes}: all images have the pattern, and removing them leaves none.")
    if any(label >= classes for label in scenario.named_classes):
        name, value = ("pairs", scenario.pairs) if scenario.pairs else ("classes", scenario.classes)
        raise ConfigError(f"{name}={value}: {task.dataset} has classes 0 to {classes - 1}.")


@cache
def _require_model(name: str, settings: tuple[tuple[str, Any], ...], classes: int, shape: tuple[int, ...]) -> None:
    """Refuse a model that cannot be built or does not take such images: on a CPU, with two of them."""
    try:
        model = build(name, seed=0, **sizes_of(name, classes, shape[0]), **dict(settings)).eval()
        with torch.no_grad():
            logits = model(torch.zeros(2, *shape))
        if logits.shape != (2, classes):
            raise ValueError(f"it gives {tuple(logits.shape)} for two images of {classes} classes")
    except Exception as error:
        raise ConfigError(
            f"model={name!r}, settings={settings!r}: it does not work on images of {shape} (channels, height, width): "
            f"{type(error).__name__}: {error}"
        ) from error
