"""Who takes part in a comparison, with which budget, and with which settings.

Every entry starts from a method's published settings with the epochs of the budget, and was tuned over the space that
the method declares: ``experiments/digits_rehearsal.py`` writes ``digits_settings.json``, which is read here.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib.resources import files
from typing import Any

from expunge.batches import LossTerms
from expunge.errors import ConfigError
from expunge.methods import Method, all_methods, fine_tune, method_of, reload
from expunge.methods.fisher import FisherForgetting
from expunge.methods.grda import GRDA
from expunge.methods.reload import Reload
from expunge.methods.retrain import Retrain
from expunge.space import Choice, Range, Space, with_settings
from expunge.training import Recipe

FILE = "digits_settings.json"
LAYERS = 3  # weight layers of the network on the digits
_OF_THE_BUDGET = ("batch_size", "crop", "flip", "cutout", "channels_last", "precision", "compile")
SHORT = Recipe(epochs=10, lr=0.1)  # where any budget will do


@dataclass(frozen=True)
class Entry:
    """A method, or a control: a part of RELOAD by itself, or the same time spent otherwise."""

    name: str  # in tables
    start: Any  # its configuration before tuning
    space: Space
    blind: bool
    unfit: Mapping[str, str] = field(default_factory=dict)  # scenario: why it does not take part

    @property
    def cached_loss(self) -> LossTerms | None:
        """What it needs a cached gradient of, if it needs one."""
        return method_of(self.start).cached_loss

    def configured(self, settings: Mapping[str, Any], removed_classes: tuple[int, ...] = ()) -> object:
        """Its configuration with chosen settings, and the classes of which nothing is left.

        Raises:
            ConfigError: A setting that it does not have, or a value that it refuses.
        """
        config = with_settings(self.start, settings)
        if isinstance(config, FisherForgetting) and removed_classes:
            return replace(config, removed_classes=removed_classes)
        return config


def entries(budget: Recipe, layers: int = LAYERS) -> dict[str, Entry]:
    """Everyone who takes part, by name: blind methods, controls, then those that see what was removed.

    Args:
        budget: Epochs that each may train, all its phases together, and the batch size.
        layers: Weight layers of the network.
    """
    methods = [_entry(method, budget, layers) for method in all_methods().values() if method.name != "retrain"]
    ordered = [*(e for e in methods if e.blind), *controls(budget), *(e for e in methods if not e.blind)]
    return {entry.name: entry for entry in ordered}


def controls(budget: Recipe) -> Iterator[Entry]:
    """What RELOAD has to be better than to be worth its parts."""
    ascent, reset = "priming_lr", "reset_fraction"
    training = {name: values for name, values in reload.SPACE.items() if name not in (ascent, reset)}
    ascending, resetting = {ascent: reload.SPACE[ascent]}, {reset: reload.SPACE[reset]}
    still = replace(budget, epochs=0)
    yield Entry("control: short retraining", Retrain(recipe=budget), fine_tune.SPACE, blind=True)
    yield Entry("control: random reset", Reload(selector="random", fine_tune=budget), reload.SPACE, blind=True)
    no_ascent = Reload(priming_lr=None, fine_tune=budget)
    yield Entry("control: without ascent", no_ascent, resetting | training, blind=True)
    yield Entry("control: ascent alone", Reload(reset_fraction=0.0, fine_tune=still), ascending, blind=True)
    yield Entry("control: reset alone", Reload(priming_lr=None, fine_tune=still), resetting, blind=True)


@cache
def stored() -> dict[str, Any]:
    """The settings that the rehearsal chose, with where they come from."""
    text = (files("expunge.bench") / FILE).read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def rehearsed() -> set[str]:
    """The entries that the rehearsal chose settings for: all but methods of other packages."""
    return {name for settings in stored()["settings"].values() for name in settings}


def chosen(scenario: str, name: str) -> dict[str, Any]:
    """The settings that the rehearsal chose for an entry.

    Raises:
        ConfigError: It took no part in the rehearsal.
    """
    settings: dict[str, dict[str, Any]] = stored()["settings"].get(scenario, {})
    if name not in settings:
        raise ConfigError(
            f"{name!r} has no settings for {scenario!r} in {FILE}. Run experiments/digits_rehearsal.py, which chooses "
            "them, or an experiment that tunes everyone (docs/own-method.md)."
        )
    return settings[name]


def _entry(method: Method, budget: Recipe, layers: int) -> Entry:
    start = _within(method.published(), budget)
    space = {path: _within_epochs(path, values, start) for path, values in method.space.items()}
    if method.of_expunge:
        space = {path: _fitted(path, values, start, layers) for path, values in space.items()}
    return Entry(method.name, start, space, method.blind, method.unfit)


def _within(config: Any, budget: Recipe) -> Any:
    """The published settings with the epochs of the budget, dealt out to the phases as published.

    Augmentation and what makes training fast are those of the budget, for everyone.
    """
    recipes = {f.name: getattr(config, f.name) for f in fields(config) if isinstance(getattr(config, f.name), Recipe)}
    published = sum(recipe.epochs for recipe in recipes.values())
    same = {name: getattr(budget, name) for name in _OF_THE_BUDGET}
    changed: dict[str, Any] = {
        name: replace(recipe, epochs=max(budget.epochs * recipe.epochs // published, 1), **same)
        for name, recipe in recipes.items()
    }
    if isinstance(config, GRDA):  # each step passes over all of the data twice
        changed = {"epochs": max(budget.epochs // 2, 1), "batch_size": budget.batch_size}
    return replace(config, **changed)


def _within_epochs(path: str, values: Range | Choice, start: Any) -> Range | Choice:
    """No more epochs of a recipe, or of GRDA, than the budget gave it."""
    outer, _, last = path.rpartition(".")
    holder = getattr(start, outer, None) if outer else start
    if last != "epochs" or not isinstance(holder, Recipe | GRDA):
        return values
    most = holder.epochs
    if isinstance(values, Choice):
        return Choice(tuple(each for each in values.options if each <= most) or (most,))
    return Range(min(values.low, most), min(values.high, most), values.log)


def _fitted(path: str, values: Any, start: Any, layers: int) -> Any:
    """Of expunge's own methods what the network and the budget allow."""
    if path == "rounds":  # of one epoch at least
        return Range(values.low, min(values.high, start.fine_tune.epochs))
    if path == "k":  # a layer must stay as it is, or it is no longer the method
        return Range(values.low, max(min(values.high, layers - 1), values.low))
    return values
