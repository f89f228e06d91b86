"""Two and four gloo processes do what one does, and end together."""

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

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
    sharding,
    train,
    unlearn,
)
from expunge.cli import main
from expunge.errors import ConfigError, NotFinite, ProcessFailed, UnsupportedModule
from expunge.params import smallest
from expunge.setup import load_setup
from expunge.training import mean_loss
from expunge.weights import save_weights
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
        if work is not command:  # which joins by itself
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


def passes(alone: dict[tuple[str, str], Gradient]) -> None:
    for (dtype, form), one in alone.items():
        for shard in (False, True):
            model = sharded(network(TYPES[dtype])) if shard else network(TYPES[dtype])
            require_same(one, gradient(model, cross_entropy, in_form(form, TYPES[dtype]), micro_batch=8))
            assert all(p.grad is None for p in model.parameters())


def in_form(form: str, dtype: torch.dtype) -> object:
    data = zoo.tensors(101, dtype=dtype)
    kept = torch.tensor([i for i in range(101) if i not in REMOVED.tolist()])
    return zoo.in_form(form, data, kept, 9)


FOUR = [("float32", "examples"), ("float64", "batches")]
TWO = [("float64", "examples"), ("float32", "loader"), ("bfloat16", "batches")]


@pytest.mark.parametrize(("processes", "forms"), [(2, TWO), (4, FOUR)])
def test_gradient_has_the_bits_of_one_process_whole_and_sharded(
    processes: int, forms: list[tuple[str, str]], tmp_path: Path
) -> None:
    alone = {
        (dtype, form): gradient(network(TYPES[dtype]), cross_entropy, in_form(form, TYPES[dtype]), micro_batch=8)
        for dtype, form in forms
    }
    all_well(processes, passes, tmp_path, alone)


def few_and_some(one: Gradient, some: Gradient) -> None:
    for model in (network(), sharded(network())):
        require_same(
            one, gradient(model, cross_entropy, records(count=5), micro_batch=8)
        )  # fewer groups than processes
        require_same(some, gradient(model, cross_entropy, records(), parameters=["0.weight", "3.bias"]))
        train(model, records(), cross_entropy, Recipe(epochs=1, lr=0.05), seed=0)  # FSDP2 has its reduce-scatter back


def test_fewer_micro_batches_than_processes_and_some_of_the_parameters(tmp_path: Path) -> None:
    one = gradient(network(), cross_entropy, records(count=5), micro_batch=8)
    some = gradient(network(), cross_entropy, records(), parameters=["0.weight", "3.bias"])
    all_well(2, few_and_some, tmp_path, one, some)


def groups(one: Gradient) -> None:
    several = gradient(network(), cross_entropy, records(), micro_batch=8, groups=4)
    require_same(one, several)
    assert one.groups is not None
    assert several.groups is not None
    assert torch.equal(one.groups.contents, several.groups.contents)
    for mine, theirs in zip(one.groups.totals, several.groups.totals, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    with pytest.raises(
        ConfigError, match="groups=4: gradients of groups are not kept of a model that FSDP2 has sharded"
    ):
        gradient(sharded(network()), cross_entropy, records(), micro_batch=8, groups=4)


def test_gradients_of_groups_have_the_bits_of_one_process(tmp_path: Path) -> None:
    all_well(2, groups, tmp_path, gradient(network(), cross_entropy, records(), micro_batch=8, groups=4))


def given(full: Gradient | None) -> Blind:
    return Blind(
        retain=records().without(REMOVED), loss_terms=cross_entropy, fresh=lambda seed: network(seed=seed), full=full
    )


def reloaded(model: nn.Module, path: Path, config: Reload) -> list[dict[str, Tensor]]:
    """The weights after the ascent, after the re-initialisation, and at the end, all from one cache on disk."""
    seen: list[dict[str, Tensor]] = []

    def watch(moment: str, model: nn.Module) -> None:
        if moment in ("ascend", "re-initialise"):
            seen.append(weights(model))

    result = unlearn(model, given(cache.load(path, model, cross_entropy)), config, seed=1, watch=watch)
    return [*seen, weights(result.model)]


CONFIGS = {
    selector: Reload(
        reset_fraction=0.3, selector=selector, scope=scope, reset_to=to, fine_tune=Recipe(epochs=1, lr=0.05)
    )
    for selector, scope, to in (
        ("small-kv", "global", "fresh"),
        ("large-ratio", "layer", "kaiming-normal"),
        ("random", "global", "normal"),
        ("large-gradient", "layer", "layer-mean"),
    )
}


def reloads(alone: dict[str, list[dict[str, Tensor]]], path: Path) -> None:
    for name in alone:
        config = CONFIGS[name]
        for model in (network(), sharded(network())):
            ascended, reset, tuned = reloaded(model, path, config)
            for mine, theirs in zip(alone[name][:2], (ascended, reset), strict=True):
                assert all(torch.equal(mine[n], theirs[n]) for n in mine), name
            for n, tensor in alone[name][2].items():
                torch.testing.assert_close(tuned[n], tensor, rtol=0, atol=1e-12)
    for model, file in ((network(), "whole"), (sharded(network()), "sharded")):
        cache.save(path.with_name(file), gradient(model, cross_entropy, records(), micro_batch=8))
    sighted, model = Sighted(**vars(given(None)), forget=records().only(REMOVED)), sharded(network())
    with pytest.raises(UnsupportedModule, match="salun does not work on a model that FSDP2 has sharded; reload, fine"):
        unlearn(model, sighted, SalUn(), seed=0)
    full = cache.load(path, model, cross_entropy)
    with pytest.raises(UnsupportedModule, match="selector='obs' takes a model apart into examples"):
        unlearn(model, given(full), Reload(selector="obs"), seed=0)


@pytest.mark.parametrize(("processes", "configs"), [(2, list(CONFIGS)), (4, ["small-kv"])])
def test_reload_resets_what_one_process_resets_and_caches_go_both_ways(
    processes: int, configs: list[str], tmp_path: Path
) -> None:
    one = gradient(network(), cross_entropy, records(), micro_batch=8)
    path = tmp_path / "one"
    cache.save(path, one)
    alone = {name: reloaded(network(), path, CONFIGS[name]) for name in configs}
    for ascended, reset, _ in alone.values():
        changed = sum(int((ascended[name] != reset[name]).sum()) for name in reset)
        assert 0.2 < changed / sum(tensor.numel() for tensor in reset.values()) <= 0.3
    all_well(processes, reloads, tmp_path, alone, path)
    for file in ("whole", "sharded"):
        require_same(one, cache.load(tmp_path / file, network(), cross_entropy))


def fine_tunes(alone: dict[str, tuple[list[float], dict[str, Tensor]]], tuned: dict[str, Tensor]) -> None:
    for name, (losses, after) in alone.items():
        for model in (network(), sharded(network())):
            trace = train(model, FORMS[name], cross_entropy, OPTIMISERS[name], seed=0)
            for n, tensor in weights(model).items():
                torch.testing.assert_close(tensor, after[n], rtol=0, atol=1e-9 if "adamw" in name else 1e-12)
            assert trace.losses == pytest.approx(losses, abs=1e-9)
            assert mean_loss(model, records(), cross_entropy) < 1.2
    for model in (network(), sharded(network())):
        result = unlearn(model, given(None), FineTune(recipe=RECIPE), seed=0)
        for n, tensor in weights(result.model).items():
            torch.testing.assert_close(tensor, tuned[n], rtol=0, atol=1e-12)


BATCHES = [zoo.tensors(count, seed=count) for count in (20, 7, 3, 1)]  # uneven on purpose
FORMS = {"sgd": records(), "adamw": records(), "sgd, batches": BATCHES, "one left over": records(count=49)}
OPTIMISERS = {
    "sgd": RECIPE,
    "adamw": Recipe(epochs=2, lr=0.01, batch_size=16, optimizer="adamw"),
    "sgd, batches": RECIPE,
    "one left over": Recipe(epochs=1, lr=0.05, batch_size=12),
}


@pytest.mark.parametrize(("processes", "forms"), [(2, list(FORMS)), (4, ["sgd, batches", "one left over"])])
def test_training_ends_where_one_process_ends(processes: int, forms: list[str], tmp_path: Path) -> None:
    alone = {}
    for name in forms:
        data = FORMS[name]
        model = network()
        trace = train(model, data, cross_entropy, OPTIMISERS[name], seed=0)
        alone[name] = (trace.losses, weights(model))
    tuned = weights(unlearn(network(), given(None), FineTune(recipe=RECIPE), seed=0).model)
    all_well(processes, fine_tunes, tmp_path, alone, tuned)


def normalised_and_bfloat16(one: Gradient) -> None:
    model = network(middle=nn.BatchNorm1d)
    train(model, records(), cross_entropy, RECIPE, seed=0)
    everyone = [distributed.joined(tensor.flatten().double()) for tensor in model.state_dict().values()]
    assert all(torch.equal(first, last) for first, last in (tensor.chunk(2) for tensor in everyone))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    coarse = gradient(sharded(network(torch.float32), mp_policy=policy), cross_entropy, records(torch.float32))
    assert coarse.roundoff == 2**-8
    assert coarse.noise is not None
    for name, tensor in one.total.items():
        error = (sharding.whole(coarse.total[name]) - tensor).abs()
        assert 0 < float(error.max()) < 0.1 * float(tensor.abs().max())
        assert float((error < 8 * sharding.whole(coarse.noise[name])).double().mean()) > 0.9
    model = sharded(network(torch.float32), mp_policy=policy)
    before = mean_loss(model, records(torch.float32), cross_entropy)
    train(model, records(torch.float32), cross_entropy, RECIPE, seed=0)
    assert mean_loss(model, records(torch.float32), cross_entropy) < before


def test_batch_norm_agrees_in_the_end_and_bfloat16_says_how_coarse_it_is(tmp_path: Path) -> None:
    one = gradient(network(torch.float32), cross_entropy, records(torch.float32))
    all_well(2, normalised_and_bfloat16, tmp_path, one)


def selections(scores: list[dict[str, Tensor]], alone: list[dict[int, dict[str, Tensor]]]) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    like = distribute_tensor(torch.zeros(8), mesh, [Shard(0)])
    for each, masks in zip(scores, alone, strict=True):
        for k, mask in masks.items():
            got = smallest({name: sharding.placed_like(score, like) for name, score in each.items()}, k)
            assert all(torch.equal(sharding.whole(got[name]), mask[name]) for name in mask), k
    broken = {"a": torch.zeros(5), "b": torch.tensor([1.0, 2.0, torch.nan])}
    pieces = {name: sharding.placed_like(score, like) for name, score in broken.items()}
    with pytest.raises(NotFinite, match="a score of 'b' is NaN"):
        smallest(pieces, 2)


def test_selection_among_sharded_scores_takes_ties_in_the_order_of_one_process(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = {
        "a": torch.randn(7, 5, generator=generator),
        "b": torch.randn(1, 3, generator=generator),
        "c": torch.ones(2),
    }
    tied = {name: score.sign() for name, score in plain.items()}
    barred = {name: score.masked_fill(score > 0, torch.inf) for name, score in plain.items()}
    large = {"a": torch.randint(50, (600_000,), generator=generator).double(), "b": torch.zeros(3, dtype=torch.float64)}
    scores = [plain, tied, barred, large]
    ks = [(0, 13), tuple(range(1, 41, 6)), (20, 40), (12_345, 600_003)]
    alone = [{k: smallest(each, k) for k in wanted} for each, wanted in zip(scores, ks, strict=True)]
    all_well(3, selections, tmp_path, scores, alone)


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


def differs(what: str) -> None:
    first = dist.get_rank() == 0
    if what == "weights":
        gradient(network(seed=3 if first else 4), cross_entropy, records())
    elif what == "data":
        gradient(network(), cross_entropy, records() if first else records().without(torch.tensor([5])))
    elif what == "batches":
        train(network(), BATCHES if first else BATCHES[1:], cross_entropy, RECIPE, seed=0)
    elif what == "wrapped":
        gradient(nn.parallel.DistributedDataParallel(network()), cross_entropy, records())
    elif what == "partly":
        model = network()
        fully_shard(model[0], mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        gradient(model, cross_entropy, records())
    elif what == "written":
        full = gradient(network(), cross_entropy, records())
        cache.save("/proc/not/there" if first else "elsewhere", full)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("weights", "MismatchError: process 1 of 2 has other weights, buffers or loss than process 0"),
        ("data", "MismatchError: process 1 of 2 has other data than process 0. Every process builds the same model"),
        ("batches", "MismatchError: the data has more batches on some of 2 processes than on others"),
        (
            "wrapped",
            "ConfigError: the model is wrapped in DistributedDataParallel. Give the model itself, model.module",
        ),
        ("partly", "UnsupportedModule: parameter '3.weight' is whole while 2 others are sharded. Call fully_shard on"),
        ("written", "Error: "),
    ],
)
def test_what_the_processes_must_agree_on_is_checked(what: str, said: str, tmp_path: Path) -> None:
    first, second = in_processes(2, differs, tmp_path, what)
    assert said in first
    if what == "written":
        assert second == f"ProcessFailed: process 0 of 2 failed with {first}"
    else:
        assert type(second) is str
        assert said.partition("process")[0] in second


SETUP = """
import torch
from torch import nn
from expunge import Examples, cross_entropy

images = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
loss_terms = cross_entropy

def model(seed):
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()

def original():
    return Examples(images.double(), images[:, :3].argmax(1))

def retain():
    return original().without(torch.arange(6))
"""
RELOAD = ("reload", "--reset-fraction", "0.2", "--fine-tune.epochs", "1")


def command(port: int, arguments: list[str], code: int) -> None:
    """What torchrun sets, and a command."""
    rank = os.environ["RANK"]
    os.environ |= {"LOCAL_RANK": rank, "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    out_file, error_file = (Path(f"{name}.{rank}") for name in ("out", "err"))
    with (
        out_file.open("w") as out,
        error_file.open("w") as errors,
        redirect_stdout(out),
        redirect_stderr(errors),
    ):
        assert main(arguments) == code


def on_the_command_line(name: str) -> list[list[str]]:
    given = ["setup.py", "--weights", "w.safetensors"]
    cached, out = f"{name}.c.safetensors", f"{name}.u.safetensors"
    return [
        ["cache", *given, "--out", cached, "--micro-batch", "8"],
        ["unlearn", *given, "--cache", cached, "--out", out, *RELOAD],
    ]


def test_the_command_line_works_under_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("setup.py").write_text(SETUP, encoding="utf-8")
    model = load_setup("setup.py").model(0)
    save_weights("w.safetensors", model)
    for alone, together in zip(on_the_command_line("one"), on_the_command_line("two"), strict=True):
        assert main(alone) == 0
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        all_well(2, command, tmp_path, port, together, 0)
    one, two = (cache.load(f"{name}.c.safetensors", model, cross_entropy) for name in ("one", "two"))
    require_same(one, two)
    reset = load_file("one.u.safetensors")
    for name, tensor in load_file("two.u.safetensors").items():
        torch.testing.assert_close(tensor, reset[name], rtol=0, atol=1e-12)
    assert "weights: two.u.safetensors" in Path("out.0").read_text()
    assert Path("out.1").read_text() == ""
    all_well(2, command, tmp_path, 0, ["show", "one.c.safetensors"], 2)
    said = "expunge: show runs in one process; cache and unlearn run under torchrun"
    assert Path("err.1").read_text().startswith(said)


def torchrun(script: Path, folder: Path, *arguments: str) -> str:
    command = [sys.executable, *arguments[:-1], str(script), *arguments[-1:]]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_example_gives_the_same_alone_and_in_four_processes(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "examples" / "torchrun" / "unlearn.py"
    said = {}
    for name, arguments in {
        "alone": (),
        "four": ("-m", "torch.distributed.run", "--nproc-per-node", "4"),
        "sharded": ("-m", "torch.distributed.run", "--nproc-per-node", "4"),
    }.items():
        (tmp_path / name).mkdir()
        said[name] = torchrun(script, tmp_path / name, *arguments, "--shard" if name == "sharded" else "")
        assert re.search(r"removed 40 of 2000, reset 13\d weights", said[name])
    one = load_file(tmp_path / "alone" / "unlearned.safetensors")
    for name in ("four", "sharded"):
        for key, tensor in load_file(tmp_path / name / "unlearned.safetensors").items():
            assert float((tensor - one[key]).abs().max()) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raise", "kill"])
def test_torchrun_ends_within_seconds_with_the_cause_and_the_job_can_be_run_again(how: str, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(JOB, encoding="utf-8")
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    failed = subprocess.run([*run, how], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert failed.returncode != 0
    if how == "raise":
        assert "ProcessFailed" in failed.stderr
        assert "no such label" in failed.stderr
    else:  # torchrun may end the other one before it can say anything
        assert re.search(r"exitcode\s*: -9 .*SIGKILL", failed.stderr.partition("Root Cause")[2])
    assert not list(tmp_path.glob("*.safetensors*")) + list(tmp_path.glob(".*.tmp"))
    subprocess.run([*run, "well"], cwd=tmp_path, capture_output=True, timeout=120, check=True)
    model = network()
    require_same(
        gradient(model, cross_entropy, records(), micro_batch=8),
        cache.load(tmp_path / "cache.safetensors", model, cross_entropy),
    )


JOB = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import torch.distributed as dist
from expunge import cache, cross_entropy, gradient
from tests.test_distributed import Failing, network, records

dist.init_process_group("gloo")
loss = cross_entropy if sys.argv[1] == "well" else Failing(sys.argv[1])
cache.save("cache.safetensors", gradient(network(), loss, records(), micro_batch=8))
"""
