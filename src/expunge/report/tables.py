"""Rows in, tables out: for a terminal, for Markdown and for the page."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expunge.definitions import ARROWS, Good, define
from expunge.errors import ConfigError
from expunge.report.summaries import FLOOR, ORIGINAL, Summary, at_floor, label, number, order, seeds, summarise
from expunge.rows import Row

if TYPE_CHECKING:
    import rich.table

_WORDS: dict[Good, str] = {"high": "high", "low": "low", "close": "close to retraining"}
_YES = {True: "yes", False: "no"}


@dataclass(frozen=True)
class Cell:
    """A mean and its spread as text, and whether it is as close to retraining as a second retraining."""

    mean: str
    sd: str  # "" for one seed
    at_floor: bool = False

    def __str__(self) -> str:
        return f"{self.mean} ± {self.sd}" if self.sd else self.mean


@dataclass(frozen=True)
class Line:
    """A method's line in a table."""

    method: str
    label: str
    blind: str  # yes, no, or a dash for a model that unlearned nothing
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class Table:
    """Methods by metrics for one scenario."""

    title: str
    note: str  # what the numbers are
    marked: str  # what a marked cell means; "" where none can be
    metrics: tuple[str, ...]
    units: tuple[str, ...]  # with the direction: "points ↓"
    lines: tuple[Line, ...]


def tables(rows: Iterable[Row], scenario: str) -> list[Table]:
    """The tables of a scenario: distances to retraining, then each model's own values.

    Raises:
        ConfigError: No row is of this scenario.
    """
    found = {(s.method, s.metric): s for s in summarise(rows) if s.scenario == scenario}
    if not found:
        raise ConfigError(f"no measured row has scenario={scenario!r}.")
    metrics = list(dict.fromkeys(metric for _, metric in found))
    own = [metric for metric in metrics if define(metric).kind == "value"]
    relative = [metric for metric in metrics if metric not in own]
    titles = {"Distance to retraining": relative, "What each model does": own}
    return [_table(title, found, listed) for title, listed in titles.items() if listed]


def markdown(rows: Iterable[Row], scenario: str) -> str:
    """The tables of a scenario as Markdown whose columns also line up as plain text."""
    return "\n\n".join(_markdown(table) for table in tables(rows, scenario)) + "\n"


def rich_tables(rows: Iterable[Row], scenario: str) -> list["rich.table.Table"]:
    """The tables of a scenario for a terminal."""
    import rich.box
    import rich.table

    made = []
    for table in tables(rows, scenario):
        caption = f"{table.note}\n* {table.marked}" if table.marked else table.note
        drawn = rich.table.Table(title=f"{scenario}: {table.title}", caption=caption, box=rich.box.SIMPLE_HEAD)
        drawn.add_column("method", no_wrap=True)
        drawn.add_column("blind")
        for metric, unit in zip(table.metrics, table.units, strict=True):
            drawn.add_column(f"{metric}\n{unit} ", justify="right")
        for line in table.lines:
            cells = (f"[bold]{cell}*[/bold]" if cell and cell.at_floor else f"{cell or ''} " for cell in line.cells)
            drawn.add_row(line.label, line.blind, *cells)
        made.append(drawn)
    return made


def _table(title: str, found: dict[tuple[str, str], Summary], metrics: list[str]) -> Table:
    shown = [summary for (_, metric), summary in found.items() if metric in metrics]
    spread = "Mean ± sample standard deviation" if any(summary.n > 1 for summary in shown) else "Mean"
    lines = []
    for method in order(summary.method for summary in shown):
        cells = tuple(_cell(found.get((method, metric)), found.get((FLOOR, metric))) for metric in metrics)
        blind = all(summary.blind for summary in shown if summary.method == method)
        lines.append(Line(method, label(method), "\N{EN DASH}" if method == ORIGINAL else _YES[blind], cells))
    units = {metric: next(summary.unit for summary in shown if summary.metric == metric) for metric in metrics}
    arrows = [f"{ARROWS[good]} {word}" for good, word in _WORDS.items() if good in {define(m).good for m in metrics}]
    return Table(
        title=title,
        note=f"{spread} over {seeds(shown)}" + (f"; {', '.join(arrows)} is good." if arrows else "."),
        marked=_marked(found, metrics),
        metrics=tuple(metrics),
        units=tuple(f"{unit} {ARROWS[define(metric).good]}".strip() for metric, unit in units.items()),
        lines=tuple(lines),
    )


def _cell(summary: Summary | None, floor: Summary | None) -> Cell | None:
    if summary is None:
        return None
    sd = "" if summary.sd is None else number(summary.sd, summary.unit)
    return Cell(number(summary.mean, summary.unit), sd, at_floor(summary, floor))


def _marked(found: dict[tuple[str, str], Summary], metrics: list[str]) -> str:
    """What the mark says, and on which metrics it says nothing."""
    if not any(at_floor(s, found.get((FLOOR, metric))) for (_, metric), s in found.items() if metric in metrics):
        return ""
    text = "No further from retraining, on average, than a second retrained model."
    blunt = [m for m in metrics if (ORIGINAL, m) in found and at_floor(found[ORIGINAL, m], found.get((FLOOR, m)))]
    if blunt:
        text += (
            f" On {', '.join(blunt)} even the original is: with these records, that cannot tell a model that "
            "unlearned from one that did not."
        )
    return text


def _markdown(table: Table) -> str:
    headings = (f"{metric} ({unit})" for metric, unit in zip(table.metrics, table.units, strict=True))
    body = [("method", "blind", *headings)]
    for line in table.lines:
        texts = (f"**{cell}**" if cell and cell.at_floor else str(cell or "") for cell in line.cells)
        body.append((line.label, line.blind, *texts))
    widths = [max(len(line[column]) for line in body) for column in range(len(body[0]))]
    rule = ["-" * width if column < 2 else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    padded = [
        [text.ljust(width) if column < 2 else text.rjust(width) for column, (text, width) in enumerate(pairs)]
        for pairs in (list(zip(line, widths, strict=True)) for line in body)
    ]
    lines = ["| " + " | ".join(line) + " |" for line in (padded[0], rule, *padded[1:])]
    note = f"{table.note} Bold: {table.marked[0].lower()}{table.marked[1:]}" if table.marked else table.note
    return f"**{table.title}.** {note}\n\n" + "\n".join(lines)
