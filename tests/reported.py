"""Rows and what else a run stores, to report on, and a reader of the pages."""

import re
from html.parser import HTMLParser

from expunge.report.stored import Loss, Point, Reset
from expunge.rows import Row

VOID = {"meta", "br", "link", "img", "hr", "input"}

# By method: ΔFA over three seeds, FA over three seeds, cost.
REMOVAL = {
    "original": ((6.0, 6.0, 9.0), (100.0, 100.0, 100.0), None),
    "reload": ((1.0, 2.0, 6.0), (93.0, 92.0, 97.0), 0.25),
    "retrain": (None, (94.0, 94.0, 91.0), 1.0),
    "gradient-ascent": ((94.0, 90.0, 91.0), (0.0, 4.0, 0.0), 0.0001),
    "retrain again": ((2.0, 4.0, 6.0), (92.0, 98.0, 97.0), 1.0),
}


def row(method, seed, metric, value, unit="%", split="forget", scenario="removal", **changes):
    known = {"run": "r", "experiment": "demo", "dataset": "<digits>", "model": "net", "n": 20, "seconds": 0.0}
    blind = method != "gradient-ascent"
    return Row(
        **(known | changes), scenario=scenario, method=method, blind=blind, seed=seed, split=split, metric=metric,
        value=value, unit=unit,
    )  # fmt: skip


def some_rows():
    rows = []
    for method, (gaps, own, cost) in REMOVAL.items():
        for seed in range(3):
            rows.append(row(method, seed, "FA", own[seed]))
            rows.append(row(method, seed, "TA", 90.0, split="test", n=1597))
            if gaps:
                rows.append(row(method, seed, "ΔFA", gaps[seed], "points"))
            if cost:
                rows.append(row(method, seed, "Cost", cost, "ratio", split="", n=1))
    for method, value in {"original": 10.0, "retrain": 100.0, "retrain again": 98.0, "reload": 95.0}.items():
        rows += [row(method, s, "Accuracy on corrected", value, scenario="label-correction") for s in range(3)]
    return rows


def clear_rows():
    """Eight seeds: a method at retraining, one far from it, and an original that NSKL cannot tell from retraining."""
    rows = []
    for seed in range(8):
        base = 80.0 + seed
        floor = (3.0, -3.0, 5.0, -5.0, 4.0, -4.0, 2.0, -2.0)[seed]
        for method, gap in {"original": 18.0 - seed / 4, "reload": floor / 2, "fine-tune": 12.0 + floor}.items():
            rows.append(row(method, seed, "FA", base + gap))
            rows.append(row(method, seed, "ΔFA", abs(gap), "points"))
        rows += [row("retrain", seed, "FA", base), row("retrain again", seed, "FA", base + floor)]
        rows.append(row("retrain again", seed, "ΔFA", abs(floor), "points"))
        for method, gap in {"original": 0.01, "reload": 0.02, "fine-tune": 0.3, "retrain again": 0.05}.items():
            rows.append(row(method, seed, "NSKL", gap * (1 + seed / 50), "nats", split="retain"))
    return rows


def some_points():
    """Two seeds; the second ends an epoch early. Nothing moves at "difference" and "select"."""
    for seed in (0, 1):
        for moment, step, loss in (
            ("original", 0, 0.01),
            ("difference", 0, 0.01),
            ("ascend", 0, 0.1),
            ("select", 0, 0.1),
            ("re-initialise", 0, 4.0),
            ("epoch 1", 6, 0.5),
            ("epoch 2", 12, 0.25),
        ):
            if seed == 0 or step < 12:
                for split in ("retain", "forget", "test"):
                    yield Point("removal", "reload", seed, moment, step, split, loss)


def some_losses():
    """Apart for the original, half in common for reload, the same for retrain."""
    spread = {"original": (0.001, 1.0), "reload": (0.1, 1.0), "retrain": (1.0, 1.0)}
    for method, (low, high) in spread.items():
        for seed in (0, 1):
            forget = [low, high] if method == "reload" else [low, low]
            yield from (Loss("removal", method, seed, "forget", loss) for loss in forget)
            yield from (Loss("removal", method, seed, "test", loss) for loss in (high, high))


RESETS = [
    Reset("removal", "reload", 0, "conv.weight", 0.2, 90),
    Reset("removal", "reload", 0, "head.weight", 0.5, 10),
    Reset("removal", "reload", 1, "conv.weight", 0.4, 90),
    Reset("removal", "reload", 1, "head.weight", 0.7, 10),
]


class Page(HTMLParser):
    """Checks that tags are balanced while it collects what tests ask for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.cells, self.titles = [], [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found[name] for name in ("href", "src") if name in found]
        self.links += [f"#{found[name]}" for name in ("aria-labelledby",) if name in found]
        self.links += re.findall(r"url\(([^)]*)\)", found.get("clip-path", ""))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")
        if tag == "th":
            assert found["scope"] in ("row", "col", "rowgroup")
        if tag == "svg":
            assert found["role"] == "img"
            self.titles.append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data
        if self.open[-2:] == ["svg", "title"]:
            self.titles[-1] += data
