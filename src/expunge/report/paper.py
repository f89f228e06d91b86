"""A paper's figures among the rows, to be shown beside the measured ones."""

from collections.abc import Iterable
from dataclasses import dataclass

from expunge.report.summaries import number
from expunge.rows import Row


@dataclass(frozen=True)
class Printed:
    """A figure as a paper prints it."""

    value: float
    unit: str
    source: str  # "paper, Table 3"
    where: str  # on which data and model

    def __str__(self) -> str:
        return number(self.value, self.unit)


def printed(rows: Iterable[Row], scenario: str) -> dict[tuple[str, str], Printed]:
    """What papers print for a scenario, by method and metric; of several the first."""
    found: dict[tuple[str, str], Printed] = {}
    for row in rows:
        if row.source != "measured" and row.scenario == scenario:
            where = f"{row.dataset}, {row.model}"
            found.setdefault((row.method, row.metric), Printed(row.value, row.unit, row.source, where))
    return found


def attribution(figures: Iterable[Printed]) -> str:
    """Where the figures come from, in a sentence; "" without any."""
    places = dict.fromkeys(f"{figure.source} ({figure.where})" for figure in figures)
    return f"In italics, as printed: {'; '.join(places)}." if places else ""
