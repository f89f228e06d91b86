"""The figure of the losses from the trained model over the stages of an unlearning to its last step."""

from collections.abc import Iterable, Sequence
from statistics import fmean

import numpy as np
from jaxtyping import Float

from expunge.definitions import split_names
from expunge.report.figures import LEAST_LOSS, Drawing
from expunge.report.stored import Loss, Point
from expunge.report.summaries import ORIGINAL, REFERENCE, label
from expunge.report.svg import FORGET, RETAIN, RULE, TEST, Axes, Figure, draw

_COLOURS = {"forget": FORGET, "test": TEST, "retain": RETAIN}
_STAGES = {"original": "trained", "difference": "trained", "ascend": "ascended", "re-initialise": "re-initialised"}


def steps(
    points: Iterable[Point], losses: Iterable[Loss], scenario: str, subject: str, *, corrects: bool = False
) -> Drawing | None:
    """Mean loss on every split at every stage and after every epoch, over seeds."""
    mine = [point for point in points if (point.scenario, point.method) == (scenario, subject)]
    if not mine:
        return None
    stages, later = _stages(mine), sorted({point.step for point in mine if point.step})
    gap = max(later, default=6) / 6
    xs = [gap * (place + 1 - len(stages)) for place in range(len(stages))] + [float(step) for step in later]
    curves = {split: _over_seeds(mine, split, [*stages, *later]) for split in _COLOURS}
    curves = {split: curve for split, curve in curves.items() if len(curve)}
    levels = _levels(losses, scenario)
    names = split_names(corrects)

    def plot(figure: Figure) -> None:
        ax = figure.subplots()
        ax.set_yscale("log")
        ax.axvspan(xs[0] - gap / 3, 0, color=RULE, alpha=0.4, lw=0)
        for level in levels.values():
            ax.axhline(level, color=FORGET, lw=0.9, ls=(0, (4, 3)))
        ends = [(level, f"{names['forget']}, {method}", FORGET) for method, level in levels.items()]
        for split, curve in curves.items():
            colour = _COLOURS[split]
            ax.fill_between(xs, curve.min(0), curve.max(0), color=colour, alpha=0.16, lw=0)
            ax.plot(xs, curve.mean(0), "o-", color=colour, lw=1.6, ms=3)
            ends.append((float(curve[:, -1].mean()), names[split], colour))
        ax.set_xlim(xs[0] - gap / 3, xs[-1] + gap / 12)
        _label_ends(ax, ends)
        _ticks(ax, stages, gap)

    heading = "Loss over the steps"
    finding = _finding(curves.get("forget"), stages, levels, names["forget"])
    return Drawing(
        heading,
        draw(f"steps-{scenario}", f"{heading}. {finding}", (9.0, 3.4), plot),
        finding,
        f"The mean loss while {label(subject)} works, on three kinds of records: mean over seeds, with a band from the "
        "lowest seed to the highest (a seed that ended early stays where it ended). Shaded: the stages before "
        "fine-tuning. Dashed: the original's and the retrained model's loss on the "
        f"{names['forget']} records. The end is good where the {names['forget']} records meet the level of the "
        "retrained model and the others fit as before.",
    )


def _stages(points: Iterable[Point]) -> list[str]:
    """The moments before fine-tuning, without those at which nothing had moved."""
    seen: dict[str, dict[tuple[int, str], float]] = {}
    for point in points:
        if point.step == 0:
            seen.setdefault(point.moment, {})[point.seed, point.split] = point.loss
    before = [{}, *seen.values()]
    return [moment for (moment, found), last in zip(seen.items(), before, strict=False) if found != last]


def _over_seeds(
    points: Iterable[Point], split: str, columns: Sequence[str | int]
) -> Float[np.ndarray, "seeds columns"]:
    """Losses by seed and by stage or step; where a seed has ended, its last loss."""
    found: dict[int, dict[str | int, float]] = {}
    for point in points:
        if point.split == split:
            found.setdefault(point.seed, {})[point.step or point.moment] = max(point.loss, LEAST_LOSS)
    lines = []
    for losses in found.values():
        line, last = [], float("nan")
        for column in columns:
            last = losses.get(column, last)
            line.append(last)
        lines.append(line)
    return np.array(lines, dtype=np.float64).reshape(len(lines), len(columns))


def _levels(losses: Iterable[Loss], scenario: str) -> dict[str, float]:
    """The mean loss on the forget split of the original and of the retrained model."""
    stored: dict[str, list[float]] = {}
    for loss in losses:
        if (loss.scenario, loss.split) == (scenario, "forget"):
            stored.setdefault(loss.method, []).append(loss.loss)
    return {method: fmean(stored[method]) for method in (ORIGINAL, REFERENCE) if method in stored}


def _finding(
    curve: Float[np.ndarray, "seeds columns"] | None, stages: Sequence[str], levels: dict[str, float], name: str
) -> str:
    if curve is None:
        return f"The loss on the {name} records was not watched."
    means = curve.mean(0)
    path = [f"{mean:.2g} {_STAGES.get(stage, stage)}" for mean, stage in zip(means, stages, strict=False)]
    text = f"Loss on the {name} records: {', '.join([*path, f'{means[-1]:.2g} at the end'])}"
    return text + (f"; retraining gives {levels[REFERENCE]:.2g} nats." if REFERENCE in levels else " (nats).")


def _label_ends(ax: Axes, ends: Sequence[tuple[float, str, str]], apart: float = 0.065) -> None:
    """Write names at the right end of lines, pushed apart where they would overlap."""
    low, high = np.log(ax.get_ylim())
    ends = sorted(ends)
    places = [float((np.log(level) - low) / (high - low)) for level, _, _ in ends]
    for _ in range(100):  # neighbours that are too close share what is missing
        for i in range(len(places) - 1):
            missing = max(0.0, apart - (places[i + 1] - places[i]))
            places[i] -= missing / 2
            places[i + 1] += missing / 2
    for place, (_, text, colour) in zip(places, ends, strict=True):
        ax.text(1.012, place, text, color=colour, va="center", transform=ax.transAxes)


def _ticks(ax: Axes, stages: Sequence[str], gap: float) -> None:
    names = [_STAGES.get(stage, stage) for stage in stages]
    marks = [float(mark) for mark in ax.xaxis.get_major_locator().tick_values(0, ax.get_xlim()[1])]
    marks = [mark for mark in marks if gap / 2 < mark <= ax.get_xlim()[1]]
    places = [gap * (place + 1 - len(stages)) for place in range(len(stages))]
    ax.set_xticks([*places, *marks], [*names, *(f"{mark:g}" for mark in marks)])
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.minorticks_off()
    ax.set_xlabel("steps of fine-tuning")
    ax.set_ylabel("loss, nats")
    ax.grid(axis="y")
