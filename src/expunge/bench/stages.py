"""The stages of an experiment: what each depends on, and the name that follows from that.

A stage is plain values; its result is a folder whose name is a hash of those that matter to it, of the keys of the
stages it needs, and of a version. Stages with the same key are the same work and are done once, whoever needs them.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any, Literal, get_args

from expunge.batches import LossTerms
from expunge.bench.entries import SHORT, Entry, entries
from expunge.bench.required import is_whole, nearest, require, require_settings
from expunge.bench.tasks import Scenario, Task
from expunge.errors import ConfigError
from expunge.losses import cross_entropy, logit_margin, name_of, tempered_margin
from expunge.methods import method_of
from expunge.space import settings_of, with_settings
from expunge.training import Recipe

Step = Literal["original", "cache", "retrain", "outputs", "tune", "unlearn", "evaluate"]
STEPS: tuple[Step, ...] = get_args(Step)
# Raise one when the code of a step, or what it calls, gives other results than before: its stages are then done anew.
# Only the file of a method counts by itself. A hash of the whole library would throw away days of training after a
# change of a comment; env.json of every stage has that hash, and `bench status` says when results mix.
VERSIONS: dict[Step, int] = dict.fromkeys(STEPS, 1) | {"evaluate": 2}
CACHED = (cross_entropy, logit_margin, tempered_margin)  # losses that gradients are cached of
LOSSES = {name_of(loss): loss for loss in CACHED}
PSEUDO_SETS = 2  # that a blind tuning tries every setting on
STANDARDS = ("original", "retrain", "retrain again")  # models that are evaluated beside those that unlearned


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Who takes part: a method or a control, with settings of its own on top of those that were tuned.

    Raises:
        ConfigError: There is no such entry, or it does not have these settings or refuses their values.
    """

    name: str  # in tables
    entry: str  # one of `entries`: whose start and search space; of the standards their own name
    settings: tuple[tuple[str, Any], ...] = ()
    tuned: bool | Literal["blind"] = True  # on a rehearsal, or "blind" on what is left, or with the start's settings
    cached_loss: str = ""  # that its cached gradient is of, by name; by default what the entry takes

    def __post_init__(self) -> None:
        require(isinstance(self.name, str) and self.name != "", "name", self.name, "give a contender a name")
        fitting = isinstance(self.tuned, bool) or self.tuned == "blind"
        require(fitting, "tuned", self.tuned, "write True, False or 'blind'")
        require_settings(self.settings)
        fitting = self.cached_loss in ("", *LOSSES)
        require(fitting, "cached_loss", self.cached_loss, f"choose from {', '.join(LOSSES)}, or leave it out")
        if self.entry in STANDARDS:
            require(not self.settings, "settings", self.settings, f"{self.entry} has none of its own. Leave them out")
            return
        _require_entry(self.entry)
        entry = _entries()[self.entry]
        uses = entry.cached_loss is not None or not self.cached_loss
        require(uses, "cached_loss", self.cached_loss, f"{self.entry} uses no cached gradient. Leave it out")
        can = entry.blind or self.tuned != "blind"
        require(can, "tuned", self.tuned, f"{self.entry} needs the removed records. Write True or False")
        _require_fitting(self.name, self.entry, self.settings)


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What everyone may spend.

    Raises:
        ConfigError: Less than a comparison takes, or a value of another kind.
    """

    budget: Recipe  # the most that an unlearning may train, all its phases together
    trials: int  # of settings, a method
    rehearsals: tuple[int, ...] = (1001,)  # seeds of their own, on which settings are tried
    references: int = 2  # retrained models of a rehearsal

    def __post_init__(self) -> None:
        require(isinstance(self.budget, Recipe), "budget", self.budget, "write Recipe(epochs=…, lr=…)")
        seeds = self.rehearsals
        several = isinstance(seeds, tuple) and all(is_whole(seed, 0) for seed in seeds)
        require(several, "rehearsals", seeds, "write a tuple of seeds, as (1001,)")
        require(len(set(seeds)) == len(seeds), "rehearsals", seeds, "name every seed once")
        for name in ("trials", "references"):
            require(is_whole(getattr(self, name), 0), name, getattr(self, name), "give a whole number")
        for name, value, least in (
            ("budget.epochs", self.budget.epochs, 2),  # SCRUB takes turns
            ("trials", self.trials, 1),
            ("rehearsals", len(self.rehearsals), 1),
            ("references", self.references, 2),  # the distance between two is the unit of the score
        ):
            if value < least:
                raise ConfigError(f"Effort: {name} is {value}, and a comparison takes {least} or more.")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A piece of work of an experiment."""

    step: Step
    task: Task
    seed: int
    number: int = 1  # of a retrained model
    contender: Contender | None = None
    effort: Effort | None = None
    cached_loss: str = name_of(cross_entropy)  # of a cached gradient

    @property
    def label(self) -> str:
        """For people."""
        who = self.contender.name if self.contender else str(self.number) if self.step in ("retrain", "outputs") else ""
        return " ".join(each for each in (self.step, who, f"({self.task.name}, seed {self.seed})") if each)

    @property
    def needs(self) -> "dict[str, Stage]":
        """The stages whose results this one reads, by role."""
        return _NEEDS[self.step](self)

    @property
    def key(self) -> str:
        """Names the result."""
        return _key(self)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dict(json.loads(json.dumps(asdict(self))))

    def of(self, step: Step, **changes: Any) -> "Stage":
        """Another stage of the same task and seed, unless changed."""
        return replace(Stage(step=step, task=self.task, seed=self.seed), **changes)


def from_plain(plain: dict[str, Any]) -> Stage:
    """The stage that `Stage.plain` wrote."""
    values: dict[str, Any] = {name: _tuples(value) for name, value in plain.items()}
    task = values["task"]
    values["task"] = Task(**{**task, "recipe": Recipe(**task["recipe"]), "scenario": Scenario(**task["scenario"])})
    if values["contender"] is not None:
        values["contender"] = Contender(**values["contender"])
    if values["effort"] is not None:
        values["effort"] = Effort(**{**values["effort"], "budget": Recipe(**values["effort"]["budget"])})
    return Stage(**values)


def closure(wanted: Iterable[Stage], done: Callable[[Stage], bool] = lambda _: False) -> dict[str, Stage]:
    """These stages and all that they need, by key; what is needed comes first.

    Args:
        wanted: The stages asked for.
        done: Which are left out, with what only they need.
    """
    found: dict[str, Stage] = {}

    def visit(stage: Stage) -> None:
        if stage.key not in found and not done(stage):
            for need in stage.needs.values():
                visit(need)
            found[stage.key] = stage

    for stage in wanted:
        visit(stage)
    return found


def original_of(stage: Stage) -> Stage:
    """The stage that trains the model before any deletion, which is the same for all of a sequence."""
    return stage.of("original", task=_first(stage.task))


def start_of(stage: Stage) -> Stage:
    """The stage whose model an unlearning starts from: the original, or the deletion before this one."""
    scenario = stage.task.scenario
    if scenario.round == 1:
        return original_of(stage)
    before = replace(stage.task, scenario=replace(scenario, round=scenario.round - 1))
    return replace(stage, step="unlearn", task=before)


def cache_of(stage: Stage) -> Stage:
    """The stage that caches the gradient at that model: after each deletion anew, of the loss that the entry takes."""
    assert stage.contender is not None
    loss = name_of(cached_loss_of(stage.contender) or cross_entropy)
    first = stage.task.scenario.round == 1
    return stage.of("cache", cached_loss=loss) if first else replace(stage, step="cache", cached_loss=loss)


def cached_loss_of(contender: Contender) -> LossTerms | None:
    """What a contender needs a cached gradient of, if it needs one."""
    if contender.cached_loss:
        return LOSSES[contender.cached_loss]
    return None if contender.entry in STANDARDS else _entries()[contender.entry].cached_loss


def _trained(stage: Stage) -> dict[str, Stage]:
    return {"original": start_of(stage), "cache": cache_of(stage)}


def _tune(stage: Stage) -> dict[str, Stage]:
    assert stage.effort is not None
    assert stage.contender is not None
    if stage.contender.tuned == "blind":
        return _trained(stage)
    found: dict[str, Stage] = {}
    for seed in stage.effort.rehearsals:
        found |= {f"{role} {seed}": need for role, need in _trained(replace(stage, seed=seed)).items()}
        for number in range(1, stage.effort.references + 1):
            found[f"outputs {number} {seed}"] = stage.of("outputs", seed=seed, number=number)
    return found


def _unlearn(stage: Stage) -> dict[str, Stage]:
    assert stage.contender is not None
    if not stage.contender.tuned:
        return _trained(stage)
    return {**_trained(stage), "tune": tuning_of(stage)}


def tuning_of(stage: Stage) -> Stage:
    """The search whose best settings an unlearning takes; of a sequence that of its first deletion.

    A blind one is made anew for each seed, on what is left of its data.
    """
    assert stage.contender is not None
    entry = replace(stage.contender, name=stage.contender.entry, settings=())
    seed = stage.seed if entry.tuned == "blind" else 0
    return stage.of("tune", task=_first(stage.task), seed=seed, contender=entry, effort=stage.effort)


def _first(task: Task) -> Task:
    """Of a sequence the first deletion."""
    return replace(task, scenario=replace(task.scenario, round=1))


def _evaluate(stage: Stage) -> dict[str, Stage]:
    assert stage.contender is not None
    models = {
        "original": original_of(stage),
        "retrain": stage.of("retrain"),
        "retrain again": stage.of("retrain", number=2),
    }
    model = models.get(stage.contender.entry) or replace(stage, step="unlearn")
    found = {"model": model, "truth": stage.of("outputs"), "reference": stage.of("retrain")}
    return found if stage.contender.entry in STANDARDS else {**found, "cache": cache_of(stage)}


_NEEDS = {
    "original": lambda _: {},
    "cache": lambda stage: {"original": start_of(stage)},
    "retrain": lambda _: {},
    "outputs": lambda stage: {"model": stage.of("retrain", number=stage.number)},
    "tune": _tune,
    "unlearn": _unlearn,
    "evaluate": _evaluate,
}


@cache
def _key(stage: Stage) -> str:
    own: dict[str, Any] = {"step": stage.step, "version": VERSIONS[stage.step], **_matters(stage)}
    own["needs"] = {role: need.key for role, need in stage.needs.items()}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    return f"{stage.step}-{digest[:16]}"


def _matters(stage: Stage) -> dict[str, Any]:
    """What a stage depends on beside its needs."""
    if stage.step == "cache":
        other = stage.cached_loss != name_of(cross_entropy)
        return {"loss": stage.cached_loss} if other else {}  # all else follows from the original
    task = _chosen(replace(stage.task, called=""))
    if stage.step == "original":
        return {**task, "scenario": stage.task.scenario.before, "seed": stage.seed}
    if stage.step == "retrain" and stage.task.scenario.mended:
        task = {**task, "scenario": "mended"}  # one retrained model for all kinds of faults
    found: dict[str, Any] = {"task": task, "seed": stage.seed}
    if stage.step in ("retrain", "outputs"):
        return {**found, "number": stage.number}
    assert stage.contender is not None
    if stage.step == "evaluate":
        return {**found, "task": _chosen(stage.task), "contender": stage.contender.name}
    assert stage.effort is not None
    code = {"method": _source(stage.contender.entry)}
    if stage.step == "tune":
        # What pseudo-forget sets are like is a part of the key: they were random before, or of any class.
        how = {"tuned": "blind", "like": "removed"} if stage.contender.tuned == "blind" else {}
        if stage.task.scenario.corrects:
            how["scored"] = "accuracies"  # and not FSKL, as before
        if not method_of(_entries()[stage.contender.entry].start).of_expunge:  # ours are known by VERSIONS
            how["space"] = repr(_entries()[stage.contender.entry].space)
        return {**found, **code, **how, "entry": stage.contender.entry, "effort": _chosen(stage.effort)}
    choice = {name: value for name, value in _chosen(stage.contender).items() if name != "name"}
    return {**found, **code, "contender": choice, "budget": _chosen(stage.effort.budget)}


def _chosen(config: Any) -> Any:
    """A configuration as plain values, without those that are defaults: a new setting leaves old keys as they are."""
    if not is_dataclass(config):
        return config
    values = {each.name: (getattr(config, each.name), each.default) for each in fields(config)}
    return {name: _chosen(value) for name, (value, default) in values.items() if value != default}


@cache  # stages ask by the thousand
def _entries() -> dict[str, Entry]:
    """All entries, with any budget."""
    return entries(SHORT)


def _require_entry(entry: str) -> None:
    if entry not in _entries():
        raise ConfigError(
            f"contenders: no entry {entry!r}.{nearest(entry, _entries())} There are {', '.join(_entries())}. (A method "
            "of another package that could not be used is left out, with a warning that says why.)"
        )


@cache  # stages make contenders by the thousand
def _require_fitting(name: str, entry: str, settings: tuple[tuple[str, Any], ...]) -> None:
    start = _entries()[entry].start
    known = settings_of(start)
    for setting, _ in settings:
        if setting not in known:
            raise ConfigError(
                f"contender {name!r}: {entry} has no setting {setting!r}.{nearest(setting, known)} It has "
                f"{', '.join(known) or 'none'}."
            )
    try:
        with_settings(start, dict(settings))
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"contender {name!r}, settings={settings!r}: {entry} refuses this: {error}") from error


@cache
def _source(entry: str) -> str:
    """A hash of the file of a method."""
    module = inspect.getmodule(method_of(_entries()[entry].start).run)
    assert module is not None
    return hashlib.sha256(inspect.getsource(module).encode()).hexdigest()


def _tuples(value: Any) -> Any:
    """Lists as tuples, for dataclasses that are hashed."""
    if isinstance(value, list):
        return tuple(_tuples(each) for each in value)
    return {name: _tuples(each) for name, each in value.items()} if isinstance(value, dict) else value
