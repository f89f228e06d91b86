"""The figures that a paper prints, as rows to be shown beside the measured ones: read from printed.toml."""

import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any

from expunge.bench.entries import SHORT, entries
from expunge.definitions import METRICS
from expunge.errors import ConfigError
from expunge.rows import Row

FILE = "printed.toml"


def printed(table: str, scenario: str) -> tuple[Row, ...]:
    """The rows of a table.

    Args:
        table: As the file calls it, "table1".
        scenario: The scenario of the measured rows that they belong beside.

    Raises:
        ConfigError: There is no such table.
    """
    stored = _stored()
    if table not in stored:
        raise ConfigError(f"table={table!r}: {FILE} has {', '.join(stored)}.")
    return tuple(_rows(table, stored[table], scenario))


def _rows(table: str, stored: dict[str, Any], scenario: str) -> Iterator[Row]:
    for method, values in stored["methods"].items():
        known = entries(SHORT).get(method)
        for metric, value in zip(stored["metrics"], values, strict=True):
            if value == "":
                continue
            odd = isinstance(value, str)  # "7.39 %": in another unit than the metric's
            number, unit = value.split() if odd else (value, _unit(metric))
            yield Row(
                run=table,
                experiment=table,
                dataset=stored["dataset"],
                model=stored["model"],
                scenario=scenario,
                method=method,
                blind=known is None or known.blind,
                seed=0,
                split="",
                metric=metric,
                value=float(number),
                unit=unit,
                n=stored["seeds"],
                seconds=0.0,
                source=stored["source"],
            )


def _unit(metric: str) -> str:
    unit = METRICS[metric.removeprefix("Δ")].unit
    return "points" if metric.startswith("Δ") and unit == "%" else unit


@cache
def _stored() -> dict[str, Any]:
    return tomllib.loads((files("expunge.bench") / FILE).read_text(encoding="utf-8"))
