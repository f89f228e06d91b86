"""Number formats and compilation where several processes train one model."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from expunge import cross_entropy, execution, train
from tests.contract import same
from tests.processes import RECIPE, all_well, network, records, sharded, weights, whole

DATA = records(torch.float32, 96)  # six whole batches an epoch


def low_precision(alone: dict[str, Tensor]) -> None:
    for built in (network(torch.float32), sharded(network(torch.float32))):
        seen: list[torch.dtype] = []
        built[0].register_forward_hook(lambda _, inputs, out, seen=seen: seen.append(out.dtype))
        train(built, DATA, cross_entropy, replace(RECIPE, precision="bfloat16"), seed=0)
        assert set(seen) == {torch.bfloat16}
        for name, tensor in weights(built).items():
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor, alone[name], rtol=0, atol=0.01)


def test_bfloat16_is_that_of_one_process_within_its_rounding(tmp_path):
    model, plain = network(torch.float32), network(torch.float32)
    train(model, DATA, cross_entropy, replace(RECIPE, precision="bfloat16"), seed=0)
    train(plain, DATA, cross_entropy, RECIPE, seed=0)
    assert not same(weights(model), weights(plain))
    all_well(2, low_precision, tmp_path, whole(dict(model.named_parameters())))


def measured(seconds: list[float], kept: str) -> None:
    clock = [0.0]
    execution.time = SimpleNamespace(perf_counter=lambda: clock[0])

    def loss(model: nn.Module, batch: Any) -> Tensor:
        clock[0] += seconds[dist.get_rank()] if torch.is_autocast_enabled("cpu") else 2.0
        return cross_entropy(model, batch)

    model = network(torch.float32)
    assert train(model, DATA, loss, replace(RECIPE, precision="fastest"), seed=0).facts == {"precision": kept}


@pytest.mark.parametrize(
    ("seconds", "kept"), [([1.0, 3.0], "float32"), ([3.0, 1.0], "float32"), ([1.0, 1.5], "bfloat16")]
)
def test_all_compute_in_the_format_in_which_the_slowest_is_fastest(seconds, kept, tmp_path):
    all_well(2, measured, tmp_path, seconds, kept)


def compiled_by_one() -> None:
    """A stand-in for the compiler, which fails on the second process."""

    def compile_(function):
        if dist.get_rank():
            raise RuntimeError("no compiler here")
        return function

    torch.compile = compile_
    plain, model = network(torch.float32), network(torch.float32)
    train(plain, DATA, cross_entropy, RECIPE, seed=0)
    trace = train(model, DATA, cross_entropy, replace(RECIPE, compile=True), seed=0)
    assert same(weights(model), weights(plain))
    assert trace.facts == {"compiled_steps": 0 if dist.get_rank() else 18}
    assert [text[:50] for text in trace.warnings] == [
        "compile=True: Sequential could not be compiled and"
    ] * dist.get_rank()
    trace = train(sharded(network(torch.float32)), DATA, cross_entropy, replace(RECIPE, compile=True), seed=0)
    assert trace.facts == {"compiled_steps": 0}
    assert "a model that FSDP2 has sharded is trained as it is" in trace.warnings[0]


def test_what_one_process_cannot_compile_it_trains_as_it_is(tmp_path):
    all_well(2, compiled_by_one, tmp_path)
