import io
import json
import math
import re
import sys
from html.parser import HTMLParser
from importlib.resources import files

import matplotlib as mpl
import pytest
from rich.console import Console
from scipy.stats import t as student_t

import expunge.report
from expunge.errors import ConfigError, MissingExtra
from expunge.report import markdown, rich_tables, summarise, tables, write_page
from expunge.report.curves import steps
from expunge.report.figures import distances, histograms, resets
from expunge.report.overview import findings, sentences, sizes
from expunge.report.stored import Fact, Loss, Point, Reset
from expunge.report.summaries import number, student
from expunge.rows import Row, write_csv, write_rows

FILES = ("config.json", "env.json", "rows.csv", "curves.csv", "reset.csv", "losses.csv", "facts.csv")
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
    assert gap.half_width == pytest.approx(4.3027 * math.sqrt(7) / math.sqrt(3), rel=1e-4)


def test_the_t_quantile_is_that_of_scipy():
    for freedom in (*range(1, 12), 30, 1000):
        assert student(freedom) == pytest.approx(student_t.ppf(0.975, freedom), rel=6e-5)


def test_markdown_shows_reference_then_floor_and_marks_what_is_as_close():
    distance, own = markdown(some_rows(), "removal").split("\n\n**What each model does.**")
    assert distance.splitlines()[2:] == [
        "| method                     | blind |  ΔFA (points ↓) | Cost (ratio ↓) |",
        "| -------------------------- | ----- | --------------: | -------------: |",
        "| original                   | \N{EN DASH}     |     7.00 ± 1.73 |                |",
        "| RELOAD                     | yes   | **3.00 ± 2.65** |  0.250 ± 0.000 |",
        "| retrain (reference)        | yes   |                 |  1.000 ± 0.000 |",
        "| noise floor (two retrains) | yes   |     4.00 ± 2.00 |  1.000 ± 0.000 |",
        "| gradient ascent            | no    |    91.67 ± 2.08 | <0.001 ± 0.000 |",
    ]
    assert "over 3 seeds" in distance
    assert "Bold: no further from retraining" in distance
    assert "FA (% ≈)" in own


def test_a_metric_on_which_the_original_is_as_close_is_named():
    rows = [row(m, s, "ΔFA", v, "points") for m, v in {"original": 1.0, "retrain again": 2.0}.items() for s in (0, 1)]
    assert "On ΔFA even the original is" in tables(rows, "removal")[0].marked


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
    for table in rich_tables(some_rows(), "removal"):
        console.print(table)
    text = console.export_text()
    assert re.search(r"RELOAD +yes +3\.00 ± 2\.65\* +0\.250 ± 0\.000", text)
    assert re.search(r"noise floor \(two retrains\) +yes +4\.00 ± 2\.00 ", text)


# ── words ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_summary_sentences():
    text = sentences(summarise(some_rows()), "removal", "reload").replace("\N{NO-BREAK SPACE}", " ")
    assert text == (
        "RELOAD changed the accuracy on the removed records from 100.00 % (original) to 94.00 %; retraining gives "
        "93.00 %, and two retrains differ by 4.00 points. On 1 of 1 distances it is as close to retraining as a "
        "second retrained model is (the original: on none); it took 25 % of the time of retraining."
    )
    text = sentences(summarise(some_rows()), "label-correction", "reload").replace("\N{NO-BREAK SPACE}", " ")
    assert text.endswith("to 95.00 %; retraining gives 100.00 %, and two retrains differ by 2.00 points.")
    assert sizes(some_rows(), "removal") == "20 removed and 1,597 test records"


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
    assert len(page.titles) == 4
    assert all(re.search(r"\d", title) for title in page.titles)
    assert text.count("<figcaption>") == 4
    assert "3.00 (within the noise floor) ± 2.65" in page.cells
    assert "loss … reached (2 of 2 seeds)" in page.cells
    assert "reload.reset_fraction" in page.cells
    assert "&lt;digits&gt;" in text
    assert "<digits>" not in text
    assert "It is not proof" in text
    assert "20 removed and 1,597 test records a seed, 3 seeds" in text


def test_the_same_files_give_the_same_bytes(run):
    first = write_page(run).read_bytes()
    assert write_page(run).read_bytes() == first


def test_tables_that_a_run_has_nothing_for_hold_their_header(run):
    for name in ("curves", "reset", "losses", "facts"):
        only_header(run / f"{name}.csv")
    page = Page(write_page(run).read_text(encoding="utf-8"))
    assert len(page.titles) == 1


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(run, name):
    (run / name).unlink()
    with pytest.raises(ConfigError, match=f"{re.escape(name)} is missing: a report is drawn from a whole run folder"):
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
    for module in ("svg", "figures", "curves"):
        monkeypatch.delitem(sys.modules, f"expunge.report.{module}")
        monkeypatch.delattr(expunge.report, module)
    with pytest.raises(MissingExtra, match=re.escape("pip install 'expunge[report]'")):
        write_page(run)


def test_the_template_is_part_of_the_package():
    assert (files("expunge.report") / "page.html.j2").is_file()
