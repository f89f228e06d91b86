"""Two and four gloo processes do what one does, and end together."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
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
    distributed,
    gradient,
    seeded,
    train,
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
        require_same(
            one, gradient(model, cross_entropy, records(count=5), micro_batch=8)
        )  # fewer groups than processes
        require_same(some, gradient(model, cross_entropy, records(), parameters=["0.weight", "3.bias"]))
        train(model, records(), cross_entropy, Recipe(epochs=1, lr=0.05), seed=0)  # FSDP2 has its reduce-scatter back


def test_fewer_micro_batches_than_processes_and_some_of_the_parameters(tmp_path: Path) -> None:
    one = gradient(network(), cross_entropy, records(count=5), micro_batch=8)
    some = gradient(network(), cross_entropy, records(), parameters=["0.weight", "3.bias"])
    all_well(4, few_and_some, tmp_path, one, some)


def groups(one: Gradient) -> None:
    several = gradient(network(), cross_entropy, records(), micro_batch=8, groups=4)
    require_same(one, several)
    assert one.groups is not None
    assert several.groups is not None
    assert torch.equal(one.groups.contents, several.groups.contents)
    for mine, theirs in zip(one.groups.totals, several.groups.totals, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    with pytest.raises(ConfigError, match="groups=4: gradients of groups are not kept of a model that FSDP2 has sharded"):
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
    selector: Reload(reset_fraction=0.3, selector=selector, scope=scope, reset_to=to, fine_tune=RECIPE)
    for selector, scope, to in (
        ("small-kv", "global", "fresh"),
        ("large-ratio", "layer", "kaiming-normal"),
        ("random", "global", "normal"),
        ("large-gradient", "layer", "layer-mean"),
    )
}


def reloads(alone: dict[str, list[dict[str, Tensor]]], path: Path) -> None:
    for name, config in CONFIGS.items():
        for model in (network(), sharded(network())):
            ascended, reset, tuned = reloaded(model, path, config)
            for mine, theirs in zip(alone[name][:2], (ascended, reset), strict=True):
                assert all(torch.equal(mine[n], theirs[n]) for n in mine), name
            for n, tensor in alone[name][2].items():
                torch.testing.assert_close(tuned[n], tensor, rtol=0, atol=1e-12)
    for model, file in ((network(), "whole"), (sharded(network()), "sharded")):
        cache.save(path.with_name(file), gradient(model, cross_entropy, records(), micro_batch=8))
    with pytest.raises(UnsupportedModule, match="salun does not work on a model that FSDP2 has sharded; reload, fine-tune"):
        sighted = Sighted(**vars(given(None)), forget=records().only(REMOVED))
        unlearn(sharded(network()), sighted, SalUn(), seed=0)


@pytest.mark.parametrize("processes", [2, 4])
def test_reload_resets_what_one_process_resets_and_caches_go_both_ways(processes: int, tmp_path: Path) -> None:
    one = gradient(network(), cross_entropy, records(), micro_batch=8)
    path = tmp_path / "one"
    cache.save(path, one)
    alone = {name: reloaded(network(), path, config) for name, config in CONFIGS.items()}
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


@pytest.mark.parametrize("processes", [2, 4])
def test_training_ends_where_one_process_ends(processes: int, tmp_path: Path) -> None:
    alone = {}
    for name, data in FORMS.items():
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
        error = (distributed.whole(coarse.total[name]) - tensor).abs()
        assert 0 < float(error.max()) < 0.1 * float(tensor.abs().max())
        assert float((error < 8 * distributed.whole(coarse.noise[name])).double().mean()) > 0.9
    model = sharded(network(torch.float32), mp_policy=policy)
    trace = train(model, records(torch.float32), cross_entropy, RECIPE, seed=0)
    assert trace.losses[-1] < trace.losses[0]


def test_batch_norm_agrees_in_the_end_and_bfloat16_says_how_coarse_it_is(tmp_path: Path) -> None:
    one = gradient(network(torch.float32), cross_entropy, records(torch.float32))
    all_well(2, normalised_and_bfloat16, tmp_path, one)


def selections(scores: list[dict[str, Tensor]], alone: list[dict[int, dict[str, Tensor]]]) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    like = distribute_tensor(torch.zeros(8), mesh, [Shard(0)])
    for each, masks in zip(scores, alone, strict=True):
        for k, mask in masks.items():
            got = smallest({name: distributed.placed_like(score, like) for name, score in each.items()}, k)
            assert all(torch.equal(distributed.whole(got[name]), mask[name]) for name in mask), k
    with pytest.raises(NotFinite, match="a score of 'b' is NaN"):
        broken = {"a": torch.zeros(5), "b": torch.tensor([1.0, 2.0, torch.nan])}
        smallest({name: distributed.placed_like(score, like) for name, score in broken.items()}, 2)


def test_selection_among_sharded_scores_takes_ties_in_the_order_of_one_process(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = {"a": torch.randn(7, 5, generator=generator), "b": torch.randn(1, 3, generator=generator), "c": torch.ones(2)}
    tied = {name: score.sign() for name, score in plain.items()}
    barred = {name: score.masked_fill(score > 0, torch.inf) for name, score in plain.items()}
    large = {"a": torch.randint(50, (600_000,), generator=generator).double(), "b": torch.zeros(3, dtype=torch.float64)}
    scores = [plain, tied, barred, large]
    ks = [(0, 1, 13, 40), tuple(range(0, 41, 3)), (1, 20, 40), (1, 12_345, 300_000, 600_003)]
    alone = [{k: smallest(each, k) for k in wanted} for each, wanted in zip(scores, ks, strict=True)]
    all_well(4, selections, tmp_path, scores, alone)
