"""A run folder as a demo or an experiment wrote it, read and checked."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from expunge.errors import ConfigError
from expunge.rows import Row, read_rows

T = TypeVar("T")
SAMPLES = "samples.safetensors"


@dataclass(frozen=True)
class Point:
    """The mean loss on a split at a moment of an unlearning; a line of curves.csv, in order of time."""

    scenario: str
    method: str
    seed: int
    moment: str  # "original", "ascend", "re-initialise", "epoch 1", …
    step: int  # fine-tuning steps so far
    split: str
    loss: float  # nats


@dataclass(frozen=True)
class Reset:
    """How much of a tensor was re-initialised; a line of reset.csv."""

    scenario: str
    method: str
    seed: int
    parameter: str
    share: float  # in [0, 1]
    entries: int


@dataclass(frozen=True)
class Loss:
    """The loss of one record; a line of losses.csv."""

    scenario: str
    method: str
    seed: int
    split: str
    loss: float  # nats


@dataclass(frozen=True)
class Fact:
    """Something a method found out; a line of facts.csv."""

    scenario: str
    method: str
    seed: int
    fact: str
    value: str


@dataclass(frozen=True)
class Run:
    """Everything in a run folder."""

    config: dict[str, Any]
    environment: dict[str, Any]
    rows: list[Row]
    curves: list[Point]
    resets: list[Reset]
    losses: list[Loss]
    facts: list[Fact]
    trace: dict[str, Any]  # of the unlearning of one model; empty for runs of many
    samples: dict[str, np.ndarray]  # a few images of each scenario, by name; empty where none were kept


def read_json(path: Path | str) -> dict[str, Any]:
    """Read a JSON object of a run folder.

    Raises:
        ConfigError: It is missing, or is no JSON object.
    """
    return _checked(Path(path), _object)


def read_run(folder: Path | str) -> Run:
    """Read a run folder.

    Args:
        folder: With config.json, env.json and rows.csv, and of curves.csv, reset.csv, losses.csv, facts.csv, trace.json
            and samples.safetensors what the run has something for.

    Raises:
        ConfigError: A file is missing, is not what its name says, or there are no rows.
    """
    folder = Path(folder)
    run = Run(
        config=read_json(folder / "config.json"),
        environment=read_json(folder / "env.json"),
        rows=_checked(folder / "rows.csv", read_rows),
        curves=_optional(folder / "curves.csv", Point),
        resets=_optional(folder / "reset.csv", Reset),
        losses=_optional(folder / "losses.csv", Loss),
        facts=_optional(folder / "facts.csv", Fact),
        trace=read_json(folder / "trace.json") if (folder / "trace.json").exists() else {},
        samples=_checked(folder / SAMPLES, load_file) if (folder / SAMPLES).exists() else {},
    )
    if not any(row.source == "measured" for row in run.rows):
        raise ConfigError(f"{folder / 'rows.csv'} holds no measured row: there is nothing to report. Finish the run.")
    return run


def _optional(path: Path, line: type[T]) -> list[T]:
    return _checked(path, lambda path: _table(path, line)) if path.exists() else []


def _checked(path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} is missing: a run folder has config.json, env.json and rows.csv. Name such a folder, as `expunge "
            "demo` and `expunge evaluate --out` write them, or finish the run."
        ) from error
    except ConfigError:
        raise
    except (ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Run again to write it anew.") from error


def _object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a {type(value).__name__}; a JSON object is expected.")
    return value


def _table(path: Path, line: type[T]) -> list[T]:
    types = get_type_hints(line)
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != list(types):
            raise ConfigError(f"{path} has the columns {reader.fieldnames}; expected are {list(types)}.")
        return [line(**{name: types[name](text) for name, text in texts.items()}) for texts in reader]
