"""Check the documentation against the code, or refresh its generated parts.

python tools/check_docs.py           links, commands, names and generated parts; exit code 1 if anything is wrong
python tools/check_docs.py --write   write the generated parts anew
"""

import ast
import csv
import dataclasses
import functools
import inspect
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

import expunge
from expunge.bench import compare, experiments
from expunge.bench.entries import entries
from expunge.bench.profiles import PROFILES
from expunge.bench.situations import FULL
from expunge.cli import COMMANDS
from expunge.definitions import METRICS, Definition
from expunge.methods import METHODS
from expunge.metrics.stats import paired, t_interval
from expunge.report import markdown
from expunge.report.summaries import label, summarise
from expunge.rows import read_rows
from expunge.space import Choice, Range

ROOT = Path(__file__).resolve().parent.parent
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
        return repr(value)
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
    return re.sub(r"[^\w\- ]", "", name.lower()).strip().replace(" ", "-")


def demo_table() -> str:
    """What the demo measured, from the rows it left."""
    rows = read_rows(ROOT / "results" / "demo_rows.csv")
    shown = [row for row in rows if row.metric in ("ΔFA", "ΔFE", "ΔFMIA", "NSKL", "Cost")]
    return markdown(shown, "removal")


def compared(scenario: str) -> str:
    """What the comparison measured in a scenario, or over all of them, from the rows it left."""
    rows = read_rows(ROOT / "results" / "compare_rows.csv")
    if scenario == compare.OVERVIEW:
        return markdown(compare.overview(rows), scenario)
    return markdown([row for row in rows if row.metric in compare.SHOWN[scenario]], scenario)


PAIRS = {  # that docs/compare.md speaks of
    "removal": (
        ("class-orthogonal-ascent", "reload"), ("class-orthogonal-ascent", "orthogonal-ascent"), ("reload", "original"),
        ("reload", "orthogonal-ascent"), ("reload", "control: random reset"), ("reload", "control: without ascent"),
    ),
    "class-removal": (
        ("orthogonal-ascent", "reload"), ("class-orthogonal-ascent", "reload"), ("eu-k", "reload"),
        ("control: random reset", "reload"), ("control: without ascent", "reload"),
    ),
}  # fmt: skip


def paired_table() -> str:
    """Who is closer to retraining than whom over the same seeds, from the rows of the comparison."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for row in compare.overview(read_rows(ROOT / "results" / "compare_rows.csv")):
        found.setdefault((row.metric, row.method), {})[row.seed] = row.value
    lines = ["| scenario | method | against | difference, floors | closer in | p |", "|---|---|---|--:|--:|--:|"]
    for scenario, pairs in PAIRS.items():
        for names in pairs:
            mine, other = (found[f"Δ {scenario}", name] for name in names)
            both = paired([mine[seed] for seed in mine], [other[seed] for seed in mine])
            closer = sum(mine[seed] < other[seed] for seed in mine)
            labels = " | ".join(map(label, names))
            cells = f"{both.difference:+.2f} | {closer} of {len(mine)} | {both.p:.2g}"
            lines.append(f"| {scenario.replace('-', ' ')} | {labels} | {cells} |")
    return "\n".join(lines)


def results() -> str:
    """What every experiment measured in each profile, from the rows that were kept of it."""
    parts = []
    for path in sorted((ROOT / "experiments").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "\ndef experiment(profile" not in text:
            continue
        title = (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]
        parts.append(f"## {path.stem}\n\n{title}")
        kept = [profile for profile in PROFILES if (ROOT / "results" / f"{path.stem}-{profile}.csv").exists()]
        parts += [_kept(path, profile) for profile in kept] or ["No rows are kept of it yet."]
    return "\n\n".join(parts)


def _kept(path: Path, profile: str) -> str:
    """The tables of the rows that were kept, and where they come from."""
    file = ROOT / "results" / f"{path.stem}-{profile}.csv"
    rows, experiment = read_rows(file), experiments.defined(path, profile)
    shown = experiments.table_rows(experiment, rows)
    made = json.loads(file.with_suffix(".env.json").read_text(encoding="utf-8"))
    tables = [markdown(shown, scenario).strip() for scenario in dict.fromkeys(row.scenario for row in rows)]
    if together := experiments.across(experiment, rows):
        tables.insert(0, markdown(together, experiments.ACROSS).strip())
    measured = next(row for row in rows if row.source == "measured")
    seeds = len({row.seed for row in rows})
    tables.append(
        f"Profile *{profile}*: {measured.model}; data: {measured.dataset}; {seeds} seeds; {made['processor']}, torch "
        f"{made['torch']}, {made['date']}; rows in `results/{file.name}`."
    )
    return "\n\n".join(tables)


def finding(name: str) -> str:
    """The figures that docs/findings.md speaks of, from the rows that were kept: mean ± sd over seeds."""
    kept = FINDINGS[name]
    rows = [row for row in read_rows(ROOT / "results" / f"{kept.rows_of}-cpu.csv") if kept.scenario in row.scenario]
    found = {(each.method, each.metric): f"{each.mean:.2f} ± {each.sd:.2f}" for each in summarise(rows)}
    listed = kept.methods or tuple(dict.fromkeys(method for method, _ in found))
    lines = [f"| method | {' | '.join(kept.metrics)} |", f"|---|{'--:|' * len(kept.metrics)}"]
    lines += [
        f"| {label(each)} | {' | '.join(found.get((each, metric), '') for metric in kept.metrics)} |" for each in listed
    ]
    return "\n".join(lines)


def by_scenario(name: str, metric: str) -> str:
    """One metric of an experiment in each of its scenarios."""
    rows = [row for row in read_rows(ROOT / "results" / f"{name}-cpu.csv") if row.metric == metric]
    scenarios = tuple(dict.fromkeys(row.scenario for row in rows))
    found = {(each.scenario, each.method): f"{each.mean:.1f} ± {each.sd:.1f}" for each in summarise(rows)}
    columns = [re.sub(".*, | of .*", "", scenario) for scenario in scenarios]
    lines = [f"| {metric} | {' | '.join(columns)} |", f"|---|{'--:|' * len(columns)}"]
    lines += [
        f"| {label(method)} | {' | '.join(found[scenario, method] for scenario in scenarios)} |"
        for method in dict.fromkeys(row.method for row in rows)
    ]
    return "\n".join(lines)


def frontier_table() -> str:
    """The grid of frontier.py: what a re-initialisation of the same size does, by who chooses and with which ascent."""
    rows = read_rows(ROOT / "results" / "frontier-cpu.csv")
    found = {(each.method, each.metric): each.mean for each in summarise(rows)}
    kinds = ("reload", "random reset", "without ascent")
    points = [method.split(", ", 1)[1] for method in dict.fromkeys(row.method for row in rows) if "reload," in method]
    metrics = {"NA": ".1f", "ΔFA": ".1f", "NSKL": ".2f"}
    head = " | ".join(f"{kind}: {metric}" for kind in kinds for metric in metrics)
    lines = [f"| setting | work | {head} |", f"|---|--:|{'--:|' * len(kinds) * len(metrics)}"]
    for point in points:
        cells = [format(found[f"{kind}, {point}", m], digits) for kind in kinds for m, digits in metrics.items()]
        lines.append(f"| {point} | {found[f'reload, {point}', 'Work']:.2f} | {' | '.join(cells)} |")
    pairs = [(kind, metric) for kind in kinds for metric in metrics]
    means = [statistics.mean(found[f"{kind}, {point}", metric] for point in points) for kind, metric in pairs]
    larger = [
        sum(found[f"{kind}, {point}", metric] > found[f"reload, {point}", metric] for point in points)
        for kind, metric in pairs
    ]
    digits = [metrics[metric] for _, metric in pairs]
    cells = [format(mean, each) for mean, each in zip(means, digits, strict=True)]
    lines.append(f"| mean of all {len(points)} | | {' | '.join(cells)} |")
    cells = ["" if kind == "reload" else str(each) for (kind, _), each in zip(pairs, larger, strict=True)]
    lines.append(f"| settings in which it is larger than RELOAD's | | {' | '.join(cells)} |")
    return "\n".join(lines)


def unfit() -> str:
    """Who takes no part in a scenario of the comparison, and why."""
    lines = ["| method | scenario | why not |", "|---|---|---|"]
    for name, entry in entries(FULL.budget).items():
        lines += [f"| `{name}` | {s.replace('-', ' ')} | {why} |" for s, why in entry.unfit.items()]
    return "\n".join(lines)


def ablation_table() -> str:
    """What RELOAD's options changed, from the rows their experiment left."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for row in read_rows(ROOT / "results" / "digits_ablation.csv"):
        found.setdefault(row.method, {}).setdefault(row.seed, {})[row.metric] = row.value
    lines = [
        "| setting | re-initialised | ΔFE | NSKL | ΔFE + NSKL | farther than the default |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, seeds in found.items():
        shares = [100 * each["reset share"] for each in seeds.values() if "reset share" in each]
        share = f"{min(shares):.0f} to {max(shares):.0f} %" if shares and max(shares) - min(shares) > 0.5 else ""
        share = share or (f"{shares[0]:.0f} %" if shares else "")
        columns = [[each["ΔFE"] for each in seeds.values()], [each["NSKL"] for each in seeds.values()]]
        columns.append([sum(pair) for pair in zip(*columns, strict=True)])
        cells = [f"{statistics.mean(column):.3f} ± {statistics.stdev(column):.3f}" for column in columns]
        apart = [
            own - sum(found["default"][seed][m] for m in ("ΔFE", "NSKL"))
            for seed, own in zip(seeds, columns[2], strict=True)
        ]
        cells.append(
            f"{statistics.mean(apart):+.3f} ± {statistics.stdev(apart) / len(apart) ** 0.5:.3f}" if any(apart) else ""
        )
        lines.append(f"| {name} | {share} | {' | '.join(cells)} |")
    return "Mean ± sample standard deviation over seeds, nats.\n\n" + "\n".join(lines)


def rehearsal_table() -> str:
    """What settings cost that were chosen without the forget set, from the lines their experiment left."""
    with (ROOT / "results" / "rehearsal_value.csv").open(newline="", encoding="utf-8") as file:
        stored = list(csv.DictReader(file))
    lines = [
        "| removed | settings from | ΔFE | NSKL | score | above the true forget set's | above the defaults' |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for scenario in dict.fromkeys(line["scenario"] for line in stored):
        mine = [line for line in stored if line["scenario"] == scenario]
        floor = {m: statistics.mean(float(line[f"floor {m}"]) for line in mine) for m in ("ΔFE", "NSKL")}
        scores: dict[str, dict[str, float]] = {}
        for line in mine:
            score = statistics.mean(float(line[m]) / floor[m] for m in floor)
            scores.setdefault(line["way"], {})[line["seed"]] = score
        for way, found in scores.items():
            means = [statistics.mean(float(line[m]) for line in mine if line["way"] == way) for m in floor]
            apart = [_apart(found, scores[other]) for other in ("true forget set", "defaults (no tuning)")]
            cells = [
                scenario,
                way,
                *(f"{mean:.3f}" for mean in means),
                f"{statistics.mean(found.values()):.2f}",
                *apart,
            ]
            lines.append(f"| {' | '.join(cells)} |")
        cells = [scenario, "(two retrained models)", *(f"{value:.3f}" for value in floor.values()), "1.00", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _apart(found: dict[str, float], other: dict[str, float]) -> str:
    """The mean difference over seeds, with its 95 % interval."""
    if found is other:
        return ""
    interval = t_interval(np.array([found[seed] - other[seed] for seed in found]))
    return f"{(interval.low + interval.high) / 2:+.2f} ({interval.low:+.2f} to {interval.high:+.2f})"


class Finding(NamedTuple):
    """Which part of an experiment's rows a page shows."""

    rows_of: str
    methods: tuple[str, ...]  # none: all
    metrics: tuple[str, ...]
    scenario: str = ""  # a part of its name


FINDINGS: dict[str, Finding] = {
    "table1": Finding(
        "table1",
        ("original", "retrain", "retrain again", "reload", "control: random reset", "control: without ascent",
         "control: recipe alone", "control: short retraining", "fine-tune", "l1-sparse", "orthogonal-ascent",
         "class-orthogonal-ascent", "duck", "amnesiac", "scrub", "salun"),
        ("NA", "FA", "ΔFA", "ΔFE", "ΔFMIA", "FSKL", "NSKL", "Work"),
    ),
    "table2": Finding(
        "table2_cifar10",
        ("original", "retrain", "retrain again", "reload", "control: random reset", "control: without ascent",
         "control: recipe alone", "control: short retraining", "fine-tune", "eu-k", "l1-sparse", "orthogonal-ascent",
         "class-orthogonal-ascent", "duck", "salun", "grda", "scrub"),
        ("NA", "TA", "ΔFA", "ΔFE", "ΔFMIA", "FSKL", "NSKL", "Work"),
    ),
    "backdoor": Finding(
        "table3",
        ("original", "retrain", "retrain again", "reload", "control: random reset", "control: without ascent",
         "control: recipe alone", "control: short retraining", "orthogonal-ascent", "class-orthogonal-ascent", "eu-k",
         "fine-tune", "cf-k",
         "l1-sparse", "ssd", "salun", "duck", "gar", "scrub"),
        ("NA", "TA", "TA with trigger", "Acc_corr", "FSKL", "NSKL", "Work"),
    ),
    "ablation": Finding(
        "ablation",
        ("reload", "selector=random", "selector=large-kv", "selector=large-ratio", "selector=large-gradient",
         "selector=ekfac", "selector=obs", "priming_lr=None", "priming_lr=63.0", "priming_lr=300.0",
         "priming_lr=1500.0", "reset_fraction=0.05", "reset_fraction=0.2", "reset_fraction=0.4", "reset_to=zero",
         "reset_to=normal", "published_code=normal-1d"),
        ("NA", "ΔFA", "ΔFE", "ΔFMIA", "FSKL", "NSKL"),
    ),
    "rehearsed": Finding(
        "rehearsed",
        tuple(f"{name}{how}" for name in ("orthogonal-ascent", "class-orthogonal-ascent", "reload")
              for how in ("", " (rehearsed blind)", " (defaults)")),
        ("NA", "TA", "ΔFA", "ΔFE", "ΔFMIA", "FSKL", "NSKL"),
    ),
    "frontier": Finding(
        "frontier",
        ("original", "retrain", "retrain again", *(f"short retraining, {e} epochs, lr 0.1" for e in (1, 2, 5)),
         *(f"fine-tune, {e} epochs, lr 0.1" for e in (1, 2, 5)), "ascent alone", "reset alone"),
        ("NA", "FA", "ΔFA", "ΔFE", "ΔFMIA", "FSKL", "NSKL", "Work"),
    ),
    "ascent": Finding("ascent", (), ("NA", "ΔFA", "ΔFE", "ΔFMIA", "FSKL", "NSKL")),
}  # fmt: skip
GENERATED: dict[str, Callable[[], str]] = {
    "compare-overview": lambda: compared(compare.OVERVIEW),
    "compare-removal": lambda: compared("removal"),
    "compare-class-removal": lambda: compared("class-removal"),
    "compare-label-correction": lambda: compared("label-correction"),
    "compare-unfit": unfit,
    "compare-paired": paired_table,
    "ablation": ablation_table,
    "results": results,
    **{f"finding:{name}": functools.partial(finding, name) for name in FINDINGS},
    "finding-frontier": frontier_table,
    "finding-by-share": functools.partial(by_scenario, "gamma", "TA with trigger"),
    "finding-sequence-left": functools.partial(by_scenario, "sequential", "NA"),
    "finding-sequence-removed": functools.partial(by_scenario, "sequential", "FA"),
    "rehearsal-value": rehearsal_table,
    "demo": demo_table,
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
                ast.parse(inspect.cleandoc(block))
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
