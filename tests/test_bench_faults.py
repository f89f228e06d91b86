"""What kills, fills or doubles a run of an experiment costs no result."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from expunge import resuming
from expunge.bench import experiments, runner, steps, workers
from expunge.bench.judging import SPENT
from expunge.bench.runner import Ended, Serial, carry_out
from expunge.bench.stages import closure
from expunge.bench.store import Store, read_json
from expunge.bench.workers import Processes
from expunge.errors import IncompleteRun
from expunge.rows import read_rows
from tests.tiny_bench import FILE, TINY, run, values


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
    wait_for(lambda: not alive(int(number)))


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


def test_a_worker_that_cannot_be_started_fails_its_stage(tmp_path, monkeypatch):
    def refused():
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(workers, "_process", refused)
    with pytest.raises(IncompleteRun, match=r"no worker could be started \(Resource .*\); ask for fewer --jobs"):
        carry_out(TINY.evaluations([0])[:1], Store(tmp_path), Processes(Store(tmp_path), 2))


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
