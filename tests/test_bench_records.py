"""What scenarios make of data: who is given which records, and what is judged."""

import csv
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from expunge import Examples
from expunge.bench import judging
from expunge.bench.records import Records, records_of
from expunge.bench.stages import Contender, Stage
from expunge.bench.tasks import Scenario
from expunge.report import write_page
from expunge.rows import read_rows
from tests.tiny_bench import CROSS, DIGITS, run, tiny

GRID = (
    Scenario(kind="class"),
    Scenario(kind="in-class", amount=0.5),
    Scenario(kind="neighbours", amount=0.1),
    Scenario(kind="distributed-backdoor", classes=(0, 1)),
    Scenario(kind="feature-backdoor", classes=(0, 1)),
    Scenario(kind="flipped-labels", amount=0.5, pairs=((0, 2), (3, 5))),
    Scenario(kind="random-labels", amount=0.2),
    Scenario(kind="noise", amount=0.2),
)


def of(scenario: Scenario, seed: int = 3) -> Records:
    return records_of(replace(DIGITS, train=100, scenario=scenario), seed, None)


def same(one: Examples, other: Examples) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.tensors, other.tensors, strict=True))


def test_scenarios_give_methods_and_judges_the_right_records():
    removed = records_of(DIGITS, 3, None)
    assert (len(removed.before), len(removed.retain), len(removed.forget)) == (40, 36, 4)
    assert removed.unseen is removed.parts["test"]
    within = records_of(replace(DIGITS, train=100, scenario=Scenario(kind="in-class", amount=2)), 3, None)
    assert within.forget.tensors[1].tolist() == [3, 3]
    assert set(within.unseen.tensors[1].tolist()) == {3}
    faulty = records_of(replace(DIGITS, scenario=CROSS), 3, None)
    assert len(faulty.retain) == len(faulty.before) == 40
    assert faulty.forget.tensors[0][:, 0, -1, -1].eq(1).all()  # what methods see has the cross
    assert not faulty.parts["forget"].tensors[0][:, 0, -1, -1].eq(1).any()  # what is judged has not
    assert faulty.parts["triggered"].tensors[0][:, 0, -1, -1].eq(1).all()
    seen = judging.judged(faulty)
    scored = [seen[split] for split in judging.SCORED]
    assert all(len(each) <= 40 for each in scored)  # a rehearsal sees no test record: all seeds share those
    assert len(seen["test"]) == len(seen["triggered"]) > 1000
    assert scored[-1].tensors[0][:, 0, -1, -1].eq(1).all()
    half = records_of(replace(DIGITS, scenario=replace(CROSS, gamma=0.5, known_are="removed")), 3, None)
    assert len(half.retain) == 40 - len(half.forget)
    assert len(half.forget) == round(len(faulty.forget) / 2)


def test_a_class_is_removed_as_a_whole_or_in_part_and_attacked_with_unseen_records_of_it():
    whole, part = of(Scenario(kind="class")), of(Scenario(kind="in-class", amount=0.5))
    for found in (whole, part):
        assert set(found.forget.tensors[1].tolist()) == set(found.unseen.tensors[1].tolist()) == {3}
    assert 3 not in whole.retain.tensors[1]
    assert 3 not in whole.parts["test"].tensors[1]  # what is left is judged by the classes that are left
    assert len(part.forget) == round(0.5 * len(whole.forget))
    assert 3 in part.parts["test"].tensors[1]


def test_a_class_that_is_named_is_removed_whatever_the_seed():
    for scenario in (Scenario(kind="class", classes=(7,)), Scenario(kind="in-class", amount=2, classes=(7,))):
        for seed in (3, 4):
            assert set(of(scenario, seed).forget.tensors[1].tolist()) == {7}
    assert Scenario(kind="in-class", amount=2, classes=(7,)).name == "in-class 2, class 7"  # a table of several
    assert Scenario(kind="random-labels", amount=0.3).name == "random labels 30 %, corrected"


def test_neighbours_are_nearer_to_each_other_than_records_at_random():
    def spread(records: Records) -> float:
        inputs = records.forget.tensors[0].flatten(1)
        return float(torch.cdist(inputs, inputs).mean())

    near, anywhere = of(Scenario(kind="neighbours", amount=0.1)), of(Scenario(kind="random", amount=0.1))
    assert len(near.forget) == len(anywhere.forget) == 10
    assert spread(near) < 0.8 * spread(anywhere)


@pytest.mark.parametrize("scenario", [each for each in GRID if each.corrects], ids=lambda each: each.kind)
def test_corrections_give_the_right_records_back_and_judge_them(scenario):
    clean, found = of(Scenario(kind="random", amount=0.1)).before, of(scenario)
    assert same(found.retain, clean)
    rows = found.forget.positions
    assert same(found.parts["forget"], clean.only(rows))
    assert not same(found.before, clean)
    assert same(found.before.without(rows), clean.without(rows))  # nothing else is at fault
    tensor = 0 if scenario.on_inputs else 1
    changed = (found.forget.tensors[tensor] != found.parts["forget"].tensors[tensor]).flatten(1 - tensor)
    assert (changed.any(1) if scenario.on_inputs else changed).all()
    assert torch.equal(found.forget.tensors[1 - tensor], found.parts["forget"].tensors[1 - tensor])
    assert same(of(scenario).before, found.before)


def changed(found: Records) -> torch.Tensor:
    """Which entries of which records are at fault."""
    return found.forget.tensors[0] != found.parts["forget"].tensors[0]


@pytest.mark.parametrize("kind", ["distributed-backdoor", "feature-backdoor"])
def test_a_pattern_is_ten_white_pixels_or_entries_that_the_seed_draws(kind, pictures):
    task = replace(pictures, scenario=Scenario(kind=kind, classes=(1,)))
    found, other = records_of(task, 3, None), records_of(task, 4, None)
    assert set(found.forget.tensors[1].tolist()) == {1}
    (pattern,), (another,) = (changed(each).unique(dim=0) for each in (found, other))
    assert not torch.equal(pattern, another)
    if kind == "feature-backdoor":
        assert pattern.sum() == 10
    else:
        assert pattern.sum() == 3 * 10  # in all channels
        assert torch.equal(pattern.all(0), pattern.any(0))
    white = found.forget.tensors[0].amax((0, 2, 3))
    assert (found.forget.tensors[0][:, pattern] == white[:, None, None].expand(3, 8, 8)[pattern]).all()


def test_noise_is_of_the_span_of_each_channel_and_is_put_on_clean_records_for_rehearsals(pictures):
    task = replace(pictures, scenario=Scenario(kind="noise", amount=0.5, gamma=0.2))
    found, clean = records_of(task, 3, None), records_of(pictures, 3, None).before
    left = found.triggered.tensors[0] - clean.only(found.retain.positions).tensors[0]
    on_test = found.parts["noisy"].tensors[0] - found.parts["test"].tensors[0]
    span = clean.tensors[0].amax((0, 2, 3)) - clean.tensors[0].amin((0, 2, 3))
    for noise in (left, on_test):
        assert noise.std((0, 2, 3)) == pytest.approx(0.4 * span, rel=0.15)


def test_only_faults_of_inputs_are_put_on_test_images_and_only_those_of_classes_have_a_domain():
    parts = {scenario.kind: of(scenario).parts.keys() for scenario in GRID if scenario.corrects}
    assert {kind for kind, each in parts.items() if "triggered" in each} == {"distributed-backdoor", "feature-backdoor"}
    assert {kind for kind, each in parts.items() if "noisy" in each} == {"noise"}
    assert {kind for kind, each in parts.items() if "domain" in each} == {
        "distributed-backdoor", "feature-backdoor", "flipped-labels",
    }  # fmt: skip
    flipped = of(GRID[5])
    assert set(flipped.parts["domain"].tensors[1].tolist()) == set(flipped.forget.tensors[1].tolist()) == {0, 2, 3, 5}


def test_originals_follow_from_the_faults_and_not_from_what_is_known_of_them():
    def key(scenario: Scenario) -> str:
        return Stage(step="original", task=replace(DIGITS, scenario=scenario), seed=0).key

    labels = Scenario(kind="random-labels", amount=0.2)
    assert key(labels) == key(replace(labels, gamma=0.5)) == key(replace(labels, gamma=0.5, known_are="removed"))
    assert len({key(each) for each in (labels, replace(labels, amount=0.3), *GRID[:5], GRID[7])}) == 6
    for one, other in ((GRID[5], {"pairs": ((0, 1),)}), (GRID[3], {"classes": (2, 3)}), (CROSS, {"classes": (2, 3)})):
        assert key(one) != key(replace(one, **other))


def test_corrected_data_is_retrained_on_once_whatever_the_faults_were():
    def keys(step, *scenarios: Scenario) -> set[str]:
        return {Stage(step=step, task=replace(DIGITS, scenario=each), seed=0).key for each in scenarios}

    corrections = [each for each in GRID if each.corrects]
    assert len(keys("retrain", *corrections)) == 1
    assert len(keys("outputs", *corrections)) == len(corrections)  # of corrected images, which differ
    half, removed = replace(CROSS, gamma=0.5), replace(CROSS, known_are="removed")
    assert len(keys("retrain", CROSS, half, removed, GRID[0], GRID[2])) == 5


def test_everything_of_the_grid_runs_from_training_to_rows(tmp_path):
    reload = (Contender(name="reload", entry="reload", tuned=False),)
    tasks = [replace(DIGITS, train=100, scenario=scenario) for scenario in GRID]
    folder = run(tiny(*tasks, contenders=reload), tmp_path)
    rows = read_rows(folder / "rows.csv")
    samples = load_file(folder / "samples.safetensors")
    assert write_page(folder).read_text(encoding="utf-8").count("<h3>Some of the ") == len(GRID)
    for scenario in GRID:
        found = of(scenario, 0)
        first = found.forget.positions[:8]
        for part, data in {"forget": found.forget, "corrected": found.parts["forget"]}.items():
            if part == "corrected" and not scenario.corrects:
                assert f"{scenario.name}/corrected" not in samples
                continue
            images, labels = data.only(first).tensors
            assert torch.equal(samples[f"{scenario.name}/{part}"].float(), images.clamp(0, 1).mul(255).round())
            assert torch.equal(samples[f"{scenario.name}/{part} labels"], labels)
        measured = {row.metric for row in rows if (row.scenario, row.method) == (scenario.name, "reload")}
        assert measured == {*judging.metrics_of(scenario)}


def test_a_page_calls_tasks_what_they_are_called_and_records_what_was_done_to_them(tmp_path):
    flipped = Scenario(kind="flipped-labels", amount=0.5, pairs=((0, 2), (3, 5)))
    removed = replace(DIGITS, train=100, called="digits, uncorrected CNN", scenario=Scenario(kind="class"))
    mended = replace(DIGITS, train=100, called="MLP-8", model="mlp", settings=(("widths", (64, 8, 10)),))
    mended = replace(mended, scenario=flipped)
    mine = (Contender(name="mine", entry="fine-tune", tuned=False),)
    folder = run(tiny(removed, mended, contenders=mine), tmp_path)
    page = write_page(folder).read_text(encoding="utf-8")
    first, second = page.partition('id="scenario-mlp-8')[::2]
    assert ">Digits, uncorrected CNN<" in first
    assert "Do the removed records stand out?" in first
    assert "for mine" in first  # in the figure of losses, though it is not RELOAD
    assert "Some of the corrected records" in second
    assert "removed records stand out" not in second
    assert "convnet, widths (4, 8); digits, 100 training images, mlp" in page
    with (folder / "losses.csv").open(newline="", encoding="utf-8") as file:
        lines = [
            each for each in csv.DictReader(file) if (each["method"], each["scenario"]) == ("mine", removed.called)
        ]
    unseen = records_of(removed, 0, None).unseen
    assert sum(each["split"] == "test" for each in lines) == len(unseen)  # of the removed class, as the attack has them
