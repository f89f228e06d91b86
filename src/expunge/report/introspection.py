"""The introspection figure: what one removed image does inside a network, step by step, and where test records lie.

After Figure 2 of the RELOAD paper, and of its published version, which adds the embeddings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from expunge.report.svg import FORGET, INK, MUTED, Axes, Figure, FigureBase, write

_BEFORE_TRAINING = 3  # rows of the upper part: what fine-tuning makes of it is in the embeddings only
_NAMED = 20  # classes that fit below an axis or into a legend
# From Matplotlib's tab20, without orange, red and brown; and black.
_COLD = ("#1f77b4", "#2ca02c", "#9467bd", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf", "#aec7e8", "#98df8a", "#1b1d20")


@dataclass(frozen=True)
class Step:
    """A network at one step of Algorithm 1."""

    number: int  # 1: trained, 3: after the ascent, 4: after re-initialisation, 5: after fine-tuning
    name: str
    maps: tuple[Float[np.ndarray, "_ _"], ...]  # first channel of each convolution shown, for the image
    log_probabilities: Float[np.ndarray, " classes"]  # nats, for the image
    embedding: Float[np.ndarray, "records 2"]  # t-SNE of the penultimate features of test records


@dataclass(frozen=True)
class Introspection:
    """All that the figure shows."""

    image: Float[np.ndarray, "height width *colours"]  # between 0 and 1
    label: int  # its class, the one that was removed
    layers: tuple[str, ...]  # names of the convolutions
    steps: tuple[Step, ...]
    labels: Int[np.ndarray, " records"]  # of the test records


def write_figure(stem: Path, found: Introspection, title: str) -> list[Path]:
    """Draw the figure; the same bytes for the same numbers.

    Args:
        stem: Path without an ending; ".svg" and ".png" are added.
        found: What to draw.
        title: Which model and data.

    Returns:
        The paths of both files.

    Raises:
        MissingExtra: Matplotlib is not installed.
    """

    def plot(figure: Figure) -> None:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold", color=INK)
        parts: Any = figure.subfigures(2, 1, height_ratios=(3.1, 2.3))
        above, below = parts
        _inside(above, found)
        _embeddings(below, found)

    return write(stem, (8.4, 7.2), plot)


def _inside(figure: FigureBase, found: Introspection) -> None:
    shown = found.steps[:_BEFORE_TRAINING]
    columns = 2 + len(found.layers)
    axes = figure.subplots(len(shown), columns, squeeze=False, width_ratios=(*[1.0] * (columns - 1), 2.4))
    limits = [
        (min(step.maps[n].min() for step in shown), max(step.maps[n].max() for step in shown))
        for n in range(len(found.layers))
    ]
    lowest = [float(step.log_probabilities.min()) for step in shown]
    # One scale for all, but for a row that would vanish beside an ascent of thousands of nats.
    scales = [min(lowest) if 10 * own <= min(lowest) else own for own in lowest]
    for row, step in enumerate(shown):
        line: Sequence[Axes] = axes[row]
        _picture(line[0], found.image, None)
        line[0].set_visible(row == 0)
        for ax, values, (low, high) in zip(line[1:-1], step.maps, limits, strict=True):
            _picture(ax, values, (low, high))
        line[1 if found.layers else -1].set_ylabel(f"step {step.number}\n{step.name}", color=INK)
        _bars(line[-1], step, found.label, scales[row], last=row == len(shown) - 1)
    axes[0][0].set_title(f"image of {found.label}")
    for ax, name in zip(axes[0][1:-1], found.layers, strict=True):
        short = name.rpartition(".")[2]
        ax.set_title(name if short.isdigit() else short)
    axes[0][-1].set_title("log-probabilities, nats")


def _picture(ax: Axes, values: Float[np.ndarray, "height width *colours"], limits: tuple[float, float] | None) -> None:
    low, high = limits or (0.0, 1.0)
    ax.imshow(values, cmap="gray" if limits is None else "viridis", vmin=low, vmax=high, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)


def _bars(ax: Axes, step: Step, label: int, deepest: float, *, last: bool) -> None:
    classes = np.arange(len(step.log_probabilities))
    colours = [FORGET if each == label else MUTED for each in classes]
    ax.bar(classes, step.log_probabilities, color=colours, width=0.75)
    ax.set_ylim(1.05 * deepest, 0)
    ax.yaxis.tick_right()
    ax.locator_params(axis="y", nbins=4)
    ax.tick_params(axis="x", length=0)
    named = len(classes) <= _NAMED and last
    ax.set_xticks(classes if named else [], [str(each) for each in classes] if named else [])


def _embeddings(figure: FigureBase, found: Introspection) -> None:
    axes: Sequence[Axes] = figure.subplots(1, len(found.steps), squeeze=False)[0]
    classes = np.unique(found.labels)
    palette = _palette(len(classes))
    for ax, step in zip(axes, found.steps, strict=True):
        for colour, each in zip(palette, classes, strict=True):
            own = found.labels == each
            style: dict[str, Any] = {"marker": "o", "s": 6, "color": colour, "lw": 0}
            if each == found.label:
                style = {"marker": "x", "s": 14, "color": FORGET, "lw": 1.0, "zorder": 3}
            ax.scatter(*step.embedding[own].T, label=str(each), rasterized=True, **style)
        ax.set_title(f"step {step.number}: {step.name}")
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_box_aspect(1)
        ax.spines[:].set_visible(True)
    if len(classes) <= _NAMED:
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower left", ncols=len(names), title="class", alignment="left")


def _palette(classes: int) -> list[Any]:
    """A colour for each class; none is like that of the removed one."""
    if classes <= len(_COLD):
        return list(_COLD[:classes])
    from matplotlib import colormaps

    return [colormaps["viridis"](n / (classes - 1)) for n in range(classes)]
