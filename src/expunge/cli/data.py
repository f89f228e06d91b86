"""The commands for datasets: data get, data check."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from expunge.cli import printing
from expunge.data import fetch
from expunge.errors import CorruptData

FOLDER = Path("data")
Name = Literal["cifar10", "cifar10-python", "cifar100", "cifar100-python", "svhn", "mnist", "fashion-mnist"]


@dataclass(frozen=True)
class Get:
    """Download a dataset from its official place, verify it, and unpack it."""

    name: tyro.conf.Positional[Name]
    """Which dataset, and in which version."""
    folder: Path = FOLDER
    """Where datasets are kept."""
    base: str = ""
    """Address of a mirror, in front of the names of the files; what it gives must have the official checksums."""


@dataclass(frozen=True)
class Check:
    """Say which datasets are in a folder, and whether they are whole."""

    folder: tyro.conf.Positional[Path] = FOLDER
    """Where datasets are kept."""


Command = Annotated[Get, tyro.conf.subcommand("get")] | Annotated[Check, tyro.conf.subcommand("check")]


def data(command: Annotated[Command, tyro.conf.arg(name="")]) -> None:
    """Get datasets, and check those that are here.

    Args:
        command: What to do.
    """
    if isinstance(command, Get):
        fetch.get(command.name, command.folder, base=command.base)
        print(f"{command.name} is in {command.folder.resolve()}, whole. Read it with expunge.data.read(…).")
        return
    from rich.table import Table

    found = fetch.check(command.folder)
    table = Table("dataset", "where", "state", "how that is known, or what to do")
    for each in found:
        table.add_row(each.dataset, str(each.path), each.state, each.how)
    printing.show(table)
    broken = [str(each.path) for each in found if each.state == "damaged"]
    if broken:
        raise CorruptData(f"damaged: {', '.join(broken)}. Delete them and get the dataset again.")
