"""Stages of experiments: what they depend on, which records they see, how settings are chosen."""

import json
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import scipy.stats
import torch

from expunge import cache
from expunge.access import Blind
from expunge.bench import judging, records, stages, steps
from expunge.bench.experiments import everyone
from expunge.bench.records import records_of
from expunge.bench.stages import Contender, Stage, closure, from_plain
from expunge.bench.store import Store, read_json
from expunge.bench.tasks import Scenario
from expunge.errors import ConfigError
from expunge.metrics.outputs import Outputs
from expunge.rows import read_rows
from tests.tiny_bench import BRIEF, CROSS, DIGITS, RECIPE, TINY, TWO, run, tiny


def looks(right, *, confidence=4.0, count=40):
    """Outputs of a model of two classes that gets so many of the records right, with one margin for all."""
    labels = np.zeros(count, dtype=np.int64)
    margin = np.where(np.arange(count) < right, confidence, -confidence)
    return Outputs(np.stack([margin, np.zeros(count)], axis=1), labels)


def test_a_rehearsal_is_scored_in_units_of_what_is_close_or_of_the_noise_floor():
    one = {"retain": looks(40), "forget": looks(20)}
    other = {"retain": looks(40), "forget": looks(22)}
    unit = judging.units([[one, other]], corrects=False)
    assert unit["NA"] == 0.5  # the two do not differ
    assert unit["FA"] == pytest.approx(5.0)  # they do, by 2 of 40
    apart = one["forget"].losses - other["forget"].losses  # 4 nats for two of the records
    assert unit["FE"] == pytest.approx(scipy.stats.sem(apart))
    p = 1 / (1 + math.exp(-4))
    assert unit["FSKL"] == pytest.approx(2 / 40 * 2 * (2 * p - 1) * 4)
    assert judging.score([one], [[one]], unit, corrects=False) == 0
    learned = {"retain": looks(39), "forget": looks(40)}
    gaps = judging.gaps(learned, one, corrects=False)
    assert gaps["NA"] == pytest.approx(2.5)
    assert gaps["FA"] == pytest.approx(50)
    assert gaps["FE"] == pytest.approx(2.0)
    expected = (2.5 / 0.5 + 50 / 5 + 2 / unit["FE"] + gaps["FSKL"] / unit["FSKL"]) / 4
    assert judging.score([learned], [[one]], unit, corrects=False) == pytest.approx(expected)
    single = [{"retain": looks(40), "forget": looks(right, count=1)} for right in (0, 1)]
    unit = judging.units([single], corrects=False)
    assert unit["FE"] == pytest.approx(4.0)  # of one record there is no standard error
    assert judging.units([[single[0], single[0]]], corrects=False)["FE"] == judging.CLOSE["FE"]
    triggered = [{**each, judging.TRIGGERED: looks(right)} for each, right in ((one, 40), (other, 38))]
    assert judging.units([triggered], corrects=True).keys() == {"NA", "FA", "NA with trigger"}
    assert judging.units([triggered], corrects=True)["NA with trigger"] == pytest.approx(5.0)


def test_originals_are_shared_and_what_differs_is_not():
    def key(step, **changes):
        return Stage(step=step, task=replace(DIGITS, **changes), seed=0).key

    more = Scenario(kind="random", amount=0.2)
    assert key("original") == key("original", scenario=more)
    assert key("cache") == key("cache", scenario=more)
    assert key("retrain") != key("retrain", scenario=more)
    assert key("original") != key("original", scenario=CROSS)
    assert key("original", scenario=CROSS) == key("original", scenario=replace(CROSS, gamma=0.5))
    assert key("original") != key("original", recipe=replace(RECIPE, epochs=5))
    assert key("original") != key("original", fingerprint="other data")


def test_a_cached_gradient_is_of_the_loss_that_the_contender_takes(tmp_path):
    entry, three = "orthogonal-ascent", (("step", 0.1),)
    others = [Contender(name=n, entry=entry, settings=three, tuned=False, cached_loss=n) for n in stages.LOSSES]
    own = Contender(name=entry, entry=entry, settings=three, tuned=False)
    experiment = tiny(DIGITS, contenders=(own, *others, TWO[0]))
    needed = {s.contender.name: s.needs["cache"] for s in experiment.evaluations([0]) if s.effort is not None}
    losses = {name: stage.cached_loss for name, stage in needed.items()}
    assert losses == {entry: "logit_margin", "reload": "cross_entropy", **{name: name for name in stages.LOSSES}}
    assert needed[entry].key == needed["logit_margin"].key != needed["reload"].key == needed["cross_entropy"].key
    assert needed["reload"].key == Stage(step="cache", task=DIGITS, seed=0).key
    rows = read_rows(run(experiment, tmp_path) / "rows.csv")
    found = {row.method: row.value for row in rows if row.metric == "FE" and row.method in losses}
    assert found[entry] == found["logit_margin"] != found["cross_entropy"]
    work = {row.method: row.value for row in rows if row.metric == "Work"}
    passes = 40 + 36 + 36 * BRIEF.budget.epochs  # examples: the cached gradient, the second one, fine-tuning
    assert work[entry] == work["logit_margin"] == passes / (36 * RECIPE.epochs)
    store = Store(tmp_path)
    assert {n: cache.read_header(store.result(s) / "cache.safetensors").loss_terms for n, s in needed.items()} == losses


def test_a_blind_tuning_sees_what_is_left_of_its_own_seed_and_nothing_else(tmp_path, monkeypatch, pictures):
    blind = Contender(name="reload (blind)", entry="reload", tuned="blind")
    experiment = tiny(pictures, contenders=(blind, TWO[0]))
    tunings = {
        (s.contender.tuned, s.seed): s for s in closure(experiment.evaluations([0, 1])).values() if s.step == "tune"
    }
    assert set(tunings) == {("blind", 0), ("blind", 1), (True, 0)}
    assert len({stage.key for stage in tunings.values()}) == 3
    needed = closure([tunings["blind", 1]])
    assert [(each.step, each.seed) for each in needed.values()] == [("original", 1), ("cache", 1), ("tune", 1)]

    given = []
    drawn = steps.rehearsal.prepare
    monkeypatch.setattr(
        steps.rehearsal, "prepare", lambda problem, *a, **k: given.append(problem) or drawn(problem, *a, **k)
    )
    run(experiment, tmp_path)
    left, forget = records_of(pictures, 0, None).retain, records_of(pictures, 0, None).forget
    assert type(given[0].given) is Blind
    assert torch.equal(given[0].given.retain.positions, left.positions)
    assert given[0].given.full.count == len(left)
    assert not set(forget.positions.tolist()) & set(given[0].given.retain.positions.tolist())
    own, other = (
        read_json(Store(tmp_path).result(tunings[how, 0]) / "trials.json")["trials"] for how in ("blind", True)
    )
    assert len(own) == BRIEF.trials
    assert {json.dumps(trial["settings"]) for trial in own} == {json.dumps(trial["settings"]) for trial in other}
    assert not {trial["score"] for trial in own} & {trial["score"] for trial in other}


def test_a_correction_cannot_be_rehearsed_blind(pictures):
    blind = Contender(name="reload (blind)", entry="reload", tuned="blind")
    with pytest.raises(ConfigError, match=r"only one removal of records can be rehearsed, random or in-class, and not"):
        replace(tiny(), tasks=(replace(pictures, scenario=CROSS),), contenders=(blind,), shown=("TA",))
    for kind in ("random", "in-class"):
        with pytest.raises(ConfigError, match=rf"'{kind} 40 %' leaves too little for 2 pseudo-forget sets of its size"):
            tiny(replace(pictures, scenario=Scenario(kind=kind, amount=0.4)), contenders=(blind,))


def test_images_to_spare_are_neither_trained_on_nor_test_images(pictures):
    seen = records_of(pictures, 3, None)
    spare = records.spare(pictures, 3, None).tensors[0]
    assert (len(seen.before), len(spare)) == (40, 20)
    for others in (seen.before.tensors[0], seen.parts["test"].tensors[0]):
        assert not any(torch.equal(one, other) for one in spare for other in others)


def test_a_blind_tuning_is_refused_where_all_images_are_used(pictures):
    blind = Contender(name="reload (blind)", entry="reload", tuned="blind")
    for task in (DIGITS, replace(pictures, train=0)):
        with pytest.raises(
            ConfigError, match=r"on (digits|cifar10), train=\d+: a tuning without a forget set.*set train to a part"
        ):
            tiny(task, contenders=(blind,))
    with pytest.raises(ConfigError, match=r"train=60: a tuning.*Take fewer than 60, which are all"):
        records.spare(replace(pictures, train=60), 0, None)


def test_deletions_in_a_row_start_from_what_the_one_before_left_and_cache_anew(tmp_path):
    rounds = [replace(DIGITS, scenario=Scenario(kind="sequence", amount=0.1, round=number)) for number in (1, 2)]
    experiment = tiny(*rounds, contenders=TWO[:1])
    listed = closure(experiment.evaluations([0]))
    unlearned = {stage.task: stage for stage in listed.values() if stage.step == "unlearn"}
    first, second = (unlearned[task] for task in rounds)
    assert second.needs["original"].key == first.key
    assert second.needs["cache"].needs["original"].key == first.key
    assert second.needs["tune"].key == first.needs["tune"].key
    assert first.needs["original"].key == Stage(step="original", task=DIGITS, seed=0).key
    alone = closure(replace(experiment, tasks=(rounds[1],)).evaluations([0]))
    assert {len(records_of(s.task, s.seed, None).before) for s in alone.values() if s.step == "original"} == {40}
    one, two = (records_of(task, 0, None) for task in rounds)
    assert torch.equal(two.before.positions, one.retain.positions)
    assert not set(two.forget.positions.tolist()) & set(one.forget.positions.tolist())
    judged = set(two.parts["forget"].positions.tolist())
    assert judged == {*one.forget.positions.tolist(), *two.forget.positions.tolist()}
    folder = run(experiment, tmp_path)
    counts = {row.scenario: row.n for row in read_rows(folder / "rows.csv") if row.metric == "FE"}
    assert list(counts.values()) == [4, 8]
    assert cache.read_header(Store(tmp_path).result(second.needs["cache"]) / "cache.safetensors").count == 36
    with pytest.raises(ConfigError, match=r"10 deletions of 10 % each\. They must take some and leave some"):
        Scenario(kind="sequence", amount=0.1, round=10)
    with pytest.raises(ConfigError, match=r"1 deletions of 0 of 40 images each\. They must take some and leave some"):
        records_of(replace(DIGITS, scenario=Scenario(kind="sequence", amount=0.01)), 0, None)


def test_one_experiment_has_several_networks_and_only_rows_depend_on_what_they_are_called(tmp_path):
    mlp = replace(DIGITS, called="MLP", model="mlp", settings=(("widths", (64, 8, 10)),))
    still = (Contender(name="fine-tune", entry="fine-tune", tuned=False),)
    rows = read_rows(run(tiny(DIGITS, mlp, contenders=still), tmp_path) / "rows.csv")
    assert {(row.scenario, row.model.split(", ")[2], row.run) for row in rows} == {
        ("random 10 %", "convnet", "random 10 %/0"),
        ("MLP", "mlp", "MLP/0"),
    }
    (one, *_), (other, *_) = (
        tiny(replace(mlp, called=name), contenders=still).evaluations([0]) for name in ("MLP", "a")
    )
    assert one.key != other.key
    assert {role: need.key for role, need in one.needs.items()} == {role: n.key for role, n in other.needs.items()}


def test_a_setting_that_is_new_and_has_its_default_leaves_keys_as_they_are():
    @dataclass(frozen=True)
    class Old:
        a: int = 1

    @dataclass(frozen=True)
    class New:
        a: int = 1
        b: int = 2

    assert stages._chosen(New(a=3)) == stages._chosen(Old(a=3)) == {"a": 3}
    assert stages._chosen(New(b=3)) == {"b": 3}


def test_another_version_or_file_of_a_method_makes_its_stages_anew_and_no_others(monkeypatch):
    def keys():
        stages._key.cache_clear()
        return {stage.label: stage.key for stage in closure(TINY.evaluations([0])).values()}

    before = keys()
    monkeypatch.setattr(stages, "_source", lambda entry: "changed" if entry == "ssd" else entry)
    other = keys()
    monkeypatch.setattr(stages, "_source", lambda entry: entry)
    same = keys()
    assert {label for label in same if other[label] != same[label]} == {
        f"{step} ssd (random 10 %, seed 0)" for step in ("tune", "unlearn", "evaluate")
    }
    monkeypatch.setitem(stages.VERSIONS, "retrain", 99)
    assert keys()["original (random 10 %, seed 0)"] == before["original (random 10 %, seed 0)"]
    assert keys()["retrain 1 (random 10 %, seed 0)"] != same["retrain 1 (random 10 %, seed 0)"]
    stages._key.cache_clear()


def test_stages_survive_the_way_to_a_worker():
    listed = closure(tiny(DIGITS, replace(DIGITS, scenario=CROSS)).evaluations([0, 1]))
    assert {from_plain(json.loads(json.dumps(stage.plain()))).key for stage in listed.values()} == set(listed)


def test_everyone_is_every_method_that_fits_and_six_controls():
    names = [each.name for each in everyone("removal")]
    assert len([name for name in names if name.startswith("control: ")]) == 6
    assert names[0] == "reload"
    assert not {"retrain", "unsir", "boundary-shrink"} & set(names)
    assert "scrub" in names
    assert "salun" in [each.name for each in everyone("input-correction")]


def test_no_seed_is_both_tuned_on_and_reported():
    with pytest.raises(
        ConfigError, match=r"seed 1 is one that settings are tuned on.*fewer seeds, or .*rehearsals=\(1002,\)"
    ):
        tiny(effort=replace(BRIEF, rehearsals=(1,))).evaluations([0, 1])


def test_a_repetition_is_planned_seed_by_seed():
    seeds = [stage.seed for stage in TINY.evaluations([0, 1])]
    assert seeds == sorted(seeds)
