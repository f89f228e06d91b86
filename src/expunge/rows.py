"""Rows: every measured number on a line of its own, with what it takes to know what it means."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from expunge.errors import ConfigError, CorruptData
from expunge.files import replacing

SQUARED = "units²"  # the squared unit of a regression's targets, summed over the numbers of a target
EVALUATION = "evaluate"  # the experiment in which a "seed" numbers a retrained model, or a pair of them


_BLIND = {"True": True, "False": False, "": None}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number."""

    run: str
    experiment: str
    dataset: str
    model: str
    scenario: str
    method: str
    blind: bool | None  # None: not known how the model was made
    seed: int
    split: str  # retain, forget, test, or "" where none applies
    metric: str
    value: float
    unit: str  # "%", "points", "nats", "units²", "fraction", "ratio", "s"
    n: int  # examples the number was measured on
    seconds: float  # wall time of the method, 0 where none applies
    source: str = "measured"  # or "paper, Table 3"


def write_rows(path: Path | str, rows: Iterable[Row]) -> None:
    """Write rows as CSV, whole or not at all."""
    write_csv(path, [field.name for field in fields(Row)], (list(asdict(row).values()) for row in rows))


def write_csv(path: Path | str, columns: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    """Write any table as CSV, whole or not at all."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(lines)


def read_rows(path: Path | str) -> list[Row]:
    """Read rows that `write_rows` wrote.

    Raises:
        ConfigError: The file has other columns.
        CorruptData: A line that is no row.
    """
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        names = [field.name for field in fields(Row)]
        if reader.fieldnames != names:
            raise ConfigError(f"{path} has the columns {reader.fieldnames}; rows have {names}.")
        found = []
        for row in reader:
            try:
                found.append(_row(row))
            except ValueError as error:
                raise CorruptData(
                    f"{path}, line {reader.line_num}: no row of {len(names)} values ({error}). Correct it, or measure "
                    "again."
                ) from error
        return found


def _row(texts: dict[str, str]) -> Row:
    values: dict[str, Any] = dict(texts)
    if None in values or None in values.values():  # more than columns, or fewer
        raise ValueError("there are more, or fewer")
    if texts["blind"] not in _BLIND:
        raise ValueError(f"blind is {texts['blind']!r}")
    values |= {"blind": _BLIND[texts["blind"]]}
    values |= {name: int(texts[name]) for name in ("seed", "n")}
    values |= {name: float(texts[name]) for name in ("value", "seconds")}
    return Row(**values)
