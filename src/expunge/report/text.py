"""Tables as text: Markdown, the terminal, and CSV with every digit."""

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from expunge.report.paper import printed
from expunge.report.summaries import summarise
from expunge.report.tables import Cell, Table, tables
from expunge.report.verdicts import verdicts
from expunge.rows import Row, write_csv

if TYPE_CHECKING:
    import rich.table
    import rich.text

COLUMNS = (
    "scenario", "method", "blind", "metric", "unit", "n", "over", "mean", "sd", "low", "high", "margin", "p",
    "p_beyond", "verdict", "paper", "source",
)  # fmt: skip


def markdown(rows: Iterable[Row], scenario: str, shown: Collection[str] = ()) -> str:
    """The tables of a scenario as Markdown whose columns also line up as plain text; arguments as of `tables`."""
    return "\n\n".join(markdown_table(table) for table in tables(rows, scenario, shown)) + "\n"


def markdown_table(table: Table, *, intervals: bool = False) -> str:
    """One table, with 95 % intervals in place of standard deviations if asked for."""
    headings = (f"{metric} ({unit})" for metric, unit in zip(table.metrics, table.units, strict=True))
    body = [("method", "blind", *headings)]
    body += [
        (line.label.replace("|", r"\|"), line.blind, *(_marked(cell, intervals) for cell in line.cells))
        for line in table.lines
    ]
    if table.margins:
        body.append(("δ", "", *table.margins))
    widths = [max(len(line[column]) for line in body) for column in range(len(body[0]))]
    rule = ["-" * width if column < 2 else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    padded = [
        [text.ljust(width) if column < 2 else text.rjust(width) for column, (text, width) in enumerate(pairs)]
        for pairs in (list(zip(line, widths, strict=True)) for line in body)
    ]
    lines = ["| " + " | ".join(line) + " |" for line in (padded[0], rule, *padded[1:])]
    return f"**{table.title}.** {words(table, intervals=intervals)}\n\n" + "\n".join(lines)


def words(table: Table, *, intervals: bool = False) -> str:
    """What stands above a table."""
    note = table.note.replace("Mean ± sample standard deviation", "Mean [95 % interval]") if intervals else table.note
    return " ".join(text for text in (note, table.marked, table.source) if text)


def rich_tables(rows: Iterable[Row], scenario: str, shown: Collection[str] = ()) -> list["rich.table.Table"]:
    """The tables of a scenario for a terminal; arguments as of `tables`."""
    import rich.box
    import rich.table
    from rich.text import Text  # of which nothing is taken for markup, whatever a task or a method is called

    made = []
    for table in tables(rows, scenario, shown):
        title = Text(f"{scenario}: {table.title}", "table.title")
        said = "\n".join(text for text in (table.note, table.marked.replace("Bold:", "*:"), table.source) if text)
        drawn = rich.table.Table(title=title, caption=Text(said, "table.caption"), box=rich.box.SIMPLE_HEAD)
        made.append(drawn)
        if len(table.metrics) > len(table.lines):
            _a_line_a_metric(drawn, table)
            continue
        drawn.add_column("method", no_wrap=True)
        drawn.add_column("blind")
        for metric, unit in zip(table.metrics, table.units, strict=True):
            drawn.add_column(Text(f"{metric}\n{unit} "), justify="right")
        for line in table.lines:
            drawn.add_row(Text(line.label), line.blind, *(_for_terminal(cell) for cell in line.cells))
        if table.margins:
            drawn.add_row("δ", "", *(f"{margin} " for margin in table.margins), style="dim")
    return made


def _a_line_a_metric(drawn: "rich.table.Table", table: Table) -> None:
    """Few models and many metrics, as `expunge evaluate` has them: the other way round fits no terminal."""
    from rich.text import Text

    drawn.add_column("metric")
    for line in table.lines:
        drawn.add_column(Text(line.label), justify="right")
    if table.margins:
        drawn.add_column("δ", justify="right", style="dim")
    margins = [[f"{margin} "] for margin in table.margins] or [[] for _ in table.metrics]
    for column, (metric, unit) in enumerate(zip(table.metrics, table.units, strict=True)):
        cells = (_for_terminal(line.cells[column]) for line in table.lines)
        drawn.add_row(Text(f"{metric} ({unit})"), *cells, *margins[column])


def write_table(path: Path | str, rows: Iterable[Row]) -> None:
    """Write every mean, interval and verdict of all scenarios as CSV, a line each, with all digits."""
    write_csv(path, COLUMNS, lines(rows))


def lines(rows: Iterable[Row]) -> Iterator[tuple[object, ...]]:
    """The lines of that file; what there is not is empty."""
    rows = list(rows)
    summaries = summarise(rows)
    for scenario in dict.fromkeys(summary.scenario for summary in summaries):
        mine = [summary for summary in summaries if summary.scenario == scenario]
        judged = verdicts(mine)
        papers = printed(rows, scenario)
        for s in mine:
            low, high = s.interval or ("", "")
            verdict, paper = judged.get((s.method, s.metric)), papers.get((s.method, s.metric))
            said = (verdict.margin, verdict.p, verdict.p_beyond, verdict.state) if verdict else ("", "", "", "")
            source = (paper.value, paper.source) if paper else ("", "")
            sd = "" if s.sd is None else s.sd
            yield (scenario, s.method, s.blind, s.metric, s.unit, s.n, s.over, s.mean, sd, low, high, *said, *source)


def _marked(cell: Cell | None, intervals: bool) -> str:
    if cell is None:
        return ""
    text = f"{cell.mean} [{cell.interval}]" if intervals and cell.interval else cell.mean if intervals else str(cell)
    text = f"**{text}**" if cell.mark in ("within", "differs") else text
    return text + (" >" if cell.mark == "beyond" else "") + (f" _{cell.paper}_" if cell.paper else "")


def _for_terminal(cell: Cell | None) -> "rich.text.Text":
    from rich.text import Text

    if cell is None:
        return Text(" ")
    mark = {"within": "*", "beyond": ">"}.get(cell.mark, " ")
    text = Text(f"{cell}{mark}", "bold" if cell.mark == "within" else "")
    return Text.assemble(text, (f" {cell.paper}" if cell.paper else "", "italic"))
