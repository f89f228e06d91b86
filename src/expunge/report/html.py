"""Templates into self-contained HTML: no network, no scripts, the same bytes for the same values."""

import re
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import Any

from expunge.definitions import anchor, define
from expunge.errors import MissingExtra
from expunge.report.summaries import FLOOR, REFERENCE, label
from expunge.report.tables import Table


def render(template: str, context: Mapping[str, Any], metrics: Iterable[str]) -> str:
    """Fill a template of this package.

    Args:
        template: Its file name.
        context: What it asks for.
        metrics: Those that the page defines. The filter ``linked`` turns their names into links to that place.

    Raises:
        MissingExtra: Jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise MissingExtra("the page of a report needs Jinja2: pip install 'expunge[report]'.") from error
    environment = Environment(
        loader=PackageLoader("expunge", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    metrics = list(metrics)
    environment.filters["linked"] = lambda text: Markup(linked(text, metrics))  # linked() escapes
    environment.globals |= {
        "anchor": anchor,
        "widths": _widths,
        "flat": flat,
        "label": label,
        "standards": (REFERENCE, FLOOR),
    }
    return environment.get_template(template).render(context) + "\n"


def linked(text: str, metrics: Iterable[str]) -> str:
    """A text as HTML in which the names of metrics, short or in words, lead to their definitions."""
    names = {escape(name): anchor(metric) for metric in metrics for name in (metric, define(metric).name)}
    if not names:
        return escape(text)
    longest_first = sorted(names, key=len, reverse=True)
    pattern = re.compile(rf"(?<![\w#-])(?:{'|'.join(map(re.escape, longest_first))})(?![\w-])")
    return pattern.sub(lambda found: f'<a href="#{names[found[0]]}">{found[0]}</a>', escape(text))


def flat(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as lines: ``reload.fine_tune.epochs``, 10."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        yield name, ", ".join(str(each) for each in value) or "none"
    else:
        yield name, "none" if value is None or value == {} else str(value)


def _widths(table: Table) -> list[int]:
    """The longest spread of each column, to which the others are padded so that numbers line up."""
    return [
        max((len(cell.sd) for cell in cells if cell), default=0)
        for cells in zip(*(line.cells for line in table.lines), strict=True)
    ]
