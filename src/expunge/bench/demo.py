"""The main job on real data, from training to the page: what `expunge demo` and `make demo` run."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from expunge import progress
from expunge.bench import digits, inputs
from expunge.errors import ConfigError
from expunge.files import write_text
from expunge.provenance import environment, sources
from expunge.report import rich_tables, write_page
from expunge.rows import Row, read_rows, write_csv, write_rows

if TYPE_CHECKING:
    from rich.table import Table

_CASES: dict[str, Callable[[Path, int], digits.Case]] = {
    "removal": digits.removal,
    "label-correction": digits.label_correction,
}
_ROLES = {
    "setup.py": "setup file",
    "original.safetensors": "weights before",
    "cache.safetensors": "gradient cache",
    "data.safetensors": "records that are left",
    "reload.safetensors": "weights after",
    "reload.trace.json": "trace",
}
_COLUMNS = {
    "curves": ("method", "moment", "step", "split", "loss"),
    "reset": ("method", "parameter", "share", "entries"),
    "losses": ("method", "split", "loss"),
    "facts": ("method", "fact", "value"),
}


def run(out: Path, seeds: int) -> Path:
    """Run every case for every seed and draw the page; seeds that are done already are not run again.

    Args:
        out: Folder for runs. The run itself is a folder in it, named by the hash of its configuration.
        seeds: 0, 1, … seeds - 1.

    Returns:
        The path of the page.

    Raises:
        ConfigError: Fewer than three seeds: an interval over them would mean nothing.
        IncompleteRun: The unlearning process failed.
    """
    if seeds < 3:
        raise ConfigError(f"seeds={seeds}: a mean and a spread need at least 3.")
    folder = folder_of(out)
    write_text(folder / "config.json", json.dumps(_config(), indent=2) + "\n")
    write_text(folder / "env.json", json.dumps({**environment(), "threads": 1}, indent=2) + "\n")
    with _one_thread(), progress.task("demo", seeds * len(_CASES)) as advance:
        for seed in range(seeds):
            for scenario, case in _CASES.items():
                part = folder / scenario / f"seed-{seed}"
                if not (part / "DONE").exists():
                    _store(case(part, seed), part)
                advance()
    parts = [folder / scenario / f"seed-{seed}" for scenario in _CASES for seed in range(seeds)]
    _gather(parts, folder)
    _describe(folder, seeds)
    return write_page(folder)


def folder_of(out: Path) -> Path:
    """Where the run of the present configuration lives."""
    digest = hashlib.sha256(json.dumps(_config(), sort_keys=True).encode()).hexdigest()
    return out / digest[:12]


def rows(out: Path) -> list[Row]:
    """All rows of the run of the present configuration."""
    return read_rows(folder_of(out) / "rows.csv")


def tables(out: Path) -> list["Table"]:
    """The tables of that run, for a terminal."""
    found = rows(out)
    return [table for scenario in _CASES for table in rich_tables(found, scenario)]


def _config() -> dict[str, Any]:
    settings = {
        "train": digits.TRAIN,
        "removed": digits.REMOVED,
        "faulty": digits.FAULTY,
        "original and retrain": asdict(digits.RECIPE),
        "reload": asdict(digits.RELOAD),
        "fine-tune": asdict(digits.FINE_TUNE),
        "gradient-ascent": asdict(digits.ASCENT),
        "reload, label correction": asdict(digits.CORRECTING_RELOAD),
        "fine-tune, label correction": asdict(digits.CORRECTING_FINE_TUNE),
        "expunge": version("expunge"),
        "sources": sources(),
    }
    return dict(json.loads(json.dumps(settings)))


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread is faster on tiny models, and gives the same bits on one core as on many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _store(case: digits.Case, part: Path) -> None:
    write_rows(part / "rows.csv", case.rows)
    lines: dict[str, list[tuple[Any, ...]]] = {
        "curves": case.curves,
        "reset": case.resets,
        "losses": case.losses,
        "facts": case.facts,
    }
    for name, columns in _COLUMNS.items():
        whole = [(case.scenario, line[0], case.seed, *line[1:]) for line in lines[name]]
        write_csv(part / f"{name}.csv", ("scenario", columns[0], "seed", *columns[1:]), whole)
    write_text(part / "DONE", "")


def _gather(parts: Sequence[Path], folder: Path) -> None:
    """Put the tables of all parts together, one header each."""
    for name in ("rows", *_COLUMNS):
        texts = [(part / f"{name}.csv").read_text(encoding="utf-8").splitlines(keepends=True) for part in parts]
        write_text(folder / f"{name}.csv", "".join([texts[0][0], *(line for text in texts for line in text[1:])]))


def _describe(folder: Path, seeds: int) -> None:
    """Say what the files of each seed are for, and which records it removed or corrected, for the evidence."""
    salt = inputs.salt_of(folder)
    parts = [folder / "removal" / f"seed-{seed}" for seed in range(seeds)]
    files = [
        inputs.file_entry(role, part / name, folder)
        for part in parts
        for name, role in _ROLES.items()
        if (part / name).exists()
    ]
    data = [
        inputs.split_entry(scenario, seed, split, records, salt)
        for scenario in _CASES
        for seed in range(seeds)
        for split, records in digits.records(scenario, seed).items()
    ]
    inputs.write_inputs(folder / "inputs.json", files, data)
