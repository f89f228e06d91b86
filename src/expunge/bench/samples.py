"""A few images of what a scenario removes or corrects, kept beside the rows of a run for its page."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from expunge.batches import Examples
from expunge.bench.records import Bounds, records_of
from expunge.bench.stages import Stage
from expunge.bench.store import Store
from expunge.files import save_tensors
from expunge.report.stored import SAMPLES

MOST = 8  # images of a scenario


def keep(stages: Iterable[Stage], store: Store, folder: Path) -> None:
    """Write those of each scenario, of the first stage that has it, unless they are there.

    Tensors are named ``SCENARIO/forget``, what methods see that are not blind, and after a correction
    ``SCENARIO/corrected``: bytes (images, channels, height, width), with their class numbers in ``… labels``.
    """
    first = {stage.task.name: stage for stage in reversed(list(stages))}
    if first.keys() <= _kept(folder):
        return
    found: dict[str, Tensor] = {}
    for name, stage in sorted(first.items()):
        records = records_of(stage.task, stage.seed, store.data)
        rows = records.forget.positions[:MOST]
        parts = {"forget": records.forget} | (
            {"corrected": records.parts["forget"]} if stage.task.scenario.corrects else {}
        )
        for part, data in parts.items():
            some = data.only(rows)
            found |= {f"{name}/{part}": _bytes(some, records.bounds), f"{name}/{part} labels": some.tensors[1]}
    save_tensors(folder / SAMPLES, found)


def _kept(folder: Path) -> set[str]:
    """The scenarios of which there are some."""
    if not (folder / SAMPLES).exists():
        return set()
    with safe_open(folder / SAMPLES, "pt") as file:
        return {name.rpartition("/")[0] for name in file.keys()}  # noqa: SIM118 it is no dictionary


def _bytes(data: Examples, bounds: Bounds) -> Tensor:
    black, white = bounds
    return ((data.tensors[0] - black) / (white - black)).clamp(0, 1).mul(255).round().to(torch.uint8)
