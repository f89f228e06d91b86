"""Two and four gloo processes do what one does, and say what they do not agree on."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from expunge import (
    Gradient,
    Recipe,
    cache,
    cross_entropy,
    distributed,
    gradient,
    sharding,
    train,
)
from expunge.errors import ConfigError, NotFinite
from expunge.params import smallest
from expunge.training import mean_loss
from tests import zoo
from tests.processes import (
    RECIPE,
    REMOVED,
    TYPES,
    all_well,
    in_processes,
    network,
    records,
    require_same,
    sharded,
    weights,
)


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


def fine_tunes(alone: dict[str, tuple[list[float], dict[str, Tensor]]]) -> None:
    for name, (losses, after) in alone.items():
        for model in (network(), sharded(network())):
            trace = train(model, FORMS[name], cross_entropy, OPTIMISERS[name], seed=0)
            for n, tensor in weights(model).items():
                torch.testing.assert_close(tensor, after[n], rtol=0, atol=1e-9 if "adamw" in name else 1e-12)
            assert trace.losses == pytest.approx(losses, abs=1e-9)
            assert mean_loss(model, records(), cross_entropy) < 1.2


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
    all_well(processes, fine_tunes, tmp_path, alone)


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
