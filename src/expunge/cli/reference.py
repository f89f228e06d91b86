"""The commands that explain: methods, and what a metric means."""

from dataclasses import asdict
from typing import Annotated

import tyro

from expunge.cli import printing
from expunge.cli.arguments import Flag
from expunge.definitions import ARROWS, METRICS, find
from expunge.methods import all_methods


def methods(*, json: Flag = False) -> None:
    """List the methods, what they may see and what they do.

    Args:
        json: Print JSON, with the settings and their defaults.
    """
    if json:
        table = [
            {"name": m.name, "blind": m.blind, "summary": m.summary, "settings": m.defaults()}
            for m in all_methods().values()
        ]
        print(printing.as_json(table))
        return
    from rich.table import Table

    columns = Table("method", "sees the removed records", "what it does")
    for method in all_methods().values():
        columns.add_row(method.name, "no (blind)" if method.blind else "yes", method.summary)
    printing.show(columns)


def explain(metric: Annotated[str, tyro.conf.Positional] = "", *, json: Flag = False) -> None:
    """Say what a metric means: formula, unit, which values are good, and what it misses.

    Args:
        metric: Such as FA, "delta FE" or KLOM. Without it, the list.
        json: Print JSON.
    """
    name = find(metric) if metric else ""
    if json:
        print(printing.as_json(asdict(METRICS[name]) if name else {key: asdict(d) for key, d in METRICS.items()}))
        return
    from rich.table import Table
    from rich.text import Text

    if not name:
        columns = Table("metric", "what it is", "unit", "good")
        for key, each in METRICS.items():
            columns.add_row(key, each.name, each.unit, ARROWS[each.good])
        printing.show(columns, "↑ high is good, ↓ low, ≈ close to the retrained model's. More: expunge explain METRIC")
        return
    found = METRICS[name]
    lines = {
        "formula": found.formula,
        "unit": found.unit,
        "good": found.direction,
        "perfect": found.perfect,
        "misses": found.misses,
        "source": found.source,
        "in Python": found.function,
    }
    table = Table.grid(padding=(0, 2))
    for key, words in lines.items():
        if words:
            table.add_row(key, Text(words))
    printing.show(Text(f"{name}: {found.name}\n\n{found.text}\n"), table)
