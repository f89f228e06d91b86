"""The comparison: who takes part with which settings, on what they are judged, and a killed run that goes on."""

import csv
import random
from ast import literal_eval
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean

import pytest
import torch

from expunge.access import Sighted
from expunge.bench import compare, runs
from expunge.bench.case import observe
from expunge.bench.entries import Entry, chosen, entries, stored
from expunge.bench.situations import FULL, SCENARIOS, Size, situation_of
from expunge.cli import main
from expunge.errors import ConfigError
from expunge.methods import METHODS
from expunge.methods.fine_tune import FineTune
from expunge.metrics import membership
from expunge.metrics.membership import loss_attack
from expunge.metrics.outputs import outputs
from expunge.rows import Row, read_rows
from expunge.space import random_settings, with_settings
from expunge.training import Recipe
from expunge.unlearn import unlearn

BRIEF = Size(train=60, recipe=Recipe(epochs=10, lr=0.05, batch_size=32))
REHEARSAL = Path(__file__).parent.parent / "results" / "digits_rehearsal.csv"
TWO = ("fine-tune", "ssd")


@pytest.fixture(autouse=True)
def quick_attack(monkeypatch):
    monkeypatch.setattr(membership, "DRAWS", 1)


def values(rows):
    """All but times."""
    return [replace(row, seconds=0.0) for row in rows if row.metric != "Cost"]


def test_a_comparison_killed_between_two_methods_goes_on_and_gives_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.delitem(compare.SCENARIOS, "removal")  # two are enough
    size = replace(BRIEF, train=40)
    attempt, calls = compare.attempt, []

    def killed(*arguments, **others):
        calls.append(arguments)
        if len(calls) == 6:  # the second method of the third case
            raise KeyboardInterrupt
        return attempt(*arguments, **others)

    monkeypatch.setattr(compare, "attempt", killed)
    with pytest.raises(KeyboardInterrupt):
        compare.run(tmp_path, 3, TWO, size)
    folder = runs.folder_of(tmp_path, compare.config(TWO, size))
    done = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/DONE")}
    assert {str(path.parent.relative_to(folder)) for path in done} == {
        "class-removal/seed-0",
        "label-correction/seed-0",
    }

    monkeypatch.setattr(compare, "attempt", attempt)
    page = compare.run(tmp_path, 3, TWO, size)
    assert page.read_text(encoding="utf-8").count("<svg") >= 3
    assert done == {path: path.stat().st_mtime_ns for path in done}  # not run again
    rows = compare.rows(tmp_path, TWO, size)
    taking_part = [entries(size.budget)[name] for name in TWO]
    unbroken = compare.case("class-removal", taking_part, size, tmp_path, 1)
    assert values(unbroken.rows) == values(row for row in rows if row.run == "class-removal/1")

    assert {row.scenario for row in rows} == {"class-removal", "label-correction"}
    assert {(row.method, row.blind) for row in rows} == {
        ("original", True), ("retrain", True), ("retrain again", True), ("fine-tune", True), ("ssd", False),
    }  # fmt: skip
    shown = compare.tables(rows)
    assert len(shown) == 3
    assert all(table.row_count >= 4 for table in shown)


def test_of_reload_there_is_what_the_figures_need_and_its_cost_counts_the_caching(tmp_path, monkeypatch):
    slow = replace(situation_of("class-removal", 1, BRIEF), caching=1000.0)
    monkeypatch.setattr(compare, "situation_of", lambda *_: slow)
    reload = entries(BRIEF.budget)["reload"]
    case = compare.case("class-removal", [reload, entries(BRIEF.budget)["fine-tune"]], BRIEF, tmp_path, 1)
    assert {method for method, *_ in case.curves} == {method for method, *_ in case.resets} == {"reload"}
    assert {split for _, _, _, split, _ in case.curves} == {"retain", "forget", "test"}
    assert {method for method, *_ in case.losses} == {"original", "retrain", "reload"}
    seconds = {row.method: row.seconds for row in case.rows}
    assert seconds["reload"] > 1000 > seconds["fine-tune"] > 0
    cost = next(row.value for row in case.rows if (row.method, row.metric) == ("reload", "Cost"))
    assert cost == pytest.approx(seconds["reload"] / seconds["retrain"])
    found = {fact: value for method, fact, value in case.facts if method == "reload"}
    assert found["reset_count"] > 0
    assert "epochs done" in found["stopped"] or "loss" in found["stopped"]


def test_everyone_takes_part_blind_ones_first():
    named = entries(FULL.budget)
    controls = [name for name in named if name.startswith("control: ")]
    assert set(named) == (set(METHODS) - {"retrain"}) | set(controls)
    assert len(controls) == 5
    blind = [entry.blind for entry in named.values()]
    assert blind == sorted(blind, reverse=True)
    assert all(entry.blind == METHODS[name].blind for name, entry in named.items() if name in METHODS)


def test_nobody_trains_for_more_epochs_than_reload_may():
    draw = random.Random(0)
    for entry in entries(FULL.budget).values():
        for _ in range(20):
            config = with_settings(entry.start, random_settings(entry.space, draw))
            recipes = [getattr(config, each.name) for each in fields(config)]
            recipes = [each for each in recipes if isinstance(each, Recipe)]
            assert sum(each.epochs for each in recipes) <= FULL.budget.epochs, entry.name
            assert all(each.batch_size == FULL.budget.batch_size for each in recipes), entry.name
            assert getattr(config, "k", 1) < 3, entry.name  # of three layers, one must stay
    assert entries(FULL.budget)["reload"].start.fine_tune.epochs == FULL.budget.epochs
    assert entries(FULL.budget)["grda"].start.epochs == FULL.budget.epochs // 2  # two passes a step


def test_the_settings_are_the_best_of_the_rehearsal_for_everyone():
    best, counts = {}, {}
    with REHEARSAL.open(encoding="utf-8") as file:
        for trial in csv.DictReader(file):
            key = trial["scenario"], trial["method"]
            counts[key] = counts.get(key, 0) + 1
            score = float(trial["score"])
            if score < best.get(key, (float("inf"), None))[0]:
                best[key] = score, literal_eval(trial["settings"])
    expected = {(s, name) for s in SCENARIOS for name, e in entries(FULL.budget).items() if s not in e.unfit}
    assert set(counts) == expected
    assert set(counts.values()) == {stored()["provenance"]["trials a method and scenario"]}
    assert not set(stored()["provenance"]["seeds"]) & set(range(100))  # reported are those from 0 on
    for (scenario, name), (_, settings) in best.items():
        assert chosen(scenario, name) == settings
        assert set(settings) == set(entries(FULL.budget)[name].space)


def test_who_took_no_part_in_the_rehearsal_has_no_settings():
    with pytest.raises(ConfigError, match=r"'unsir' has no settings for 'removal' in digits_settings.json"):
        chosen("removal", "unsir")


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(
        ConfigError, match=r"methods=\['relaod'\]: nobody of that name takes part. Is it 'reload'. Choose from reload, "
    ):
        compare.run(tmp_path, 3, ("reload", "relaod"), BRIEF)
    assert not list(tmp_path.iterdir())


def test_of_a_removed_class_nothing_is_left_and_test_records_are_divided():
    situation = situation_of("class-removal", 4, BRIEF)
    given, parts = situation.given, situation.parts
    assert set(given.forget.tensors[1].tolist()) == set(situation.unseen.tensors[1].tolist()) == {4}
    assert 4 not in given.retain.tensors[1].tolist() + parts["test"].tensors[1].tolist()
    assert len(given.retain) + len(given.forget) == BRIEF.train
    assert len(parts["test"]) + len(situation.unseen) == 1797 - BRIEF.train

    found = observe(situation, situation.original)
    by_name = {each.metric: each for each in found.values}
    model = situation.original.eval()
    with torch.no_grad():
        right = (model(parts["test"].tensors[0]).argmax(1) == parts["test"].tensors[1]).double().mean()
    assert by_name["TA"].value == pytest.approx(100 * float(right))
    assert by_name["TA"].n == len(parts["test"])
    removed, unseen = (outputs(model, data).losses for data in (given.forget, situation.unseen))
    assert by_name["FMIA"].value == loss_attack(removed, unseen, seed=4).accuracy


def test_sighted_methods_see_the_faulty_labels_and_the_judge_the_corrected_ones():
    situation = situation_of("label-correction", 0, BRIEF)
    seen, judged = situation.given.forget, situation.parts["forget"]
    assert torch.equal(seen.tensors[0], judged.tensors[0])
    assert (seen.tensors[1] != judged.tensors[1]).all()
    assert isinstance(situation.given, Sighted)
    assert len(situation.given.original) == len(situation.given.retain) == BRIEF.train


def test_fisher_forgetting_is_told_which_class_was_removed():
    entry, situation = entries(BRIEF.budget)["fisher"], situation_of("class-removal", 4, BRIEF)
    assert entry.configured({"alpha": 1e-7}, situation.removed_classes).removed_classes == (4,)


def test_a_method_that_diverges_is_reported_and_does_not_stop_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "chosen", lambda scenario, name: {"recipe.lr": 1e30} if name == "wild" else {})
    tame = Entry("tame", FineTune(recipe=replace(BRIEF.budget, lr=0.01)), {}, blind=True)
    wild = Entry("wild", FineTune(recipe=BRIEF.budget), {}, blind=True)
    idle = Entry("idle", FineTune(recipe=BRIEF.budget), {}, blind=True, unfit={"label-correction": "has no reason"})
    case = compare.case("label-correction", [wild, tame, idle], BRIEF, tmp_path, 0)
    assert {row.method for row in case.rows} == {"original", "retrain", "retrain again", "tame"}
    assert ("idle", "took no part", "has no reason") in case.facts
    assert [fact for method, fact, text in case.facts if method == "wild" and "the loss became" in text] == ["failed"]
    situation = situation_of("label-correction", 0, BRIEF)
    alone = unlearn(situation.original, situation.given, tame.start)
    accuracy = next(row.value for row in case.rows if (row.method, row.metric) == ("tame", "TA"))
    assert accuracy == pytest.approx(100 * outputs(alone.model, situation.parts["test"]).correct.mean())


def test_a_model_without_finite_outputs_has_no_rows_in_a_comparison(tmp_path, monkeypatch):
    real = compare.take_part

    def wrecked(entry, situation, watch=None):
        done = real(entry, situation, watch)
        for p in done.model.parameters():
            p.data.fill_(1e30)
        return done

    monkeypatch.setattr(compare, "take_part", wrecked)
    monkeypatch.setattr(compare, "chosen", lambda scenario, name: {})
    wild = Entry("wild", FineTune(recipe=BRIEF.budget), {}, blind=True)
    case = compare.case("label-correction", [wild], BRIEF, tmp_path, 0)
    assert {row.method for row in case.rows} == {"original", "retrain", "retrain again"}
    ((method, fact, why),) = case.facts
    assert (method, fact) == ("wild", "failed")
    assert why.startswith("the model's logits are NaN or infinite")


def row(method, metric, value, seed, scenario="removal"):
    return Row(
        run="", experiment="compare", dataset="", model="", scenario=scenario, method=method, blind=method != "ssd",
        seed=seed, split="forget", metric=metric, value=value, unit="nats", n=6, seconds=1.0,
    )  # fmt: skip


def test_the_overview_counts_distances_in_noise_floors():
    rows = [
        *(row("retrain again", "ΔFE", value, seed) for seed, value in enumerate((1.0, 3.0))),  # mean 2
        *(row("retrain again", "NSKL", value, seed) for seed, value in enumerate((0.1, 0.1))),
        *(row("ssd", "ΔFE", value, seed) for seed, value in enumerate((4.0, 8.0))),
        *(row("ssd", "NSKL", value, seed) for seed, value in enumerate((0.2, 0.3))),
        *(row("ssd", "FSKL", 99.0, seed) for seed in range(2)),
        *(row("ssd", "Cost", value, 0, scenario) for value, scenario in ((0.1, "removal"), (0.3, "class-removal"))),
    ]
    found = {(each.method, each.metric, each.seed): each.value for each in compare.overview(rows)}
    assert found == pytest.approx(
        {
            ("retrain again", "Δ removal", 0): (0.5 + 1) / 2,
            ("retrain again", "Δ removal", 1): (1.5 + 1) / 2,
            ("ssd", "Δ removal", 0): (2 + 2) / 2,
            ("ssd", "Δ removal", 1): (4 + 3) / 2,
            ("ssd", "Cost", 0): 0.2,
        }
    )
    assert fmean(found["retrain again", "Δ removal", seed] for seed in range(2)) == 1


def test_the_overview_measures_a_correction_by_fskl():
    rows = [
        row(method, metric, value, 0, "label-correction")
        for method, value in (("retrain again", 1.0), ("reload", 2.0))
        for metric in ("FSKL", "NSKL")
    ]
    assert [(each.method, each.metric, each.value) for each in compare.overview(rows)] == [
        ("retrain again", "Δ label-correction", 1.0),
        ("reload", "Δ label-correction", 2.0),
    ]


def test_the_committed_rows_are_those_of_the_present_settings():
    rows = read_rows(REHEARSAL.with_name("compare_rows.csv"))
    for scenario in SCENARIOS:
        methods = {each.method for each in rows if each.scenario == scenario}
        fit = {name for name, entry in entries(FULL.budget).items() if scenario not in entry.unfit}
        assert fit <= methods
        assert len({each.seed for each in rows if each.scenario == scenario}) >= 3


def test_the_command_line_refuses_what_the_comparison_refuses(tmp_path, capsys):
    assert main(["compare", "--out", str(tmp_path), "--seeds", "2"]) == 2
    assert "seeds=2: a mean and a spread need at least 3" in capsys.readouterr().err
    assert main(["compare", "--out", str(tmp_path), "--methods", "scrub", "nobody"]) == 2
    assert "methods=['nobody']: nobody of that name takes part" in capsys.readouterr().err


@dataclass(frozen=True, kw_only=True)
class OwnEpochs:
    """A method of somebody's own that does not train by a recipe."""

    epochs: int = 40


@dataclass(frozen=True, kw_only=True)
class Undecided:
    """One with a setting that has no default."""

    noise: float


def test_epochs_of_somebody_s_own_are_left_alone_and_a_setting_without_default_is_named(monkeypatch):
    fine_tune = METHODS["fine-tune"]
    monkeypatch.setitem(METHODS, "own", replace(fine_tune, name="own", config=OwnEpochs, space={}))
    assert entries(FULL.budget)["own"].start == OwnEpochs()
    monkeypatch.setitem(METHODS, "own", replace(fine_tune, name="own", config=Undecided, space={}))
    with pytest.raises(ConfigError, match=r"method own: .*'noise'.*Give every setting a default"):
        entries(FULL.budget)
