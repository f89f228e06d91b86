"""Tables of a report: means, intervals and verdicts, and all forms in which they are written."""

import csv
import io
import math
import re
import statistics
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from scipy import stats as scipy_stats

import expunge.report
from expunge.errors import ConfigError
from expunge.metrics import stats
from expunge.report import comparison, latex_table, markdown, rich_tables, summarise, tables, write_table
from expunge.report.summaries import number
from expunge.report.verdicts import verdicts
from expunge.report.written import write
from expunge.rows import EVALUATION, write_rows
from tests.reported import clear_rows, row, some_rows


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


def test_a_method_that_lacks_a_seed_is_tested_by_the_seeds_that_it_has():
    gaps = {0: 3.0, 2: -3.0, 3: 2.9, 4: -3.1}  # not 1
    floor = (0.5, 2.0, 1.0, 4.0, 3.0)
    rows = [row("retrain again", seed, "ΔFA", each, "points") for seed, each in enumerate(floor)]
    rows += [row("retrain", seed, "FA", 50.0 + seed) for seed in range(5)]
    for seed, gap in gaps.items():
        rows += [row("reload", seed, "FA", 50.0 + seed + gap), row("reload", seed, "ΔFA", abs(gap), "points")]
    found = verdicts(summarise(rows))["reload", "ΔFA"]
    assert found.p == pytest.approx(stats.equivalence(list(gaps.values()), found.margin).p)
    assert found.p != pytest.approx(stats.non_inferiority([abs(gap) for gap in gaps.values()], found.margin).p)


def test_beyond_is_the_t_test_of_scipy_turned_round():
    found = {(s.method, s.metric): s for s in summarise(clear_rows())}
    nearly = replace(found["fine-tune", "NSKL"], values=tuple(0.062 + 0.01 * (k % 4) for k in range(8)))
    delta = stats.floor_margin(found["retrain again", "NSKL"].values, shape="divergence").delta
    p = scipy_stats.ttest_1samp(np.log(nearly.values), math.log(delta), alternative="greater").pvalue
    for factor, state in ((1, "beyond"), (math.ceil(0.05 / p) + 1, "open")):  # as many equal tests are corrected for
        many = [replace(nearly, method=f"m{number}") for number in range(factor)]
        judged = verdicts([found["retrain again", "NSKL"], *many])
        assert {verdict.state for verdict in judged.values()} == {state}


def test_a_destroyed_model_is_beyond_however_its_divergences_spread():
    floor = next(s for s in summarise(clear_rows()) if (s.method, s.metric) == ("retrain again", "NSKL"))
    wreck = replace(floor, method="wreck", values=tuple(10.0**k for k in range(8)))
    assert scipy_stats.ttest_1samp(wreck.values, 0.1, alternative="greater").pvalue > 0.05  # of the values as they are
    assert verdicts([floor, wreck])["wreck", "NSKL"].state == "beyond"
    once_equal = replace(wreck, values=(0.0, *wreck.values[1:]))  # 0 has no logarithm
    assert verdicts([floor, once_equal])["wreck", "NSKL"].state == "open"


def test_means_of_distances_are_judged_as_distances():
    values = {"retrain again": (0.8, 1.0, 1.3), "wreck": (9.0, 70.0, 200.0)}
    rows = [row(who, seed, "Δ removal", each[seed], "floors") for who, each in values.items() for seed in range(3)]
    found = verdicts(summarise(rows))["wreck", "Δ removal"]
    assert found.state == "beyond"
    assert found.margin == stats.floor_margin(values["retrain again"], shape="divergence").delta


def test_differences_on_both_sides_of_retraining_are_not_beyond():
    rows = [row("retrain again", seed, "ΔFA", 1.0 + seed % 2, "points") for seed in range(8)]
    for seed, sign in enumerate((1, -1) * 4):
        rows += [row("retrain", seed, "FA", 50.0, "%"), row("swings", seed, "FA", 50.0 + sign * (20 + seed), "%")]
        rows += [row("swings", seed, "ΔFA", 20.0 + seed, "points")]
    assert verdicts(summarise(rows))["swings", "ΔFA"].state == "open"  # every one is, and their mean is not


def test_what_is_shown_changes_no_verdict():
    whole = {(line.method, metric): cell.mark for line, metric, cell in marks(tables(clear_rows(), "removal")[0])}
    for metrics in (("ΔFA",), ("NSKL",), ("ΔFA", "FA")):
        table = tables(clear_rows(), "removal", metrics)[0]
        assert {*table.metrics} == {*metrics} - {"FA"}
        assert {(line.method, metric): cell.mark for line, metric, cell in marks(table)}.items() <= whole.items()
    with pytest.raises(ConfigError, match="none of ΔFMIA, TA was measured in 'removal': of too few records"):
        tables(clear_rows(), "removal", ("ΔFMIA", "TA"))


def marks(table):
    return [
        (line, metric, cell)
        for line in table.lines
        for metric, cell in zip(table.metrics, line.cells, strict=True)
        if cell is not None
    ]


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
    rows += [
        row(method, seed, "NSKL", 1.0 + seed, "nats") for method in ("retrain again", "reload") for seed in range(3)
    ]
    (table,) = tables(rows, "removal")
    assert table.margins[0] == "" != table.margins[1]
    assert "On ΔFA there is no δ and no mark" in table.marked


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
    cases |= {
        (0.0001, "ratio"): "<0.001",
        (0.0, "ratio"): "0.000",
        (math.nan, "nats"): "nan",
        (1.65e13, "nats"): "1.65e+13",
    }
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


def test_brackets_in_names_stay_as_they_are_on_a_terminal():
    names = {"reload": "mine [/bold] [red]", "removal": "half [of it]"}
    rows = [replace(each, method=names.get(each.method, each.method)) for each in some_rows()]
    rows = [replace(each, scenario=names.get(each.scenario, each.scenario)) for each in rows]
    few = [each for each in rows if each.method == names["reload"] and each.metric in ("FA", "TA", "Cost", "ΔFA")]
    for shown in (rows, few):  # methods down, or metrics down
        console = Console(width=200, record=True, file=io.StringIO())
        for table in rich_tables(shown, names["removal"]):
            console.print(table)
        text = console.export_text()
        assert names["reload"] in text
        assert f"{names['removal']}: Distance to retraining" in text


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


def test_captions_in_latex_say_of_which_scenario_they_are(tmp_path):
    write_rows(tmp_path / "rows.csv", clear_rows())
    for name in ("config.json", "env.json"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    text = write(tmp_path, "latex").read_text(encoding="utf-8")
    assert r"\caption{Distance to retraining, removal. Mean" in text


def test_names_do_not_break_a_markdown_table():
    rows = [replace(r, method="a|b") if r.method == "reload" else r for r in clear_rows()]
    assert r"| a\|b " in markdown(rows, "removal")


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
        assert line["p_beyond"] == (str(verdict.p_beyond) if verdict else "")
    assert (lines["reload", "NSKL"]["paper"], lines["reload", "NSKL"]["source"]) == ("0.15", "paper, Table 1")
    assert lines["original", "NSKL"]["source"] == ""


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
