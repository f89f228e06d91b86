"""The runner of experiments: stages done once, whatever kills them, and rows that do not depend on who made them."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from expunge import cache
from expunge.access import Blind
from expunge.bench import difference, experiments, fit, judging, profiles, runner, stages, steps, tasks, workers
from expunge.bench.experiments import Experiment, everyone
from expunge.bench.fit import require_fit
from expunge.bench.printed import printed
from expunge.bench.runner import Ended, Serial, carry_out
from expunge.bench.stages import Contender, Effort, Stage, closure, from_plain
from expunge.bench.store import Store, read_json
from expunge.bench.tasks import Scenario, Task, records
from expunge.bench.workers import Processes, RayCluster
from expunge.cli import main
from expunge.data.images import ImageData, Images
from expunge.errors import ConfigError, IncompleteRun, MismatchError, MissingData, MissingExtra, NotFinite
from expunge.files import write_text
from expunge.metrics.outputs import Outputs
from expunge.rows import Row, read_rows, write_rows
from expunge.training import Recipe
from tests.contract import without_type_checks

RECIPE = Recipe(epochs=4, lr=0.3, batch_size=16)
RANDOM = Scenario(kind="random", amount=0.1)
CROSS = Scenario(kind="cross-backdoor", classes=(0, 1))
DIGITS = Task(
    dataset="digits", model="convnet", settings=(("widths", (4, 8)),), recipe=RECIPE, scenario=RANDOM, train=40
)
TWO = (Contender(name="reload", entry="reload"), Contender(name="ssd", entry="ssd"))
BRIEF = Effort(budget=Recipe(epochs=2, lr=0.1, batch_size=16), trials=2)
FILE = '''"""Two methods on the digits."""
from tests.test_bench import TINY


def experiment(profile):
    return TINY
'''


def tiny(*tasks, contenders=TWO, effort=BRIEF):
    return Experiment(
        name="tiny",
        profile="cpu",
        tasks=tasks or (DIGITS,),
        contenders=contenders,
        effort=effort,
        shown=("ΔFE", "NSKL"),
    )


TINY = tiny()


def values(folder):
    """All but times, of seed 0."""
    rows = read_rows(folder / "rows.csv")
    return [replace(row, seconds=0.0) for row in rows if row.metric != "Cost" and row.seed == 0]


def run(experiment, root, seeds=(0,)):
    store = Store(root)
    carry_out(experiment.evaluations(seeds), store, Serial(store))
    return experiments.gather(experiment, seeds, store)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The run folder of an experiment that nothing happened to."""
    return run(TINY, tmp_path_factory.mktemp("unbroken"), seeds=(0, 1))


def test_an_experiment_on_digits_leaves_rows_settings_and_facts_of_everyone(unbroken):
    rows = read_rows(unbroken / "rows.csv")
    assert {row.method for row in rows} == {"original", "retrain", "retrain again", "reload", "ssd"}
    assert {row.seed for row in rows} == {0, 1}
    attacks = {"FMIA", "AUC", "ΔFMIA", "ΔAUC"}  # four removed records are too few to attack
    assert {row.metric for row in rows if row.method == "reload"} == set(judging.metrics_of(corrects=False)) - attacks
    assert {(row.method, row.blind) for row in rows if row.method in ("reload", "ssd")} == {
        ("reload", True),
        ("ssd", False),
    }
    found = {(row.method, row.metric, row.seed): row.value for row in rows}
    for seed in (0, 1):
        assert found["reload", "ΔFE", seed] == pytest.approx(
            abs(found["reload", "FE", seed] - found["retrain", "FE", seed])
        )
        assert found["retrain", "Work", seed] == 1
        assert ("retrain", "NSKL", seed) not in found
        assert found["retrain again", "NSKL", seed] > 0
    chosen = read_json(unbroken / "settings.json")["settings"]["random 10 %"]
    assert set(chosen) == {"reload", "ssd"}
    assert 0.05 <= chosen["reload"]["settings"]["reset_fraction"] <= 0.8
    assert "reset_count" in (unbroken / "facts.csv").read_text(encoding="utf-8")
    assert read_json(unbroken / "config.json")["seeds"] == [0, 1]


def test_the_work_of_reload_counts_both_gradients(unbroken):
    """By hand: 40 records cached, 36 passed for the difference, then the epochs of fine-tuning with their looks."""
    root = unbroken.parent
    stage = next(e for e in TINY.evaluations([0]) if e.contender.name == "reload")
    trace = read_json(Store(root).folder(stage.needs["model"]) / "trace.json")
    steps_taken = len(trace["epoch_ends"]) * 36
    assert trace["backwarded"] == 36 + steps_taken
    work = next(
        row.value
        for row in read_rows(unbroken / "rows.csv")
        if (row.method, row.metric, row.seed) == ("reload", "Work", 0)
    )
    assert work == pytest.approx((3 * (40 + 36 + steps_taken) + trace["forwarded"]) / (3 * RECIPE.epochs * 36))


def test_a_run_interrupted_between_stages_goes_on_and_gives_the_same_rows(tmp_path, unbroken, monkeypatch):
    real, calls = runner.do, []

    def killed(stage, store):
        calls.append(stage)
        if len(calls) > 9:
            raise KeyboardInterrupt
        return real(stage, store)

    monkeypatch.setattr(runner, "do", killed)
    with pytest.raises(KeyboardInterrupt):
        run(TINY, tmp_path)
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("stages/*/DONE")}
    assert len(done) == 9
    monkeypatch.setattr(runner, "do", real)
    assert values(run(TINY, tmp_path)) == values(unbroken)
    assert done == {path: path.stat().st_mtime_ns for path in done}  # not done again


def test_a_driver_and_its_workers_killed_in_the_middle_of_a_stage_lose_no_result(tmp_path, unbroken):
    file = tmp_path / "tiny.py"
    file.write_text(FILE, encoding="utf-8")
    command = [sys.executable, "-m", "expunge", "bench", "run", str(file), "--seeds", "1", "--out", str(tmp_path)]
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    driver = subprocess.Popen(command, env=here, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for(lambda: len(list(tmp_path.glob("stages/*/DONE"))) >= 3, driver)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert not list(tmp_path.glob("tiny-*/rows.csv"))
    assert values(run(TINY, tmp_path)) == values(unbroken)
    assert not list(tmp_path.glob("stages/.*"))  # nothing half-written is left


def test_workers_end_when_their_driver_is_killed_and_they_keep_freed_memory(tmp_path):
    """The first line of a worker's error output says that memory is kept; then it sleeps in the middle of a stage."""
    said, here = tmp_path / "said", {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    worker = f"""
import os, time
from expunge.bench import workers
workers.keep_freed_memory = lambda: print("kept", os.getpid(), file=open({str(said)!r}, "w"), flush=True)
workers.serve_one = lambda line: time.sleep(60)
workers.main()
"""
    driver = f"""
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", {worker!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
worker.stdin.write(b"a stage\\n")
worker.stdin.flush()
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", driver], env=here)
    wait_for(lambda: said.exists() and said.read_text(encoding="utf-8").endswith("\n"), process)
    kept, number = said.read_text(encoding="utf-8").split()
    assert kept == "kept"
    process.kill()
    process.wait()
    wait_for(lambda: not alive(int(number)), seconds=10)


def alive(number):
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{number}/stat")  # one that ended and that nobody asks about any more counts as ended
    return not status.exists() or status.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"


def wait_for(condition, process=None, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.01)


def test_processes_give_the_same_rows_and_a_worker_that_is_killed_costs_nothing(tmp_path, unbroken, monkeypatch):
    hands, said = [], []
    real = workers._asked

    def killed_once(worker, stage, store):
        if stage.step == "tune" and not hands:
            hands.append(worker)
            threading.Timer(0.05, worker.kill).start()
        return real(worker, stage, store)

    monkeypatch.setattr(workers, "_asked", killed_once)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    store = Store(tmp_path)
    carry_out(TINY.evaluations([0]), store, Processes(store, 2), said.append)
    assert values(experiments.gather(TINY, [0], store)) == values(unbroken)
    assert hands[0].poll() == -signal.SIGKILL
    assert sum(line.startswith("begun again: tune") and "its worker died" in line for line in said) == 1
    assert sum(line.startswith("[") for line in said) == len(closure(TINY.evaluations([0])))


class Losing:
    """Hands that lose every stage of one step."""

    def __init__(self, store, step, state="lost"):
        self.serial, self.step, self.state, self.begun = Serial(store), step, state, []

    @property
    def free(self):
        return self.serial.free

    def start(self, stage):
        self.begun.append(stage.step)
        if stage.step == self.step:
            self.serial._ended.append(Ended(stage, self.state, "gone"))
        else:
            self.serial.start(stage)

    def wait(self):
        return self.serial.wait()

    def close(self):
        self.serial.close()


def test_a_worker_that_dies_every_time_fails_its_stage_and_no_other(tmp_path):
    store = Store(tmp_path)
    hands = Losing(store, "tune")
    with pytest.raises(
        IncompleteRun, match=r"6 of 20 stages are missing.*\n.*tune reload .*: gone\n(.|\n)*the same command"
    ):
        carry_out(TINY.evaluations([0]), store, hands)
    assert hands.begun.count("tune") == 2 * (1 + runner.RETRIES)
    rows = values(experiments.gather(TINY, [0], store))
    assert {row.method for row in rows} == {"original", "retrain", "retrain again"}  # what is done is there


def test_a_full_disk_stops_the_run_and_says_what_to_do(tmp_path, unbroken, monkeypatch):
    real, left = steps.save_weights, [2]

    def save(path, model, header=None):
        left[0] -= 1
        if left[0] < 0:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(path, model, header)

    monkeypatch.setattr(steps, "save_weights", save)
    with pytest.raises(IncompleteRun, match=r"the disk is full: .*No space left.* Free some space below .* again"):
        run(TINY, tmp_path)
    folders = list((tmp_path / "stages").iterdir())
    assert folders
    assert all((folder / "DONE").exists() for folder in folders)
    monkeypatch.setattr(steps, "save_weights", real)
    assert values(run(TINY, tmp_path)) == values(unbroken)


def test_two_runs_of_the_same_folder_do_every_stage_once(tmp_path, unbroken, monkeypatch):
    done, real = [], steps._STEPS

    def counting(step):
        def work(stage, store, folder):
            done.append(stage.key)
            real[step](stage, store, folder)

        return work

    monkeypatch.setattr(steps, "_STEPS", {step: counting(step) for step in real})
    threads = [threading.Thread(target=run, args=(TINY, tmp_path)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == sorted(closure(TINY.evaluations([0])))
    assert values(run(TINY, tmp_path)) == values(unbroken)


def test_who_does_a_stage_is_known_until_it_is_done_and_a_second_waits(tmp_path):
    store, stage = Store(tmp_path), TINY.evaluations([0])[0].of("original")
    begun, go, order = threading.Event(), threading.Event(), []

    def slow(folder):
        begun.set()
        go.wait(10)
        order.append("first")

    first = threading.Thread(target=store.make, args=(stage, slow))
    first.start()
    begun.wait(10)
    assert store.holder(stage).startswith(f"process {os.getpid()} on ")
    second = threading.Thread(target=store.make, args=(stage, lambda folder: order.append("second")))
    second.start()
    assert not store.done(stage)
    go.set()
    first.join()
    second.join()
    assert order == ["first"]
    assert store.holder(stage) == ""


def test_a_clock_that_jumps_back_changes_nothing(tmp_path, unbroken, monkeypatch):
    now = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    folder = run(TINY, tmp_path)
    assert values(folder) == values(unbroken)
    assert all(row.value > 0 for row in read_rows(folder / "rows.csv") if row.metric == "Cost")


def test_a_folder_without_its_marker_is_made_anew(tmp_path):
    store, stage = Store(tmp_path), TINY.evaluations([0])[0].of("original")
    steps.do(stage, store)
    before = (store.folder(stage) / "model.safetensors").read_bytes()
    (store.folder(stage) / "DONE").unlink()
    (store.folder(stage) / "model.safetensors").write_bytes(b"half")
    assert steps.do(stage, store)
    assert (store.folder(stage) / "model.safetensors").read_bytes() == before
    assert not steps.do(stage, store)


def test_a_method_that_breaks_down_is_a_fact_and_not_a_row(tmp_path, monkeypatch):
    real = steps.unlearn

    def breaks(model, given, config, *, seed):
        if type(config).__name__ == "SSD":
            raise NotFinite("the loss became nan in epoch 1")
        return real(model, given, config, seed=seed)

    monkeypatch.setattr(steps, "unlearn", breaks)
    folder = run(TINY, tmp_path)
    assert "ssd" not in {row.method for row in read_rows(folder / "rows.csv")}
    assert "random 10 %,ssd,0,failed,the loss became nan in epoch 1" in (folder / "facts.csv").read_text(
        encoding="utf-8"
    )


def test_a_correction_is_judged_by_accuracies_with_and_without_the_trigger(tmp_path):
    task = replace(DIGITS, scenario=CROSS)
    folder = run(replace(TINY, tasks=(task,), contenders=TWO[:1], shown=("NSKL",)), tmp_path)
    found = {row.metric for row in read_rows(folder / "rows.csv") if row.method == "reload"}
    assert {"TA", "TA with trigger", "Acc_corr", "Accuracy on corrected", "NSKL", "FSKL", "Cost", "Work"} <= found
    assert found == set(judging.metrics_of(corrects=True))


def test_scenarios_give_methods_and_judges_the_right_records():
    removed = records(DIGITS, 3, None)
    assert (len(removed.before), len(removed.retain), len(removed.forget)) == (40, 36, 4)
    assert removed.unseen is removed.parts["test"]
    within = records(replace(DIGITS, train=100, scenario=Scenario(kind="in-class", amount=2)), 3, None)
    assert within.forget.tensors[1].tolist() == [3, 3]
    assert set(within.unseen.tensors[1].tolist()) == {3}
    faulty = records(replace(DIGITS, scenario=CROSS), 3, None)
    assert len(faulty.retain) == len(faulty.before) == 40
    assert faulty.forget.tensors[0][:, 0, -1, -1].eq(1).all()  # what methods see has the cross
    assert not faulty.parts["forget"].tensors[0][:, 0, -1, -1].eq(1).any()  # what is judged has not
    assert faulty.parts["triggered"].tensors[0][:, 0, -1, -1].eq(1).all()
    seen = judging.judged(faulty)
    scored = [seen[split] for split in judging.SCORED]
    assert all(len(each) <= 40 for each in scored)  # a rehearsal sees no test record: all seeds share those
    assert len(seen["test"]) == len(seen["triggered"]) > 1000
    assert scored[-1].tensors[0][:, 0, -1, -1].eq(1).all()
    half = records(replace(DIGITS, scenario=replace(CROSS, gamma=0.5, known_are="removed")), 3, None)
    assert len(half.retain) == 40 - len(half.forget)
    assert len(half.forget) == round(len(faulty.forget) / 2)


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
    triggered = [{**each, judging.TRIGGERED: looks(right)} for each, right in ((one, 40), (other, 38))]
    assert judging.units([triggered], corrects=True).keys() == {"NA", "FA", "NA with trigger", "FSKL"}
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


def test_a_blind_tuning_sees_what_is_left_of_its_own_seed_and_nothing_else(tmp_path, monkeypatch):
    blind = Contender(name="reload (blind)", entry="reload", tuned="blind")
    experiment = tiny(DIGITS, contenders=(blind, TWO[0]))
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
    rows = read_rows(run(experiment, tmp_path) / "rows.csv")
    assert len({row.value for row in rows if row.method in ("reload", blind.name) and row.metric == "FE"}) == 2
    left, forget = records(DIGITS, 0, None).retain, records(DIGITS, 0, None).forget
    assert type(given[0].given) is Blind
    assert torch.equal(given[0].given.retain.positions, left.positions)
    assert given[0].given.full.count == len(left)
    assert not set(forget.positions.tolist()) & set(given[0].given.retain.positions.tolist())
    trials = read_json(Store(tmp_path).result(tunings["blind", 0]) / "trials.json")
    assert len(trials["trials"]) == BRIEF.trials


def test_a_correction_cannot_be_rehearsed_blind():
    blind = Contender(name="reload (blind)", entry="reload", tuned="blind")
    with pytest.raises(ConfigError, match=r"only one removal of records can be rehearsed, random or in-class, and not"):
        replace(tiny(), tasks=(replace(DIGITS, scenario=CROSS),), contenders=(blind,), shown=("TA",))


def test_images_to_spare_are_neither_trained_on_nor_test_images(monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def some(count):
        pixels = torch.randint(256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
        return Images(pixels, torch.arange(count) % 2)

    found = ImageData(name="some", train=some(30), test=some(10), classes=("a", "b"))
    monkeypatch.setattr(tasks, "images", lambda *_: found)
    task = Task(dataset="cifar10", model="convnet", recipe=RECIPE, scenario=RANDOM, train=20)
    tasks.records.cache_clear()
    trained = records(task, 3, None).before.tensors[0]
    spare = tasks.spare(task, 3, None).tensors[0]
    assert (len(trained), len(spare)) == (20, 10)
    assert not any(torch.equal(one, other) for one in spare for other in trained)
    everything = replace(task, train=0)
    assert torch.equal(
        tasks.spare(everything, 3, None).tensors[0], records(everything, 3, None).parts["test"].tensors[0]
    )
    tasks.records.cache_clear()


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
    assert {len(records(s.task, s.seed, None).before) for s in alone.values() if s.step == "original"} == {40}
    one, two = (records(task, 0, None) for task in rounds)
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
        records(replace(DIGITS, scenario=Scenario(kind="sequence", amount=0.01)), 0, None)


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
    assert "salun" in [each.name for each in everyone("backdoor-correction")]


def test_the_figures_of_the_paper_stand_beside_the_measured_ones(unbroken, capsys):
    rows = printed("table1", "random 10 %")
    found = {(row.method, row.metric): (row.value, row.unit) for row in rows}
    assert found["reload", "ΔFA"] == (0.3, "points")
    assert found["salun", "ΔFMIA"] == (7.39, "%")
    assert found["retrain", "FA"] == (74.89, "%")
    assert ("retrain", "ΔFA") not in found
    shown = experiments.table_rows(replace(TINY, printed=rows), read_rows(unbroken / "rows.csv"))
    assert {row.metric for row in shown} == {"ΔFE", "NSKL"}
    assert {row.source for row in shown} == {"measured", "paper, Table 1"}
    with pytest.raises(ConfigError, match=r"table='table9': printed.toml has table1, table2, table3"):
        printed("table9", "x")


def row(value, *, seed=0, metric="ΔFE", method="reload"):
    return Row(
        run="r", experiment="e", dataset="d", model="m", scenario="s", method=method, blind=True, seed=seed,
        split="forget", metric=metric, value=value, unit="nats", n=4, seconds=0.0,
    )  # fmt: skip


def test_a_difference_of_runs_tells_identical_changed_and_beyond_noise():
    one = [row(value, seed=seed) for seed, value in enumerate([1.0, 1.1, 0.9, 1.0])]
    moved = [row(value, seed=seed) for seed, value in enumerate([2.0, 2.11, 1.9, 2.0])]
    noisy = [row(value, seed=seed) for seed, value in enumerate([1.5, 0.6, 1.4, 0.5])]
    assert [cell.state for cell in difference.compare(one, one)] == ["identical"]
    assert [cell.state for cell in difference.compare(one, moved)] == ["beyond noise"]
    cell = difference.compare(one, noisy)[0]
    assert (cell.state, cell.seeds, cell.before, cell.after) == ("changed", 4, 1.0, 1.0)
    lone = difference.compare([row(1.0), row(2.0, metric="NSKL")], [row(1.5), row(3.0, method="ssd")])
    assert [cell.state for cell in lone] == ["changed", "only in A", "only in B"]


def test_the_commands_run_show_and_compare(tmp_path, monkeypatch, capsys, unbroken):
    file = tmp_path / "tiny.py"
    file.write_text(FILE, encoding="utf-8")
    out = str(unbroken.parent)
    named = [str(file), "--seeds", "2", "--out", out]
    assert main(["bench", "status", *named]) == 0
    assert "all" in capsys.readouterr().out
    assert main(["bench", "run", *named]) == 0
    assert "RELOAD" in capsys.readouterr().out
    assert main(["bench", "table", *named, "--format", "markdown"]) == 0
    assert "| RELOAD" in capsys.readouterr().out
    kept = {path: path.read_bytes() for path in unbroken.iterdir()}
    assert "Missing" not in capsys.readouterr().out
    assert main(["bench", "table", str(file), "--seeds", "1", "--out", out]) == 0
    assert "Missing" not in capsys.readouterr().out
    assert main(["bench", "table", str(file), "--seeds", "4", "--out", out]) == 0
    assert "Missing: seed 2 (5 of 5 evaluations), seed 3 (5 of 5 evaluations). `expunge" in capsys.readouterr().out
    assert kept == {path: path.read_bytes() for path in unbroken.iterdir()}  # a table is only looked at
    capsys.readouterr()
    assert main(["bench", "diff", str(unbroken), str(unbroken)]) == 0
    assert "identical of" in capsys.readouterr().out
    other = tmp_path / "rows.csv"
    write_rows(other, [replace(each, value=each.value + 1) for each in read_rows(unbroken / "rows.csv")])
    assert main(["bench", "diff", str(unbroken), str(other)]) == 0
    assert " changed of " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "profile", "message"),
    [
        ("x = (", "cpu", r"wrong.py: failed when it was run: SyntaxError: '\(' was never closed"),
        ("x = 1\ny = z", "cpu", r"wrong.py, line 2: failed when it was run: NameError: name 'z' is not defined"),
        ("def experiment(profile):\n    return 1 / 0", "cpu", r"line 2: experiment\('cpu'\) failed: ZeroDivisionError"),
        (
            "from expunge.bench.tasks import Scenario\nScenario(kind='rnd')",
            "cpu",
            r"wrong.py, line 2: failed when it was run: kind='rnd': choose from random, in-class, sequence",
        ),
        ("x = 1", "cpu", r"defines no experiment\(profile\)"),
        ("def experiment(profile): return 3", "cpu", r"returned int, and not an Experiment"),
    ],
)
def test_a_file_that_defines_no_experiment_is_refused(tmp_path, text, profile, message):
    file = tmp_path / "wrong.py"
    write_text(file, text)
    with without_type_checks(), pytest.raises(ConfigError, match=message):
        experiments.load(file, profile, None)


def test_a_mistake_in_an_experiment_file_is_said_in_one_line(tmp_path, capsys):
    file = tmp_path / "wrong.py"
    write_text(file, "import expunge\nexpunge.nothing_of_this_name\n")
    assert main(["bench", "status", str(file), "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"expunge: {file}, line 2: failed when it was run: AttributeError")
    assert "Traceback" not in said
    assert "mistake of ours" not in said


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "rnd"}, "kind='rnd': choose from random, in-class, sequence, cross-backdoor"),
        ({"kind": "random"}, "amount=0.0: of a removal it is the share of the training images, above 0 and below 1"),
        ({"kind": "sequence", "amount": 10}, "amount=10: of a removal it is the share"),
        ({"kind": "random", "amount": "0.1"}, "amount='0.1': give a number"),
        (
            {"kind": "in-class", "amount": 0.1},
            "amount=0.1: of a class it is how many images are removed: a whole number",
        ),
        ({"kind": "random", "amount": 0.1, "round": 2}, "round=2: only a sequence has rounds, and not random"),
        ({"kind": "sequence", "amount": 0.1, "round": 0}, "round=0: count deletions from 1"),
        ({"kind": "random", "amount": 0.1, "classes": (0,)}, r"classes=\(0,\): only a cross-backdoor has this"),
        ({"kind": "random", "amount": 0.1, "gamma": 0.5}, "gamma=0.5: only a cross-backdoor has this"),
        ({"kind": "in-class", "amount": 5, "known_are": "removed"}, "known_are='removed': only a cross-backdoor"),
        ({"kind": "cross-backdoor"}, r"classes=\(\): name those whose images get the cross"),
        ({"kind": "cross-backdoor", "classes": (0, 0)}, r"classes=\(0, 0\): name every class once"),
        ({"kind": "cross-backdoor", "classes": (-1,)}, r"classes=\(-1,\): name those"),
        ({"kind": "cross-backdoor", "classes": (0,), "amount": 0.1}, "amount=0.1: a backdoor has none"),
        ({"kind": "cross-backdoor", "classes": (0,), "gamma": 0}, "gamma=0: choose a share above 0, up to 1"),
        ({"kind": "cross-backdoor", "classes": (0,), "known_are": "gone"}, "known_are='gone': choose from corrected"),
    ],
)
def test_a_scenario_that_cannot_be_is_refused(values, message):
    with without_type_checks(), pytest.raises(ConfigError, match=message):
        Scenario(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"dataset": "cifar11"},
            "dataset='cifar11': choose from digits, cifar10, cifar100, svhn, mnist, fashion-mnist",
        ),
        ({"model": "convnets"}, "model='convnets': choose from mlp, convnet"),
        ({"model": "mlp", "settings": ()}, "model='mlp'.*An experiment gives classes and channels; .* takes widths"),
        (
            {"settings": (("widht", 8),)},
            "unexpected keyword argument 'widht'.* this model takes channels, classes, widths",
        ),
        ({"settings": (("classes", 8),)}, "multiple values for keyword argument 'classes'"),
        ({"settings": ("widths", 8)}, r"settings=\('widths', 8\): write pairs: \(\(\"name\", value\),\)"),
        ({"settings": (("widths", [8]),)}, r"widths=\[8\]: give a number, a text, None, or a tuple of these"),
        ({"settings": (("widths", (8,)),) * 2}, "give every setting once"),
        ({"settings": ((1, 2),)}, "the first of each pair is a name"),
        ({"recipe": 30}, r"recipe=30: write Recipe\(epochs=…, lr=…\)"),
        ({"recipe": Recipe(epochs=0, lr=0.1)}, "recipe.epochs=0: an original must train"),
        ({"scenario": "random"}, r"scenario='random': write Scenario\(kind=…\)"),
        ({"train": 3000}, "train=3000: of the 1797 digits give 1 to 1796: the others are the test images"),
        ({"train": 0}, "train=0: of the 1797 digits"),
        ({"train": 0.5}, "train=0.5: give a number of images, or 0 for all"),
        ({"test": 100}, "test=100: the digits that are not trained on are the test images"),
        ({"threads": 0}, "threads=0: give 1 or more"),
        ({"device": "gpu"}, "device='gpu': torch has none of this name. Write cpu or cuda"),
    ],
)
def test_a_task_that_cannot_be_is_refused(values, message):
    with without_type_checks(), pytest.raises(ConfigError, match=message):
        replace(DIGITS, **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": ""}, "name='': give a contender a name"),
        ({"entry": "relaod"}, r"no entry relaod\. There are reload"),
        (
            {"settings": (("selectr", "obs"),)},
            "contender 'x': reload has no setting 'selectr'. It has priming_lr, .*selector",
        ),
        ({"settings": (("selector", "kv"),)}, "reload refuses this: selector='kv': choose from small-kv"),
        (
            {"settings": (("reset_fraction", "a"),)},
            "settings=.*reset_fraction.* reload refuses this: '<=' not supported",
        ),
        ({"settings": (("fine_tune.lr", -1.0),)}, "reload refuses this: lr=-1.0"),
        ({"entry": "retrain", "settings": (("lr", 1),)}, "settings=.*: retrain has none of its own. Leave them out"),
        ({"tuned": "no"}, "tuned='no': write True, False or 'blind'"),
        ({"cached_loss": "mse"}, "cached_loss='mse': choose from cross_entropy, logit_margin, or leave it out"),
    ],
)
def test_a_contender_that_cannot_be_is_refused(values, message):
    with without_type_checks(), pytest.raises(ConfigError, match=message):
        Contender(**{"name": "x", "entry": "reload", **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budget": 5}, r"budget=5: write Recipe\("),
        ({"trials": 2.5}, "trials=2.5: give a whole number"),
        ({"rehearsals": 1001}, r"rehearsals=1001: write a tuple of seeds, as \(1001,\)"),
        ({"rehearsals": (7, 7)}, "name every seed once"),
    ],
)
def test_an_effort_of_another_kind_is_refused(values, message):
    with without_type_checks(), pytest.raises(ConfigError, match=message):
        replace(BRIEF, **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "a/b"}, "name='a/b': a folder is called after it"),
        ({"tasks": DIGITS}, r"tasks: write a tuple of Task, with a comma after the last"),
        ({"tasks": ()}, r"tasks=\(\): there must be one"),
        ({"tasks": (DIGITS, replace(DIGITS, train=50))}, "scenarios of the tasks: random 10 % would be there twice"),
        ({"contenders": list(TWO)}, "contenders: write a tuple of Contender"),
        ({"contenders": (Contender(name="x", entry="retrain"),)}, "entry='retrain': it is in every table anyway"),
        ({"shown": "ΔFE"}, "shown: write a tuple of str"),
        ({"shown": ()}, "there must be one metric in the table"),
        ({"shown": ("DFA",)}, "'DFA' is not measured in these scenarios. There are NA, .*ΔFA"),
        ({"shown": ("Acc_corr",)}, "'Acc_corr' is not measured in these scenarios"),
        ({"leading": "dFE"}, "'dFE' is not measured in these scenarios"),
    ],
)
def test_an_experiment_that_cannot_be_is_refused(values, message):
    with without_type_checks(), pytest.raises(ConfigError, match=message):
        replace(TINY, **values)
    assert replace(TINY, tasks=(DIGITS, replace(DIGITS, scenario=CROSS)), shown=("Acc_corr", "ΔFE")).shown


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scenario": Scenario(kind="random", amount=0.01)}, "amount=0.01 is 0 of 40 training images at a time"),
        (
            {"scenario": Scenario(kind="in-class", amount=4)},
            "amount=4 images of one class: .*no more than 4 of 40 training",
        ),
        ({"scenario": Scenario(kind="cross-backdoor", classes=(0, 10))}, "digits has classes 0 to 9"),
        ({"model": "vgg16", "settings": ()}, r"model='vgg16'.* does not work on images of \(1, 8, 8\)"),
        ({"settings": (("widths", (8,) * 5),)}, r"model='convnet'.* does not work on images of"),
    ],
)
def test_a_task_that_does_not_fit_its_data_is_refused_before_anything_runs(values, message):
    with without_type_checks(), pytest.raises(ConfigError, match=message):
        require_fit(replace(DIGITS, **values), None)
    require_fit(DIGITS, None)


def test_more_images_than_a_dataset_has_are_refused_before_anything_runs(monkeypatch):
    def few(count):
        return Images(torch.zeros(count, 3, 32, 32, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64))

    data = ImageData("cifar10", tuple("abcdefghij"), few(50), few(20))
    monkeypatch.setattr(fit, "images", lambda task, folder: data)
    task = replace(DIGITS, dataset="cifar10")
    require_fit(task, None)
    with pytest.raises(ConfigError, match=r"train=51: cifar10 has 50 such images. Take fewer, or 0 for all"):
        require_fit(replace(task, train=51), None)
    with pytest.raises(ConfigError, match="test=21: cifar10 has 20 such images"):
        require_fit(replace(task, test=21), None)
    monkeypatch.setattr(fit, "images", lambda task, folder: replace(data, test=None))
    with pytest.raises(ConfigError, match="cifar10 has no test images"):
        require_fit(task, None)


def test_profiles_refuse_the_digits_and_trainings_too_short_for_a_budget():
    with pytest.raises(ConfigError, match=r"they are 1797 images, and a profile takes more. Write a Task of your own"):
        profiles.task("cpu", "digits", RANDOM)
    with pytest.raises(ConfigError, match=r"recipe.epochs=4: 0.12 of these less two leaves -2 .* Train for 34 or more"):
        profiles.effort(DIGITS, "cpu")
    assert profiles.effort(replace(DIGITS, recipe=Recipe(epochs=34, lr=0.1)), "cpu").budget.epochs == 2


def test_mistakes_are_named_with_their_cure(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such experiment"):
        experiments.load(tmp_path / "none.py", "cpu", None)
    with pytest.raises(ConfigError, match="reload would be there twice"):
        tiny(contenders=TWO[:1] * 2)
    with pytest.raises(ConfigError, match=r"--data DIR or in the environment variable EXPUNGE_DATA"):
        records(replace(DIGITS, dataset="cifar10"), 0, None)
    with pytest.raises(MissingData, match="expunge data get cifar10"):
        records(replace(DIGITS, dataset="cifar10"), 0, tmp_path)
    with pytest.raises(ConfigError, match="jobs=0: at least one process"):
        Processes(Store(tmp_path), 0)
    with pytest.raises(IncompleteRun, match=r"there is no result of the stage 'original \(random"):
        Store(tmp_path).result(TINY.evaluations([0])[0].of("original"))
    with pytest.raises(ConfigError, match="no such rows"):
        difference.rows_of(tmp_path)
    assert main(["bench", "run", "experiments/table1.py", "--seeds", "0"]) == 2


def test_other_data_than_planned_is_refused(tmp_path, monkeypatch):
    from expunge.bench import tasks

    monkeypatch.setattr(tasks, "_read", lambda dataset, folder: (None, "found"))
    with pytest.raises(MismatchError, match="is not the data that this run was planned with"):
        tasks.images(replace(DIGITS, dataset="cifar10", fingerprint="planned"), tmp_path)


def test_without_ray_its_absence_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'expunge\[cluster\]'.*--jobs N"):
        RayCluster(Store(tmp_path))


@pytest.mark.slow
def test_ray_gives_the_same_rows_and_a_killed_worker_costs_nothing(tmp_path, unbroken, monkeypatch):
    pytest.importorskip("ray")
    marker = tmp_path / "killed"

    def killed_once(text):
        if not marker.exists() and '"step": "tune"' in text:
            marker.write_text("", encoding="utf-8")
            os.kill(os.getpid(), signal.SIGKILL)
        from expunge.bench import workers as there  # in a process of Ray: nothing is patched there

        return there.serve_one(text)

    monkeypatch.setattr(workers, "serve_one", killed_once)
    said = []
    store = Store(tmp_path / "out")
    carry_out(TINY.evaluations([0]), store, RayCluster(store, jobs=2), said.append)
    assert values(experiments.gather(TINY, [0], store)) == values(unbroken)
    assert sum(line.startswith("begun again: tune") for line in said) == 1


def test_of_several_tasks_the_leading_metric_is_put_into_one_table(tmp_path, capsys, monkeypatch):
    more = replace(DIGITS, scenario=Scenario(kind="random", amount=0.2))
    experiment = replace(tiny(DIGITS, more, contenders=()), leading="ΔFE")
    folder = run(experiment, tmp_path)
    together = experiments.across(experiment, read_rows(folder / "rows.csv"))
    assert {(each.scenario, each.metric) for each in together} == {
        ("all scenarios", "ΔFE, random 10 %"),
        ("all scenarios", "ΔFE, random 20 %"),
    }
    assert experiments.across(TINY, read_rows(folder / "rows.csv")) == []


def test_before_anything_is_done_the_table_says_so(tmp_path, capsys):
    file = tmp_path / "tiny.py"
    file.write_text(FILE, encoding="utf-8")
    assert main(["bench", "table", str(file), "--out", str(tmp_path)]) == 0
    assert "Nothing of tiny is done yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value"), [("budget", Recipe(epochs=1, lr=0.1)), ("trials", 0), ("rehearsals", ()), ("references", 1)]
)
def test_an_effort_too_small_for_a_comparison_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"Effort: {name}.* a comparison takes"):
        replace(BRIEF, **{name: value})


def test_no_seed_is_both_tuned_on_and_reported():
    with pytest.raises(ConfigError, match="seed 1 is one that settings are tuned on"):
        tiny(effort=replace(BRIEF, rehearsals=(1,))).evaluations([0, 1])


def test_a_repetition_is_planned_seed_by_seed():
    seeds = [stage.seed for stage in TINY.evaluations([0, 1])]
    assert seeds == sorted(seeds)


def test_paths_of_results_are_short_and_say_what_they_are(tmp_path):
    stage = TINY.evaluations([0])[3]
    assert Store(Path("x")).folder(stage).name.startswith("evaluate-")
    assert len(Store(Path("x")).folder(stage).name) < 32
