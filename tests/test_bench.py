"""The runner of experiments: stages done once, whatever kills them, and rows that do not depend on who made them."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from expunge import resuming
from expunge.bench import difference, experiments, judging, runner, steps, workers
from expunge.bench.judging import SPENT
from expunge.bench.printed import printed
from expunge.bench.runner import Ended, Serial, carry_out
from expunge.bench.stages import closure
from expunge.bench.store import Store, read_json
from expunge.bench.tasks import Scenario
from expunge.bench.workers import Processes, RayCluster
from expunge.cli import main
from expunge.errors import ConfigError, IncompleteRun, MissingExtra, NotFinite
from expunge.rows import Row, read_rows, write_rows
from tests.tiny_bench import CROSS, DIGITS, FILE, RECIPE, TINY, TWO, run, tiny, values


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


def test_a_training_that_was_interrupted_goes_on_and_its_time_counts(tmp_path, unbroken, monkeypatch):
    monkeypatch.setattr(resuming, "_EVERY", 0.0)
    kept = resuming.Resumable.keep

    def killed(self, epochs):
        kept(self, epochs)
        if epochs == 2:
            raise KeyboardInterrupt

    states = []
    monkeypatch.setattr(resuming.Resumable, "keep", killed)
    for _ in range(3):  # the original and two retrained models
        with pytest.raises(KeyboardInterrupt):
            run(TINY, tmp_path)
        states += [path for path in tmp_path.glob("journals/*.safetensors") if path not in states]
    monkeypatch.setattr(resuming.Resumable, "keep", kept)
    assert values(run(TINY, tmp_path)) == values(unbroken)
    assert len(states) == 3
    for path in states:
        trace = read_json(tmp_path / "stages" / path.stem / "trace.json")
        assert trace["facts"]["resumed"]["epochs"] == 2
        assert trace[SPENT] > trace["facts"]["resumed"]["processor_seconds"] > 0
    assert not list(tmp_path.glob("journals/*.safetensors"))


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


def test_paths_of_results_are_short_and_say_what_they_are(tmp_path):
    stage = TINY.evaluations([0])[3]
    assert Store(Path("x")).folder(stage).name.startswith("evaluate-")
    assert len(Store(Path("x")).folder(stage).name) < 32
