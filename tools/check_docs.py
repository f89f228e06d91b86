"""Check the documentation against the code, or refresh its generated parts.

python tools/check_docs.py           links, commands, names, generated parts and planted bugs; 1 if anything is wrong
python tools/check_docs.py --write   write the generated parts anew
"""

import ast
import dataclasses
import functools
import inspect
import re
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import expunge
from expunge.cli import COMMANDS
from expunge.definitions import METRICS, Definition
from expunge.methods import METHODS
from expunge.space import Choice, Range
from measured import MEASURED, ROOT

PAGES = sorted(p for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
_GENERATED = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def methods_table() -> str:
    """What every method may see."""
    lines = ["| method | sees the removed records | what it does |", "|---|---|---|"]
    for method in METHODS.values():
        sees = "no (blind)" if method.blind else "yes"
        lines.append(f"| [`{method.name}`](methods/{method.name}.md) | {sees} | {method.summary} |")
    return "\n".join(lines)


def method_part(name: str) -> str:
    """What the code says about a method: source, settings, search space, trace."""
    method = METHODS[name]
    words = (inspect.getdoc(inspect.getmodule(method.run)) or "").partition("\n\n")[2]
    about = (inspect.getdoc(method.config) or "").partition("\n\nRaises:")[0]
    does = (inspect.getdoc(method.run) or "").partition("\n\nRaises:")[0]
    settings = ["| setting | default | meaning |", "|---|---|---|"]
    comments = _comments(method.config)
    for setting in dataclasses.fields(method.config):
        required = setting.default is dataclasses.MISSING
        default = "required" if required else f"`{_default(setting.default)}`"
        settings.append(f"| `{setting.name}` | {default} | {comments.get(setting.name, '')} |")
    space = [f"`{setting}` {_values(values)}" for setting, values in method.space.items()]
    return "\n\n".join(
        (
            words,
            f"`unlearn(model, {method.access.__name__}(…), {method.config.__name__}(…), seed=0)`: {about}",
            "\n".join(settings),
            "A search tries " + ("; ".join(space) + "." if space else "nothing: the recipe is that of the original."),
            does,
        )
    )


def _default(value: object) -> str:
    """A default as it is written, a recipe by what differs from its own defaults."""
    if not dataclasses.is_dataclass(value):
        return f"{value:.3g}" if isinstance(value, float) and len(repr(value)) > 6 else repr(value)
    given = [
        f"{field.name}={getattr(value, field.name)!r}"
        for field in dataclasses.fields(value)
        if getattr(value, field.name) != field.default
    ]
    return f"{type(value).__name__}({', '.join(given)})"


def _values(values: Range | Choice) -> str:
    if isinstance(values, Choice):
        return " or ".join(map(str, values.options))
    return f"from {values.low:g} to {values.high:g}" + (" (log)" if values.log else "")


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
    return re.sub(r"[^\w\- ]|²", "", name.lower()).strip().replace(" ", "-")


GENERATED: dict[str, Callable[[], str]] = {
    **MEASURED,
    "methods-table": methods_table,
    "metrics-table": metrics_table,
    "metrics": metrics_list,
    **{f"method:{name}": functools.partial(method_part, name) for name in METHODS},
}
METHOD_HEADINGS = ("What it does", "Formula", "What it needs", "Cost", "When to use it", "When not", "From the code")


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
                ast.parse(textwrap.dedent(block))
            except SyntaxError as error:
                yield f"{name}: a Python block does not parse: {error}"
        for attribute in re.findall(r"\bexpunge\.([A-Za-z_]+)\b(?!\.py|/)", _code(text)):
            if not hasattr(expunge, attribute) and not find_spec(f"expunge.{attribute}"):
                yield f"{name}: there is no expunge.{attribute}"
    yield from _method_pages()
    api = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    yield from (f"docs/api.md does not name {name}" for name in expunge.__all__ if f"`{name}" not in api)
    defined = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    yield from (f"docs/metrics.md does not name {name}" for name in METRICS if name not in defined)


def _method_pages() -> Iterator[str]:
    """Every method has a page with the same headings and its generated part, and every such page a method."""
    folder = ROOT / "docs" / "methods"
    yield from (f"docs/methods/{page.name}: there is no such method" for page in _others(folder))
    for name in METHODS:
        page = folder / f"{name}.md"
        if not page.exists():
            yield f"docs/methods/{name}.md is missing: every method has a page; copy the headings of another"
            continue
        text = page.read_text(encoding="utf-8")
        found = tuple(re.findall(r"^## (.*)$", text, re.MULTILINE))
        if found != METHOD_HEADINGS:
            yield f"docs/methods/{name}.md: its headings are {list(found)}; they must be {list(METHOD_HEADINGS)}"
        parts = re.split(r"^## .*$", text, flags=re.MULTILINE)[1:]
        yield from (
            f"docs/methods/{name}.md: nothing is written under {heading!r}"
            for heading, part in zip(found, parts, strict=True)
            if not part.strip()
        )
        if f"<!-- generated: method:{name} -->" not in text:
            yield f"docs/methods/{name}.md: add <!-- generated: method:{name} --> and <!-- end -->"


def _others(folder: Path) -> list[Path]:
    return sorted(page for page in folder.glob("*.md") if page.stem not in METHODS)


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


def _planted_bugs() -> Iterator[str]:
    """Code that `mutants.py` would change is there, once, and so are the tests that should see it."""
    for bug in tomllib.loads((ROOT / "tools" / "mutants.toml").read_text(encoding="utf-8"))["mutant"]:
        where = f"tools/mutants.toml: {bug['name']!r}"
        times = (ROOT / "src" / "expunge" / bug["file"]).read_text(encoding="utf-8").count(bug["old"])
        if times != 1:
            yield f"{where}: its code is in {bug['file']} {times} times"
        for test in bug["tests"].split():
            file, _, function = test.partition("::")
            path = ROOT / "tests" / file
            if not path.exists() or f"def {function}" not in path.read_text(encoding="utf-8"):
                yield f"{where}: there is no {test}"


def main(arguments: list[str]) -> int:
    """Check or write; the exit code says whether all is well."""
    if arguments == ["--write"]:
        for page in PAGES:
            text = page.read_text(encoding="utf-8")
            page.write_text(refreshed(text), encoding="utf-8")
    found = [*problems(), *_planted_bugs()]
    print("\n".join(found) or f"{len(PAGES)} pages agree with the code.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
