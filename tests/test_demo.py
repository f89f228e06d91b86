"""The main job from end to end, on the real digits with training cut short."""

import ast
import csv
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from expunge.bench import demo, digits
from expunge.data.digits import digits as load_digits
from expunge.errors import ConfigError
from expunge.metrics import membership
from expunge.rows import read_rows
from expunge.scenarios.removal import random_removal


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(digits, "RECIPE", replace(digits.RECIPE, epochs=4))
    quick = replace(digits.RELOAD, fine_tune=replace(digits.RELOAD.fine_tune, epochs=2))
    monkeypatch.setattr(digits, "RELOAD", quick)
    monkeypatch.setattr(membership, "DRAWS", 1)


def values(folder):
    return [
        (r.scenario, r.method, r.seed, r.metric, r.value) for r in read_rows(folder / "rows.csv") if r.metric != "Cost"
    ]


def test_the_demo_deletes_unlearns_blind_compares_and_draws(short, tmp_path):
    page = demo.run(tmp_path, 3)
    folder = demo.folder_of(tmp_path)
    assert page == folder / "report.html"
    text = page.read_text(encoding="utf-8")
    assert "noise floor" in text
    assert text.count("<svg") >= 5

    rows = read_rows(folder / "rows.csv")
    removal = [row for row in rows if row.scenario == "removal"]
    assert {row.method for row in removal} == {
        "original", "retrain", "retrain again", "reload", "fine-tune", "gradient-ascent",
    }  # fmt: skip
    assert {row.seed for row in rows} == {0, 1, 2}
    assert {row.metric for row in removal if row.method == "reload"} == {
        "NA", "FA", "TA", "FE", "FMIA", "AUC", "ΔFA", "ΔFE", "ΔFMIA", "ΔAUC", "NSKL", "FSKL", "Cost",
    }  # fmt: skip
    assert {row.method for row in rows if not row.blind} == {"gradient-ascent"}

    for seed in range(3):
        on_disk = load_file(folder / "removal" / f"seed-{seed}" / "data.safetensors")
        removed = random_removal(digits.TRAIN, digits.REMOVED, seed)
        assert len(on_disk["positions"]) == digits.TRAIN - len(removed)
        assert not torch.isin(removed, on_disk["positions"]).any()
        gone = load_digits(digits.TRAIN, seed=seed).train.only(removed).tensors[0]
        assert not any((image == on_disk["images"]).flatten(1).all(1).any() for image in gone)

    with (folder / "reset.csv").open(encoding="utf-8") as file:
        resets = [row for row in csv.DictReader(file) if row["scenario"] == "removal" and row["seed"] == "0"]
    total = sum(int(row["entries"]) for row in resets)
    chosen = sum(float(row["share"]) * int(row["entries"]) for row in resets)
    assert round(chosen) == int(total * digits.RELOAD.reset_fraction)


def test_a_finished_demo_is_not_run_again(short, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_CASES", {"label-correction": digits.label_correction})
    first = demo.run(tmp_path, 3).read_bytes()

    def never(*_):
        raise AssertionError("ran again")

    monkeypatch.setattr(demo, "_CASES", {"label-correction": never})
    assert demo.run(tmp_path, 3).read_bytes() == first


def test_an_interrupted_demo_goes_on_and_gives_the_same_rows(short, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_CASES", {"label-correction": digits.label_correction})
    demo.run(tmp_path / "unbroken", 3)

    def interrupted(folder, seed):
        if seed == 1:
            raise KeyboardInterrupt
        return digits.label_correction(folder, seed)

    monkeypatch.setattr(demo, "_CASES", {"label-correction": interrupted})
    with pytest.raises(KeyboardInterrupt):
        demo.run(tmp_path / "broken", 3)
    assert not (demo.folder_of(tmp_path / "broken") / "report.html").exists()
    monkeypatch.setattr(demo, "_CASES", {"label-correction": digits.label_correction})
    demo.run(tmp_path / "broken", 3)
    assert values(demo.folder_of(tmp_path / "broken")) == values(demo.folder_of(tmp_path / "unbroken"))


def test_too_few_seeds_for_an_interval_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"seeds=2: a mean and a spread need at least 3"):
        demo.run(tmp_path, 2)
    assert not list(tmp_path.iterdir())


def test_global_threads_are_as_before(short, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_CASES", {"label-correction": digits.label_correction})
    before = torch.get_num_threads()
    demo.run(tmp_path, 3)
    assert torch.get_num_threads() == before


def test_the_published_settings_are_the_best_of_the_rehearsal():
    path = Path(__file__).parent.parent / "results" / "digits_rehearsal.csv"
    best: dict[tuple[str, str], dict[str, object]] = {}
    with path.open(encoding="utf-8") as file:
        for trial in csv.DictReader(file):  # best first
            best.setdefault((trial["scenario"], trial["method"]), ast.literal_eval(trial["settings"]))
    for key, used in {
        ("removal", "reload"): digits.RELOAD,
        ("removal", "fine-tune"): digits.FINE_TUNE,
        ("removal", "gradient-ascent"): digits.ASCENT,
        ("correction", "reload"): digits.CORRECTING_RELOAD,
        ("correction", "fine-tune"): digits.CORRECTING_FINE_TUNE,
    }.items():
        for setting, value in best[key].items():
            assert attrgetter(setting)(used) == (value if isinstance(value, str) else pytest.approx(value, rel=5e-3))
