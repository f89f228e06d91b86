"""A report in the format that was asked for, written into the folder of its run."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from expunge.definitions import slug
from expunge.files import write_text
from expunge.report.latex import HEAD, latex_table
from expunge.report.overview import sentences, sizes, subject
from expunge.report.page import write_page
from expunge.report.stored import Run, read_run
from expunge.report.summaries import summarise
from expunge.report.tables import Table, comparison, tables
from expunge.report.text import markdown_table, write_table


def write(folder: Path | str, form: Literal["html", "markdown", "latex", "csv"]) -> Path:
    """Write report.html, report.md, report.tex or report.csv into a run folder.

    Returns:
        The path of what was written.

    Raises:
        ConfigError: A file of the run is missing or damaged.
        MissingExtra: A library of the extra ``report`` is not installed.
    """
    folder = Path(folder)
    if form == "html":
        return write_page(folder)
    run = read_run(folder)
    path = folder / {"markdown": "report.md", "latex": "report.tex", "csv": "report.csv"}[form]
    if form == "csv":
        write_table(path, run.rows)
    else:
        write_text(path, _markdown(run) if form == "markdown" else _latex(run))
    return path


def _tables(run: Run) -> dict[str, list[Table]]:
    """The tables of every scenario, with the comparison of its subject with the other methods."""
    summaries, found = summarise(run.rows), {}
    for scenario in dict.fromkeys(summary.scenario for summary in summaries):
        about = subject(summary.method for summary in summaries if summary.scenario == scenario)
        compared = comparison(run.rows, scenario, about) if about else None
        found[scenario] = tables(run.rows, scenario) + ([compared] if compared else [])
    return found


def _markdown(run: Run) -> str:
    summaries, parts = summarise(run.rows), ["# Unlearning report"]
    for scenario, listed in _tables(run).items():
        about = subject(summary.method for summary in summaries if summary.scenario == scenario)
        parts.append(f"## {scenario}")
        parts += [sentences(summaries, scenario, about)] if about else []
        parts.append(f"Measured on {sizes(run.rows, scenario)}.")
        parts += [markdown_table(table, intervals=True) for table in listed]
    return "\n\n".join(parts) + "\n"


def _latex(run: Run) -> str:
    parts = [HEAD]
    for scenario, listed in _tables(run).items():
        for table in listed:
            named = replace(table, title=f"{table.title}, {scenario}")
            parts.append(latex_table(named, f"{slug(scenario)}-{slug(table.title)}"))
    return "\n\n".join(parts) + "\n"
