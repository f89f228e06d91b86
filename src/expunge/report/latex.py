"""Tables for LaTeX with booktabs."""

import re

from expunge.report.tables import Cell, Table
from expunge.report.text import words

_SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "±": r"$\pm$", "Δ": r"$\Delta$",
    "δ": r"$\delta$", "ε": r"$\varepsilon$", "θ": r"$\theta$", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
    "≈": r"$\approx$", "\N{MINUS SIGN}": r"$-$", "\N{EN DASH}": "--", "\N{NO-BREAK SPACE}": "~", "‖": r"$\|$",
    "|": r"$|$", "²": "$^2$",
}  # fmt: skip
HEAD = "% Needs \\usepackage{booktabs}."


def escape(text: str) -> str:
    """A text as LaTeX prints it."""
    return re.sub(".", lambda found: _SPECIAL.get(found[0], found[0]), text)


def latex_table(table: Table, name: str) -> str:
    r"""One ``table`` environment with 95 % intervals, its caption above as booktabs wants it.

    Args:
        table: What to set.
        name: Of its ``\label``: ``tab:name``.
    """
    columns = len(table.metrics)
    heads = [
        " & ".join(["", "", *map(escape, table.metrics)]),
        " & ".join(["method", "blind", *map(escape, table.units)]),
    ]
    body = []
    for line in table.lines:
        body.append(" & ".join([escape(line.label), escape(line.blind), *map(_cell, line.cells)]))
        if any(cell and cell.interval for cell in line.cells):
            below = (rf"{{\tiny {escape(cell.interval)}}}" if cell and cell.interval else "" for cell in line.cells)
            body += [" & ".join(["", "", *below]), r"\addlinespace[4pt]"]
    if table.margins:
        body += [r"\midrule", " & ".join([r"$\delta$", "", *map(escape, table.margins)])]
    return "\n".join(
        [
            r"\begin{table}[tbp]",
            r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
            rf"\caption{{{escape(table.title)}. {escape(words(table, intervals=True))}}}",
            rf"\label{{tab:{name}}}",
            rf"\begin{{tabular}}{{ll{'r' * columns}}}",
            r"\toprule",
            *_lines(heads),
            r"\midrule",
            *_lines(body),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _lines(texts: list[str]) -> list[str]:
    return [text if text.startswith((r"\midrule", r"\addlinespace")) else rf"{text} \\" for text in texts]


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    text = escape(cell.mean)
    text = rf"\textbf{{{text}}}" if cell.mark in ("within", "differs") else text
    text += r"~$>$" if cell.mark == "beyond" else ""
    return text + (rf" \emph{{{escape(cell.paper)}}}" if cell.paper else "")
