"""A metric over scenarios that differ in one number: how many deletions, or what share of the faults is known."""

import re
from collections.abc import Iterable, Sequence

from expunge.definitions import ARROWS, define
from expunge.report import overview
from expunge.report.figures import Drawing
from expunge.report.summaries import FLOOR, ORIGINAL, REFERENCE, Summary, label, number
from expunge.report.svg import FORGET, INK, MUTED, RETAIN, RULE, TEST, Axes, Figure, draw

_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_SHOWN = ("Acc_corr", "ΔFE", "TA", "NA")  # what is drawn of what was measured, the first two of these
_LEAST = 3  # points that make a line
_COLOURS = (INK, FORGET, TEST, RETAIN, MUTED)


def axis_of(scenarios: Sequence[str]) -> tuple[str, dict[str, float]] | None:
    """What the scenarios of a run differ in, if that is one number.

    Args:
        scenarios: As tables call them: "deletion 1 of 2 % each", "deletion 2 of 2 % each", …

    Returns:
        Their name with … in place of the number, and the number of each; None if they differ in anything else.
    """
    numbers = [[float(each) for each in _NUMBER.findall(name)] for name in scenarios]
    words = {_NUMBER.sub("#", name) for name in scenarios}
    if len(scenarios) < _LEAST or len(words) != 1:
        return None
    differing = [place for place, values in enumerate(zip(*numbers, strict=True)) if len(set(values)) > 1]
    if len(differing) != 1:
        return None
    parts = iter(range(len(numbers[0])))
    title = _NUMBER.sub(lambda found: "…" if next(parts) == differing[0] else found[0], scenarios[0])
    return title, {name: values[differing[0]] for name, values in zip(scenarios, numbers, strict=True)}


def series(summaries: Sequence[Summary]) -> Drawing | None:
    """A line for each method, mean with standard deviation; None where the scenarios of a run are no series."""
    found = axis_of(list(dict.fromkeys(summary.scenario for summary in summaries)))
    metrics = [metric for metric in _SHOWN if any(each.metric == metric for each in summaries)][:2]
    if found is None or not metrics:
        return None
    title, at = found
    lines = {metric: _lines(summaries, metric, at) for metric in metrics}
    if any(_about(each) is None for each in lines.values()):
        return None

    def plot(figure: Figure) -> None:
        axes: Sequence[Axes] = figure.subplots(1, len(metrics), squeeze=False).flatten().tolist()
        for ax, metric in zip(axes, metrics, strict=True):
            _panel(ax, lines[metric], at)
            unit = next(each.unit for each in summaries if each.metric == metric)
            ax.set_ylabel(f"{metric} ({unit} {ARROWS[define(metric).good]})")
            ax.set_xlabel(title)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)

    said = "; ".join(_said(lines[metric], metric, at) for metric in metrics)
    return Drawing(
        overview.title(title),
        draw("series", f"{title}. {said}", (3.6 * len(metrics), 3.4), plot),
        f"{said}.",
        "Mean over repetitions, with the sample standard deviation.",
    )


def _lines(summaries: Iterable[Summary], metric: str, at: dict[str, float]) -> dict[str, list[Summary]]:
    """The points of every method, in the order of the number."""
    lines: dict[str, list[Summary]] = {}
    for each in sorted((s for s in summaries if s.metric == metric), key=lambda s: at[s.scenario]):
        lines.setdefault(each.method, []).append(each)
    return lines


def _panel(ax: Axes, lines: dict[str, list[Summary]], at: dict[str, float]) -> None:
    for place, (method, points) in enumerate(lines.items()):
        colour = RULE if method in (FLOOR, ORIGINAL) else _COLOURS[place % len(_COLOURS)]
        ax.errorbar(
            [at[each.scenario] for each in points], [each.mean for each in points],
            yerr=[each.sd or 0.0 for each in points], color=colour, ls="-" if place < len(_COLOURS) else "--",
            lw=1.1, marker="o", ms=3, mew=0, elinewidth=0.6, label=label(method),
        )  # fmt: skip
    ax.grid(color=RULE, lw=0.5)


def _about(lines: dict[str, list[Summary]]) -> str | None:
    """The method that the page is about, or the first; None if there are only standards."""
    methods = [method for method in lines if method not in (FLOOR, ORIGINAL, REFERENCE)]
    return "reload" if "reload" in methods else next(iter(methods), None)


def _said(lines: dict[str, list[Summary]], metric: str, at: dict[str, float]) -> str:
    """The first and the last value of the method that the page is about."""
    about = _about(lines)
    assert about is not None
    first, last = lines[about][0], lines[about][-1]
    return (
        f"{metric} of {label(about)} goes from {number(first.mean, first.unit)} at {at[first.scenario]:g} to "
        f"{number(last.mean, last.unit)} at {at[last.scenario]:g}"
    )
