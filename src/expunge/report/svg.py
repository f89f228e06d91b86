"""Matplotlib figures as inline SVG: colours from the page's style sheet, no outside references, stable bytes."""

import io
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from expunge.definitions import slug
from expunge.errors import MissingExtra
from expunge.files import replacing

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase
    from matplotlib.ticker import LogLocator
except ImportError as error:
    raise MissingExtra("the figures of a report need Matplotlib: pip install 'expunge[report]'.") from error

__all__ = [
    "FORGET",
    "INK",
    "MUTED",
    "RETAIN",
    "RULE",
    "TEST",
    "Axes",
    "Figure",
    "FigureBase",
    "LogLocator",
    "draw",
    "write",
]

# Names of the page's custom properties, and the values Matplotlib draws with until they are put in.
INK, MUTED, RULE, FORGET, RETAIN, TEST = "#1b1d20", "#5c6268", "#d9d8d3", "#b34a00", "#00735a", "#0067a8"
_PROPERTIES = {INK: "ink", MUTED: "muted", RULE: "rule", FORGET: "forget", RETAIN: "retain", TEST: "test"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 8,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": False,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.color": RULE,
    "ytick.labelcolor": INK,
    "ytick.left": False,
    "lines.solid_capstyle": "round",
    "figure.constrained_layout.hspace": 0.12,
    "figure.constrained_layout.wspace": 0.05,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
}


def draw(name: str, title: str, size: tuple[float, float], plot: Callable[[Figure], None]) -> str:
    """Draw a figure.

    Args:
        name: Unique on the page; identifiers inside the figure come from it.
        title: What the figure says, for those who do not see it.
        size: Width and height in inches; only their ratio and the size of text in it matter.
        plot: Draws into an empty figure.

    Returns:
        One ``<svg>`` element.
    """
    file, name = io.StringIO(), slug(name)
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever the user has set: the same rows give the same figure
        mpl.rcParams.update({**_STYLE, "svg.hashsalt": name})
        figure = Figure(figsize=size, layout="constrained")
        plot(figure)
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(file.getvalue(), name, title)


def write(stem: Path, size: tuple[float, float], plot: Callable[[Figure], None]) -> list[Path]:
    """Write a figure as files of its own, on white; the same bytes for the same plot.

    Args:
        stem: Path without an ending.
        size: Width and height in inches.
        plot: Draws into an empty figure.

    Returns:
        The paths of an SVG and of a PNG.
    """
    paths = []
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({**_STYLE, "svg.hashsalt": stem.name, "figure.facecolor": "white"})
        figure = Figure(figsize=size, layout="constrained", dpi=110)
        plot(figure)
        for ending, unwanted in (("svg", ("Date", "Creator", "Format", "Type")), ("png", ("Software",))):
            paths.append(stem.with_name(f"{stem.name}.{ending}"))
            with replacing(paths[-1]) as temporary:
                figure.savefig(temporary, format=ending, metadata=dict.fromkeys(unwanted))
    return paths


def _inline(text: str, name: str, title: str) -> str:
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None, "Matplotlib writes a viewBox"
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)  # would style the whole page
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # the same in every figure
    body = body.replace("xlink:href", "href")
    body = re.sub(r' transform="rotate\(-?0 [^"]*"', "", body)
    body = re.sub(r"\bfont: (?:(\w+) )?([\d.]+px) [^;\"]*", _font, body)  # Matplotlib before 3.11
    body = re.sub(r"font-family: [^;\"]*(?:; )?", "", body)  # the page's
    for colour, called in _PROPERTIES.items():
        body = body.replace(colour, f"var(--{called})")
    return (
        f'<svg viewBox="{box[1]}" role="img" aria-labelledby="{name}-title">\n'
        f'<title id="{name}-title">{escape(title)}</title>{body.strip()}'
    )


def _font(match: re.Match[str]) -> str:
    weight = f"font-weight: {match[1]}; " if match[1] else ""
    return f"{weight}font-size: {match[2]}"
