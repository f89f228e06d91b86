"""The figure of forgetting against usefulness and against cost, with every method a numbered dot."""

import itertools
import math
from collections.abc import Iterable, Sequence

from expunge.definitions import ARROWS, define
from expunge.report.figures import Drawing
from expunge.report.summaries import FLOOR, ORIGINAL, REFERENCE, Summary, label, number, order
from expunge.report.svg import INK, MUTED, RULE, Axes, Figure, LogLocator, draw

# The first that is there; a mean that cannot cancel is best
_FORGETTING = ("FSKL", "Forget MSD", "ΔFE", "ΔForget MSE", "ΔFMIA", "ΔFA", "NSKL", "Retain MSD")
_USE = ("TA", "Test MSE", "NA", "Retain MSE")
_STANDARDS = (ORIGINAL, REFERENCE, FLOOR)
_REACHES, _ENOUGH = (8, 16, 25, 35), 8.5  # of a number from its dot, and what it needs around itself; points
_ANGLES = [math.pi * turn / 8 for turn in range(16)]

Found = dict[tuple[str, str], Summary]
Dot = tuple[int, str, float, float]  # number, method, across, up


def tradeoff(summaries: Iterable[Summary], scenario: str, subject: str) -> Drawing | None:
    """Distance to retraining against accuracy, and against cost where costs are known."""
    found: Found = {(s.method, s.metric): s for s in summaries if s.scenario == scenario and math.isfinite(s.mean)}
    metrics = {metric for _, metric in found}
    forgetting = next((metric for metric in _FORGETTING if metric in metrics), None)
    use = next((metric for metric in _USE if metric in metrics), None)
    across = [metric for metric in (use, "Cost" if "Cost" in metrics else None) if metric is not None]
    if forgetting is None or not across:
        return None
    methods = [m for m in order(method for method, _ in found) if (m, forgetting) in found]
    if not [m for m in methods if m not in _STANDARDS]:
        return None

    def plot(figure: Figure) -> None:
        axes: Sequence[Axes] = figure.subplots(1, len(across), sharey=True, squeeze=False).flatten().tolist()
        shown = [
            _panel(ax, found, methods, (metric, forgetting), subject) for ax, metric in zip(axes, across, strict=True)
        ]
        axes[0].set_ylabel(_axis(forgetting, found))
        for place, method in enumerate(methods):
            name = f"{place + 1}  {label(method)}"
            axes[-1].plot([], [], " ", label=name)
        figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside right upper", handlelength=0, handletextpad=0)
        figure.draw_without_rendering()  # so that it is known where the dots are
        for ax, dots in zip(axes, shown, strict=True):
            _number(ax, dots, subject)

    definition = define(forgetting)
    heading = "Forgetting, usefulness and cost"
    values = [
        f"{metric} {number(found[subject, metric].mean, found[subject, metric].unit)} {found[subject, metric].unit}"
        for metric in (forgetting, *across)
        if (subject, metric) in found
    ]
    finding = f"{label(subject)}: {', '.join(values)}."
    height = max(3.2, 0.6 + 0.155 * len(methods))
    sides = (" (left panel)", " (right panel, logarithmic)") if len(across) > 1 else ("", " (logarithmic)")
    rightwards = [f"{_rightwards(metric)}{sides[metric == 'Cost']}" for metric in across]
    return Drawing(
        heading,
        draw(f"tradeoff-{scenario}", f"{heading}. {finding}", (9.0, height), plot),
        finding,
        f"Each dot is a method, mean over repetitions, with its number from the list. Upwards: the {definition.name} "
        f"to the retrained model. Low is closer to retraining, and right is {' or '.join(rightwards)}. Dashed: the "
        "noise floor, and what the retrained model has.",
    )


def _rightwards(metric: str) -> str:
    return "slower" if metric == "Cost" else "more accurate" if define(metric).good == "high" else "of a larger error"


def _panel(ax: Axes, found: Found, methods: Sequence[str], metrics: tuple[str, str], subject: str) -> list[Dot]:
    across, up = metrics
    shown = [
        (place + 1, method, found[method, across].mean, found[method, up].mean)
        for place, method in enumerate(methods)
        if (method, across) in found and (across != "Cost" or found[method, across].mean > 0)
    ]
    ys = [y for *_, y in shown]
    if min(ys, default=0) > 0 and max(ys) > 5 * min(ys):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    if across == "Cost":
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        ax.locator_params(axis="x", nbins=5)
    if (FLOOR, up) in found:
        ax.axhline(found[FLOOR, up].mean, color=MUTED, lw=0.9, ls=(0, (4, 3)))
    if (REFERENCE, across) in found and across != "Cost":
        ax.axvline(found[REFERENCE, across].mean, color=MUTED, lw=0.9, ls=(0, (4, 3)))
    for _, method, x, y in shown:
        colour = INK if method == subject else MUTED
        ax.plot([x], [y], "o", color=colour, ms=6 if method == subject else 4, mew=0, clip_on=False)
    ax.margins(0.12, 0.12)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.minorticks_off()
    ax.grid(color=RULE, lw=0.5)
    ax.set_xlabel(_axis(across, found))
    return shown


def _axis(metric: str, found: Found) -> str:
    unit = next(summary.unit for (_, named), summary in found.items() if named == metric)
    return f"{metric} ({unit} {ARROWS[define(metric).good]})"


def _number(ax: Axes, shown: Sequence[Dot], subject: str) -> None:
    """Write each dot's number beside it, further out and with a line to it where there is no room."""
    dots: list[tuple[float, float]] = [tuple(ax.transData.transform((x, y))) for *_, x, y in shown]
    taken: list[tuple[float, float]] = []
    scale = ax.figure.dpi / 72
    for (name, method, x, y), (left, bottom) in zip(shown, dots, strict=True):
        rooms = {}
        for reach, angle in itertools.product(_REACHES, _ANGLES):
            offset = (reach * math.cos(angle), reach * math.sin(angle))
            at = (left + scale * offset[0], bottom + scale * offset[1])
            others = [*taken, *(dot for dot in dots if dot != (left, bottom))]
            free = min((math.dist(at, other) / scale for other in others), default=math.inf)
            rooms[offset] = min(free, _ENOUGH) - reach / 100  # of those with room enough, the nearest
        offset = max(rooms, key=rooms.__getitem__)
        taken.append((left + scale * offset[0], bottom + scale * offset[1]))
        line = {"arrowstyle": "-", "color": MUTED, "lw": 0.6, "shrinkA": 0, "shrinkB": 2}
        ax.annotate(
            str(name), (x, y), offset, textcoords="offset points", ha="center", va="center",
            fontsize=7.5, weight="bold" if method == subject else "normal", color=INK,
            arrowprops=line if math.hypot(*offset) > _REACHES[0] + 1 else None,
        ).set_in_layout(False)  # fmt: skip
