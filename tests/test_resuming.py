"""A training that was interrupted goes on, and ends with the same bits."""

import itertools
import json
import math
import os
import signal
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from expunge import Blind, Examples, Recipe, Retrain, cross_entropy, logit_margin, resuming, train, unlearn
from expunge.batches import Batches
from expunge.errors import ConfigError, MismatchError
from expunge.trace import Trace
from tests.contract import architecture, examples, same, state
from tests.processes import RECIPE, all_well, in_processes, network, records, sharded, weights, whole

EPOCHS, BATCHES = 5, 4
RECIPES = {
    "sgd": Recipe(epochs=EPOCHS, lr=0.05, batch_size=16),
    "sgd without momentum": Recipe(epochs=EPOCHS, lr=0.05, batch_size=16, momentum=0.0),
    "adamw": Recipe(epochs=EPOCHS, lr=0.01, batch_size=16, optimizer="adamw", schedule="one-cycle"),
}
DATA: dict[str, Batches] = {
    "in memory": examples(),
    "dataset": TensorDataset(*examples().tensors),
    "batches": list(examples().fetch(torch.arange(60).split(16))),
}


@pytest.fixture(autouse=True)
def after_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "_EVERY", 0.0)


class Interrupted(Exception):
    pass


class Interrupting:
    """The loss, with an end in the middle of an epoch."""

    __qualname__ = "cross_entropy"  # the name that a file keeps

    def __init__(self, after: float = math.inf, seen: Callable[[], object] = lambda: None) -> None:
        self.calls, self.after, self.seen = 0, after, seen

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        self.seen()
        if self.calls > self.after:
            raise Interrupted
        return cross_entropy(model, batch)


def built(kind: str = "batch-norm", seed: int = 5) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return architecture(kind)


def interrupted(
    path: Path, recipe: Recipe = RECIPES["sgd"], data: Batches = DATA["in memory"], epochs: int = 2
) -> None:
    with pytest.raises(Interrupted):
        train(built(), data, Interrupting(BATCHES * epochs + 2), recipe, seed=0, resume=path)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("name", RECIPES)
def test_it_ends_with_the_bits_of_a_training_without_a_break(name, data, tmp_path):
    path, recipe = tmp_path / "state.safetensors", RECIPES[name]
    model = built()
    unbroken = train(model, DATA[data], cross_entropy, recipe, seed=0)
    interrupted(path, recipe, DATA[data], epochs=1)
    interrupted(path, recipe, DATA[data], epochs=1)  # twice, and one epoch further
    again, loss, trace = built(), Interrupting(), Trace("again", 0, losses=[9.0], epoch_ends=[1], backwarded=7)
    train(again, DATA[data], loss, recipe, seed=0, trace=trace, resume=path)
    assert same(state(again), state(model))
    assert loss.calls == BATCHES * (EPOCHS - 2)
    assert trace.losses == [9.0, *unbroken.losses]
    assert trace.epoch_ends == [1, *(1 + end for end in unbroken.epoch_ends)]
    assert trace.backwarded == 7 + unbroken.backwarded
    assert trace.facts["resumed"]["epochs"] == 2
    assert trace.stopped == unbroken.stopped


def test_a_retraining_goes_on_and_its_time_is_that_of_both_parts(tmp_path):
    path = str(tmp_path / "state.safetensors")
    given = {"retain": examples(), "fresh": lambda seed: built(seed=seed)}
    config = Retrain(recipe=RECIPES["sgd"], resume=path)
    whole_ = unlearn(built(), Blind(**given, loss_terms=cross_entropy), Retrain(recipe=RECIPES["sgd"]))
    with pytest.raises(Interrupted):
        unlearn(built(), Blind(**given, loss_terms=Interrupting(BATCHES * 3)), config)
    header, tensors = resuming_file(path)
    save_file(tensors, path, {resuming._FORMAT: json.dumps(header | {"seconds": 1000.0, "processor_seconds": 900.0})})
    done = unlearn(built(), Blind(**given, loss_terms=cross_entropy), config)
    assert same(state(done.model), state(whole_.model))
    assert 1000 < done.trace.seconds["train"] < 1060
    assert done.trace.facts["resumed"] == {"epochs": 3, "seconds": 1000.0, "processor_seconds": 900.0}


def resuming_file(path: Path | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[resuming._FORMAT]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no dictionary


def test_the_file_is_private_and_adds_up_what_was_spent(tmp_path):
    path = tmp_path / "state.safetensors"
    interrupted(path, epochs=1)
    first = resuming_file(path)[0]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    interrupted(path, epochs=1)
    second = resuming_file(path)[0]
    assert (first["epochs"], second["epochs"]) == (1, 2)
    assert second["seconds"] > first["seconds"] > 0
    assert second["processor_seconds"] > first["processor_seconds"] > 0


def test_it_is_written_at_most_once_a_minute(tmp_path, monkeypatch):
    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

        process_time = perf_counter

    clock, path = Clock(), tmp_path / "state.safetensors"
    monkeypatch.setattr(resuming, "_EVERY", 60.0)
    monkeypatch.setattr(resuming, "time", clock)
    found = []

    def watch(moment: str, _: nn.Module) -> None:
        found.append(resuming_file(path)[0]["epochs"] if path.exists() else 0)
        clock.now += 25

    train(built(), examples(), cross_entropy, RECIPES["sgd"], seed=0, trace=Trace("x", 0, watch=watch), resume=path)
    assert found == [0, 0, 0, 4, 4]


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 1}, "seed"),
    "recipe": ({"recipe": Recipe(epochs=EPOCHS, lr=0.06, batch_size=16)}, "recipe"),
    "freeze": ({"freeze_statistics": True}, "freeze_statistics"),
    "weights": ({"model": built(seed=6)}, "weights at the beginning"),
    "a record": ({"data": examples().without(torch.tensor([3]))}, "data"),
    "a label": (
        {"data": Examples(examples().tensors[0], (examples().tensors[1] + (torch.arange(60) == 7)) % 3)},
        "data",
    ),
    "positions": ({"data": Examples(*examples().tensors, positions=torch.arange(60) + 1)}, "data"),
    "loss": ({"loss_terms": logit_margin}, "loss"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_training_is_refused_and_the_file_stays(what, tmp_path):
    path = tmp_path / "state.safetensors"
    interrupted(path)
    before = path.read_bytes()
    changes, said = OTHERS[what]
    model = changes.get("model") or built()
    begun = state(model)
    usual = {"data": examples(), "loss_terms": cross_entropy, "recipe": RECIPES["sgd"], "seed": 0}
    with pytest.raises(ConfigError, match=f"after 2 epochs with another value of: {said}. Delete it to begin anew"):
        train(model, **usual | {k: v for k, v in changes.items() if k != "model"}, resume=path)
    assert path.read_bytes() == before
    assert same(state(model), begun)


def test_buffers_and_frozen_parameters_tell_trainings_apart(tmp_path):
    path = tmp_path / "state.safetensors"
    interrupted(path)
    moved, frozen = built(), built()
    moved[1].running_mean += 1
    next(frozen.parameters()).requires_grad_(False)
    for model, said in ((moved, "buffers at the beginning"), (frozen, "parameters to train")):
        with pytest.raises(ConfigError, match=f"another value of: {said}"):
            train(model, examples(), cross_entropy, RECIPES["sgd"], seed=0, resume=path)


@pytest.mark.parametrize("content", [b"", b"not a file of tensors", None])
def test_a_file_that_is_something_else_is_refused(content, tmp_path):
    path = tmp_path / "state.safetensors"
    if content is None:
        save_file({"x": torch.zeros(3)}, path)
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"is not the state of a training, or damaged .*Delete it to begin anew"):
        train(built(), examples(), cross_entropy, RECIPES["sgd"], seed=0, resume=path)
    assert path.read_bytes() == before


def test_what_the_file_cannot_hold_is_refused_before_anything_is_trained(tmp_path):
    path, loss = tmp_path / "state.safetensors", Interrupting(0)
    for other in ({"stop": lambda model, loss: None}, {"after_step": lambda step: None}):
        with pytest.raises(ConfigError, match=f"what {next(iter(other))} remembers of earlier epochs is in no file"):
            train(built(), examples(), loss, RECIPES["sgd"], seed=0, resume=path, **other)
    with pytest.raises(ConfigError, match="takes no new file"):
        train(built(), examples(), loss, RECIPES["sgd"], seed=0, resume="/proc/state.safetensors")


@pytest.mark.parametrize("chosen", ["float32", "bfloat16"])
def test_a_number_format_that_was_measured_is_not_measured_again(chosen, tmp_path):
    path = tmp_path / "state.safetensors"
    recipe = Recipe(epochs=EPOCHS, lr=0.05, batch_size=16, precision="fastest")
    interrupted(path, recipe)  # ten steps, of which six measure
    header, tensors = resuming_file(path)
    assert header["facts"]["precision"] in ("float32", "bfloat16")
    save_file(tensors, path, {resuming._FORMAT: json.dumps(header | {"facts": {"precision": chosen}})})
    low = []
    loss = Interrupting(seen=lambda: low.append(torch.is_autocast_enabled("cpu")))
    train(built(), examples(), loss, recipe, seed=0, resume=path)
    assert low == [chosen == "bfloat16"] * BATCHES * (EPOCHS - 2)


def together(folder: Path, alone: dict[str, Tensor]) -> None:
    import torch.distributed as dist

    path, model = folder / "state.safetensors", network()
    loss = Interrupting(9 if dist.get_rank() else 10)  # seven steps an epoch
    with pytest.raises(Exception):  # noqa: B017, PT011 on one an Interrupted, on the others a ProcessFailed
        train(model, records(), loss, RECIPE, seed=0, resume=path)
    again = network()
    trace = train(again, records(), cross_entropy, RECIPE, seed=0, resume=path)
    assert trace.facts["resumed"]["epochs"] == 1
    for name, tensor in weights(again).items():
        torch.testing.assert_close(tensor, alone[name], rtol=0, atol=1e-12)
    own = path if dist.get_rank() == 0 else folder / "elsewhere.safetensors"
    with pytest.raises(MismatchError, match="of 2 processes some see another file, or none"):
        train(network(), records(), cross_entropy, RECIPE, seed=0, resume=own)


MEMORY = {"sgd": "momentum_buffer", "adamw": "exp_avg"}


def ends_in_the_second_epoch(folder: Path, recipe: Recipe) -> None:
    import torch.distributed as dist

    loss = Interrupting(9 if dist.get_rank() else 100)  # seven steps an epoch
    train(sharded(network()), records(), loss, recipe, seed=0, resume=folder / "state.safetensors")


def goes_on(folder: Path, recipe: Recipe) -> None:
    path, unbroken, again = folder / "state.safetensors", sharded(network()), sharded(network())
    tensors = resuming_file(path)[1]
    assert (
        tensors["model/0.weight"].shape == tensors["optimizer/0/" + MEMORY[recipe.optimizer]].shape == (7, 5)
    )  # whole
    train(unbroken, records(), cross_entropy, recipe, seed=0)
    trace = train(again, records(), cross_entropy, recipe, seed=0, resume=path)
    assert trace.facts["resumed"]["epochs"] == 1
    assert same(weights(again), weights(unbroken))


def test_two_processes_go_on_together(tmp_path):
    model = network()
    train(model, records(), cross_entropy, RECIPE, seed=0)
    all_well(2, together, tmp_path, tmp_path, whole(dict(model.named_parameters())))


def keeps_by_the_clock_of_the_first(folder: Path, hurries: int) -> None:
    import torch.distributed as dist

    resuming._EVERY, path = 60.0, folder / "state.safetensors"
    now = itertools.count(0, 100 if dist.get_rank() == hurries else 0)
    resuming.time = SimpleNamespace(perf_counter=lambda: next(now), process_time=time.process_time)
    train(sharded(network()), records(), cross_entropy, RECIPE, seed=0, resume=path)
    dist.barrier()
    assert path.exists() == (hurries == 0)


@pytest.mark.parametrize("hurries", [0, 1])
def test_the_clock_of_the_first_process_decides_for_all(hurries, tmp_path):
    all_well(2, keeps_by_the_clock_of_the_first, tmp_path, tmp_path, hurries)


@pytest.mark.parametrize(("count", "recipe"), [(4, RECIPE), (2, replace(RECIPE, lr=0.01, optimizer="adamw"))])
def test_a_job_goes_on_with_a_model_in_pieces(count, recipe, tmp_path):
    ended = in_processes(count, ends_in_the_second_epoch, tmp_path, tmp_path, recipe)
    assert "ok" not in ended
    all_well(count, goes_on, tmp_path, tmp_path, recipe)


def test_a_killed_process_leaves_the_last_whole_state(tmp_path):
    path, model = tmp_path / "state.safetensors", built()
    train(model, examples(), cross_entropy, RECIPES["sgd"], seed=0)
    child = os.fork()
    if not child:

        def die_after_three() -> None:
            if path.exists() and resuming_file(path)[0]["epochs"] == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        train(built(), examples(), Interrupting(seen=die_after_three), RECIPES["sgd"], seed=0, resume=path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    again = built()
    assert train(again, examples(), cross_entropy, RECIPES["sgd"], seed=0, resume=path).facts["resumed"]["epochs"] == 3
    assert same(state(again), state(model))
