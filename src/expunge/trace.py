"""`Trace`: what an unlearning did and what it cost, filled while it runs."""

import ctypes
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge import sharding

Watch = Callable[[str, nn.Module], None]


@dataclass
class Trace:
    """What an unlearning did, step by step.

    ``facts`` holds what a method found out, by name; a method documents its own.
    """

    method: str
    seed: int
    seconds: dict[str, float] = field(default_factory=dict)  # wall time by stage, in order
    losses: list[float] = field(default_factory=list)  # nats a term, training loss of each step
    epoch_ends: list[int] = field(default_factory=list)  # the number of steps after each epoch
    backwarded: int = 0  # examples (terms) that went forward and backward
    forwarded: int = 0  # and those that only went forward
    peak_memory: int | None = None  # bytes at the peak above those at the start; None: not measurable here
    reset: dict[str, float] = field(default_factory=dict)  # re-initialised share of each tensor
    stopped: str = ""  # why training ended
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    watch: Watch | None = field(default=None, repr=False, compare=False)
    _uncounted: float = field(default=0.0, repr=False, compare=False)

    def __str__(self) -> str:
        """What was done in a few lines; everything is in `as_dict`."""
        spent = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in self.seconds.items())
        lines = [f"{self.method}, seed {self.seed}: {spent or 'nothing timed'}; {len(self.losses)} steps of training"]
        lines += [f"stopped: {self.stopped}"] if self.stopped else []
        lines += [f"{name}: {value}" for name, value in self.facts.items()]
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])

    @contextmanager
    def stage(self, name: str, model: nn.Module) -> Iterator[None]:
        """Time a stage, then show the model to whoever watches; watching is not counted."""
        _synchronise()
        start, watched = time.perf_counter(), self._uncounted
        yield
        _synchronise()
        spent = time.perf_counter() - start - (self._uncounted - watched)
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        self.show(name, model)

    @contextmanager
    def measuring_memory(self, device: torch.device) -> Iterator[None]:
        """Record by how much the memory in use grew at its peak.

        On a CUDA device that is what torch allocated there. On the CPU it is the resident memory of the process, other
        threads included, where Linux lets the process reset its high-water mark; elsewhere nothing is recorded.
        """
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            start = torch.cuda.memory_allocated(device)
            yield
            self.peak_memory = torch.cuda.max_memory_allocated(device) - start
        elif device.type == "cpu" and _reset_high_water_mark():
            start = _resident("VmRSS")
            yield
            self.peak_memory = max(_resident("VmHWM") - start, 0)
        else:
            yield

    def count_earlier(self, seconds: float) -> None:
        """Add to the stage that runs what it took before it was interrupted."""
        self._uncounted -= seconds

    def warn(self, message: str) -> None:
        """Note something that whoever reads the trace must know, and say it at once."""
        warnings.warn(message, stacklevel=2)
        self.warnings.append(message)

    def show(self, moment: str, model: nn.Module) -> None:
        """Let the watcher look at the model."""
        if self.watch is not None:
            start = time.perf_counter()
            self.watch(moment, model)
            sharding.settle(model)  # a forward pass without a backward pass leaves FSDP2's root whole
            self._uncounted += time.perf_counter() - start

    def as_dict(self) -> dict[str, Any]:
        """Everything measured, as plain values for JSON."""
        hidden = ("watch", "_uncounted")
        return {name: value for name, value in vars(self).items() if name not in hidden}


def _reset_high_water_mark() -> bool:
    """Let the peak of the resident memory start anew, and say whether that worked.

    What the C library keeps of memory that was freed before is given back first: growing into it would not show.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        _resident("VmHWM")
    except (OSError, AttributeError, StopIteration, TypeError):  # no Linux, another C library, or not permitted
        return False
    return True


def _resident(field: str) -> int:
    """A size of the process, bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def _synchronise() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
