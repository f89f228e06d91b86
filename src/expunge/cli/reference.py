"""The commands that explain: methods."""

from expunge.cli import printing
from expunge.cli.arguments import Flag
from expunge.methods import METHODS


def methods(*, json: Flag = False) -> None:
    """List the methods, what they may see and what they do.

    Args:
        json: Print JSON, with the settings and their defaults.
    """
    if json:
        table = [
            {"name": m.name, "blind": m.blind, "summary": m.summary, "settings": m.defaults()} for m in METHODS.values()
        ]
        print(printing.as_json(table))
        return
    from rich.table import Table

    columns = Table("method", "sees the removed records", "what it does")
    for method in METHODS.values():
        columns.add_row(method.name, "no (blind)" if method.blind else "yes", method.summary)
    printing.show(columns)
