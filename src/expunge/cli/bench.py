"""The commands for the paper's experiments: bench run, status, table, diff."""

import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from expunge.cli import printing
from expunge.cli.arguments import Flag, Maybe

if TYPE_CHECKING:
    from expunge.bench.experiments import Experiment
    from expunge.bench.runner import Hands
    from expunge.bench.stages import Stage
    from expunge.bench.store import Store
    from expunge.rows import Row

File = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="EXPERIMENT")]
RunPath = Annotated[Path, tyro.conf.Positional]
DATA = "EXPUNGE_DATA"


@dataclass(frozen=True, kw_only=True)
class _Named:
    """An experiment, and where it is run."""

    file: File
    """Python file that defines the experiment, such as experiments/table1.py."""
    profile: Literal["cpu", "paper"] = "cpu"
    """How large: cpu for two cores and about an hour, paper for a GPU and the paper's own sizes."""
    seeds: int = 3
    """How many repetitions: seeds 0, 1, …"""
    out: Path = Path("runs/bench")
    """Folder for the results of stages, which experiments share, and for the run."""
    data: Maybe[Path] = None
    """Folder of the datasets; by default what the environment variable EXPUNGE_DATA says."""


@dataclass(frozen=True, kw_only=True)
class Run(_Named):
    """Carry out an experiment; what is done already, by this or another experiment, is not done again."""

    jobs: int = 1
    """Processes that work at the same time."""
    ray: Flag = False
    """Work on a Ray cluster: one that is started on this machine, or the one at --ray-address."""
    ray_address: str = ""
    """Of a running cluster, whose machines must see the folders of --out and --data under the same paths."""
    gpus: float = 0
    """GPUs that a stage takes, with --ray."""
    data_note: str = ""
    """What must be said of the data in every row; by default the text of the file NOTE in its folder."""


@dataclass(frozen=True, kw_only=True)
class Status(_Named):
    """Say what of an experiment is done, what is being done, and what is missing."""


@dataclass(frozen=True, kw_only=True)
class Table(_Named):
    """Print the tables of what is done so far, the paper's figures beside the measured ones."""

    format: Literal["terminal", "markdown"] = "terminal"
    """For a terminal, or as Markdown."""


@dataclass(frozen=True)
class Diff:
    """Compare the rows of two runs: what is identical, what changed, and what changed beyond noise."""

    before: RunPath
    """Run folder, or a CSV file of rows."""
    after: RunPath
    """The other."""


Command = (
    Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Status, tyro.conf.subcommand("status")]
    | Annotated[Table, tyro.conf.subcommand("table")]
    | Annotated[Diff, tyro.conf.subcommand("diff")]
)


def bench(command: Annotated[Command, tyro.conf.arg(name="")]) -> None:
    """Run the paper's experiments, and look at what they gave.

    Args:
        command: What to do.
    """
    if isinstance(command, Run):
        _run(command)
    elif isinstance(command, Status):
        _status(command)
    elif isinstance(command, Table):
        _table(command)
    else:
        _diff(command)


def _run(command: Run) -> None:
    from expunge.bench import experiments
    from expunge.bench.runner import carry_out
    from expunge.errors import IncompleteRun
    from expunge.rows import read_rows

    experiment, store = _planned(command)
    seeds = range(command.seeds)
    try:
        carry_out(experiment.evaluations(seeds), store, _hands(command, experiment, store), _say)
    except IncompleteRun:
        experiments.gather(experiment, seeds, store, command.data_note)
        raise
    folder = experiments.gather(experiment, seeds, store, command.data_note)
    printing.show(*_tables(experiment, read_rows(folder / "rows.csv")))
    for line in experiments.failures(experiments.evaluated(experiment, seeds, store), store):
        print(line)
    print(f"\nRows, settings and the environment: {folder.resolve()}. A page with figures: expunge report {folder}")


def _hands(command: Run, experiment: "Experiment", store: "Store") -> "Hands":
    from expunge.bench.runner import Serial
    from expunge.bench.workers import Processes, RayCluster

    if command.ray or command.ray_address:
        threads = max(task.threads for task in experiment.tasks)
        jobs = command.jobs if command.jobs > 1 else 0
        return RayCluster(store, address=command.ray_address, jobs=jobs, threads=threads, gpus=command.gpus)
    return Serial(store) if command.jobs == 1 else Processes(store, command.jobs)


def _status(command: Status) -> None:
    from rich.table import Table as RichTable

    from expunge.bench.experiments import made_by
    from expunge.bench.stages import STEPS, closure

    experiment, store = _planned(command)
    stages = closure(experiment.evaluations(range(command.seeds))).values()
    done = [stage for stage in stages if store.done(stage)]
    working = {stage.label: holder for stage in stages if stage not in done and (holder := store.holder(stage))}
    total, over = (Counter(stage.step for stage in each) for each in (stages, done))
    table = RichTable("stage", "done", "of", title=f"{experiment.name}, profile {experiment.profile}")
    for step in STEPS:
        table.add_row(step, str(over[step]), str(total[step]))
    table.add_row("all", str(len(done)), str(len(stages)))
    printing.show(table)
    for label, holder in working.items():
        print(f"being done: {label}, by {holder}")
    for name, values in made_by(done, store).items():
        if isinstance(values, list) and len(values) > 1:
            print(f"results mix {len(values)} of {name}: {', '.join(value[:40] for value in values)}")


def _table(command: Table) -> None:
    from expunge.bench.experiments import evaluated, failures, rows_of, shown
    from expunge.report import markdown

    experiment, store = _planned(command)
    wanted = experiment.evaluations(range(command.seeds))
    done = evaluated(experiment, range(command.seeds), store)
    rows = rows_of(experiment, done, store)
    if not done:
        print(f"Nothing of {experiment.name} is done yet in {command.out}: carry it out with `expunge bench run`.")
    if command.format == "terminal":
        printing.show(*_tables(experiment, rows))
        for line in failures(done, store):
            print(line)
    else:
        for table in shown(experiment, rows):
            print(markdown(*table))
    if 0 < len(done) < len(wanted):
        print(_missing(wanted, done))


def _missing(wanted: "list[Stage]", done: "list[Stage]") -> str:
    """Which seeds a table lacks, or has in part."""
    total, over = (Counter(stage.seed for stage in each) for each in (wanted, done))
    lacking = ", ".join(
        f"seed {seed} ({total[seed] - over[seed]} of {total[seed]} evaluations)"
        for seed in total
        if over[seed] < total[seed]
    )
    return f"Missing: {lacking}. `expunge bench run` with the same options makes what is missing."


def _tables(experiment: "Experiment", rows: "list[Row]") -> list[object]:
    from expunge.bench.experiments import shown
    from expunge.report import rich_tables

    return [drawn for table in shown(experiment, rows) for drawn in rich_tables(*table)]


def _diff(command: Diff) -> None:
    from rich.table import Table as RichTable

    from expunge.bench.difference import compare, rows_of

    cells = compare(rows_of(command.before), rows_of(command.after))
    table = RichTable("scenario", "method", "metric", "A", "B", "seeds", "p", "state")
    for cell in cells:
        if cell.state != "identical":
            sides = ["" if value is None else f"{value:.6g}" for value in (cell.before, cell.after)]
            p = "" if cell.p is None else f"{cell.p:.2g}"
            table.add_row(
                cell.scenario, cell.method, f"{cell.metric} ({cell.unit})", *sides, str(cell.seeds), p, cell.state
            )
    if table.row_count:
        printing.show(table)
    counts = Counter(cell.state for cell in cells)
    print(", ".join(f"{counts[state]} {state}" for state in counts) + f" of {len(cells)} cells.")
    alone = Counter(
        (run, seeds) for cell in cells for run, seeds in zip("AB", cell.alone, strict=True) if seeds and cell.seeds
    )
    for (run, seeds), count in alone.items():
        print(f"Only {run} has seed {', '.join(map(str, seeds))}, in {count} of them: not compared.")


def _planned(command: _Named) -> "tuple[Experiment, Store]":
    from expunge.bench import experiments
    from expunge.bench.store import Store
    from expunge.errors import ConfigError

    if command.seeds < 1:
        raise ConfigError(f"seeds={command.seeds}: at least one must be run, and an interval needs three.")
    data = command.data or (Path(os.environ[DATA]) if os.environ.get(DATA) else None)
    return experiments.load(command.file, command.profile, data), Store(command.out, data)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
