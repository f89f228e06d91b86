"""Where the results of stages are kept: a folder each, complete or not there at all."""

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.bench.stages import Stage
from expunge.errors import ConfigError, IncompleteRun
from expunge.files import sync, write_text
from expunge.provenance import environment, sources

DONE = "DONE"


@dataclass(frozen=True)
class Store:
    """A folder for the results of stages, and the folder that data is read from.

    Any number of runs may share it, at the same time too: a stage is locked by who does it, and whoever needs it
    meanwhile waits. The lock is the operating system's and goes when its process does, so that a killed run leaves
    none behind and no clock matters. Over a network file system the locks must work across machines (NFS 4 does).
    """

    root: Path
    data: Path | None = None

    def folder(self, stage: Stage) -> Path:
        """Where the result of a stage is, or will be."""
        return self.root / "stages" / stage.key

    def done(self, stage: Stage) -> bool:
        """Whether the result is there."""
        return (self.folder(stage) / DONE).exists()

    def result(self, stage: Stage) -> Path:
        """The folder of a stage that is done.

        Raises:
            IncompleteRun: It is not.
        """
        if not self.done(stage):
            raise IncompleteRun(
                f"{self.folder(stage)}: there is no result of the stage {stage.label!r}. `expunge bench run` makes it."
            )
        return self.folder(stage)

    def journal(self, stage: Stage) -> Path:
        """A file in which a stage may keep what it has done so far."""
        return self.root / "journals" / f"{stage.key}.jsonl"

    def unfinished(self, stage: Stage) -> Path:
        """A file in which a stage may keep the state of its training."""
        return self.root / "journals" / f"{stage.key}.safetensors"

    def make(self, stage: Stage, work: Callable[[Path], None]) -> bool:
        """Do a stage unless it is done: in a temporary folder, which is synced and renamed at the end.

        Args:
            stage: What to do.
            work: Does it, given the temporary folder.

        Returns:
            Whether it had to be done.
        """
        with self.locked(stage.key):
            if self.done(stage):
                return False
            final = self.folder(stage)
            temporary = final.with_name(f".{stage.key}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)  # of one that was killed: nobody else can be here
            try:
                temporary.mkdir(parents=True)
                write_json(temporary / "stage.json", stage.plain())
                work(temporary)
                write_json(temporary / "env.json", {**environment(), "sources": sources()})
                write_text(temporary / DONE, "")
                shutil.rmtree(final, ignore_errors=True)  # one without DONE: somebody took the marker away
                temporary.rename(final)
                sync(final.parent)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            for path in (self.journal(stage), self.unfinished(stage)):
                path.unlink(missing_ok=True)
        return True

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold a lock; wait while somebody else does."""
        import fcntl  # not on Windows

        path = self.root / "locks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fcntl.flock(file, fcntl.LOCK_EX)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield

    def holder(self, stage: Stage) -> str:
        """Who is doing a stage now, as "process 123 on host"; "" if nobody is."""
        import fcntl

        path = self.root / "locks" / stage.key
        if not path.exists():
            return ""
        with path.open("r", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip()
        return ""


def write_json(path: Path, value: object) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Raises:
        ConfigError: It is missing or damaged.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}). Remove the folder {path.parent} and run again: it is made anew."
        ) from error
