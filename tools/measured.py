"""The parts of the documentation that say what was measured: tables from the rows in results/."""

import ast
import csv
import functools
import itertools
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from expunge.bench import compare, experiments
from expunge.bench.entries import entries
from expunge.bench.profiles import PROFILES
from expunge.bench.situations import FULL
from expunge.metrics.stats import paired, t_interval
from expunge.report import markdown
from expunge.report.summaries import label, summarise
from expunge.rows import read_rows

ROOT = Path(__file__).resolve().parent.parent


def demo_table() -> str:
    """What the demo measured, from the rows it left."""
    rows = read_rows(ROOT / "results" / "demo_rows.csv")
    return markdown(rows, "removal", ("ΔFA", "ΔFE", "ΔFMIA", "NSKL", "Cost"))


def compared(scenario: str) -> str:
    """What the comparison measured in a scenario, or over all of them, from the rows it left."""
    rows = read_rows(ROOT / "results" / "compare_rows.csv")
    if scenario == compare.OVERVIEW:
        return markdown(compare.overview(rows), scenario)
    return markdown(rows, scenario, compare.SHOWN[scenario])


PAIRS = {  # that docs/compare.md speaks of
    "removal": (
        ("class-orthogonal-ascent", "reload"), ("class-orthogonal-ascent", "orthogonal-ascent"),
        ("natural-ascent", "reload"), ("natural-ascent", "class-orthogonal-ascent"), ("reload", "original"),
        ("reload", "orthogonal-ascent"), ("reload", "control: random reset"), ("reload", "control: without ascent"),
    ),
    "class-removal": (
        ("natural-ascent", "reload"), ("natural-ascent", "orthogonal-ascent"),
        ("natural-ascent", "class-orthogonal-ascent"), ("natural-ascent", "eu-k"),
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
    made = json.loads(file.with_suffix(".env.json").read_text(encoding="utf-8"))
    found = sorted(experiments.shown(experiment, rows), key=lambda table: table.scenario != experiments.ACROSS)
    tables = [markdown(*table).strip() for table in found]
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
    words = re.compile(rf"(?<![\w-]){re.escape(kept.scenario)}(?![\w-])")  # "class" is not "in-class"
    every = read_rows(ROOT / "results" / f"{kept.rows_of}-cpu.csv")
    rows = [row for row in every if words.search(row.scenario)]
    found = {(each.method, each.metric): f"{each.mean:.2f} ± {each.sd:.2f}" for each in summarise(rows)}
    listed = kept.methods or tuple(dict.fromkeys(method for method, _ in found))
    lines = [f"| method | {' | '.join(kept.metrics)} |", f"|---|{'--:|' * len(kept.metrics)}"]
    lines += [
        f"| {label(each)} | {' | '.join(found.get((each, metric), '') for metric in kept.metrics)} |" for each in listed
    ]
    return "\n".join(lines)


def by_scenario(name: str, metric: str, decimals: int = 1) -> str:
    """One metric of an experiment in each of its scenarios."""
    rows = [row for row in read_rows(ROOT / "results" / f"{name}-cpu.csv") if row.metric == metric]
    scenarios = tuple(dict.fromkeys(row.scenario for row in rows))
    found = {
        (each.scenario, each.method): f"{each.mean:.{decimals}f} ± {each.sd:.{decimals}f}" for each in summarise(rows)
    }
    columns = list(map(_brief, scenarios))
    lines = [f"| {metric} | {' | '.join(columns)} |", f"|---|{'--:|' * len(columns)}"]
    lines += [
        f"| {label(method)} | {' | '.join(found[scenario, method] for scenario in scenarios)} |"
        for method in dict.fromkeys(row.method for row in rows)
    ]
    return "\n".join(lines)


def _brief(scenario: str) -> str:
    """A scenario beside others that have something in common with it, which is left out."""
    return re.sub(".* (corrected|removed), | of .*|,? corrected$", "", scenario)


def fault_gradients_table() -> str:
    """Whose gradients the difference after a correction is made of."""
    found: dict[tuple[str, str], list[list[float]]] = {}
    with (ROOT / "results" / "fault_gradients.csv").open(newline="", encoding="utf-8") as file:
        for scenario, _, loss, *numbers in itertools.islice(csv.reader(file), 1, None):
            found.setdefault((scenario, loss), []).append([float(number) for number in numbers])
    lines = [
        "| faults | cached loss | ‖faults‖ | ‖corrections‖ | cosine with faults | with what is left, reversed |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for (scenario, loss), seeds in found.items():
        faults, corrections, along, against = map(statistics.mean, zip(*seeds, strict=True))
        sizes = f"{faults:,.0f} | {corrections:,.0f} | {along:.2f}"
        lines.append(f"| {_brief(scenario)} | {loss} | {sizes} | {against:.5f} |")
    return "\n".join(lines)


def natural_steps_table() -> str:
    """What three steps of natural ascent left of each removal, less what retraining leaves."""
    found: dict[tuple[str, str], list[list[float]]] = {}
    with (ROOT / "results" / "natural_steps.csv").open(newline="", encoding="utf-8") as file:
        for scenario, seed, *numbers in itertools.islice(csv.reader(file), 1, None):
            found.setdefault((scenario, seed), []).append([float(number) for number in numbers])
    lines = [
        "| removal | seed | information | steps | FA less retraining's, points | FE less retraining's, nats |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for (scenario, seed), tried in found.items():
        share, steps, _, accuracies, losses, truly, loss = zip(*tried, strict=True)
        cells = (
            f"{share[0]:.3f}",
            ", ".join(f"{step:.3f}" for step in steps),
            ", ".join(f"{own - other:+.0f}" for own, other in zip(accuracies, truly, strict=True)),
            ", ".join(f"{own - other:+.1f}" for own, other in zip(losses, loss, strict=True)),
        )
        lines.append(f"| {scenario} | {seed} | {' | '.join(cells)} |")
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


def classes_table() -> str:
    """How many removed records a cache puts into the right class: mean, least and most over seeds."""
    with (ROOT / "results" / "removed_classes.csv").open(newline="", encoding="utf-8") as file:
        stored = list(csv.DictReader(file))
    groups: dict[tuple[str, str], dict[str, list[dict[str, str]]]] = {}
    for line in stored:
        groups.setdefault((line["dataset"], line["removal"]), {}).setdefault(line["loss"], []).append(line)
    losses = tuple(dict.fromkeys(line["loss"] for line in stored))
    heads = [f"{what} ({loss})" for loss in losses for what in ("placed", "unexplained")]
    lines = [f"| data | removed | by shares of what is left | {' | '.join(heads)} |", f"|---|---|{'--:|' * 5}"]
    for (dataset, removal), of in groups.items():
        cells = [f"{statistics.mean(float(line['by_chance']) for line in of[losses[0]]):.2f}"]
        for loss in losses:
            for what in ("placed", "unexplained"):
                found = [float(line[what]) for line in of[loss]]
                cells.append(f"{statistics.mean(found):.2f} ({min(found):.2f} to {max(found):.2f})")
        lines.append(f"| {dataset} | {removal} | {' | '.join(cells)} |")
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
         "class-orthogonal-ascent", "natural-ascent", "duck", "amnesiac", "scrub", "salun"),
        ("NA", "FA", "ΔFA", "ΔFE", "ΔFMIA", "FSKL", "NSKL", "Work"),
    ),
    "table2": Finding(
        "table2_cifar10",
        ("original", "retrain", "retrain again", "reload", "control: random reset", "control: without ascent",
         "control: recipe alone", "control: short retraining", "fine-tune", "eu-k", "l1-sparse", "orthogonal-ascent",
         "class-orthogonal-ascent", "natural-ascent", "duck", "salun", "amnesiac", "grda", "scrub"),
        ("NA", "TA", "ΔFA", "ΔFE", "ΔFMIA", "FSKL", "NSKL", "Work"),
    ),
    "backdoor": Finding(
        "table3",
        ("original", "retrain", "retrain again", "reload", "control: random reset", "control: without ascent",
         "control: recipe alone", "control: short retraining", "orthogonal-ascent", "class-orthogonal-ascent",
         "natural-ascent", "eu-k", "fine-tune", "cf-k", "l1-sparse", "ssd", "salun", "duck", "gar", "scrub"),
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
    **{f"rehearsed-{kind}": Finding(
        "rehearsed",
        ("retrain again",
         *(f"{name}{how}" for name in ("natural-ascent", "class-orthogonal-ascent", "reload")
           for how in ("", " (rehearsed blind)", " (defaults)"))),
        ("NA", "TA", "ΔFA", "ΔFE", "ΔFMIA", "FSKL", "NSKL"),
        scenario=kind,
    ) for kind in ("random", "in-class")},
    **{f"natural-{kind}": Finding(
        "natural", (), ("NA", "TA", "FA", "ΔFA", "ΔFE", "ΔFMIA", "ΔAUC", "FSKL", "NSKL", "Work", "Cost"), scenario=kind,
    ) for kind in ("random", "in-class")},
    "natural-backdoor": Finding(
        "natural", (), ("NA", "TA", "TA with trigger", "Acc_corr", "FSKL", "NSKL", "Work", "Cost"), scenario="backdoor"
    ),
    **{f"grid-{kind}": Finding(
        "grid", (), ("NA", "TA", "FA", "ΔFA", "ΔFE", "ΔFMIA", "FSKL", "NSKL", "Work"), scenario=scenario,
    ) for kind, scenario in (
        ("class", "class"), ("quarter", "in-class 25"), ("half", "in-class 50"), ("neighbours", "neighbours"),
    )},
    **{f"labels-{kind}": Finding(
        "labels", (), ("NA", "TA", "Accuracy on corrected", "FSKL", "NSKL", "Work", "Cost"), scenario=kind,
    ) for kind in ("random", "flipped")},
    "frontier": Finding(
        "frontier",
        ("original", "retrain", "retrain again", *(f"short retraining, {e} epochs, lr 0.1" for e in (1, 2, 5)),
         *(f"fine-tune, {e} epochs, lr 0.1" for e in (1, 2, 5)), "ascent alone", "reset alone"),
        ("NA", "FA", "ΔFA", "ΔFE", "ΔFMIA", "FSKL", "NSKL", "Work"),
    ),
    "ascent": Finding("ascent", (), ("NA", "ΔFA", "ΔFE", "ΔFMIA", "FSKL", "NSKL")),
}  # fmt: skip
MEASURED: dict[str, Callable[[], str]] = {
    "compare-overview": lambda: compared(compare.OVERVIEW),
    "compare-removal": lambda: compared("removal"),
    "compare-class-removal": lambda: compared("class-removal"),
    "compare-label-correction": lambda: compared("label-correction"),
    "compare-unfit": unfit,
    "compare-paired": paired_table,
    "ablation": ablation_table,
    "results": results,
    **{
        f"finding-corrections-{kind}": functools.partial(by_scenario, "corrections", metric, decimals)
        for kind, metric, decimals in (
            ("trigger", "TA with trigger", 1),
            ("test", "TA", 1),
            ("faults", "FSKL", 2),
            ("left", "NSKL", 2),
        )
    },
    "finding-fault-gradients": fault_gradients_table,
    "finding-natural-steps": natural_steps_table,
    **{f"finding:{name}": functools.partial(finding, name) for name in FINDINGS},
    "finding-frontier": frontier_table,
    "finding-by-share": functools.partial(by_scenario, "gamma", "TA with trigger"),
    "finding-amounts-removed": functools.partial(by_scenario, "amounts", "FA"),
    "finding-amounts-loss": functools.partial(by_scenario, "amounts", "ΔFE"),
    "finding-amounts-attack": functools.partial(by_scenario, "amounts", "ΔFMIA", 2),
    "finding-amounts-left": functools.partial(by_scenario, "amounts", "NSKL", 2),
    **{
        f"finding-transfer-{what}": functools.partial(by_scenario, "transfer", metric, decimals)
        for what, metric, decimals in (("removed", "FA", 1), ("loss", "ΔFE", 2), ("left", "NA", 1), ("test", "TA", 1))
    },
    "finding-sequence-left": functools.partial(by_scenario, "sequential", "NA"),
    "finding-sequence-removed": functools.partial(by_scenario, "sequential", "FA"),
    "rehearsal-value": rehearsal_table,
    "removed-classes": classes_table,
    "demo": demo_table,
}
