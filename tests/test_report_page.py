"""The page of a run: its words, that it is whole and stands alone, and what it refuses."""

import json
import re
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import expunge.report
from expunge.errors import ConfigError, MissingExtra
from expunge.report import summarise, write_page
from expunge.report.html import linked
from expunge.report.overview import findings, sentences, sizes
from expunge.report.stored import Fact
from expunge.rows import write_csv, write_rows
from tests.reported import RESETS, Page, clear_rows, some_losses, some_points, some_rows


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


# The words


def test_names_of_metrics_become_links_once_and_text_stays_text():
    text = linked("ΔFA <b> and FA; the accuracy on the removed records, not FAX", ["FA", "ΔFA"])
    assert text == (
        '<a href="#metric-delta-fa">ΔFA</a> &lt;b&gt; and <a href="#metric-fa">FA</a>; the '
        '<a href="#metric-fa">accuracy on the removed records</a>, not FAX'
    )
    assert linked("a < b", []) == "a &lt; b"


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


def test_facts_are_averaged_and_texts_counted():
    values = {"share": ("0.5", "0.7"), "count": ("1553", "1553"), "stopped": ("loss 0.02 reached", "loss 0.01 reached")}
    stored = [Fact("s", "m", seed, name, two[seed]) for name, two in values.items() for seed in (0, 1)]
    assert [(f.fact, f.value) for f in findings(stored)["s", "m"]] == [
        ("share", "0.6 (0.5 to 0.7)"),
        ("count", "1,553"),
        ("stopped", "loss … reached (2 of 2 seeds)"),
    ]
    warned = [Fact("s", "m", 0, "warning", f"too long by {n}") for n in (1, 2)]
    said = {f.fact: f.value for f in findings([*stored, *warned])["s", "m"]}
    assert said["warning"] == "too long by … (1 of 2 seeds)"  # twice in one of them


# The page


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


def test_a_report_without_removed_records_says_so_first(run):
    rows = [row for row in clear_rows() if row.metric == "NSKL" or row.split == "test"]
    text = sentences(summarise(rows), "removal", "reload")
    assert text.startswith("Nothing was measured on the removed records, so that nothing here says whether they are")
    write_rows(run / "rows.csv", rows)
    page = write_page(run).read_text(encoding="utf-8")
    assert "Anything about the removed records. Nothing was measured on them." in page
    assert "can still differ in their weights, and no attack was run." in " ".join(page.split())


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
        ("samples.safetensors", "no tensors", "samples.safetensors cannot be read"),
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
    for module in ("svg", "figures", "curves", "attack", "samples", "tradeoff") if library == "matplotlib" else ():
        monkeypatch.delitem(sys.modules, f"expunge.report.{module}", raising=False)
        monkeypatch.delattr(expunge.report, module, raising=False)
    with pytest.raises(MissingExtra, match=re.escape("pip install 'expunge[report]'")):
        write_page(run)


def test_the_template_is_part_of_the_package():
    assert (files("expunge.report") / "page.html.j2").is_file()
