"""A process that fails or is killed ends all of a job, with its cause."""

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from expunge import cross_entropy, gradient, train
from expunge.errors import ProcessFailed
from tests.processes import RECIPE, Failing, all_well, in_processes, network, records, sharded


def fails(how: str, what: str) -> None:
    model = sharded(network()) if "sharded" in what else network()
    if "gradient" in what:
        gradient(model, Failing(how), records(), micro_batch=8)
    else:
        train(model, records(), Failing(how), RECIPE, seed=0)


@pytest.mark.parametrize("what", ["gradient", "training", "sharded gradient", "sharded training"])
def test_a_process_that_fails_ends_all_with_its_cause(what: str, tmp_path: Path) -> None:
    first, last = in_processes(2, fails, tmp_path, "raise", what)
    assert last == "KeyError: 'no such label'"
    assert first.startswith("ProcessFailed: ")
    assert "process 1" in first
    assert "failed with KeyError: 'no such label'" in first


@pytest.mark.parametrize("what", ["gradient", "sharded training"])
def test_a_process_that_is_killed_ends_all(what: str, tmp_path: Path) -> None:
    start = time.monotonic()
    first, last = in_processes(2, fails, tmp_path, "kill", what)
    assert first.startswith(
        "ProcessFailed: another of the 2 processes ended: without a word (killed, or out of memory)"
    )
    assert last == ""
    assert time.monotonic() - start < 40  # the timeout of the group is 50


def fails_in_time(alone: dict[str, Tensor]) -> None:
    model = network()
    with pytest.raises((KeyError, ProcessFailed)):
        gradient(model, Failing("raise"), records(), micro_batch=8)
    again = gradient(model, cross_entropy, records(), micro_batch=8)
    assert all(torch.equal(again.total[name], tensor) for name, tensor in alone.items())


def test_a_job_that_caught_the_failure_can_go_on(tmp_path: Path) -> None:
    all_well(2, fails_in_time, tmp_path, gradient(network(), cross_entropy, records(), micro_batch=8).total)
