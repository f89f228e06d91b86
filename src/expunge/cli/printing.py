"""What commands print: tables for people, JSON for machines."""

import json
import sys
from collections.abc import Mapping


def show(*renderables: object) -> None:
    """Print tables and texts; as wide as the terminal, or 160 columns where there is none."""
    from rich.console import Console

    # No markup: names that people give and messages of errors may hold brackets.
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False)
    for each in renderables:
        console.print(each)


def as_json(value: object) -> str:
    """Indented, with Greek letters as they are."""
    return json.dumps(value, indent=2, ensure_ascii=False)


def stages(seconds: Mapping[str, float]) -> str:
    """Wall time by stage, on one line."""
    return ", ".join(f"{name} {spent:.2f}" for name, spent in seconds.items())
