"""The trace: stages are timed, watching is not, and what it says is plain values."""

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from expunge import trace as trace_module
from expunge import unlearn
from expunge.trace import Trace
from tests.contract import BRIEF, quick, world


@dataclass
class Clock:
    now: float = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(trace_module, "time", fake)
    return fake


def test_stages_are_timed_and_watching_is_not(clock):
    model, seen = nn.Linear(1, 1), []

    def watch(moment: str, shown: nn.Module) -> None:
        assert shown is model
        seen.append((moment, clock.now))
        clock.now += 100

    trace = Trace("x", 0, watch=watch)
    with trace.stage("first", model):
        clock.now += 2
        trace.show("inside", model)
        clock.now += 3
    with trace.stage("second", model):
        clock.now += 7
    with trace.stage("first", model):
        clock.now += 1
    assert trace.seconds == {"first": 6, "second": 7}
    assert seen == [("inside", 2), ("first", 105), ("second", 212), ("first", 313)]


def test_a_trace_without_a_watcher_only_times(clock):
    trace = Trace("x", 0)
    with trace.stage("only", nn.Linear(1, 1)):
        clock.now += 4
    assert trace.seconds == {"only": 4}


def test_stages_wait_for_the_accelerator(clock, monkeypatch):
    """Its queue is emptied before a clock is read, or a stage would pay for the one before it."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: setattr(clock, "now", clock.now + 10))
    trace = Trace("x", 0)
    with trace.stage("only", nn.Linear(1, 1)):
        clock.now += 1
    assert trace.seconds == {"only": 11}
    assert clock.now == 21


def test_the_watcher_is_no_part_of_what_a_trace_says():
    watched = Trace("x", 0, watch=lambda moment, model: None)
    watched.show("moment", nn.Linear(1, 1))
    assert watched == Trace("x", 0)
    assert "watch" not in repr(watched)


def test_a_trace_is_plain_values_for_json():
    trace = Trace("x", 3, watch=lambda moment, model: None)
    trace.facts["share"] = 0.5
    values = json.loads(json.dumps(trace.as_dict()))
    assert values == {
        "method": "x",
        "seed": 3,
        "seconds": {},
        "losses": [],
        "epoch_ends": [],
        "backwarded": 0,
        "forwarded": 0,
        "peak_memory": None,
        "reset": {},
        "stopped": "",
        "facts": {"share": 0.5},
        "warnings": [],
    }


def test_epochs_are_shown_to_the_watcher_in_order():
    here, seen = world(), []
    unlearn(here.model, here.blind(), quick("reload"), watch=lambda moment, _: seen.append(moment))
    epochs = [f"epoch {number}" for number in range(1, BRIEF.epochs + 1)]
    assert seen == ["difference", "ascend", "select", "re-initialise", *epochs, "fine-tune"]
