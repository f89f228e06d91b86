"""Carrying out the stages of an experiment: in order, each as soon as what it needs is done."""

import errno
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from expunge.bench.stages import Stage, closure
from expunge.bench.steps import do
from expunge.bench.store import Store
from expunge.errors import ExpungeError, IncompleteRun

RETRIES = 2  # times that a stage is begun again when its worker was lost
Say = Callable[[str], None]


@dataclass(frozen=True)
class Ended:
    """How a stage ended."""

    stage: Stage
    state: Literal["done", "failed", "lost", "full"]  # lost: its worker died; full: no space on the disk
    why: str = ""


@runtime_checkable
class Hands(Protocol):
    """Who does stages: this process, others, or a cluster."""

    @property
    def free(self) -> int:
        """How many stages more can be begun now."""
        ...

    def start(self, stage: Stage) -> None:
        """Begin a stage."""
        ...

    def wait(self) -> Ended:
        """The next stage that ends."""
        ...

    def close(self) -> None:
        """Let go of everyone."""
        ...


class Serial:
    """This process, one stage at a time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._ended: deque[Ended] = deque()

    @property
    def free(self) -> int:
        """One at a time."""
        return 0 if self._ended else 1

    def start(self, stage: Stage) -> None:
        """Do it at once."""
        self._ended.append(attempt(stage, self._store))

    def wait(self) -> Ended:
        """What was done."""
        return self._ended.popleft()

    def close(self) -> None:
        """Nobody to let go of."""


def attempt(stage: Stage, store: Store) -> Ended:
    """Do a stage; an error becomes how it ended."""
    try:
        do(stage, store)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            return Ended(stage, "full", str(error))
        return Ended(stage, "failed", f"{type(error).__name__}: {error}")
    except Exception as error:  # whatever it is, other stages go on, and the run says at its end what failed
        if not isinstance(error, ExpungeError):
            traceback.print_exc()
        return Ended(stage, "failed", f"{type(error).__name__}: {error}")
    return Ended(stage, "done")


def carry_out(wanted: Iterable[Stage], store: Store, hands: Hands, say: Say = lambda _: None) -> None:
    """Do stages and all that they need, unless done already.

    Args:
        wanted: What is asked for.
        store: Where results are kept.
        hands: Who does it; closed at the end.
        say: Called with a line for each stage that ends.

    Raises:
        IncompleteRun: Stages failed, or the disk is full; what is done is kept.
    """
    todo = closure(wanted, store.done)
    waiting = dict(todo)
    total, lost = len(todo), dict.fromkeys(todo, 0)
    failed: dict[str, str] = {}
    started: dict[str, float] = {}
    try:
        while waiting or started:
            for key, stage in list(waiting.items()):
                if not hands.free:
                    break
                needs = {need.key for need in stage.needs.values()} & todo.keys()
                if needs & failed.keys():
                    failed[key] = "what it needs failed"
                    del waiting[key]
                elif not needs & (waiting.keys() | started.keys()):
                    started[key] = time.perf_counter()
                    del waiting[key]
                    hands.start(stage)
            if not started:
                continue
            ended = hands.wait()
            key, spent = ended.stage.key, time.perf_counter() - started.pop(ended.stage.key)
            if ended.state == "full":
                raise IncompleteRun(
                    f"the disk is full: {ended.why}. Free some space below {store.root} and run the same command "
                    "again: everything that is done is kept, and nothing is half-written."
                )
            if ended.state == "lost" and lost[key] < RETRIES:
                lost[key] += 1
                waiting = {key: ended.stage, **waiting}
                say(f"begun again: {ended.stage.label}: {ended.why}")
                continue
            if ended.state != "done":
                failed[key] = f"{ended.stage.label}: {ended.why}"
            over = total - len(waiting) - len(started)
            say(f"[{over}/{total}] {ended.state}: {ended.stage.label} ({spent:.0f} s) {ended.why}".rstrip())
    finally:
        hands.close()
    causes = [why for why in failed.values() if why != "what it needs failed"]
    if causes:
        raise IncompleteRun(
            f"{len(failed)} of {total} stages are missing. What failed:\n  "
            + "\n  ".join(causes)
            + "\nSee to the cause and run the same command again: what is done is kept."
        )
