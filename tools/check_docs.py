"""Check the documentation against the code, or refresh its generated parts.

python tools/check_docs.py           links, commands, names and generated parts; exit code 1 if anything is wrong
python tools/check_docs.py --write   write the generated parts anew
"""

import ast
import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import expunge
from expunge.cli import COMMANDS
from expunge.definitions import METRICS, Definition
from expunge.methods import METHODS, Method
from expunge.report import markdown
from expunge.rows import read_rows

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(p for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
_GENERATED = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def methods_table() -> str:
    """What every method may see."""
    lines = ["| method | sees the removed records | what it does |", "|---|---|---|"]
    for method in METHODS.values():
        sees = "no (blind)" if method.blind else "yes"
        lines.append(f"| [`{method.name}`](#{method.name}) | {sees} | {method.summary} |")
    return "\n".join(lines)


def method_sections() -> str:
    """Each method's own words, and its settings."""
    return "\n\n".join(_section(method) for method in METHODS.values())


def _section(method: Method) -> str:
    words = inspect.getdoc(inspect.getmodule(method.run)) or ""
    settings = ["| setting | default | meaning |", "|---|---|---|"]
    comments = _comments(method.config)
    for setting in dataclasses.fields(method.config):
        required = setting.default is dataclasses.MISSING
        default = "required" if required else f"`{setting.default!r}`"
        settings.append(f"| `{setting.name}` | {default} | {comments.get(setting.name, '')} |")
    about = inspect.getdoc(method.config) or ""
    return f"## {method.name}\n\n{words}\n\n`{method.config.__name__}`: {about}\n\n" + "\n".join(settings)


def _comments(config: type[object]) -> dict[str, str]:
    """The comment behind each field of a dataclass."""
    found = re.findall(r"^    (\w+): [^#\n]*  # (.*)$", inspect.getsource(config), re.MULTILINE)
    return {name: comment.replace("|", "\\|") for name, comment in found}


def metrics_table() -> str:
    """Every metric on a line."""
    lines = ["| name | what it is | unit | good |", "|---|---|---|---|"]
    for name, each in METRICS.items():
        words = {"high": "high", "low": "low", "close": "as retrained", "unknown": "neither"}[each.good]
        lines.append(f"| [{name}](#{_heading(name)}) | {each.name} | {each.unit} | {words} |")
    return "\n".join(lines)


def metrics_list() -> str:
    """Every metric in full."""
    kinds = {"value": "Of a model by itself", "distance": "Distances to retraining", "cost": "Cost"}
    parts = []
    for kind, title in kinds.items():
        chosen = {name: each for name, each in METRICS.items() if each.kind == kind}
        if kind != "cost":
            parts.append(f"## {title}")
        parts += [_metric(name, each) for name, each in chosen.items()]
    return "\n\n".join(parts)


def _metric(name: str, each: Definition) -> str:
    direction = f" Direction: {each.direction}." if each.direction else ""
    return (
        f"### {name}\n\n{each.text}\n\nFormula: {each.formula}. Unit: {each.unit}.{direction} Perfect: {each.perfect}. "
        f"Misses: {each.misses}. Source: {each.source}." + (f"\n\n`{each.function}`" if each.function else "")
    )


def _heading(name: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", name.lower()).strip().replace(" ", "-")


def demo_table() -> str:
    """What the demo measured, from the rows it left."""
    rows = read_rows(ROOT / "results" / "demo_rows.csv")
    shown = [row for row in rows if row.metric in ("ΔFA", "ΔFE", "ΔFMIA", "NSKL", "Cost")]
    return markdown(shown, "removal")


GENERATED = {
    "demo": demo_table,
    "methods-table": methods_table,
    "methods": method_sections,
    "metrics-table": metrics_table,
    "metrics": metrics_list,
}


def refreshed(text: str) -> str:
    """A page with its generated parts as they should be."""
    return _GENERATED.sub(lambda found: f"{found[1]}{GENERATED[found[2]]()}\n{found[3]}", text)


def problems() -> Iterator[str]:
    """Everything that is wrong, a line each."""
    for page in PAGES:
        text, name = page.read_text(encoding="utf-8"), page.relative_to(ROOT)
        if refreshed(text) != text:
            yield f"{name}: a generated part is out of date; run tools/check_docs.py --write"
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            yield from (f"{name}: {problem}" for problem in _broken(page, target))
        for command in re.findall(r"^\$? ?expunge (\w+)", text, re.MULTILINE):
            if command not in COMMANDS:
                yield f"{name}: there is no command `expunge {command}`"
        for target in re.findall(r"`?make (\w+)`?", text):
            if not re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE):
                yield f"{name}: there is no target `make {target}`"
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            try:
                ast.parse(inspect.cleandoc(block))
            except SyntaxError as error:
                yield f"{name}: a Python block does not parse: {error}"
        for attribute in re.findall(r"\bexpunge\.([A-Za-z_]+)\b(?!\.py|/)", _code(text)):
            if not hasattr(expunge, attribute):
                yield f"{name}: there is no expunge.{attribute}"
    api = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    yield from (f"docs/api.md does not name {name}" for name in expunge.__all__ if f"`{name}" not in api)
    defined = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    yield from (f"docs/metrics.md does not name {name}" for name in METRICS if name not in defined)


def _code(text: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


def _broken(page: Path, target: str) -> Iterator[str]:
    if target.startswith(("https://", "http://", "mailto:")):
        return
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.exists():
        yield f"link to {target}, which does not exist"
    elif anchor and file.suffix == ".md":
        headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
        if anchor not in map(_heading, headings):
            yield f"link to {target}: no such heading"


def main(arguments: list[str]) -> int:
    """Check or write; the exit code says whether all is well."""
    if arguments == ["--write"]:
        for page in PAGES:
            text = page.read_text(encoding="utf-8")
            page.write_text(refreshed(text), encoding="utf-8")
    found = list(problems())
    print("\n".join(found) or f"{len(PAGES)} pages agree with the code.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
