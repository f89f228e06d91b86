"""A setup file: Python that says what the command line cannot know about one's own model and data.

It defines ``model(seed)`` and ``loss_terms``, and of the following what a command needs: ``original()`` to cache,
``retain()`` to unlearn, ``forget()`` for methods that are not blind and for evaluation, ``validation()`` for SCRUB's
rewind, ``test()`` for evaluation, ``candidates()`` and ``triggered()`` for audits, ``recipe`` to retrain, also in
rehearsals, or ``train_from_scratch(model, data, seed)``, ``train_further(model, data, recipe, seed)`` to fine-tune in a
loop of one's own, ``persons()`` for rehearsals with whole persons, ``logits(model, batch)`` where a batch is not
(inputs, labels) or (inputs, targets), ``cached_loss`` if gradients are cached of another loss than that of training.
Only what is needed is called.
"""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import nn

from expunge.batches import Batches, LossTerms, require_reiterable
from expunge.errors import ConfigError, ExpungeError
from expunge.losses import require_loss_terms
from expunge.metrics.outputs import Logits, images_and_labels
from expunge.training import Recipe

SETUP = "expunge_setup_"  # what the names of setup modules begin with


@dataclass(frozen=True)
class Setup:
    """A loaded setup file."""

    path: Path
    module: ModuleType

    def imported(self) -> list[Path]:
        """The Python files below its folder that have been imported so far, without what is installed there."""
        own = self.path.resolve()
        return sorted(file for file in {*_below(own.parent).values()} - {own} if file.is_file())

    def model(self, seed: int) -> nn.Module:
        """An untrained model; the global generators, which it may draw from, are the caller's to seed."""
        model = self._call("model", seed)
        if not isinstance(model, nn.Module):
            raise ConfigError(f"{self.path}: model({seed}) returned {type(model).__name__}, not a torch.nn.Module.")
        return model

    @property
    def loss_terms(self) -> LossTerms:
        """Unreduced losses of a batch."""
        return self._loss("loss_terms")

    @property
    def cached_terms(self) -> LossTerms:
        """What cached gradients are of: ``cached_loss`` if the file defines it, otherwise ``loss_terms``."""
        return self._loss("cached_loss" if hasattr(self.module, "cached_loss") else "loss_terms")

    @property
    def logits(self) -> Logits:
        """Where logits and labels are in a batch."""
        logits: Logits = getattr(self.module, "logits", images_and_labels)
        return logits

    @property
    def recipe(self) -> Recipe:
        """How the model was trained.

        Raises:
            ConfigError: It is no `Recipe`.
        """
        recipe = self._get("recipe", "recipe = expunge.Recipe(epochs=…, lr=…)")
        if not isinstance(recipe, Recipe):
            raise ConfigError(
                f"{self.path}: recipe is a {type(recipe).__name__}. Write expunge.Recipe(epochs=…, lr=…)."
            )
        return recipe

    @property
    def train_from_scratch(self) -> Callable[[nn.Module, Batches, int], object] | None:
        """How models are trained from scratch, if not by a recipe."""
        return self._loop("train_from_scratch", "model, data, seed")

    @property
    def train_further(self) -> Callable[[nn.Module, Batches, Recipe, int], object] | None:
        """How a trained model is trained further, if not by a recipe alone."""
        return self._loop("train_further", "model, data, recipe, seed")

    def has(self, split: str) -> bool:
        """Whether the file defines a split: original, retain, forget, validation or test."""
        return hasattr(self.module, split)

    def data(self, split: str) -> Batches:
        """The data of a split: original, retain, forget, validation or test."""
        data: Batches = self._call(split)
        require_reiterable(data, f"what {split}() of {self.path} returns")
        return data

    def persons(self, records: int) -> Int[np.ndarray, " records"]:
        """Whose each record of ``retain()`` is, by number.

        Raises:
            ConfigError: It does not say it once for each of so many records.
        """
        returned = self._call("persons")
        names = returned.tolist() if hasattr(returned, "tolist") else list(returned)
        if len(names) != records:
            raise ConfigError(
                f"{self.path}: persons() returned {len(names)} names, and retain() has {records} records. Return the "
                "name or number of a person for each, in the same order."
            )
        for row, name in enumerate(names):
            if type(name) not in (str, int) or type(name) is not type(names[0]):
                raise ConfigError(
                    f"{self.path}: persons()[{row}] is {name!r}, and persons()[0] is {names[0]!r}. Return names or "
                    "whole numbers, all of one kind."
                )
        numbers: Int[np.ndarray, " records"] = np.unique(names, return_inverse=True)[1]
        return numbers

    def _loop(self, name: str, arguments: str) -> Callable[..., object] | None:
        if not hasattr(self.module, name):
            return None
        loop: Callable[..., object] = getattr(self.module, name)
        if not callable(loop):
            raise ConfigError(
                f"{self.path}: {name} is a {type(loop).__name__}, no function. Write def {name}({arguments}): …, which "
                "trains the model in place."
            )
        return loop

    def _loss(self, name: str) -> LossTerms:
        example = f"def {name}(model, batch): …, one loss a term"
        loss: LossTerms = self._get(name, example)
        if not callable(loss):
            raise ConfigError(f"{self.path}: {name} is {loss!r}, no function. Write {example}")
        try:
            require_loss_terms(loss)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {name}: {error}") from error
        return loss

    def _get(self, name: str, example: str) -> Any:
        if not hasattr(self.module, name):
            raise ConfigError(f"{self.path} does not define {name}. Add: {example}")
        return getattr(self.module, name)

    def _call(self, name: str, *arguments: int) -> Any:
        returned = {"model": "MyNetwork()", "persons": '["anna", "anna", "ben", …]'}.get(name, "Examples(x, y)")
        example = f"def {name}({'seed' if arguments else ''}): return {returned}"
        function: Callable[..., Any] = self._get(name, example)
        if not callable(function):
            raise ConfigError(f"{self.path}: {name} is a {type(function).__name__}, no function. Write {example}")
        try:
            return function(*arguments)
        except ExpungeError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{self.path}: {name}({', '.join(map(str, arguments))}) failed with {type(error).__name__}: {error}"
            ) from error


_beside: list[Path] = []  # the folder of the last file that was run


def _let_import_from(folder: Path) -> None:
    """Let a file that is run import what lies beside it, now and from its functions, until one of another folder is.

    The folder is last on the path, so that nothing there hides a library. What another folder's file imported from
    beside it is forgotten: this one may have modules of the same names.
    """
    if _beside and _beside[0] != folder:
        old = _beside.pop()
        sys.path[:] = [each for each in sys.path if each != str(old)]
        for name in _below(old):
            if not name.startswith(SETUP):
                del sys.modules[name]
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
        _beside[:] = [folder]


def _below(folder: Path) -> dict[str, Path]:
    """The files of modules that were imported from a folder or one in it, by name; neither ours nor installed there."""
    named = ((name, getattr(module, "__file__", None)) for name, module in list(sys.modules.items()))
    files = {name: Path(file).resolve() for name, file in named if file and Path(file).is_absolute()}
    return {
        name: file
        for name, file in files.items()
        if file.is_relative_to(folder)
        and file.suffix == ".py"
        and not file.is_relative_to(Path(__file__).parent)
        and not {"site-packages", "dist-packages"} & {*file.parts}
    }


def run_python(path: Path, name: str, what: str, failed: Callable[[Exception], ConfigError]) -> ModuleType:
    """Run a Python file as a module; what it is and what its failure is called are its reader's to say.

    Raises:
        ConfigError: It is no Python file, or fails when it is run.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: {what}, and its name ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and worker processes look it up
    _let_import_from(path.resolve().parent)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise failed(error) from error
    return module


def load_setup(path: Path | str) -> Setup:
    """Run a setup file and look at what it defines.

    Raises:
        FileNotFoundError: No such file.
        ConfigError: It is no Python file, or fails when it is run.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such setup file. Write one: Python that defines model(seed), loss_terms and your data, as "
            "docs/own-model.md shows."
        )

    def failed(error: Exception) -> ConfigError:
        return ConfigError(f"{path} failed when it was run, with {type(error).__name__}: {error}")

    return Setup(path, run_python(path, f"{SETUP}{path.stem}", "a setup file is Python", failed))
