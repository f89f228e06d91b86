"""Two and four gloo processes do what one does, and end together."""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from expunge import (
    Blind,
    Examples,
    FineTune,
    Gradient,
    Recipe,
    Reload,
    SalUn,
    Sighted,
    cache,
    cross_entropy,
    distributed,
    gradient,
    seeded,
    train,
    unlearn,
)
from expunge.errors import ConfigError, MismatchError, ProcessFailed, UnsupportedModule
from expunge.params import smallest
from expunge.training import mean_loss
from tests import zoo

TYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
REMOVED = torch.tensor([3, 16, 17, 18, 19, 20, 21, 22, 23, 40, 99])
RECIPE = Recipe(epochs=3, lr=0.05, batch_size=16)
GRADIENT_LOSS = "cross_entropy"


def network(dtype: torch.dtype = torch.float64, seed: int = 3, middle: type[nn.Module] = nn.Identity) -> nn.Module:
    with seeded(seed, "model"):
        layers = (nn.Linear(zoo.FEATURES, 7), middle(7) if middle is nn.BatchNorm1d else middle(), nn.Tanh())
        return nn.Sequential(*layers, nn.Linear(7, zoo.CLASSES)).to(dtype)


def sharded(model: nn.Module, **options: object) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model[0], mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def records(dtype: torch.dtype = torch.float64, count: int = 101) -> Examples:
    return zoo.classification(count, dtype=dtype)


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: distributed.whole(tensor.detach()).clone() for name, tensor in tensors.items()}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return whole(dict(model.named_parameters()))


def in_processes(count: int, work: Callable[..., object], folder: Path, *arguments: object) -> list[str]:
    """Run a function in forked processes of one job; what each raised, or nothing, and an empty text if killed."""
    context = multiprocessing.get_context("fork")
    for old in folder.glob("said.*"):
        old.unlink()
    processes = [context.Process(target=_member, args=(i, count, work, folder, arguments)) for i in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode is not None, "a process hangs"
    said = [folder / f"said.{i}" for i in range(count)]
    return [path.read_text() if path.exists() else "" for path in said]


def _member(rank: int, count: int, work: Callable[..., object], folder: Path, arguments: tuple[object, ...]) -> None:
    said = "ok"
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous.{work.__name__}.{count}",
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=50),
        )
        work(*arguments)
    except BaseException as error:  # whatever it is, the test wants to read it
        traceback.print_exc()
        said = f"{type(error).__name__}: {error}"
    (folder / f"said.{rank}").write_text(said)
    os._exit(0)  # without the parent's clean-up, and without waiting for others


def all_well(count: int, work: Callable[..., object], folder: Path, *arguments: object) -> None:
    assert in_processes(count, work, folder, *arguments) == ["ok"] * count


def require_same(one: Gradient, several: Gradient) -> None:
    assert one.noise is not None
    assert several.noise is not None
    for name in one.total:
        assert torch.equal(one.total[name], distributed.whole(several.total[name]))
        assert torch.equal(one.noise[name], distributed.whole(several.noise[name]))
    assert (one.count, one.loss, one.origin, one.roundoff) == (several.count, several.loss, several.origin, several.roundoff)
    assert (one.micro_batches is None) == (several.micro_batches is None)
    if one.micro_batches is not None:
        assert several.micro_batches is not None
        for mine, theirs in zip(one.micro_batches._columns(), several.micro_batches._columns(), strict=True):
            assert torch.equal(mine, theirs)


def passes(alone: dict[tuple[str, str], Gradient]) -> None:
    for (dtype, form), one in alone.items():
        for shard in (False, True):
            model = sharded(network(TYPES[dtype])) if shard else network(TYPES[dtype])
            require_same(one, gradient(model, cross_entropy, in_form(form, TYPES[dtype]), micro_batch=8))
            assert all(p.grad is None for p in model.parameters())
    model = sharded(network())
    some = gradient(model, cross_entropy, records(), micro_batch=8, parameters=["0.weight", "3.bias"])
    require_same(alone["subset", ""], some) if ("subset", "") in alone else None


def in_form(form: str, dtype: torch.dtype) -> object:
    data = zoo.tensors(101, dtype=dtype)
    kept = torch.tensor([i for i in range(101) if i not in REMOVED.tolist()])
    return zoo.in_form(form, data, kept, 9)


@pytest.mark.parametrize("processes", [2, 4])
def test_gradient_has_the_bits_of_one_process_whole_and_sharded(processes: int, tmp_path: Path) -> None:
    forms = [("float32", "examples"), ("float64", "loader"), ("bfloat16", "batches"), ("float64", "batches")]
    alone = {
        (dtype, form): gradient(network(TYPES[dtype]), cross_entropy, in_form(form, TYPES[dtype]), micro_batch=8)
        for dtype, form in forms
    }
    all_well(processes, passes, tmp_path, alone)


def few_and_some(one: Gradient, some: Gradient) -> None:
    for model in (network(), sharded(network())):
        require_same(one, gradient(model, cross_entropy, records(count=5), micro_batch=8))  # fewer groups than processes
        require_same(some, gradient(model, cross_entropy, records(), parameters=["0.weight", "3.bias"]))
        train(model, records(), cross_entropy, Recipe(epochs=1, lr=0.05), seed=0)  # FSDP2 has its reduce-scatter back


def test_fewer_micro_batches_than_processes_and_some_of_the_parameters(tmp_path: Path) -> None:
    one = gradient(network(), cross_entropy, records(count=5), micro_batch=8)
    some = gradient(network(), cross_entropy, records(), parameters=["0.weight", "3.bias"])
    all_well(4, few_and_some, tmp_path, one, some)
