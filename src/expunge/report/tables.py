"""Rows in, tables out: means, spreads, intervals, verdicts and a paper's figures, as text in cells."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from expunge.definitions import ARROWS, Good, define
from expunge.errors import ConfigError
from expunge.report.paper import Printed, attribution, printed
from expunge.report.summaries import ORIGINAL, Summary, blind_throughout, label, number, order, repetitions, summarise
from expunge.report.verdicts import LEVEL, Difference, Verdict, differences, verdicts
from expunge.rows import EVALUATION, Row

_WORDS: dict[Good, str] = {"high": "high", "low": "low", "close": "close to retraining"}
_YES = {True: "yes", False: "no", None: "?"}
_PERCENT = f"{100 * (1 - LEVEL):.0f}"
_NOTHING = "\N{EN DASH}"
Found = Mapping[tuple[str, str], Summary]  # by method and metric


@dataclass(frozen=True)
class Cell:
    """A mean with its spread as text, and what may be said of it."""

    mean: str
    sd: str = ""  # "" for one repetition
    interval: str = ""  # "1.20 to 4.80"
    mark: Literal["within", "beyond", "differs", ""] = ""  # δ of retraining; for a difference, from zero
    paper: str = ""  # the figure that a paper prints

    def __str__(self) -> str:
        return f"{self.mean} ± {self.sd}" if self.sd else self.mean


@dataclass(frozen=True)
class Line:
    """A method's line in a table."""

    method: str
    label: str
    blind: str  # yes, no, ? where that is not known, or a dash for a model that unlearned nothing
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class Table:
    """Methods by metrics for one scenario."""

    title: str
    note: str  # what the numbers are
    marked: str  # what a marked cell means; "" where none is marked
    source: str  # where a paper's figures come from; "" without any
    metrics: tuple[str, ...]
    units: tuple[str, ...]  # with the direction: "points ↓"
    lines: tuple[Line, ...]
    margins: tuple[str, ...]  # δ of each metric; empty without a noise floor


def tables(rows: Iterable[Row], scenario: str, shown: Collection[str] = ()) -> list[Table]:
    """The tables of a scenario: distances to retraining, then each model's own values.

    Args:
        rows: All rows of a run: verdicts are corrected for all distances, and a Δ is tested by the values that it is
            the difference of, whether these are shown or not.
        scenario: Which.
        shown: Metrics to show; by default all.

    Raises:
        ConfigError: No row is of this scenario, or of these metrics.
        MissingExtra: SciPy is not installed, and there are intervals to compute.
    """
    rows = list(rows)
    found = {(s.method, s.metric): s for s in summarise(rows) if s.scenario == scenario}
    if not found:
        raise ConfigError(f"no measured row has scenario={scenario!r}.")
    papers = printed(rows, scenario)
    metrics = [metric for metric in dict.fromkeys(metric for _, metric in found) if not shown or metric in shown]
    if not metrics:
        raise ConfigError(
            f"none of {', '.join(shown)} was measured in {scenario!r}: of too few records some metrics say nothing and "
            "have no rows. Show others, or take more records."
        )
    own = [metric for metric in metrics if define(metric).kind == "value"]
    relative = [metric for metric in metrics if metric not in own]
    titles = {"Distance to retraining": relative, "What each model does": own}
    return [_table(title, found, papers, listed) for title, listed in titles.items() if listed]


def comparison(rows: Iterable[Row], scenario: str, subject: str) -> Table | None:
    """The subject against every other method, by paired differences of their distances; None without a pair.

    Of an evaluation there is none: its repetitions are retrained models, and of every other kind there is one model.
    """
    rows = list(rows)
    if any(row.experiment == EVALUATION for row in rows):
        return None
    found = {(s.method, s.metric): s for s in summarise(rows) if s.scenario == scenario}
    pairs = differences(found, subject)
    if not pairs:
        return None
    metrics = list(dict.fromkeys(metric for _, metric in pairs))
    others = list(dict.fromkeys(method for method, _ in pairs))
    lines = []
    for method in others:
        cells = tuple(_difference(pairs.get((method, metric)), found, metric, subject) for metric in metrics)
        lines.append(Line(method, f"\N{MINUS SIGN} {label(method)}", _blind(found, method), cells))
    name = label(subject)
    shown = [found[subject, metric] for metric in metrics]
    marked = any(cell and cell.mark for line in lines for cell in line.cells)
    return Table(
        title=f"{name} against the other methods",
        note=f"Distance of {name} less that of the other method, paired: mean difference with 95 % interval over "
        f"{repetitions(shown)}. Below zero, {name} is closer to retraining.",
        marked=f"Bold: different from zero (paired t-test, {_PERCENT} %, Holm over this table)." if marked else "",
        source="",
        metrics=tuple(metrics),
        units=tuple(found[subject, metric].unit for metric in metrics),
        lines=tuple(lines),
        margins=(),
    )


def _table(title: str, found: Found, papers: Mapping[tuple[str, str], Printed], metrics: list[str]) -> Table:
    shown = [summary for (_, metric), summary in found.items() if metric in metrics]
    judged = {key: verdict for key, verdict in verdicts(found.values()).items() if key[1] in metrics}
    spread = "Mean ± sample standard deviation" if any(summary.n > 1 for summary in shown) else "Mean"
    lines = []
    for method in order(summary.method for summary in shown):
        keys = [(method, metric) for metric in metrics]
        cells = tuple(_cell(found.get(key), judged.get(key), papers.get(key)) for key in keys)
        lines.append(Line(method, label(method), _blind(found, method), cells))
    units = {metric: next(summary.unit for summary in shown if summary.metric == metric) for metric in metrics}
    arrows = [f"{ARROWS[good]} {word}" for good, word in _WORDS.items() if good in {define(m).good for m in metrics}]
    margins = {metric: verdict.margin for (_, metric), verdict in judged.items()}
    return Table(
        title=title,
        note=f"{spread} over {repetitions(shown)}" + (f"; {', '.join(arrows)} is good." if arrows else "."),
        marked=_marked(judged, [m for m in metrics if m not in margins and define(m).kind == "distance"]),
        source=attribution(papers[key] for key in found if key in papers and key[1] in metrics),
        metrics=tuple(metrics),
        units=tuple(f"{unit} {ARROWS[define(metric).good]}".strip() for metric, unit in units.items()),
        lines=tuple(lines),
        margins=tuple(number(margins[m], units[m]) if m in margins else "" for m in metrics) if margins else (),
    )


def _blind(found: Found, method: str) -> str:
    if method == ORIGINAL:
        return _NOTHING
    return _YES[blind_throughout(s.blind for (who, _), s in found.items() if who == method)]


def _cell(summary: Summary | None, verdict: Verdict | None, paper: Printed | None) -> Cell | None:
    if summary is None:
        return None
    unit = summary.unit
    sd = "" if summary.sd is None else number(summary.sd, unit)
    beside = "" if paper is None else str(paper) if paper.unit == unit else f"{paper} {paper.unit}"
    state = verdict.state if verdict is not None and verdict.state != "open" else ""
    return Cell(number(summary.mean, unit), sd, _interval(summary.interval, unit), state, beside)


def _difference(difference: Difference | None, found: Found, metric: str, subject: str) -> Cell | None:
    if difference is None:
        return None
    unit = found[subject, metric].unit
    interval = _interval(difference.interval, unit)
    return Cell(number(difference.mean, unit), "", interval, "differs" if difference.p <= LEVEL else "")


def _interval(interval: tuple[float, float] | None, unit: str) -> str:
    if interval is None or interval[0] == interval[1] or not all(map(math.isfinite, interval)):
        return ""
    return f"{number(interval[0], unit)} to {number(interval[1], unit)}"


def _marked(judged: Mapping[tuple[str, str], Verdict], unjudged: list[str]) -> str:
    """What the marks say, and on which metrics they say nothing."""
    if not judged:
        return ""
    text = (
        f"Bold: indistinguishable from retraining within δ; >: further from it than δ; neither: undecided "
        f"({_PERCENT} %, Holm over all distances of the scenario; δ is the 95 % quantile of the noise floor)."
    )
    blunt = [metric for (method, metric), verdict in judged.items() if method == ORIGINAL and verdict.state == "within"]
    if unjudged:
        text += (
            f" On {', '.join(unjudged)} there is no δ and no mark: retrained models do not differ, or too few have it."
        )
    if blunt:
        text += (
            f" On {', '.join(blunt)} even the original is within δ: with these records, that cannot tell a model that "
            "unlearned from one that did not."
        )
    return text
