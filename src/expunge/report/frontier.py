"""Quality against cost: what each kind of method reaches for what it spends, with the noise floor as a band."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, product
from typing import Any

from expunge.definitions import ARROWS, define
from expunge.errors import ConfigError
from expunge.report.figures import Drawing
from expunge.report.summaries import FLOOR, ORIGINAL, REFERENCE, Summary, label, number
from expunge.report.svg import FORGET, INK, RETAIN, RULE, TEST, Axes, Figure, LogLocator, draw

COST = "Work"  # what does not depend on how busy the machine was
_LINES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_STYLES = list(product("os^Dv", _LINES, (INK, FORGET, TEST, RETAIN)))  # marker, line, colour
SEVERAL = 3  # settings of a kind that make a grid
Point = tuple[float, float, str]  # cost, distance, name of the contender


def drawable(summaries: Iterable[Summary]) -> list[str]:
    """The distances that there is a frontier of; none unless a kind of method comes in several settings."""
    points = {(s.method, s.metric) for s in summaries if "," in s.method}
    kinds = Counter(method.partition(",")[0] for method in {method for method, _ in points})
    if max(kinds.values(), default=0) < SEVERAL:
        return []
    metrics = {metric for _, metric in points}
    return [metric for metric in ("FSKL", "ΔFE", "NSKL") if {metric, COST} <= metrics]


def frontier(summaries: Iterable[Summary], scenario: str, metrics: Sequence[str]) -> Drawing:
    """A panel for each distance: every point of a grid, and for each kind what is best at a cost or less.

    The kind of a method is its name up to the first comma: "reload, 5 epochs, lr 0.1" is of the kind "reload".

    Args:
        summaries: Of one run.
        scenario: Which of its scenarios.
        metrics: Distances to draw.

    Raises:
        ConfigError: A metric that nobody has, or no costs.
        MissingExtra: Matplotlib is not installed.
    """
    found = {(s.method, s.metric): s for s in summaries if s.scenario == scenario}
    kinds = {metric: kinds_of(found, metric) for metric in metrics}
    empty = [metric for metric in metrics if not kinds[metric]]
    if empty:
        raise ConfigError(f"nobody has {', '.join(empty)} and {COST} in {scenario!r}: there is nothing to draw.")
    styles = dict(zip(dict.fromkeys(kind for each in kinds.values() for kind in each), cycle(_STYLES), strict=False))

    def plot(figure: Figure) -> None:
        axes: Sequence[Axes] = figure.subplots(1, len(metrics), squeeze=False).flatten().tolist()
        for ax, metric in zip(axes, metrics, strict=True):
            _panel(ax, kinds[metric], found.get((FLOOR, metric)), styles)
            unit = next(s.unit for (_, named), s in found.items() if named == metric)
            ax.set_ylabel(f"{metric} ({unit} {ARROWS[define(metric).good]})")
            ax.set_xlabel(f"{COST} (share of retraining {ARROWS[define(COST).good]})")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)

    best = {metric: min((p for points in kinds[metric].values() for p in points), key=_distance) for metric in metrics}
    said = "; ".join(
        f"{metric} is lowest ({number(value, '')}) for {label(name)} at a work of {number(cost, 'ratio')}"
        for metric, (cost, value, name) in best.items()
    )
    heading = "Quality against cost"
    return Drawing(
        heading,
        draw(f"frontier-{scenario}", f"{heading}. {said}", (3.6 * len(metrics), 3.6), plot),
        said + ".",
        "Each dot is a setting, mean over repetitions; a line joins what is best of its kind at that cost or less. The "
        "band spans the distances between two retrained models over repetitions: inside it, nothing is left to gain.",
    )


def kinds_of(found: Mapping[tuple[str, str], Summary], metric: str) -> dict[str, list[Point]]:
    """The points of every kind, cheapest first."""
    kinds: dict[str, list[Point]] = {}
    for method, named in found:
        if named == metric and method not in (ORIGINAL, REFERENCE, FLOOR) and (method, COST) in found:
            point = (found[method, COST].mean, found[method, metric].mean, method)
            kinds.setdefault(method.split(",")[0], []).append(point)
    return {kind: sorted(points) for kind, points in kinds.items()}


def lowest(points: Sequence[Point]) -> list[Point]:
    """Those that are closer to retraining than everything cheaper of their kind."""
    chosen: list[Point] = []
    for point in points:
        if not chosen or point[1] < chosen[-1][1]:
            chosen.append(point)
    return chosen


def _distance(point: Point) -> float:
    return point[1]


def _panel(
    ax: Axes, kinds: Mapping[str, Sequence[Point]], floor: Summary | None, styles: Mapping[str, tuple[str, Any, str]]
) -> None:
    if floor is not None:
        ax.axhspan(min(floor.values), max(floor.values), color=RULE, lw=0, label=label(FLOOR))
    for kind, points in kinds.items():
        marker, line, colour = styles[kind]
        ax.plot([p[0] for p in points], [p[1] for p in points], marker, color=colour, ms=2.5, mew=0, alpha=0.45)
        best = lowest(points)
        ax.plot(
            [p[0] for p in best], [p[1] for p in best], color=colour, ls=line, lw=1.1, drawstyle="steps-post",
            marker=marker, ms=3.5, mew=0, label=label(kind),
        )  # fmt: skip
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.minorticks_off()
    ax.grid(color=RULE, lw=0.5)
