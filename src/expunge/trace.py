"""`Trace`: what an unlearning did and what it cost, filled while it runs."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

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
    reset: dict[str, float] = field(default_factory=dict)  # re-initialised share of each tensor
    stopped: str = ""  # why training ended
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    watch: Watch | None = field(default=None, repr=False, compare=False)
    _watching: float = field(default=0.0, repr=False, compare=False)

    @contextmanager
    def stage(self, name: str, model: nn.Module) -> Iterator[None]:
        """Time a stage, then show the model to whoever watches; watching is not counted."""
        _synchronise()
        start, watched = time.perf_counter(), self._watching
        yield
        _synchronise()
        spent = time.perf_counter() - start - (self._watching - watched)
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        self.show(name, model)

    def show(self, moment: str, model: nn.Module) -> None:
        """Let the watcher look at the model."""
        if self.watch is not None:
            start = time.perf_counter()
            self.watch(moment, model)
            self._watching += time.perf_counter() - start

    def as_dict(self) -> dict[str, Any]:
        """Everything measured, as plain values for JSON."""
        hidden = ("watch", "_watching")
        return {name: value for name, value in vars(self).items() if name not in hidden}


def _synchronise() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
