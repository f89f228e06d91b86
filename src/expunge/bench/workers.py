"""Stages in other processes on this machine, or on a Ray cluster. Texts go to and fro, no pickled objects of ours."""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from expunge.allocator import keep_freed_memory
from expunge.bench.runner import Ended, attempt
from expunge.bench.stages import Stage, from_plain
from expunge.bench.store import Store
from expunge.errors import ConfigError, MissingExtra

_LOST = "its worker died"


class Processes:
    """Worker processes that take one stage after another; one that dies is replaced."""

    def __init__(self, store: Store, jobs: int) -> None:
        """Start nothing yet: a worker begins with its first stage.

        Raises:
            ConfigError: Fewer than one job.
        """
        if jobs < 1:
            raise ConfigError(f"jobs={jobs}: at least one process must work.")
        self._store, self.free = store, jobs
        self._todo: queue.Queue[Stage | None] = queue.Queue()
        self._ended: queue.Queue[Ended] = queue.Queue()
        self._workers: list[subprocess.Popen[str] | None] = [None] * jobs
        self._threads = [threading.Thread(target=self._serve, args=(place,), daemon=True) for place in range(jobs)]
        for thread in self._threads:
            thread.start()

    def start(self, stage: Stage) -> None:
        """Hand a stage to the next worker that is free."""
        self.free -= 1
        self._todo.put(stage)

    def wait(self) -> Ended:
        """The next stage that ends."""
        ended = self._ended.get()
        self.free += 1
        return ended

    def close(self) -> None:
        """End the workers; a stage that is not done is not there at all."""
        for _ in self._threads:
            self._todo.put(None)
        for worker in self._workers:
            if worker is not None:
                worker.terminate()
                worker.wait()
        for thread in self._threads:
            thread.join()

    def _serve(self, place: int) -> None:
        while (stage := self._todo.get()) is not None:
            worker = self._workers[place]
            try:
                if worker is None or worker.poll() is not None:
                    worker = self._workers[place] = _process()
            except OSError as error:  # too many processes, or no memory for one more
                self._ended.put(Ended(stage, "lost", f"no worker could be started ({error}); ask for fewer --jobs"))
                continue
            self._ended.put(_asked(worker, stage, self._store))


class RayCluster:
    """Stages as tasks of Ray, on this machine or a cluster whose machines share the folder of the store."""

    def __init__(self, store: Store, *, address: str = "", jobs: int = 0, threads: int = 1, gpus: float = 0) -> None:
        """Join the cluster at an address, or start one here.

        Args:
            store: Where results are kept; every machine must see it under the same path.
            address: Of a running cluster; "" starts one on this machine.
            jobs: Stages at a time on a cluster that is started here; 0: as many as there are cores for.
            threads: Cores that a stage takes.
            gpus: GPUs that a stage takes.

        Raises:
            MissingExtra: Ray is not installed.
            ConfigError: There is no cluster at the address.
        """
        self._ray = _ray()
        self._store, self._running = store, dict[Any, Stage]()
        local = {"num_cpus": jobs * threads or None, "include_dashboard": False}
        try:
            self._ray.init(address=address or "local", log_to_driver=False, **({} if address else local))
        except (ConnectionError, ValueError) as error:
            raise ConfigError(
                f"ray-address={address!r}: no cluster could be joined ({error}). Start one with `ray start --head`, or "
                "leave the address out to start one here."
            ) from error
        # Ray would retry by itself, unseen; here a lost stage is said and counted.
        self._work = self._ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0)(serve_one)

    @property
    def free(self) -> int:
        """Ray queues what it has no room for."""
        return 1000 - len(self._running)

    def start(self, stage: Stage) -> None:
        """Submit a stage."""
        self._running[self._work.remote(request(stage, self._store))] = stage

    def wait(self) -> Ended:
        """The next stage that ends."""
        ready, _ = self._ray.wait(list(self._running), num_returns=1)
        stage = self._running.pop(ready[0])
        try:
            return answered(stage, self._ray.get(ready[0]))
        except self._ray.exceptions.RayError as error:
            return Ended(stage, "lost", f"{_LOST}: {type(error).__name__}")

    def close(self) -> None:
        """Leave the cluster, and end it if it was started here."""
        self._ray.shutdown()


def request(stage: Stage, store: Store) -> str:
    """A stage and where to do it, as text."""
    data = None if store.data is None else str(store.data.resolve())
    return json.dumps({"stage": stage.plain(), "root": str(store.root.resolve()), "data": data})


def serve_one(text: str) -> str:
    """Do what a request asks for; the answer, as text."""
    asked = json.loads(text)
    store = Store(Path(asked["root"]), Path(asked["data"]) if asked["data"] else None)
    ended = attempt(from_plain(asked["stage"]), store)
    return json.dumps({"state": ended.state, "why": ended.why})


def answered(stage: Stage, text: str) -> Ended:
    """How a stage ended, from an answer."""
    return Ended(stage, **json.loads(text))


def main() -> None:
    """A worker: a request a line on standard input, an answer a line on standard output; ends with its input."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever prints must not garble the answers
    keep_freed_memory()  # the process is ours
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    try:
        for line in sys.stdin:
            answers.write(serve_one(line) + "\n")
    except KeyboardInterrupt:
        sys.exit(130)  # whoever started this was interrupted, too, and says so


def _follow(parent: int) -> None:
    """End this process when the one that started it has gone, in the middle of a stage if need be."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _process() -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from expunge.bench.workers import main; main()"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")


def _asked(worker: subprocess.Popen[str], stage: Stage, store: Store) -> Ended:
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        worker.stdin.write(request(stage, store) + "\n")
        worker.stdin.flush()
        answer = worker.stdout.readline()
    except OSError:
        answer = ""
    if not answer.endswith("\n"):
        return Ended(stage, "lost", f"{_LOST} (exit code {worker.wait()})")
    return answered(stage, answer)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise MissingExtra(
            "--ray needs Ray: pip install 'expunge[cluster]'. Without it, --jobs N works with N processes here."
        ) from error
    return ray
