"""The main job from end to end, on the real digits with training cut short; and how runs are kept and go on."""

import csv
from threading import Event, Thread

import pytest
import torch
from safetensors.torch import load_file

from expunge.bench import demo, runs
from expunge.bench.case import Case, Result
from expunge.bench.entries import chosen
from expunge.bench.situations import REMOVED, Size
from expunge.data.digits import digits as load_digits
from expunge.errors import ConfigError
from expunge.metrics import membership
from expunge.metrics.compare import Measured
from expunge.rows import read_rows
from expunge.scenarios.removal import random_removal
from expunge.training import Recipe

BRIEF = Size(train=60, recipe=Recipe(epochs=10, lr=0.05, batch_size=32))


def test_the_demo_deletes_unlearns_blind_compares_and_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(membership, "DRAWS", 1)
    monkeypatch.setattr(runs, "LEAST_SEEDS", 2)
    page = demo.run(tmp_path, 2, BRIEF)
    folder = runs.folder_of(tmp_path, demo.config(BRIEF))
    assert page == folder / "report.html"
    text = page.read_text(encoding="utf-8")
    assert "noise floor" in text
    assert text.count("<svg") >= 5

    rows = read_rows(folder / "rows.csv")
    removal = [row for row in rows if row.scenario == "removal"]
    assert {row.method for row in removal} == {
        "original", "retrain", "retrain again", "reload", "natural-ascent", "class-orthogonal-ascent",
        "fine-tune", "gradient-ascent",
    }  # fmt: skip
    assert {row.seed for row in rows} == {0, 1}
    assert {row.metric for row in removal if row.method == "reload"} == {
        "NA", "FA", "TA", "FE", "FMIA", "AUC", "ΔFA", "ΔFE", "ΔFMIA", "ΔAUC", "NSKL", "FSKL", "Cost",
    }  # fmt: skip
    assert {row.metric for row in rows if row.scenario == "label-correction"} == {
        "Accuracy on corrected", "TA", "NSKL", "FSKL", "Cost",
    }  # fmt: skip
    assert {row.method for row in rows if not row.blind} == {"gradient-ascent"}

    for seed in range(2):
        on_disk = load_file(folder / "removal" / f"seed-{seed}" / "data.safetensors")
        removed = random_removal(BRIEF.train, REMOVED, seed)
        assert len(on_disk["positions"]) == BRIEF.train - len(removed)
        assert not torch.isin(removed, on_disk["positions"]).any()
        gone = load_digits(BRIEF.train, seed=seed).train.only(removed).tensors[0]
        assert not any((image == on_disk["images"]).flatten(1).all(1).any() for image in gone)

    with (folder / "reset.csv").open(encoding="utf-8") as file:
        resets = [row for row in csv.DictReader(file) if row["scenario"] == "removal" and row["seed"] == "0"]
    total = sum(int(row["entries"]) for row in resets)
    reset = sum(float(row["share"]) * int(row["entries"]) for row in resets)
    assert round(reset) == int(total * chosen("removal", "reload")["reset_fraction"])


def a_case(folder, seed):
    """A measured case in no time."""
    case = Case("trial", "removal", seed)
    for method, value in (("original", 2.0), ("retrain again", 1.0), ("reload", 0.5 + seed)):
        case.add(method, Result(torch.nn.Identity()), [Measured("ΔFE", value, "nats", "forget", 6)])
    return case


def never(folder, seed):
    raise AssertionError("ran again")


def test_a_finished_run_is_not_run_again(tmp_path):
    first = runs.carry_out("trial", tmp_path, {}, {"removal": a_case}, 3).read_bytes()
    assert runs.carry_out("trial", tmp_path, {}, {"removal": never}, 3).read_bytes() == first


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    def interrupted(folder, seed):
        if seed == 1:
            raise KeyboardInterrupt
        return a_case(folder, seed)

    with pytest.raises(KeyboardInterrupt):
        runs.carry_out("trial", tmp_path, {}, {"removal": interrupted}, 3)
    folder = runs.folder_of(tmp_path, {})
    assert not (folder / "report.html").exists()

    def rest(folder, seed):
        assert seed > 0
        return a_case(folder, seed)

    runs.carry_out("trial", tmp_path, {}, {"removal": rest}, 3)
    assert read_rows(folder / "rows.csv") == [row for seed in range(3) for row in a_case(folder, seed).rows]


def test_of_two_at_once_the_second_waits_and_finds_everything_done(tmp_path):
    begun, go_on, pages = Event(), Event(), []

    def slow(folder, seed):
        begun.set()
        assert go_on.wait(20)
        return a_case(folder, seed)

    def start(case):
        thread = Thread(target=lambda: pages.append(runs.carry_out("trial", tmp_path, {}, {"removal": case}, 3)))
        thread.start()
        return thread

    first = start(slow)
    assert begun.wait(20)
    second = start(never)
    second.join(0.5)
    assert second.is_alive()
    go_on.set()
    first.join(20)
    second.join(20)
    assert len(pages) == 2


def test_another_configuration_is_another_run(tmp_path):
    assert runs.folder_of(tmp_path, {"lr": 1.0}) != runs.folder_of(tmp_path, {"lr": 2.0})
    assert runs.folder_of(tmp_path, demo.config(BRIEF)) != runs.folder_of(tmp_path, demo.config())


def test_too_few_seeds_for_an_interval_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"seeds=2: a mean and a spread need at least 3"):
        demo.run(tmp_path, 2)
    assert not list(tmp_path.iterdir())


def test_a_run_has_one_thread_and_leaves_the_number_as_it_was(tmp_path):
    before = torch.get_num_threads()
    inside = []

    def watched(folder, seed):
        inside.append(torch.get_num_threads())
        return a_case(folder, seed)

    torch.set_num_threads(2)
    try:
        runs.carry_out("trial", tmp_path, {}, {"removal": watched}, 3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert inside == [1, 1, 1]
