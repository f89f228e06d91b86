"""Experiments: a Python file that says what is compared, the stages that follow from it, and the rows they leave.

An experiment file defines ``experiment(profile)``, which returns an `Experiment`. The file's docstring says what it
claims, what it costs and what score is expected.
"""

import csv
import hashlib
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from expunge.bench import samples
from expunge.bench.entries import SHORT, entries
from expunge.bench.fit import require_fit
from expunge.bench.judging import TABLES, drawn, metrics_of
from expunge.bench.records import NONE_TO_SPARE
from expunge.bench.required import require
from expunge.bench.stages import PSEUDO_SETS, STANDARDS, Contender, Effort, Stage, tuning_of
from expunge.bench.steps import TRIALS
from expunge.bench.store import Store, read_json, write_json
from expunge.bench.tasks import Family, Task, located, note_of
from expunge.errors import ConfigError, ExpungeError
from expunge.methods.guard import DESTROYED
from expunge.provenance import environment
from expunge.rows import Row, read_rows, write_csv, write_rows
from expunge.setup import run_python


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is compared, in which situations, and with what everyone may spend.

    Raises:
        ConfigError: A value of another kind, two contenders or tasks of the same name, or a metric that is not
            measured in these scenarios.
    """

    name: str
    profile: str
    tasks: tuple[Task, ...]
    contenders: tuple[Contender, ...]
    effort: Effort
    shown: tuple[str, ...]  # metrics of its table
    leading: str = ""  # of several tasks: the metric that is put together over all of them
    printed: tuple[Row, ...] = ()  # what a paper prints for it

    def __post_init__(self) -> None:
        named = bool(self.name) and Path(self.name).name == self.name
        require(named, "name", self.name, "a folder is called after it: write one without slashes")
        for name, kind in (("tasks", Task), ("contenders", Contender), ("shown", str)):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(each, kind) for each in value):
                raise ConfigError(f"{name}: write a tuple of {kind.__name__}, with a comma after the last: (one,).")
        require(len(self.tasks) > 0, "tasks", self.tasks, "there must be one")
        require(len(self.shown) > 0, "shown", self.shown, "there must be one metric in the table")
        _require_different("contenders", [*STANDARDS, *(each.name for each in self.contenders)])
        _require_different("tasks", [task.name for task in self.tasks])
        for contender in self.contenders:
            standard = contender.entry in STANDARDS
            require(not standard, "entry", contender.entry, "it is in every table anyway: leave the contender out")
            unfit = [t.scenario.name for t in self.tasks if t.scenario.kind not in ("random", "in-class")]
            if contender.tuned == "blind" and unfit:
                raise ConfigError(
                    f"contender {contender.name!r}, tuned='blind': without a forget set only one removal of records "
                    f"can be rehearsed, random or in-class, and not {unfit[0]!r}. Leave tuned out."
                )
            whole = [t for t in self.tasks if t.dataset == "digits" or t.train == 0]
            if contender.tuned == "blind" and whole:
                raise ConfigError(
                    f"contender {contender.name!r}, tuned='blind', on {whole[0].dataset}, train={whole[0].train}: "
                    f"{NONE_TO_SPARE}. Of other datasets set train to a part of what there is; of the digits all that "
                    "is not trained on is for testing, so leave tuned out."
                )
            large = [t for t in self.tasks if t.scenario.amount < 1 and t.scenario.amount * (1 + PSEUDO_SETS) >= 1]
            if contender.tuned == "blind" and large:
                raise ConfigError(
                    f"contender {contender.name!r}, tuned='blind': {large[0].scenario.name!r} leaves too little for "
                    f"{PSEUDO_SETS} pseudo-forget sets of its size. Remove less, or leave tuned out."
                )
        known = dict.fromkeys(name for task in self.tasks for name in metrics_of(task.scenario))
        for metric in (*self.shown, *([self.leading] if self.leading else [])):
            if metric not in known:
                raise ConfigError(
                    f"shown or leading: {metric!r} is not measured in these scenarios. There are {', '.join(known)}."
                )

    def evaluations(self, seeds: Iterable[int]) -> list[Stage]:
        """The stages that leave rows: everyone, for every task and seed; seed by seed.

        Raises:
            ConfigError: A seed that settings are tuned on.
        """
        seeds = list(seeds)
        tuned = sorted({*seeds} & {*self.effort.rehearsals})
        if tuned:
            raise ConfigError(
                f"seed {tuned[0]} is one that settings are tuned on: what it gives may not be reported. Ask for fewer "
                f"seeds, or tune on others, as Effort(…, rehearsals=({max(seeds) + 1001},))."
            )
        everyone = [*(Contender(name=name, entry=name) for name in STANDARDS), *self.contenders]
        return [
            Stage(
                step="evaluate",
                task=task,
                seed=seed,
                contender=contender,
                effort=None if contender.entry in STANDARDS else self.effort,
            )
            for seed in seeds
            for task in self.tasks
            for contender in everyone
        ]


RECIPE_ALONE = Contender(
    name="control: recipe alone", entry="reload", settings=(("priming_lr", None), ("reset_fraction", 0.0))
)


def everyone(family: Family) -> tuple[Contender, ...]:
    """All methods and controls that fit a family of scenarios (`Scenario.family`).

    To the controls of `entries` it adds RELOAD's own fine-tuning without its ascent and its reset.
    """
    found = [Contender(name=name, entry=name) for name, entry in entries(SHORT).items() if family not in entry.unfit]
    last = max(number for number, each in enumerate(found) if each.name.startswith("control: "))
    return (*found[: last + 1], RECIPE_ALONE, *found[last + 1 :])


def _require_different(what: str, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"{what}: {', '.join(twice)} would be there twice. Give everyone a name of their own, tasks of the same "
            "scenario with called=…."
        )


def load(path: Path, profile: str, data: Path | None) -> Experiment:
    """The experiment of a file, with the fingerprints of its data.

    Raises:
        FileNotFoundError: No such file.
        ConfigError: It fails when it is run, defines no experiment, or one that does not fit its data.
        MissingData: The data is not there.
    """
    found = defined(path, profile)
    for task in found.tasks:
        require_fit(task, data)
    return replace(found, tasks=tuple(located(task, data) for task in found.tasks))


def defined(path: Path, profile: str) -> Experiment:
    """The experiment of a file, whether its data is there or not.

    Raises:
        FileNotFoundError: No such file.
        ConfigError: It fails when it is run, or defines no experiment.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such experiment.")
    name, what = f"expunge_experiment_{path.stem}", "an experiment is a Python file"
    module = run_python(path, name, what, partial(_failed, path, "failed when it was run"))
    define = getattr(module, "experiment", None)
    if define is None:
        raise ConfigError(f"{path} defines no experiment(profile). docs/experiments.md shows one.")
    try:
        found = define(profile)
    except Exception as error:
        raise _failed(path, f"experiment({profile!r}) failed", error) from error
    if not isinstance(found, Experiment):
        raise ConfigError(f"{path}: experiment({profile!r}) returned {type(found).__name__}, and not an Experiment.")
    return found


def _failed(path: Path, what: str, error: Exception) -> ConfigError:
    """The error of an experiment file, with the line of the file that it comes from."""
    here = (str(path), str(path.absolute()))
    frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename in here]
    line = f", line {frames[-1]}" if frames else ""
    why = str(error) if isinstance(error, ExpungeError) else f"{type(error).__name__}: {error}"
    return ConfigError(f"{path}{line}: {what}: {why}")


def folder_of(experiment: Experiment, seeds: Iterable[int], store: Store) -> Path:
    """The run folder of an experiment: its rows, for reports.

    Named by the evaluations that it is of. Other seeds, or a method whose file was edited, have another folder, and the
    rows of before stay to compare with.
    """
    keys = "".join(stage.key for stage in experiment.evaluations(seeds))
    return store.root / f"{experiment.name}-{experiment.profile}-{hashlib.sha256(keys.encode()).hexdigest()[:8]}"


def gather(experiment: Experiment, seeds: Sequence[int], store: Store, note: str = "") -> Path:
    """Put the rows of all evaluations that are done together into the run folder, with what a report needs.

    Args:
        experiment: Which.
        seeds: Those asked for.
        store: Where the results of stages are.
        note: What must be said of the data; by default what the file NOTE beside it says.

    Returns:
        The run folder.
    """
    folder = folder_of(experiment, seeds, store)
    with store.locked(folder.name):
        _gather(experiment, seeds, store, note or note_of(store.data), folder)
    return folder


def evaluated(experiment: Experiment, seeds: Iterable[int], store: Store) -> list[Stage]:
    """The evaluations that are done."""
    return [stage for stage in experiment.evaluations(seeds) if store.done(stage)]


def rows_of(experiment: Experiment, done: Iterable[Stage], store: Store, note: str = "") -> list[Row]:
    """The rows of evaluations, with what must be said of the data."""
    return [
        replace(row, experiment=experiment.name, dataset=f"{row.dataset} ({note})" if note else row.dataset)
        for stage in done
        for row in read_rows(store.folder(stage) / "rows.csv")
    ]


def failures(done: Iterable[Stage], store: Store) -> list[str]:
    """Who broke down and has no rows, and who destroyed the model: where, and with what; a line each."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for stage in done:
        with (store.folder(stage) / "facts.csv").open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                broken = line["fact"] == "failed"
                said = f"no rows: {line['value']}" if broken else DESTROYED
                if broken or DESTROYED in line["value"]:
                    found.setdefault((line["method"], line["scenario"], said), []).append(line["seed"])
    return [
        f"{method} on {scenario}, seed {', '.join(seeds)}: {said}" for (method, scenario, said), seeds in found.items()
    ]


def _gather(experiment: Experiment, seeds: Sequence[int], store: Store, note: str, folder: Path) -> None:
    done = evaluated(experiment, seeds, store)
    lines: dict[str, list[list[str]]] = {name: [] for name in TABLES}
    seen = drawn([*STANDARDS, *(each.name for each in experiment.contenders)])
    for stage in done:
        assert stage.contender is not None
        for name in TABLES:
            if name == "losses" and stage.contender.name not in seen:  # of everyone they are many
                continue
            with (store.folder(stage) / f"{name}.csv").open(newline="", encoding="utf-8") as file:
                lines[name] += list(csv.reader(file))[1:]
    write_rows(folder / "rows.csv", rows_of(experiment, done, store, note))
    for name, columns in TABLES.items():
        write_csv(folder / f"{name}.csv", columns, lines[name])
    samples.keep(done, store, folder)
    whole = asdict(experiment)
    del whole["printed"], whole["shown"], whole["leading"]  # what is shown of the rows does not change them
    write_json(folder / "config.json", {**whole, "seeds": list(seeds), "data note": note})
    write_json(folder / "settings.json", settings(experiment, store))
    write_json(folder / "env.json", {**environment(), **made_by(done, store)})


def settings(experiment: Experiment, store: Store) -> dict[str, Any]:
    """What the rehearsal chose, by scenario and search, with where it comes from; of the searches that are done.

    A search is named by its entry and what it has of its own: another loss that is cached, or "blind" (of seed 0).
    """
    found: dict[str, Any] = {"provenance": asdict(experiment.effort), "settings": {}}
    for stage in experiment.evaluations([0]):
        if stage.effort is None or stage.contender is None or not stage.contender.tuned:
            continue
        search = tuning_of(stage)
        if store.done(search):
            tried = read_json(store.folder(search) / TRIALS)
            best = {"settings": tried["best"], "score": tried["trials"][0]["score"]}
            blind = "blind" if stage.contender.tuned == "blind" else ""
            own = ", ".join(filter(None, (stage.contender.entry, stage.contender.cached_loss, blind)))
            found["settings"].setdefault(stage.task.name, {})[own] = best
    return found


def made_by(stages: Iterable[Stage], store: Store) -> dict[str, Any]:
    """By which code, on which processors and with which versions of torch stages were done."""
    found: dict[str, set[str]] = {"sources": set(), "processor": set(), "torch": set()}
    for stage in stages:
        environment = read_json(store.folder(stage) / "env.json")
        for name, values in found.items():
            values.add(str(environment[name]))
    return {name: next(iter(values)) if len(values) == 1 else sorted(values) for name, values in found.items()}


ACROSS = "all scenarios"


class Shown(NamedTuple):
    """What a table is made of."""

    rows: list[Row]  # more than are shown: verdicts need all
    scenario: str
    metrics: tuple[str, ...]  # that it shows


def shown(experiment: Experiment, rows: Sequence[Row]) -> Iterator[Shown]:
    """The tables of an experiment: of each scenario, with what a paper prints, and of the leading metric over all."""
    for scenario in dict.fromkeys(row.scenario for row in rows):
        yield Shown([*rows, *experiment.printed], scenario, experiment.shown)
    if leading := experiment.leading:
        pair = (leading, leading.removeprefix("Δ"))  # a difference is tested by the values that it is one of
        together = [
            replace(row, scenario=ACROSS, metric=f"{row.metric}, {row.scenario}") for row in rows if row.metric in pair
        ]
        metrics = tuple(dict.fromkeys(row.metric for row in together if row.metric.startswith(leading)))
        if metrics:
            yield Shown(together, ACROSS, metrics)
