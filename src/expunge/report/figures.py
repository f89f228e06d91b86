"""The figures of a report: distances to retraining, loss over the steps, where values were reset, who stands out."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import fmean

import numpy as np
from jaxtyping import Float

from expunge.definitions import define, split_names
from expunge.report.stored import Loss, Reset
from expunge.report.summaries import FLOOR, ORIGINAL, REFERENCE, Summary, label, number, order
from expunge.report.svg import FORGET, INK, MUTED, RULE, TEST, Axes, Figure, LogLocator, draw
from expunge.report.verdicts import verdicts

LEAST_LOSS, BINS = 1e-6, 18  # of the histograms; a smaller loss, in nats or of the largest, counts as this one


@dataclass(frozen=True)
class Drawing:
    """A figure and its words."""

    heading: str
    svg: str
    finding: str  # in numbers
    caption: str  # what is drawn, how to read it, what good looks like


def distances(summaries: Iterable[Summary], scenario: str, subject: str) -> Drawing | None:
    """A panel for each distance to retraining: means, intervals, seeds, and the noise floor behind them."""
    summaries = [s for s in summaries if s.scenario == scenario and math.isfinite(s.mean)]
    found = {(s.metric, s.method): s for s in summaries if define(s.metric).kind == "distance"}
    margins = {metric: verdict.margin for (_, metric), verdict in verdicts(summaries).items()}
    metrics = list(dict.fromkeys(metric for metric, _ in found))
    methods = [m for m in order(method for _, method in found) if m not in (REFERENCE, FLOOR)]
    if not methods:
        return None
    columns = min(len(metrics), 3)
    height = math.ceil(len(metrics) / columns)

    def plot(figure: Figure) -> None:
        axes: Sequence[Axes] = figure.subplots(height, columns, sharey=True, squeeze=False).flatten().tolist()
        for ax, metric in zip_longest(axes, metrics):
            if metric is None:
                ax.set_visible(False)
                continue
            floor, shown = found.get((metric, FLOOR)), [found.get((metric, method)) for method in methods]
            _panel(ax, metric, shown, floor, margins.get(metric), subject)
        axes[0].set_yticks(range(len(methods)), [label(method) for method in methods])
        axes[0].set_ylim(len(methods) - 0.4, -0.6)

    compared = []
    for metric in metrics:
        summary, floor = found.get((metric, subject)), found.get((metric, FLOOR))
        if summary is not None:
            against = f" (noise floor {number(floor.mean, floor.unit)})" if floor else ""
            compared.append(f"{metric} {number(summary.mean, summary.unit)}{against}")
    heading, over = "Distance to retraining", f"{summaries[0].over}s"
    finding = f"{label(subject)}: {', '.join(compared)}."
    size = (9.0, height * (0.85 + 0.22 * len(methods)))
    return Drawing(
        heading,
        draw(f"distances-{scenario}", f"{heading}. {finding}", size, plot),
        finding,
        f"Large dots are means over {over} with 95 % intervals, faint dots the {over}. The grey band is the noise "
        "floor: how far a second retrained model is from the first (dashed: its mean; band: its 95 % interval). Left "
        "is closer to retraining, and inside the band is as close as a model that was itself retrained. δ is what 95 % "
        "of pairs of retrained models stay below. A line that runs to the right edge goes on beyond it, and an arrow "
        "gives a mean that is off the scale.",
    )


def resets(stored: Iterable[Reset], scenario: str, subject: str) -> Drawing | None:
    """A bar for each tensor: the share of it that was re-initialised."""
    shares: dict[str, list[float]] = {}
    entries: dict[str, int] = {}
    for reset in stored:
        if (reset.scenario, reset.method) == (scenario, subject):
            shares.setdefault(reset.parameter, []).append(100 * reset.share)
            entries[reset.parameter] = reset.entries
    if not shares:
        return None
    means = {name: fmean(values) for name, values in shares.items()}
    overall = sum(means[name] * entries[name] for name in means) / sum(entries.values())
    most, least = max(means, key=means.__getitem__), min(means, key=means.__getitem__)

    def plot(figure: Figure) -> None:
        ax = figure.subplots()
        ax.barh(range(len(means)), list(means.values()), height=0.62, color=RULE)
        for y, name in enumerate(means):
            ax.plot(shares[name], [y] * len(shares[name]), "o", color=INK, ms=2.5, mew=0, alpha=0.4)
            ax.text(1.06, y, f"{means[name]:.1f} %", ha="right", va="center", transform=ax.get_yaxis_transform())
        ax.axvline(overall, color=INK, lw=0.9, ls=(0, (4, 3)))
        ax.annotate(
            f"overall {overall:.1f} %", (overall, -0.5), (0, 3), textcoords="offset points", ha="center", va="bottom"
        )
        ax.set_yticks(range(len(means)), [f"{name}  ({entries[name]:,})" for name in means])
        ax.set_ylim(len(means) - 0.5, -0.5)
        ax.set_xlim(left=0)
        ax.set_xlabel("re-initialised entries, % of the tensor")

    heading = "Where values were re-initialised"
    extremes = f"most of {most} ({means[most]:.1f} %), least of {least} ({means[least]:.1f} %)"
    finding = f"{overall:.1f} % of all entries were re-initialised: {extremes}."
    return Drawing(
        heading,
        draw(f"resets-{scenario}", f"{heading}. {finding}", (9.0, 0.75 + 0.21 * len(means)), plot),
        finding,
        f"The share of each tensor that {label(subject)} set back to untrained values, mean over seeds (dots: the "
        "seeds), with its number of entries in brackets. The dashed line is the share of all entries; tensors "
        "whose bars pass it lost more than their share. No pattern is right or wrong in itself.",
    )


def histograms(
    losses: Iterable[Loss], scenario: str, subject: str, *, corrects: bool = False, unit: str = "nats"
) -> Drawing | None:
    """The losses of removed and of test records side by side, before and after."""
    stored: dict[tuple[str, str], list[float]] = {}
    for loss in losses:
        if loss.scenario == scenario and math.isfinite(loss.loss):
            stored.setdefault((loss.method, loss.split), []).append(loss.loss)
    wanted = (ORIGINAL, subject, REFERENCE)
    methods = [m for m in wanted if (m, "forget") in stored and (m, "test") in stored]
    if not methods:
        return None
    largest = max(value for values in stored.values() for value in values)
    least = LEAST_LOSS * (1 if unit == "nats" else largest or 1)
    stored = {key: [max(value, least) for value in values] for key, values in stored.items()}
    shown = [value for (method, _), values in stored.items() if method in methods for value in values]
    name = split_names(corrects)["forget"]
    edges = np.geomspace(min(shown) / 1.01, max(shown) * 1.01, BINS + 1)
    heights = {
        (method, split): np.histogram(stored[method, split], edges)[0] / len(stored[method, split]) * 100
        for method in methods
        for split in ("forget", "test")
    }
    overlap = {m: float(np.minimum(heights[m, "forget"], heights[m, "test"]).sum()) for m in methods}

    def plot(figure: Figure) -> None:
        axes: Sequence[Axes] = figure.subplots(1, len(methods), sharey=True, squeeze=False).flatten().tolist()
        for ax, method in zip(axes, methods, strict=True):
            _histogram(ax, edges, heights[method, "forget"], heights[method, "test"], f"{name} records")
            ax.set_xlabel(f"loss, {unit}")
            ax.set_title(f"{label(method)}: overlap {overlap[method]:.0f} %")
        axes[0].set_ylabel("% of the records")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)

    heading = f"Do the {name} records stand out?"
    parts = ", ".join(f"{overlap[m]:.0f} % for {label(m)}" for m in methods)
    finding = f"The losses of {name} and of test records overlap by {parts}."
    return Drawing(
        heading,
        draw(f"losses-{scenario}", f"{heading} {finding}", (9.0, 2.6), plot),
        finding,
        f"How the losses of single records are spread, all seeds together: {name} records against test "
        "records, which no model was trained on. Left is a small loss: the model knows the record. After unlearning, "
        "the two should overlap as much as they do for the retrained model.",
    )


def _panel(
    ax: Axes,
    metric: str,
    shown: Sequence[Summary | None],
    floor: Summary | None,
    margin: float | None,
    subject: str,
) -> None:
    present = [summary for summary in shown if summary is not None]
    limit = max(_limit([*present, *([floor] if floor else [])], subject), 1.06 * (margin or 0.0))
    if margin is not None:
        ax.axvline(margin, color=FORGET, lw=1.0)
        ax.annotate(
            "δ",
            (margin, 1),
            (3, -1),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="top",
            color=FORGET,
        )
    if floor is not None:
        low, high = floor.interval or (floor.mean, floor.mean)
        ax.axvspan(low, min(high, limit), color=RULE, alpha=0.65, lw=0)
        ax.axvline(floor.mean, color=MUTED, lw=0.9, ls=(0, (4, 3)))
    for y, summary in enumerate(shown):
        if summary is None:
            continue
        colour, width = (INK, 1.8) if summary.method == subject else (MUTED, 1.1)
        if summary.mean > limit:
            ax.text(limit, y, f"{number(summary.mean, summary.unit)} →", color=colour, ha="right", va="center")
            continue
        low, high = summary.interval or (summary.mean, summary.mean)
        seeds = [value for value in summary.values if value <= limit]
        ax.plot(seeds, [y] * len(seeds), "o", color=colour, ms=3, mew=0, alpha=0.35, clip_on=False)
        ax.plot([low, min(high, limit)], [y, y], color=colour, lw=width)
        ax.plot([summary.mean], [y], "o", color=colour, ms=5.5 if summary.method == subject else 4.5, clip_on=False)
    ax.set_xlim(0, limit)
    ax.locator_params(axis="x", nbins=4)
    ax.set_title(metric)
    unit = next(iter(present)).unit if present else ""
    ax.set_xlabel(f"← closer to retraining ({unit})", loc="left")


def _limit(summaries: Sequence[Summary], subject: str) -> float:
    """Where a panel ends: it shows all of what matters, and of the other methods those within twice as much."""

    def reach(summary: Summary) -> float:
        return max((summary.interval or (0.0, summary.mean))[1], *summary.values)

    core = max((reach(s) for s in summaries if s.method in (ORIGINAL, FLOOR, subject)), default=0.0)
    return 1.06 * max(reach(s) for s in summaries if core == 0 or reach(s) <= 2 * core) or 1.0


def _histogram(
    ax: Axes,
    edges: Float[np.ndarray, " edges"],
    forget: Float[np.ndarray, " bins"],
    test: Float[np.ndarray, " bins"],
    name: str,
) -> None:
    for heights, colour, called in ((test, TEST, "test records"), (forget, FORGET, name)):
        ax.stairs(heights, edges, fill=True, color=colour, alpha=0.22, lw=0)
        ax.stairs(heights, edges, color=colour, lw=1.4, label=called, ls="-" if heights is forget else (0, (3, 1.5)))
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(numticks=5))  # of a narrow panel: more would run into each other
    ax.minorticks_off()
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
