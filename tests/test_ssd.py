"""SSD: importances against a loop over single records in float64, dampening by hand."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from expunge import SSD, Examples, Sighted, cross_entropy, importance, squared_error, unlearn
from expunge.errors import ConfigError, MismatchError, NotFinite
from expunge.methods.ssd import dampen_
from expunge.trace import Trace
from tests.contract import FORGET, same, state, without_type_checks, world

Means = dict[str, Tensor]  # by parameter


def in_float64(kind: str, **changes: Any) -> tuple[nn.Module, Sighted]:
    here = world(kind)
    parts = {
        name: Examples(part.tensors[0].double(), part.tensors[1], positions=part.positions)
        for name, part in (("retain", here.retain), ("forget", here.forget), ("original", here.original))
    }
    given = Sighted(**(parts | {"loss_terms": cross_entropy, "fresh": here.fresh} | changes))
    return copy.deepcopy(here.model).double().eval(), given


def one_by_one(model: nn.Module, data: Examples) -> Means:
    """The mean over records of the squared gradient of each."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, y in zip(*data.tensors, strict=True):
        grads = torch.autograd.grad(functional.cross_entropy(model(x[None]), y[None]), list(model.parameters()))
        for name, grad in zip(total, grads, strict=True):
            total[name] += grad**2 / len(data)
    return total


def batch_by_batch(model: nn.Module, data: Examples, size: int) -> Means:
    """The mean over batches of the squared gradient of the mean loss of each."""
    batches = list(zip(*(tensor.split(size) for tensor in data.tensors), strict=True))
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, y in batches:
        grads = torch.autograd.grad(functional.cross_entropy(model(x), y), list(model.parameters()))
        for name, grad in zip(total, grads, strict=True):
            total[name] += grad**2 / len(batches)
    return total


def dampened(model: nn.Module, removed: Means, full: Means, alpha: float, lam: float) -> Means:
    """Entry by entry, as the definition reads."""
    result = {}
    for name, p in model.named_parameters():
        values = []
        for theta, f, d in zip(
            p.detach().flatten().tolist(), removed[name].flatten().tolist(), full[name].flatten().tolist(), strict=True
        ):
            values.append(theta * min(lam * d / f, 1) if f > alpha * d else theta)
        result[name] = torch.tensor(values, dtype=torch.float64).view_as(p)
    return result


def assert_equals(model: nn.Module, expected: Means) -> None:
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("kind", ["plain", "batch-norm"])
@pytest.mark.parametrize(("alpha", "lam"), [(1.0, 1.0), (1.5, 0.3), (1.2, 5.0)])
def test_equals_a_loop_over_single_records(kind, alpha, lam):
    model, given = in_float64(kind)
    result = unlearn(model, given, SSD(selection=alpha, dampening=lam, loss_bound=1e9))
    removed, full = one_by_one(model, given.forget), one_by_one(model, given.original)
    assert_equals(result.model, dampened(model, removed, full, alpha, lam))
    count = sum(int((removed[name] > alpha * full[name]).sum()) for name in full)
    assert 0 < result.trace.facts["dampened_count"] == count
    moved = [(p - q).detach() for p, q in zip(model.parameters(), result.model.parameters(), strict=True)]
    norm = math.sqrt(sum(float((change**2).sum()) for change in moved))
    assert result.trace.facts["dampened_norm"] == pytest.approx(norm)
    assert result.trace.backwarded == len(given.forget) + len(given.original)


@pytest.mark.parametrize("squares", ["records", "batch-means"])
def test_without_the_original_data_all_is_what_is_left_and_the_removed_records(squares):
    model, given = in_float64("plain")
    _, without = in_float64("plain", original=None)
    config = SSD(selection=1.2, squares=squares, batch_size=6)  # 6 divides 48 and 12: the batches are those of both
    result = unlearn(model, without, config)
    joined = Examples(*(torch.cat(parts) for parts in zip(given.retain.tensors, given.forget.tensors, strict=True)))
    _, reordered = in_float64("plain", original=joined)
    expected = unlearn(model, reordered, config)
    for mine, theirs in zip(result.model.parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-14)
    assert result.trace.backwarded == expected.trace.backwarded - len(given.forget)  # seen once, not twice


@pytest.mark.parametrize("kind", ["plain", "batch-norm"])
def test_squared_batch_means_are_those_of_the_published_code(kind):
    model, given = in_float64(kind)
    config = SSD(selection=1.2, squares="batch-means", batch_size=7, loss_bound=1e9)
    result = unlearn(model, given, config)
    removed, full = (batch_by_batch(model, part, 7) for part in (given.forget, given.original))
    assert_equals(result.model, dampened(model, removed, full, 1.2, 1.0))
    by_record = unlearn(model, given, SSD(selection=1.2, loss_bound=1e9))
    assert by_record.trace.facts["dampened_count"] != result.trace.facts["dampened_count"]


class Line(nn.Module):
    """Two weights; the gradient of the squared error of (x, target 0) in weight i is 2 (w·x) x_i."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 1.0]], dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight.T


def line(inputs: list[list[float]]) -> Examples:
    return Examples(torch.tensor(inputs, dtype=torch.float64), torch.zeros(len(inputs), 1, dtype=torch.float64))


def test_a_worked_example_and_that_batch_means_are_not_records():
    data, trace = line([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), Trace("test", 0)

    def found(data: Any, **settings: Any) -> tuple[list[list[float]], int, int]:
        each = importance(Line(), squared_error, data, trace=trace, **settings)
        return each.total["weight"].tolist(), each.count, trace.backwarded

    # single gradients: (2, 0), (0, 8), (4, 4); squares: (4, 0), (0, 64), (16, 16)
    assert found(data) == ([[20.0, 80.0]], 3, 3)
    # batches of two: mean gradients (1, 4) and (4, 4); squares (1, 16), (16, 16)
    assert found(data, squares="batch-means", batch_size=2) == ([[17.0, 32.0]], 2, 6)
    lists = [data.tensors]  # its own batch: the mean (2, 4), squared
    assert found(lists, squares="batch-means") == ([[4.0, 16.0]], 1, 9)


@pytest.mark.parametrize("squares", ["records", "batch-means"])
@pytest.mark.parametrize("kind", ["plain", "batch-norm"])
def test_a_kept_importance_gives_the_same_bits_from_one_pass_over_the_removed_records(kind, squares):
    here, config = world(kind), SSD(selection=1.2, squares=squares, batch_size=7, loss_bound=1e9)
    kept = importance(here.model, cross_entropy, here.original, squares=squares, batch_size=7)
    result = unlearn(here.model, here.sighted(importance=kept, original=None), config)
    assert same(state(result.model), state(unlearn(here.model, here.sighted(), config).model))
    assert not same(state(result.model), state(here.model))
    assert result.trace.backwarded == len(here.forget)


def test_taking_an_importance_leaves_model_and_global_randomness_as_they_were():
    here = world("batch-norm")
    model = copy.deepcopy(here.model).train()
    before, flags, generator = state(model), [m.training for m in model.modules()], torch.get_rng_state()
    loader = DataLoader(TensorDataset(*here.original.tensors), batch_size=7)
    with torch.no_grad():
        for squares in ("records", "batch-means"):
            importance(model, cross_entropy, loader, squares=squares)
    assert same(before, state(model))
    assert [m.training for m in model.modules()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(generator, torch.get_rng_state())


def test_a_kept_importance_of_something_else_is_refused_with_the_reason():
    here = world("batch-norm")
    kept = importance(here.model, cross_entropy, here.original)

    def refused(message: str, model: nn.Module = here.model, config: SSD | None = None, **changes: Any) -> None:
        with pytest.raises(MismatchError, match=message):
            unlearn(model, here.sighted(**({"full": None, "importance": kept} | changes)), config or SSD())

    moved, drifted, frozen = (copy.deepcopy(here.model) for _ in range(3))
    with torch.no_grad():
        moved[0].weight[0, 0] += 1e-3
    drifted[1].running_mean += 1e-3
    frozen[0].weight.requires_grad_(False)
    refused(r"the importance of all data was taken at weights .{12}…, the model has .* Load the weights", moved)
    refused(r"the importance of all data was taken with buffers .* Load the buffers", drifted)
    half = {"loss_terms": lambda m, b: cross_entropy(m, b) / 2}
    refused(r"the importance of all data is of the loss 'cross_entropy'", **half)
    refused(r"only the importance of all data has '0.weight'", frozen)
    means = SSD(squares="batch-means", batch_size=16)
    refused(r"is of squares='records', and squares='batch-means', batch_size=16 are asked for. Take it", config=means)
    other = importance(here.model, cross_entropy, here.original, squares="batch-means", batch_size=8)
    refused(r"batch_size=8, and squares='batch-means', batch_size=16 are", config=means, importance=other)
    part = importance(here.model, cross_entropy, here.forget.only(FORGET[:5]))
    refused(r"the removed records have 12 squared gradients, and all data had 5. A part cannot", importance=part)


def test_an_importance_of_nothing_or_of_data_read_once_is_refused():
    for data, message in (([], "empty"), (iter([line([[1.0, 0.0]]).tensors]), "read only once")):
        with pytest.raises(ConfigError, match=message):
            importance(Line(), squared_error, data)
    with pytest.raises(ConfigError, match="batch_size=0: must be at least 1"):
        importance(Line(), squared_error, line([[1.0, 0.0]]), batch_size=0)


def test_dampening_by_hand():
    theta = {"w": nn.Parameter(torch.tensor([8.0, -8.0, 8.0, 8.0, 8.0]))}
    removed = {"w": torch.tensor([40.0, 40.0, 20.0, 0.0, 5.0])}
    full = {"w": torch.tensor([1.0, 2.0, 2.0, 0.0, 0.0])}
    chosen = dampen_(theta, removed, full, 10.0, 5.0)  # 20 is not more than 10 x 2; 5 is more than 0
    assert chosen["w"].tolist() == [True, True, False, False, True]
    assert theta["w"].tolist() == [8 * 5 / 40, -8 * 10 / 40, 8.0, 8.0, 0.0]
    dampen_(theta, removed, full, 10.0, 50.0)  # λ F_D / F_f above 1: the weight never grows
    assert theta["w"].tolist() == [1.0, -2.0, 8.0, 8.0, 0.0]


def test_works_with_any_loss_and_leaves_unselected_weights_alone_bit_for_bit():
    forget, retain = line([[0.0, 1.0]]), line([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    given = Sighted(retain=retain, forget=forget, loss_terms=squared_error, fresh=lambda _: Line())
    result = unlearn(Line(), given, SSD(selection=3.0)).model
    # F_f = (0, 4), F_D = (3, 1): only the second weight, times 1 / 4
    assert result.weight.tolist() == [[1.0, 0.25]]
    # F_f / F_D is at most 4 records of all for a removed one
    with pytest.warns(UserWarning, match=r"no entry is 4 times as important .* can be, from 4 on: .*Lower selection"):
        untouched = unlearn(Line(), given, SSD(selection=4.0))
    assert untouched.model.weight.tolist() == [[1.0, 1.0]]
    assert untouched.trace.facts["dampened_count"] == 0
    assert untouched.trace.warnings


def test_a_dampening_that_destroys_the_model_is_taken_back_aloud():
    here = world("batch-norm")
    config = {"selection": 0.5, "dampening": 1e-3}
    with pytest.warns(UserWarning, match=r"passed the bound 0.5; the dampening was taken back. Raise selection"):
        result = unlearn(here.model, here.sighted(), SSD(**config, loss_bound=0.5))
    assert same(state(result.model), state(here.model))
    assert "taken back" in result.trace.stopped
    assert result.trace.facts["retain_loss"] > 0.5
    assert not same(state(unlearn(here.model, here.sighted(), SSD(**config, loss_bound=1e9)).model), state(here.model))


@pytest.mark.parametrize("squares", ["records", "batch-means"])
def test_nan_in_any_part_is_reported(squares):
    here = world()
    for part in ("forget", "original"):
        inputs, labels = (tensor.clone() for tensor in getattr(here, part).tensors)
        inputs[2, 1] = math.nan
        with pytest.raises(NotFinite, match="loss"):
            unlearn(here.model, here.sighted(**{part: Examples(inputs, labels)}), SSD(squares=squares))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selection": 0.0}, r"selection=0.0: must be a positive number"),
        ({"dampening": -1.0}, r"dampening=-1.0: must be a positive number"),
        ({"loss_bound": math.nan}, r"loss_bound=nan: must be a positive number"),
        ({"squares": "batches"}, r"squares='batches': choose from records, batch-means"),
        ({"batch_size": 0}, r"batch_size=0: must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with without_type_checks(), pytest.raises(ConfigError, match=message):
        SSD(**changes)


def test_the_defaults_are_those_of_the_paper():
    assert (SSD().selection, SSD().dampening, SSD().squares) == (10.0, 1.0, "records")
