"""One self-contained HTML page from the files of a run: no network, no scripts, the same bytes for the same files."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.definitions import slug
from expunge.files import write_text
from expunge.report.gaps import ATTACKS
from expunge.report.html import flat, render
from expunge.report.overview import corrects, defined, findings, sentences, sizes, subject, title
from expunge.report.stored import Run, read_run
from expunge.report.summaries import Summary, label, repetitions, summarise
from expunge.report.tables import Table, comparison, tables
from expunge.rows import SQUARED

NAME = "report.html"


@dataclass(frozen=True)
class Section:
    """What the page says about a scenario."""

    slug: str
    title: str
    summary: str
    about: str | None  # the method that the summary and the figures are about
    sizes: str
    tables: list[Table]  # distances to retraining, own values, and the subject against the other methods
    drawings: list[Any]  # of `figures.Drawing`, which needs Matplotlib


def write_page(run: Path | str) -> Path:
    """Write ``report.html`` into a run folder.

    Args:
        run: A folder as `stored.read_run` wants it.

    Returns:
        The path of the page.

    Raises:
        ConfigError: A file of the run is missing or damaged; the message names it.
        MissingExtra: Jinja2 or Matplotlib is not installed.
    """
    stored = read_run(run)
    path = Path(run) / NAME
    context = _context(stored)
    write_text(path, render("page.html.j2", context, context["definitions"]))
    return path


def _context(run: Run) -> dict[str, Any]:
    from expunge.report.series import series

    summaries = summarise(run.rows)
    first = next(row for row in run.rows if row.source == "measured")
    metrics = list(dict.fromkeys(summary.metric for summary in summaries))
    return {
        "experiment": first.experiment,
        "dataset": _all(row.dataset for row in run.rows if row.source == "measured"),
        "model": _all(row.model for row in run.rows if row.source == "measured"),
        "repetitions": repetitions(summaries),
        "date": run.environment.get("date", ""),
        "sections": [_section(run, summaries, name) for name in dict.fromkeys(s.scenario for s in summaries)],
        "series": series(summaries),
        "findings": {(title(s), label(m)): found for (s, m), found in findings(run.facts).items()},
        "definitions": defined(summaries),
        "config": list(flat(run.config)),
        "environment": list(flat(run.environment)),
        "on_removed": any(row.split == "forget" for row in run.rows),
        "attacked": not ATTACKS.isdisjoint(metrics),
    }


def _section(run: Run, summaries: list[Summary], scenario: str) -> Section:
    from expunge.report import attack, curves, figures, frontier, samples, tradeoff

    summaries = [summary for summary in summaries if summary.scenario == scenario]
    about = subject(summary.method for summary in summaries)
    drawings: list[figures.Drawing | None] = []
    corrected = corrects(run.rows, scenario)
    metrics = frontier.drawable(summaries)
    unit = SQUARED if any(summary.unit == SQUARED for summary in summaries) else "nats"
    if metrics:
        drawings = [frontier.frontier(summaries, scenario, metrics)]
    elif about is not None:
        drawings = [
            figures.distances(summaries, scenario, about),
            tradeoff.tradeoff(summaries, scenario, about),
            curves.steps(run.curves, run.losses, scenario, about, corrects=corrected),
            figures.resets(run.resets, scenario, about),
            figures.histograms(run.losses, scenario, about, corrects=corrected, unit=unit),
            attack.roc(run.losses, scenario, about, corrects=corrected),
        ]
    drawings.append(samples.samples(run.samples, scenario))
    compared = comparison(run.rows, scenario, about) if about else None
    return Section(
        slug=f"scenario-{slug(scenario)}",
        title=title(scenario),
        summary=sentences(summaries, scenario, about) if about else "",
        about=about,
        sizes=sizes(run.rows, scenario) + (f" a seed, {repetitions(summaries)}" if summaries[0].over == "seed" else ""),
        tables=tables(run.rows, scenario) + ([compared] if compared else []),
        drawings=[drawing for drawing in drawings if drawing is not None],
    )


def _all(names: Iterable[str]) -> str:
    """What all tasks of a run are about."""
    return "; ".join(dict.fromkeys(names))
