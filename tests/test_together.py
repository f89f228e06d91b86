"""Training on what is left and on the removed records at once."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from expunge import Examples, Recipe, cross_entropy
from expunge.methods.together import Apart, Together, train_on_pairs
from expunge.params import buffers_fingerprint
from expunge.trace import Trace
from expunge.training import frozen_statistics
from tests.contract import same, state, world


def numbers(low: int, high: int) -> Examples:
    return Examples(torch.arange(low, high))


def seen(part: Any) -> list[int]:
    return [] if part is None else part[0].tolist()


@pytest.mark.parametrize(("left", "removed", "size"), [(40, 10, 8), (3, 1, 16), (17, 16, 4), (1, 1, 1)])
def test_every_example_once_a_pass_on_its_own_side_in_a_new_order(left, removed, size):
    pairs = Together(numbers(0, left), numbers(100, 100 + removed), size, seed=5)
    passes = [list(pairs), list(pairs)]
    for batches in passes:
        assert sorted(number for a, _ in batches for number in seen(a)) == list(range(left))
        assert sorted(number for _, b in batches for number in seen(b)) == list(range(100, 100 + removed))
        lengths = [len(seen(a)) + len(seen(b)) for a, b in batches]
        assert len(batches) == len(pairs)
        assert set(lengths[:-1]) <= {size}
        assert lengths[-1] <= size + 1
    if left > 3:
        assert [seen(a) for a, _ in passes[0]] != [seen(a) for a, _ in passes[1]]
        assert any(a is not None and b is not None for a, b in passes[0])
        again = Together(numbers(0, left), numbers(100, 100 + removed), size, seed=5)
        assert [(seen(a), seen(b)) for a, b in again] == [(seen(a), seen(b)) for a, b in passes[0]]


def test_a_share_of_what_is_left_takes_part_the_same_in_every_pass():
    pairs = Together(numbers(0, 50), numbers(100, 110), 8, seed=1, share=0.3)
    passes = [sorted(number for a, _ in pairs for number in seen(a)) for _ in range(3)]
    assert len(passes[0]) == 15
    assert passes[0] == passes[1] == passes[2]
    other = Together(numbers(0, 50), numbers(100, 110), 8, seed=2, share=0.3)
    assert sorted(number for a, _ in other for number in seen(a)) != passes[0]


def test_data_without_positions_keeps_its_own_batches():
    lists = [(torch.arange(i, i + 5),) for i in range(0, 50, 5)]
    pairs = Together(lists, numbers(100, 110), 4, seed=1, share=0.4)
    batches = list(pairs)
    assert len(batches) == len(pairs) == 4 + 3
    assert all((a is None) != (b is None) for a, b in batches)
    assert all(len(seen(a)) == 5 for a, _ in batches if a)
    assert sorted(number for _, b in batches for number in seen(b)) == list(range(100, 110))
    kept = [seen(a) for a, _ in batches if a]
    assert kept == [seen(a) for a, _ in pairs if a]
    both_lists = Together(lists, lists[:2], 4, seed=1)
    assert sorted(number for _, b in both_lists for number in seen(b)) == list(range(10))


def test_loaders_are_mixed_like_examples():
    left = DataLoader(TensorDataset(torch.arange(30)), batch_size=7, shuffle=True)
    before = torch.get_rng_state()
    pairs = Together(left, numbers(100, 110), 8, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    expected = Together(numbers(0, 30), numbers(100, 110), 8, seed=2)
    assert [(seen(a), seen(b)) for a, b in pairs] == [(seen(a), seen(b)) for a, b in expected]


def test_apart_puts_the_removed_records_first_when_it_is_their_turn():
    pairs = Apart(numbers(0, 20), numbers(100, 110), 8, seed=0, turns=lambda number: number == 1)
    passes = [list(pairs) for _ in range(3)]
    assert [[a is not None for a, _ in batches] for batches in passes] == [
        [True] * 3,
        [False] * 2 + [True] * 3,
        [True] * 3,
    ]
    assert sorted(number for _, b in passes[1] for number in seen(b)) == list(range(100, 110))
    assert all(sorted(number for a, _ in batches for number in seen(a)) == list(range(20)) for batches in passes)


def trained(model: nn.Module, pairs: Any, bound: float = 100.0, **changes: Any) -> tuple[nn.Module, Trace]:
    model, trace = copy.deepcopy(model), Trace("test", 0)
    recipe = Recipe(**({"epochs": 1, "lr": 0.01, "schedule": "constant"} | changes))
    train_on_pairs(model, pairs, cross_entropy, cross_entropy, recipe, seed=0, trace=trace, loss_bound=bound)
    return model, trace


def test_statistics_follow_what_is_left_alone():
    here = world("batch-norm")
    x, y = here.forget.tensors
    marked = Examples(x + 1000, y)
    pairs = [*Together(here.retain, marked, 16, seed=0)]
    assert any(a is not None and b is not None for a, b in pairs)
    model, _ = trained(here.model, pairs, lr=1e-12)
    left_only, _ = trained(here.model, [(a, None) for a, _ in pairs if a is not None], lr=1e-12)
    assert buffers_fingerprint(model) != buffers_fingerprint(here.model)
    torch.testing.assert_close(model[1].running_mean, left_only[1].running_mean)
    torch.testing.assert_close(model[1].running_var, left_only[1].running_var)
    one, _ = trained(here.model, [((x[:1], y[:1]), None)])  # one example has no variance
    assert buffers_fingerprint(one) == buffers_fingerprint(here.model)


def test_removed_records_pass_with_dropout_on_and_statistics_in_use():
    flags = []

    def look(model: nn.Module, batch: Any) -> Tensor:
        flags.append([module.training for module in model])
        return cross_entropy(model, batch)

    model = copy.deepcopy(world("batch-norm").model).eval()
    batch = world().forget.tensors
    recipe = Recipe(epochs=1, lr=0.01)
    train_on_pairs(model, [(batch, batch)], look, look, recipe, seed=0, trace=Trace("t", 0), loss_bound=100.0)
    assert flags == [[True] * 5, [True, False, True, True, True]]
    assert not any(module.training for module in model)
    with frozen_statistics(model):
        assert not model[1].training


def test_the_step_follows_the_mean_over_both():
    here = world()
    model = copy.deepcopy(here.model)
    (x, y), (fx, fy) = here.retain.tensors, here.forget.tensors
    nn.functional.cross_entropy(model(torch.cat([x, fx])), torch.cat([y, fy])).backward()
    pairs = [((x, y), (fx, fy))]
    result, trace = trained(here.model, pairs, lr=0.1, momentum=0.0, weight_decay=0.0)
    for before, after in zip(model.parameters(), result.parameters(), strict=True):
        torch.testing.assert_close(after, before - 0.1 * before.grad)
    assert trace.backwarded == len(here.original)


def test_an_epoch_past_the_bound_on_what_is_left_is_taken_back_and_the_removed_records_do_not_count():
    here = world("batch-norm")
    x, y = here.forget.tensors
    pairs = [(here.retain.tensors, (x, (y + 1) % 3))]  # a loss on wrong labels above 1, on what is left below
    model, trace = trained(here.model, pairs, bound=1.0)
    assert trace.losses[0] > 0
    assert trace.stopped == "all 1 epochs done"
    assert not same(state(model), state(here.model))
    model, trace = trained(here.model, pairs, bound=1e-4, epochs=3)
    assert "passed the bound 0.0001; the epoch was taken back" in trace.stopped
    assert len(trace.epoch_ends) == 1
    assert same(state(model), state(here.model))


def test_the_bound_looks_at_one_epoch_at_a_time():
    here = world()
    pairs = [(here.retain.tensors, None), (None, here.forget.tensors)]
    first = float(cross_entropy(here.model, here.retain.tensors).detach().mean())
    _, trace = trained(here.model, pairs, bound=1.5 * first, epochs=4, lr=1e-6)
    assert trace.stopped == "all 4 epochs done"  # summed over epochs, the second would be past it
    _, trace = trained(here.model, pairs, bound=0.9 * first, epochs=4, lr=1e-6)
    assert "taken back" in trace.stopped
