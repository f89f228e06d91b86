"""Forked processes that work on one job, and a small world for them."""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from expunge import (
    Examples,
    Gradient,
    Recipe,
    cross_entropy,
    seeded,
    sharding,
)
from tests import zoo

TYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
REMOVED = torch.tensor([3, 16, 17, 18, 19, 20, 21, 22, 23, 40, 99])
RECIPE = Recipe(epochs=3, lr=0.05, batch_size=16)


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
    return {name: sharding.whole(tensor.detach()).clone() for name, tensor in tensors.items()}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return whole(dict(model.named_parameters()))


def in_processes(count: int, work: Callable[..., object], folder: Path, *arguments: object) -> list[str]:
    """Run a function in forked processes of one job; what each raised, or nothing, and an empty text if killed."""
    context = multiprocessing.get_context("fork")
    for old in folder.glob("said.*"):
        old.unlink()
    members = ((i, count, work, folder, arguments) for i in range(count))
    processes = [context.Process(target=_member, args=each, daemon=True) for each in members]
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
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
        if work.__name__ != "command":  # which joins by itself
            rendezvous = f"file://{folder}/rendezvous.{work.__name__}.{count}"
            limit = timedelta(seconds=50)
            dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=count, timeout=limit)
            dist.barrier()  # who is done early must not end before all are connected
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
        assert torch.equal(one.total[name], sharding.whole(several.total[name]))
        assert torch.equal(one.noise[name], sharding.whole(several.noise[name]))
    assert (one.count, one.loss, one.origin, one.roundoff) == (
        several.count,
        several.loss,
        several.origin,
        several.roundoff,
    )
    assert (one.micro_batches is None) == (several.micro_batches is None)
    if one.micro_batches is not None:
        assert several.micro_batches is not None
        for mine, theirs in zip(one.micro_batches._columns(), several.micro_batches._columns(), strict=True):
            assert torch.equal(mine, theirs)


class Failing:
    """A loss that fails, or kills its process, when the last process calls it once too often."""

    def __init__(self, how: str) -> None:
        self.how, self.calls = how, 0

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.calls += 1
        if self.calls == 9 and dist.get_rank() == dist.get_world_size() - 1:
            if self.how == "raise":
                raise KeyError("no such label")
            os.kill(os.getpid(), signal.SIGKILL)
        return cross_entropy(model, batch)
