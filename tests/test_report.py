import csv
import io
import json
import math
import re
import statistics
import sys
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from rich.console import Console
from scipy import stats as scipy_stats
from sklearn.metrics import roc_curve

import expunge.report
from expunge.errors import ConfigError, MissingExtra
from expunge.metrics import stats
from expunge.report import (
    comparison,
    latex_table,
    markdown,
    rich_tables,
    summarise,
    tables,
    write_page,
    write_table,
)
from expunge.report.attack import roc, true_positives
from expunge.report.curves import steps
from expunge.report.figures import distances, histograms, resets
from expunge.report.html import linked
from expunge.report.overview import findings, sentences, sizes
from expunge.report.stored import Fact, Loss, Point, Reset
from expunge.report.summaries import number
from expunge.report.tradeoff import tradeoff
from expunge.report.verdicts import verdicts
from expunge.rows import EVALUATION, Row, write_csv, write_rows

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


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"reload": {"reset_fraction": 0.3, "codes": []}}))
    (tmp_path / "env.json").write_text(json.dumps({"torch": "2.13.0", "date": "2026-01-02"}))
    write_rows(tmp_path / "rows.csv", some_rows())
    facts = [Fact("removal", "reload", seed, "stopped", f"loss 0.0{seed} reached") for seed in (1, 2)]
    for name, lines in {"curves": some_points(), "reset": RESETS, "losses": some_losses(), "facts": facts}.items():
        dicts = [vars(line) for line in lines]
        write_csv(tmp_path / f"{name}.csv", list(dicts[0]), [list(line.values()) for line in dicts])
    return tmp_path


def only_header(path):
    path.write_text(path.read_text().splitlines(keepends=True)[0])


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


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_mean_sample_sd_and_interval_by_hand():
    found = {(s.method, s.metric): s for s in summarise(some_rows())}
    gap = found["reload", "ΔFA"]
    assert gap.values == (1.0, 2.0, 6.0)
    assert gap.mean == 3.0
    assert gap.sd == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    low, high = scipy_stats.t.interval(0.95, 2, loc=3.0, scale=math.sqrt(7 / 3))
    assert low < 0
    assert gap.interval == pytest.approx((0.0, high))  # a distance ends at 0
    own = found["reload", "FA"]
    low, high = scipy_stats.t.interval(0.95, 2, loc=94.0, scale=scipy_stats.sem(own.values))
    assert high > 100
    assert own.interval == pytest.approx((low, 100.0))  # and a share at 100 %
    far = replace(own, values=(93.0, 92.0, 101.0))
    assert far.interval[1] == pytest.approx(scipy_stats.t.interval(0.95, 2, 286 / 3, scipy_stats.sem(far.values))[1])


def test_markdown_shows_reference_then_floor_and_delta_last():
    distance, own = markdown(some_rows(), "removal").split("\n\n**What each model does.**")
    assert distance.splitlines()[2:] == [
        "| method                     | blind | ΔFA (points ↓) | Cost (ratio ↓) |",
        "| -------------------------- | ----- | -------------: | -------------: |",
        "| original                   | \N{EN DASH}     |    7.00 ± 1.73 |                |",
        "| RELOAD                     | yes   |    3.00 ± 2.65 |  0.250 ± 0.000 |",
        "| retrain (reference)        | yes   |                |  1.000 ± 0.000 |",
        "| noise floor (two retrains) | yes   |    4.00 ± 2.00 |  1.000 ± 0.000 |",
        "| gradient ascent            | no    | 91.67 ± 2.08 > | <0.001 ± 0.000 |",
        "| δ                          |       |           8.47 |                |",
    ]
    assert "over 3 seeds" in distance
    assert "Bold: indistinguishable from retraining within δ; >: further from it than δ" in distance
    assert "FA (% ≈)" in own


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


def test_verdicts_are_those_of_the_statistics_called_directly():
    found = {(s.method, s.metric): s for s in summarise(clear_rows())}
    judged = verdicts(found.values())
    methods, tests = ("original", "reload", "fine-tune"), {}
    deltas = {
        "ΔFA": stats.floor_margin(found["retrain again", "ΔFA"].values, shape="gap").delta,
        "NSKL": stats.floor_margin(found["retrain again", "NSKL"].values, shape="divergence").delta,
    }
    for method in methods:
        signed = [a - b for a, b in zip(found[method, "FA"].values, found["retrain", "FA"].values, strict=True)]
        tests[method, "ΔFA"] = stats.equivalence(signed, deltas["ΔFA"]).p
        tests[method, "NSKL"] = stats.non_inferiority(found[method, "NSKL"].values, deltas["NSKL"]).p
    adjusted = dict(zip(tests, stats.holm(list(tests.values())), strict=True))
    assert {key: verdict.p for key, verdict in judged.items()} == pytest.approx(adjusted)
    assert {key: verdict.margin for key, verdict in judged.items()} == {key: deltas[key[1]] for key in tests}
    assert {key: verdict.state for key, verdict in judged.items()} == {
        ("original", "ΔFA"): "beyond",
        ("reload", "ΔFA"): "within",
        ("fine-tune", "ΔFA"): "beyond",
        ("original", "NSKL"): "within",
        ("reload", "NSKL"): "within",
        ("fine-tune", "NSKL"): "beyond",
    }


def test_beyond_is_the_t_test_of_scipy_turned_round():
    found = {(s.method, s.metric): s for s in summarise(clear_rows())}
    nearly = replace(found["fine-tune", "NSKL"], values=tuple(0.062 + 0.01 * (k % 4) for k in range(8)))
    delta = stats.floor_margin(found["retrain again", "NSKL"].values, shape="divergence").delta
    p = scipy_stats.ttest_1samp(nearly.values, delta, alternative="greater").pvalue
    for factor, state in ((1, "beyond"), (math.ceil(0.05 / p) + 1, "open")):  # as many equal tests are corrected for
        many = [replace(nearly, method=f"m{number}") for number in range(factor)]
        judged = verdicts([found["retrain again", "NSKL"], *many])
        assert {verdict.state for verdict in judged.values()} == {state}


def test_a_metric_on_which_the_original_is_as_close_is_named():
    (table, _) = tables(clear_rows(), "removal")
    assert "On NSKL even the original is within δ" in table.marked
    marks = {line.method: [cell.mark for cell in line.cells] for line in table.lines if line.method != "retrain"}
    assert marks["reload"] == ["within", "within"]
    assert marks["fine-tune"] == ["beyond", "beyond"]
    assert marks["retrain again"] == ["", ""]


@pytest.mark.parametrize("values", [(0.0, 0.0, 0.0), (1.0,), (math.nan, 1.0, 2.0)])
def test_there_is_no_verdict_without_a_spread_of_finite_distances(values):
    rows = [row("retrain again", seed, "ΔFA", value, "points") for seed, value in enumerate(values)]
    rows += [row("reload", seed, "ΔFA", 1.0, "points") for seed in range(3)]
    assert verdicts(summarise(rows)) == {}
    assert tables(rows, "removal")[0].margins == ()


def test_methods_are_compared_by_paired_tests_of_scipy():
    table = comparison(clear_rows(), "removal", "reload")
    assert [line.label for line in table.lines] == ["\N{MINUS SIGN} original", "\N{MINUS SIGN} fine-tune"]
    found = {(s.method, s.metric): s for s in summarise(clear_rows())}
    ours, theirs = found["reload", "ΔFA"].values, found["fine-tune", "ΔFA"].values
    expected = scipy_stats.ttest_rel(ours, theirs)
    cell = table.lines[1].cells[0]
    assert cell.mean == f"{statistics.fmean(ours) - statistics.fmean(theirs):.2f}"
    low, high = expected.confidence_interval(0.95)
    assert cell.interval == f"{low:.2f} to {high:.2f}"
    assert cell.mark == "differs"
    assert "Holm" in table.marked
    assert comparison([row("reload", 0, "ΔFA", 1.0, "points")], "removal", "reload") is None


def test_a_figure_of_a_paper_stands_beside_the_measured_one():
    rows = some_rows()
    rows.append(row("reload", 0, "ΔFA", 0.3, "points", source="paper, Table 1", dataset="CIFAR-100", model="ResNet-18"))
    rows.append(row("ssd", 0, "ΔFA", 74.2, "points", source="paper, Table 1", dataset="CIFAR-100"))
    rows.append(row("reload", 0, "ΔFA", 5.0, "points", scenario="other", source="paper, Table 2"))
    (distance, _) = tables(rows, "removal")
    papers = {line.method: line.cells[0].paper for line in distance.lines if line.cells[0]}
    assert papers == {"original": "", "reload": "0.30", "retrain again": "", "gradient-ascent": ""}
    assert distance.source == "In italics, as printed: paper, Table 1 (CIFAR-100, ResNet-18)."
    assert "3.00 ± 2.65 _0.30_" in markdown(rows, "removal")
    assert r"\emph{0.30}" in latex_table(distance, "t")
    fraction = row("reload", 0, "ΔFA", 7.39, "%", source="paper, Table 1")
    assert tables([*some_rows(), fraction], "removal")[0].lines[1].cells[0].paper == "7.39 %"


def test_unequal_seeds_one_seed_and_rows_of_a_paper():
    rows = [row("reload", 0, "FA", 90.0), row("reload", 0, "FA", 1.0, source="paper, Table 3")]
    (table,) = tables(rows, "removal")
    assert str(table.lines[0].cells[0]) == "90.00"
    assert table.note.startswith("Mean over 1 seed;")
    more = [*rows, row("retrain", 0, "FA", 90.0), row("retrain", 1, "FA", 92.0)]
    assert "over 1 to 2 seeds" in tables(more, "removal")[0].note


def test_two_values_for_a_seed_and_an_unknown_scenario_are_refused():
    with pytest.raises(
        ConfigError, match=r"removal: reload has two values of FA for seed 0\. Give the rows of one run"
    ):
        summarise([row("reload", 0, "FA", 90.0), row("reload", 0, "FA", 91.0)])
    with pytest.raises(ConfigError, match="no measured row has scenario='other'"):
        markdown(some_rows(), "other")


def test_numbers_have_the_decimals_of_their_unit():
    cases = {(12.345, "%"): "12.35", (100.0, "%"): "100.00", (0.12345, "nats"): "0.123", (623.8, "nats"): "624"}
    cases |= {(0.0001, "ratio"): "<0.001", (0.0, "ratio"): "0.000", (math.nan, "nats"): "nan"}
    assert {case: number(*case) for case in cases} == cases
    assert math.isnan(summarise([row("reload", s, "FE", math.inf, "nats") for s in (0, 1)])[0].sd)


def test_terminal_tables_mark_what_is_as_close():
    console = Console(width=120, record=True, file=io.StringIO())
    for table in rich_tables(clear_rows(), "removal"):
        console.print(table)
    text = console.export_text()
    assert re.search(r"RELOAD +yes +0\.75 ± 0\.\d\d\*|RELOAD +yes +1\.75 ± 0\.60\* ", text), text
    assert re.search(r"fine-tune +yes +12\.00 ± 3\.\d\d> ", text)
    assert re.search(r"noise floor \(two retrains\) +yes +3\.50 ± 1\.20 ", text)


def latex_is_balanced(text):
    """Environments nest, braces and maths close, and every row of a tabular has as many cells as it has columns."""
    plain = re.sub(r"\\\\(?=[\s{])|\\[{}$%&#_]", "", text)  # line ends and escaped characters
    assert plain.count("{") == plain.count("}")
    assert plain.count("$") % 2 == 0
    open_ = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if kind == "begin":
            open_.append(name)
        else:
            assert open_.pop() == name
    assert not open_
    for columns, body in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, re.DOTALL):
        rows_ = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len(rows_) > 2
        assert {len(re.findall(r"(?<!\\)&", line)) for line in rows_} == {len(columns) - 1}


def test_latex_is_balanced_and_escapes_what_it_must():
    rows = [replace(r, method="50%_off & more{}~^\\#$") if r.method == "reload" else r for r in clear_rows()]
    text = latex_table(tables(rows, "removal")[0], "distances")
    latex_is_balanced(text)
    assert r"50\%\_off \& more\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}\#\$ & yes" in text
    assert r"$\Delta$FA & NSKL \\" in text
    assert r"& yes & \textbf{1.75} & \textbf{0.021} \\" in text
    assert r" &  & {\tiny 1.25 to 2.25} & {\tiny 0.021 to 0.022} \\" in text
    assert r"12.00~$>$" in text
    assert all(rule in text for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
    assert not re.search("[^\\x00-\\x7f]", text)


def test_csv_holds_every_digit(tmp_path):
    rows = [*clear_rows(), row("reload", 0, "NSKL", 0.15, "nats", source="paper, Table 1")]
    write_table(tmp_path / "t.csv", rows)
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        lines = {(line["method"], line["metric"]): line for line in csv.DictReader(file)}
    summaries, judged = summarise(rows), verdicts(summarise(rows))
    assert lines.keys() == {(s.method, s.metric) for s in summaries}
    for s in summaries:
        line = lines[s.method, s.metric]
        assert (float(line["mean"]), float(line["sd"]), int(line["n"])) == (s.mean, s.sd, 8)
        assert (float(line["low"]), float(line["high"])) == s.interval
        verdict = judged.get((s.method, s.metric))
        assert line["verdict"] == (verdict.state if verdict else "")
        assert line["p"] == (str(verdict.p) if verdict else "")
    assert (lines["reload", "NSKL"]["paper"], lines["reload", "NSKL"]["source"]) == ("0.15", "paper, Table 1")
    assert lines["original", "NSKL"]["source"] == ""


def test_names_of_metrics_become_links_once_and_text_stays_text():
    text = linked("ΔFA <b> and FA; the accuracy on the removed records, not FAX", ["FA", "ΔFA"])
    assert text == (
        '<a href="#metric-delta-fa">ΔFA</a> &lt;b&gt; and <a href="#metric-fa">FA</a>; the '
        '<a href="#metric-fa">accuracy on the removed records</a>, not FAX'
    )
    assert linked("a < b", []) == "a &lt; b"


# ── words ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_summary_sentences():
    text = sentences(summarise(some_rows()), "removal", "reload").replace("\N{NO-BREAK SPACE}", " ")
    assert text == (
        "RELOAD changed the accuracy on the removed records from 100.00 % (original) to 94.00 %; retraining gives "
        "93.00 %, and two retrains differ by 4.00 points. Of 1 distance it is indistinguishable from retraining within "
        "the noise floor on none, undecided on 1 (ΔFA). The original is within it on none. RELOAD took 25 % of the "
        "time of retraining."
    )
    text = sentences(summarise(clear_rows()), "removal", "reload")
    assert text.endswith("within the noise floor on 2 (ΔFA, NSKL). The original is within it on 1.")
    assert "further from it on 1 (ΔFA)" in sentences(summarise(clear_rows()), "removal", "original")
    text = sentences(summarise(some_rows()), "label-correction", "reload").replace("\N{NO-BREAK SPACE}", " ")
    assert text.endswith("to 95.00 %; retraining gives 100.00 %, and two retrains differ by 2.00 points.")
    assert sizes(some_rows(), "removal") == "20 removed and 1,597 test records"


def test_a_report_without_removed_records_says_so_first(run):
    rows = [row for row in clear_rows() if row.metric == "NSKL" or row.split == "test"]
    text = sentences(summarise(rows), "removal", "reload")
    assert text.startswith("Nothing was measured on the removed records, so that nothing here says whether they are")
    write_rows(run / "rows.csv", rows)
    page = write_page(run).read_text(encoding="utf-8")
    assert "Anything about the removed records. Nothing was measured on them." in page
    assert "can still differ in their weights, and no attack was run." in " ".join(page.split())


def test_facts_are_averaged_and_texts_counted():
    values = {"share": ("0.5", "0.7"), "count": ("1553", "1553"), "stopped": ("loss 0.02 reached", "loss 0.01 reached")}
    stored = [Fact("s", "m", seed, name, two[seed]) for name, two in values.items() for seed in (0, 1)]
    assert [(f.fact, f.value) for f in findings(stored)["s", "m"]] == [
        ("share", "0.6 (0.5 to 0.7)"),
        ("count", "1,553"),
        ("stopped", "loss … reached (2 of 2 seeds)"),
    ]


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_figures_state_their_finding_in_numbers():
    drawn = distances(summarise(some_rows()), "removal", "reload")
    assert drawn.finding == "RELOAD: ΔFA 3.00 (noise floor 4.00)."
    assert ">91.67 →<" in drawn.svg  # gradient ascent, off the scale
    drawn = steps(some_points(), some_losses(), "removal", "reload")
    assert drawn.finding == (
        "Loss on the removed records: 0.01 trained, 0.1 ascended, 4 re-initialised, 0.38 at the end; retraining gives "
        "1 nats."  # 0.38: the mean of 0.25 and of 0.5, where the second seed had ended
    )
    drawn = resets(RESETS, "removal", "reload")  # (0.3 * 90 + 0.6 * 10) / 100
    assert drawn.finding == (
        "33.0 % of all entries were re-initialised: most of head.weight (60.0 %), least of conv.weight (30.0 %)."
    )
    drawn = histograms(some_losses(), "removal", "reload")
    assert drawn.finding == (
        "The losses of removed and of test records overlap by 0 % for original, 50 % for RELOAD, 100 % for retrain "
        "(reference)."
    )


def test_roc_curves_are_those_of_scikit_learn():
    generator = np.random.default_rng(0)
    members, unseen = generator.exponential(1.0, 40), np.round(generator.exponential(2.0, 200), 1)  # with ties
    fpr, tpr, _ = roc_curve(np.repeat([1, 0], [40, 200]), -np.concatenate([members, unseen]), drop_intermediate=False)
    rates = np.array([0.0, 0.005, 0.01, 0.1, 0.5, 0.999, 1.0])
    expected = [tpr[fpr <= rate + 1e-9].max() for rate in rates]
    found = true_positives(members, unseen, rates)
    assert (found >= np.array(expected) - 1e-12).all()  # between two thresholds a tie may be cut more finely
    assert found[-1] == 1
    untied = generator.exponential(2.0, 200)
    fpr, tpr, _ = roc_curve(np.repeat([1, 0], [40, 200]), -np.concatenate([members, untied]), drop_intermediate=False)
    assert true_positives(members, untied, rates) == pytest.approx([tpr[fpr <= rate + 1e-9].max() for rate in rates])


def test_the_roc_figure_states_how_many_are_found():
    losses = [
        Loss("removal", m, 0, "test", 0.1 + k / 100) for m in ("original", "reload", "retrain") for k in range(200)
    ]
    for method, low in {"original": 25, "reload": 5, "retrain": 1}.items():
        values = [0.01] * low + [5.0] * (50 - low)
        losses += [Loss("removal", method, 0, "forget", value) for value in values]
    assert roc(losses, "removal", "reload").finding == (
        "At a false-positive rate of 10 %, the loss alone gives away removed records: 50.0 % for original, 10.0 % for "
        "RELOAD, 2.0 % for retrain (reference)."
    )
    assert roc(losses[:10], "removal", "reload") is None
    few = [loss for loss in losses if loss.split == "forget" or round(100 * loss.loss) < 109]
    assert roc(few, "removal", "reload").finding == ""


def test_the_tradeoff_numbers_every_method_once_a_panel():
    many = [replace(r, method=f"method {k}") for k in range(18) for r in some_rows() if r.method == "reload"]
    drawn = tradeoff(summarise([*some_rows(), *many]), "removal", "reload")
    assert drawn.finding == "RELOAD: ΔFA 3.00 points, TA 90.00 %, Cost 0.250 ratio."
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawn.svg)
    listed = [text.split(maxsplit=1) for text in texts if re.fullmatch(r"\d+ +\D.*", text)]
    assert [name for _, name in listed][:2] == ["original", "RELOAD"]
    assert len(listed) == 22
    costless = sum(name.startswith("original") for _, name in listed)
    numbers = [text for text in texts if text in {number for number, _ in listed}]
    assert len(numbers) >= 2 * len(listed) - costless
    assert tradeoff(summarise(some_rows()), "label-correction", "reload") is None


def test_there_is_no_figure_without_data():
    assert distances(summarise(some_rows()), "label-correction", "reload") is None
    assert steps([], [], "removal", "reload") is None
    assert resets(RESETS, "removal", "fine-tune") is None
    assert histograms([], "removal", "reload") is None


def test_figures_leave_matplotlib_alone_and_ignore_its_settings():
    before = dict(mpl.rcParams)
    plain = resets(RESETS, "removal", "reload").svg
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "pink"}):
        assert resets(RESETS, "removal", "reload").svg == plain
    assert dict(mpl.rcParams) == before
    assert "var(--ink)" in plain
    assert not re.search(r"#[0-9a-f]{6}\b", plain.replace("url(#", "").replace('href="#', "").replace('id="', ""))


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_page_is_whole_and_stands_alone(run):
    path = write_page(run)
    assert path == run / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not re.search(r"https?://|<script|<link|@import|xmlns", text)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert all(link.startswith("#") for link in page.links)
    assert len(page.titles) == 6
    without = [title for title in page.titles if not re.search(r"\d", title)]
    assert without == ["Who finds the removed records with few false alarms?"]  # two test records show no rate
    assert "rate of 100 %" not in text
    assert "<strong></strong>" not in text
    assert text.count("<figcaption>") == 6
    assert any(cell.startswith("91.67 ± 2.08 > (beyond δ)95 % interval 86.50 to 96.84") for cell in page.cells)
    assert "loss … reached (2 of 2 seeds)" in page.cells
    assert "reload.reset_fraction" in page.cells
    assert "&lt;digits&gt;" in text
    assert "<digits>" not in text
    assert "It is not proof" in text
    assert "20 removed and 1,597 test records a seed, 3 seeds" in text


def test_the_same_files_give_the_same_bytes(run):
    first = write_page(run).read_bytes()
    assert write_page(run).read_bytes() == first


@pytest.mark.parametrize("change", [only_header, Path.unlink])
def test_a_run_may_have_nothing_for_a_table(run, change):
    for name in ("curves", "reset", "losses", "facts"):
        change(run / f"{name}.csv")
    page = Page(write_page(run).read_text(encoding="utf-8"))
    assert len(page.titles) == 2


@pytest.mark.parametrize("name", ["config.json", "env.json", "rows.csv"])
def test_a_missing_file_is_named(run, name):
    (run / name).unlink()
    with pytest.raises(
        ConfigError, match=rf"{re.escape(name)} is missing: a run folder has .* `expunge evaluate --out`"
    ):
        write_page(run)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", "config.json cannot be read"),
        ("env.json", "[]", "env.json holds a list; a JSON object is expected"),
        ("facts.csv", "a,b\n", r"facts.csv has the columns \['a', 'b'\]; expected are"),
        ("losses.csv", "scenario,method,seed,split,loss\nremoval,reload,0,test,much\n", "losses.csv cannot be read"),
        ("losses.csv", "scenario,method,seed,split,loss\nremoval,reload,0\n", "losses.csv cannot be read"),
        ("rows.csv", "a\n", "rows.csv has the columns"),
    ],
)
def test_a_damaged_file_is_named(run, name, content, message):
    (run / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        write_page(run)


def test_a_run_without_rows_is_refused(run):
    only_header(run / "rows.csv")
    with pytest.raises(ConfigError, match=r"rows\.csv holds no measured row"):
        write_page(run)


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
def test_a_missing_library_comes_with_its_cure(run, library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    for module in ("svg", "figures", "curves", "attack", "tradeoff") if library == "matplotlib" else ():
        monkeypatch.delitem(sys.modules, f"expunge.report.{module}", raising=False)
        monkeypatch.delattr(expunge.report, module, raising=False)
    with pytest.raises(MissingExtra, match=re.escape("pip install 'expunge[report]'")):
        write_page(run)


def test_the_template_is_part_of_the_package():
    assert (files("expunge.report") / "page.html.j2").is_file()


def test_many_metrics_of_few_models_are_a_line_each_and_fit_a_narrow_terminal():
    metrics = ("ΔFA", "ΔFE", "ΔFMIA", "ΔAUC", "NSKL", "FSKL", "Under-forgetting", "Over-forgetting")
    rows = [row(m, seed, metric, 1.0) for metric in metrics for m in ("reload", "retrain again") for seed in (0, 1)]
    (drawn,) = rich_tables(rows, "removal")
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(drawn)
    text = console.export_text()
    assert all(metric in text for metric in metrics)
    assert "…" not in text


def test_an_evaluation_has_no_pairs_to_compare():
    values = {"reload": (1.0, 2.5, 3.0), "fine-tune": (2.0, 3.0, 5.0)}
    rows = [row(m, seed, "ΔFE", value, "nats") for m, each in values.items() for seed, value in enumerate(each)]
    assert comparison(rows, "removal", "reload") is not None
    assert comparison([replace(each, experiment=EVALUATION) for each in rows], "removal", "reload") is None


def test_one_that_is_not_blind_decides_then_one_of_which_it_is_not_known():
    for flags, words in (((True, True), "yes"), ((True, None), "?"), ((None, False), "no")):
        rows = [replace(row("mine", seed, "ΔFA", 1.0, "points"), blind=blind) for seed, blind in enumerate(flags)]
        assert [line.blind for line in expunge.report.tables(rows, "removal")[0].lines] == [words]
