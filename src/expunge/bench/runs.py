"""The run of an experiment: a folder named by its configuration, with a part for each scenario and seed."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from expunge import progress
from expunge.bench.case import Case
from expunge.bench.judging import TABLES
from expunge.errors import ConfigError
from expunge.files import alone_in, write_text
from expunge.provenance import environment, sources
from expunge.report import write_page
from expunge.rows import Row, read_rows, write_csv, write_rows

Cases = Mapping[str, Callable[[Path, int], Case]]  # by scenario; given a folder for its files and a seed
LEAST_SEEDS = 3
_TABLES = TABLES | {"curves": ("scenario", "method", "seed", "moment", "step", "split", "loss")}


def carry_out(name: str, out: Path, config: Mapping[str, Any], cases: Cases, seeds: int) -> Path:
    """Run every case for every seed and draw the page; what is done already is not run again.

    A second process with the same configuration waits for the first one, and finds everything done.

    Args:
        name: Of the experiment, for the progress display.
        out: Folder for runs. The run itself is a folder in it, named by the hash of its configuration.
        config: Plain values, the whole configuration.
        cases: What to run.
        seeds: 0, 1, … seeds - 1.

    Returns:
        The path of the page.

    Raises:
        ConfigError: Fewer than three seeds: an interval over them would mean nothing.
    """
    if seeds < LEAST_SEEDS:
        raise ConfigError(f"seeds={seeds}: a mean and a spread need at least {LEAST_SEEDS}.")
    folder = folder_of(out, config)
    write_text(folder / "config.json", json.dumps(_whole(config), indent=2) + "\n")
    write_text(folder / "env.json", json.dumps({**environment(), "threads": 1}, indent=2) + "\n")
    with alone_in(folder):
        with _one_thread(), progress.task(name, seeds * len(cases)) as advance:
            for seed in range(seeds):
                for scenario, case in cases.items():
                    part = folder / scenario / f"seed-{seed}"
                    if not (part / "DONE").exists():
                        _store(case(part, seed), part)
                    advance()
        _gather([folder / scenario / f"seed-{seed}" for scenario in cases for seed in range(seeds)], folder)
        return write_page(folder)


def folder_of(out: Path, config: Mapping[str, Any]) -> Path:
    """Where the run of a configuration lives."""
    digest = hashlib.sha256(json.dumps(_whole(config), sort_keys=True).encode()).hexdigest()
    return out / digest[:12]


def rows_of(out: Path, config: Mapping[str, Any]) -> list[Row]:
    """All rows of the run of a configuration."""
    return read_rows(folder_of(out, config) / "rows.csv")


def _whole(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as JSON holds it, with the code that it runs: other code is another run."""
    whole = {**config, "expunge": version("expunge"), "sources": sources()}
    return dict(json.loads(json.dumps(whole)))


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread is faster on tiny models, and gives the same bits on one core as on many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _store(case: Case, part: Path) -> None:
    write_rows(part / "rows.csv", case.rows)
    lines: dict[str, list[tuple[Any, ...]]] = {
        "curves": case.curves,
        "reset": case.resets,
        "losses": case.losses,
        "facts": case.facts,
    }
    for name, columns in _TABLES.items():
        whole = [(case.scenario, line[0], case.seed, *line[1:]) for line in lines[name]]
        write_csv(part / f"{name}.csv", columns, whole)
    write_text(part / "DONE", "")


def _gather(parts: Sequence[Path], folder: Path) -> None:
    """Put the tables of all parts together, one header each."""
    for name in ("rows", *_TABLES):
        texts = [(part / f"{name}.csv").read_text(encoding="utf-8").splitlines(keepends=True) for part in parts]
        write_text(folder / f"{name}.csv", "".join([texts[0][0], *(line for text in texts for line in text[1:])]))
