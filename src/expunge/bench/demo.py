"""The main job on real data, from training to the page: what `expunge demo` and `make demo` run."""

import copy
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from functools import partial
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from expunge import cache
from expunge.batches import Examples
from expunge.bench import digits_setup, inputs, runs
from expunge.bench.case import Case, Result, curves, measure, standards
from expunge.bench.compare import take_part
from expunge.bench.entries import chosen, entries
from expunge.bench.situations import FAULTY, FULL, REMOVED, Situation, Size, situation_of
from expunge.errors import IncompleteRun
from expunge.files import save_tensors
from expunge.methods.reload import Reload
from expunge.report import rich_tables
from expunge.rows import Row
from expunge.weights import load_weights, save_weights

if TYPE_CHECKING:
    from rich.table import Table

_ROLES = {
    "setup.py": "setup file",
    "original.safetensors": "weights before",
    "cache.safetensors": "gradient cache",
    "data.safetensors": "records that are left",
    "reload.safetensors": "weights after",
    "reload.trace.json": "trace",
}
METHODS = {
    "removal": ("reload", "natural-ascent", "class-orthogonal-ascent", "fine-tune", "gradient-ascent"),
    "label-correction": ("reload", "natural-ascent", "class-orthogonal-ascent", "fine-tune"),
}


def run(out: Path, seeds: int, size: Size = FULL) -> Path:
    """Run both cases for every seed and draw the page; seeds that are done already are not run again.

    Args:
        out: Folder for runs.
        seeds: 0, 1, … seeds - 1.
        size: How much data, and how long it is trained on.

    Returns:
        The path of the page.

    Raises:
        ConfigError: Fewer than three seeds.
        IncompleteRun: The unlearning process failed.
    """
    cases = {"removal": partial(deleted, size=size), "label-correction": partial(corrected, size=size)}
    return runs.carry_out("demo", out, config(size), cases, seeds)


def rows(out: Path) -> list[Row]:
    """All rows of the run of the present configuration."""
    return runs.rows_of(out, config())


def tables(out: Path) -> list["Table"]:
    """The tables of that run, for a terminal."""
    found = rows(out)
    return [table for scenario in METHODS for table in rich_tables(found, scenario)]


def config(size: Size = FULL) -> dict[str, Any]:
    """Everything that a run depends on."""
    settings = {s: {name: chosen(s, name) for name in names} for s, names in METHODS.items()}
    return {**asdict(size), "removed": REMOVED, "faulty": FAULTY, "budget": asdict(size.budget), "settings": settings}


def deleted(folder: Path, seed: int, size: Size = FULL) -> Case:
    """Train, cache, delete 10 % of the records from disk, unlearn in a process of its own, compare."""
    situation = situation_of("removal", seed, size)
    config = entries(size.budget)["reload"].configured(chosen(situation.scenario, "reload"))
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(digits_setup.__file__, folder / "setup.py")
    assert isinstance(situation.given.original, Examples)
    assert isinstance(situation.given.retain, Examples)
    _store(folder, situation.given.original)
    save_weights(folder / "original.safetensors", situation.original)
    start = time.perf_counter()
    cache.save(folder / "cache.safetensors", situation.given.cached())
    caching = situation.caching + time.perf_counter() - start

    _store(folder, situation.given.retain)  # the only copy on disk: the removed records are gone
    trace = _unlearn_blind(folder, config, seed)

    # From here on the judge's work, who knows which records were removed.
    model = load_weights(digits_setup.model(0), folder / "reload.safetensors")
    reload = Result(model, caching + sum(trace["seconds"].values()), trace=trace)
    _describe(folder, situation)
    return _compared(situation, reload, list(_snapshots(folder)), size)


def corrected(folder: Path, seed: int, size: Size = FULL) -> Case:
    """Train on faulty labels, cache, correct them, and learn the correction with the same call."""
    situation = situation_of("label-correction", seed, size)
    folder.mkdir(parents=True, exist_ok=True)
    _describe(folder, situation)
    moments: list[tuple[str, nn.Module]] = []
    reload = take_part(
        entries(size.budget)["reload"],
        situation,
        watch=lambda name, now: moments.append((name, copy.deepcopy(now))),
    )
    return _compared(situation, reload, moments, size)


def _compared(situation: Situation, reload: Result, moments: list[tuple[str, nn.Module]], size: Size) -> Case:
    """The other methods, then all of them measured."""
    results = {**standards(situation, size.recipe), "reload": reload}
    for name in METHODS[situation.scenario][1:]:
        results[name] = take_part(entries(size.budget)[name], situation)
    case = measure("demo", situation, results)
    case.describe("reload", reload, resets=True)
    case.curves += curves(situation, moments, reload.trace)
    return case


def _store(folder: Path, records: Examples) -> None:
    images, labels = records.tensors
    save_tensors(folder / "data.safetensors", {"images": images, "labels": labels, "positions": records.positions})


def _unlearn_blind(folder: Path, config: object, seed: int) -> dict[str, Any]:
    """The command line, as a user would run it, in a folder from which the records are gone."""
    command = [sys.executable, "-m", "expunge", "unlearn", "setup.py", "--weights", "original.safetensors"]
    command += ["--cache", "cache.safetensors", "--out", "reload.safetensors", "--snapshots", "snapshots", "--replace"]
    command += ["--seed", str(seed), "--device", "cpu", "reload", *_options(config, Reload())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as the demo itself
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise IncompleteRun(f"{' '.join(command)} ended with code {done.returncode}:\n{done.stderr}")
    trace: dict[str, Any] = loads((folder / "reload.trace.json").read_text(encoding="utf-8"))
    return trace


def _options(config: object, default: object, prefix: str = "--") -> Iterator[str]:
    """The command-line options that turn the default settings into these."""
    for setting in fields(config):  # type: ignore[arg-type]
        value, usual = getattr(config, setting.name), getattr(default, setting.name)
        option = prefix + setting.name.replace("_", "-")
        if is_dataclass(value):
            yield from _options(value, usual, f"{option}.")
        elif value != usual:
            yield from (option, str(value))


def _snapshots(folder: Path) -> Iterator[tuple[str, nn.Module]]:
    """The models that the unlearning left after each stage and epoch."""
    for path in sorted((folder / "snapshots").glob("*.safetensors")):
        yield path.stem.split(" ", 1)[1], load_weights(digits_setup.model(0), path)


def _describe(part: Path, situation: Situation) -> None:
    """Say what the files of a seed are for, and which records it removed or corrected, for the evidence."""
    run = part.parent.parent
    salt, splits = inputs.salt_of(run), situation.parts
    files = [inputs.file_entry(role, part / name, run) for name, role in _ROLES.items() if (part / name).exists()]
    data = [
        inputs.split_entry(situation.scenario, situation.seed, split, splits[split], salt)
        for split in ("retain", "forget")
    ]
    inputs.write_inputs(part / inputs.NAME, files, data)
