"""The rounding floor of a difference, against the same difference in exact arithmetic.

"Exact" is the gradient of the removed records alone, of the same weights, in float64: its own error is 1e-9 of the
floors here. The case is the one the floor exists for: float32, many records that stay, few that go.
"""

import copy
import dataclasses
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from expunge import cache as cache_file
from expunge.batches import Examples
from expunge.data.digits import digits
from expunge.gradient import Gradient, gradient
from expunge.losses import cross_entropy
from expunge.models.mlp import MLP
from expunge.params import norm
from tests.zoo import classification, flat, network

COUNT = 1500


@dataclasses.dataclass(frozen=True)
class Trained:
    model: nn.Module
    data: Examples
    full: Gradient
    by_loss: Tensor  # positions, ascending by loss


@cache
def trained(epochs: int) -> Trained:
    data = digits(COUNT, seed=0).train
    inputs, labels = data.tensors
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MLP((64, 64, 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(epochs):
            for rows in torch.randperm(COUNT).split(64):
                optimizer.zero_grad()
                cross_entropy(model, (inputs[rows], labels[rows])).mean().backward()
                optimizer.step()
    with torch.no_grad():
        by_loss = cross_entropy(model, (inputs, labels)).argsort()
    return Trained(model, data, gradient(model, cross_entropy, data), by_loss)


def removed(case: str, of: Trained) -> Tensor:
    """Positions: one record by its loss, or some at random."""
    if case.startswith("random"):
        order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
        return order[: int(case.split()[1])].sort().values
    rank = {"easy": 150, "median": 750, "hard": 1350, "hardest": COUNT - 1}[case]
    return of.by_loss[rank : rank + 1]


@dataclasses.dataclass(frozen=True)
class Compared:
    exact: Tensor
    error: Tensor
    noise: Tensor
    informative: Tensor
    total: Tensor

    @property
    def touched(self) -> Tensor:
        return self.exact != 0

    @property
    def within(self) -> float:
        return float((self.error <= self.noise).double().mean())

    @property
    def tightness(self) -> float:
        return float((self.error / self.noise)[self.touched & (self.noise > 0)].median())


def compare(difference: Gradient, model: nn.Module, data: Examples, positions: Tensor) -> Compared:
    inputs, labels = data.only(positions).tensors
    exact = gradient(copy.deepcopy(model).double(), cross_entropy, Examples(inputs.double(), labels))
    total, exact_total = flat(difference.total), flat(exact.total)
    informative = flat(difference.informative()).bool()
    return Compared(exact_total, (total - exact_total).abs(), flat(difference.noise), informative, total)


@cache
def aligned(epochs: int, case: str) -> Compared:
    of = trained(epochs)
    positions = removed(case, of)
    difference = of.full - gradient(of.model, cross_entropy, of.data.without(positions))
    return compare(difference, of.model, of.data, positions)


@pytest.mark.parametrize(
    ("epochs", "case"),
    [
        (2, "easy"),
        (2, "median"),
        (2, "random 10"),
        (2, "random 100"),
        (10, "random 10"),
        (2, "hardest"),
        (10, "hardest"),
        (10, "random 100"),
    ],
)
def test_the_true_error_is_within_the_floor(epochs, case):
    assert aligned(epochs, case).within >= 0.99


@pytest.mark.parametrize("case", ["easy", "median", "hard", "random 10", "random 100"])
def test_the_floor_is_not_loose(case):
    assert aligned(2, case).tightness > 3e-3


@pytest.mark.parametrize("case", ["easy", "median", "hard", "hardest", "random 10", "random 100"])
@pytest.mark.parametrize("epochs", [2, 10])
def test_what_removed_data_never_touched_is_not_informative(epochs, case):
    result = aligned(epochs, case)
    assert int((~result.touched).sum()) > 1000
    assert not (result.informative & ~result.touched).any()


@pytest.mark.parametrize(
    ("case", "share"), [("easy", 0.9), ("median", 0.95), ("random 10", 0.99), ("random 100", 0.99)]
)
def test_most_of_what_removed_data_touched_is_informative(case, share):
    result = aligned(2, case)
    assert float(result.informative[result.touched].double().mean()) > share


def lowest_decile(values: Tensor, eligible: Tensor, of: Trained, eps: float) -> Tensor:
    score = (values.abs() + eps) / (flat(of.full.total).abs() + eps)
    order = score.masked_fill(~eligible, torch.inf).argsort(stable=True)[: len(score) // 10]
    return torch.zeros_like(eligible).index_fill_(0, order, True)


def test_the_reset_set_of_one_record_is_that_of_exact_arithmetic():
    of, with_exact, above_the_floor, without_floor = trained(2), [], [], []
    for rank in range(650, 851, 10):  # around the median loss
        positions = of.by_loss[rank : rank + 1]
        left = gradient(of.model, cross_entropy, of.data.without(positions))
        result = compare(of.full - left, of.model, of.data, positions)
        eps = float(result.noise.mean())
        found = lowest_decile(result.total, result.informative, of, eps)
        for overlaps, eligible in (
            (with_exact, result.touched),
            (above_the_floor, result.exact.abs() > result.noise),
        ):
            exact = lowest_decile(result.exact, eligible, of, eps)
            overlaps.append(float((found & exact).sum() / (found | exact).sum()))
        careless = lowest_decile(result.total, torch.ones_like(result.touched), of, eps)
        without_floor.append(float((careless & exact).sum() / (careless | exact).sum()))
    assert torch.tensor(with_exact).median() >= 0.8
    assert min(above_the_floor) >= 0.95
    assert max(without_floor) < 0.2  # so it is the floor that makes it so


def in_batches(data: Examples) -> list:
    return list(zip(*(tensor.split(128) for tensor in data.tensors), strict=True))


@pytest.mark.parametrize(("case", "looser"), [("median", 5), ("random 10", 1.2), ("random 100", 0.9)])
def test_passes_that_are_not_aligned_have_a_looser_but_honest_floor(case, looser):
    of = trained(2)
    positions = removed(case, of)
    full, left = (gradient(of.model, cross_entropy, in_batches(d)) for d in (of.data, of.data.without(positions)))
    result = compare(full - left, of.model, of.data, positions)
    assert result.within >= 0.99
    assert not (result.informative & ~result.touched).any()
    assert float(result.noise.norm()) > looser * float(aligned(2, case).noise.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["median", "random 10", "random 100"])
def test_a_cache_of_lower_precision_is_honest_about_it(case, dtype, tmp_path):
    of = trained(2)
    positions = removed(case, of)
    cache_file.save(tmp_path / "cache", of.full, dtype=dtype)
    stored = cache_file.load(tmp_path / "cache", of.model, cross_entropy)
    result = compare(
        stored - gradient(of.model, cross_entropy, of.data.without(positions)), of.model, of.data, positions
    )
    assert result.within >= 0.99
    assert not (result.informative & ~result.touched).any()
    assert float(result.noise.norm()) > float(aligned(2, case).noise.norm())


@pytest.mark.parametrize("case", ["median", "random 100"])
def test_a_bfloat16_model_is_honest_about_it(case):
    of = trained(2)
    model, (inputs, labels) = copy.deepcopy(of.model).bfloat16(), of.data.tensors
    data, positions = Examples(inputs.bfloat16(), labels), removed(case, of)
    full, left = (gradient(model, cross_entropy, d) for d in (data, data.without(positions)))
    result = compare(full - left, model, data, positions)
    assert result.within >= 0.99
    assert not (result.informative & ~result.touched).any()


def test_the_float64_floor_is_that_of_float64():
    of = trained(2)
    model, (inputs, labels) = copy.deepcopy(of.model).double(), of.data.tensors
    data, positions = Examples(inputs.double(), labels), removed("median", of)
    full, left = (gradient(model, cross_entropy, d) for d in (data, data.without(positions)))
    result = compare(full - left, model, data, positions)
    assert result.within >= 0.99
    assert float(result.noise.norm()) < 1e-6 * float(aligned(2, "median").noise.norm())


def test_nothing_removed_is_exactly_nothing():
    of = trained(2)
    difference = of.full - gradient(of.model, cross_entropy, of.data)
    assert norm(difference.total) == 0
    assert difference.count == difference.loss == 0
    assert not flat(difference.informative()).any()
    assert norm(difference.noise) < 1e-6 * norm(of.full.noise)
    assert difference.relative_noise() == torch.inf


def test_entries_that_no_touched_micro_batch_reaches_are_exactly_zero():
    position = torch.arange(96)
    inputs = nn.functional.one_hot(position // 8 % 4, 4) * torch.randn(
        96, 1, generator=torch.Generator().manual_seed(0)
    )
    data = Examples(inputs.float(), position % 3)
    model = nn.Linear(4, 3)
    full, left = (
        gradient(model, cross_entropy, d, micro_batch=8) for d in (data, data.without(torch.tensor([17, 49])))
    )
    difference = full - left  # both in micro-batches that only see feature 2
    assert bool((full.total["weight"] != 0).all())
    assert (difference.total["weight"] != 0).any(0).tolist() == [False, False, True, False]
    assert difference.informative()["weight"].any(0).tolist() == [False, False, True, False]


def test_whole_micro_batches_cancel_down_to_float64():
    of = trained(2)
    gone = torch.arange(256, 512)  # two micro-batches
    difference = of.full - gradient(of.model, cross_entropy, of.data.without(gone))
    alone = gradient(of.model, cross_entropy, of.data.only(gone))
    error = norm({name: difference.total[name] - alone.total[name] for name in alone.total})
    assert error <= 1e-13 * norm(of.full.noise) / of.full.roundoff
    scattered = removed("random 100", of)
    apart = of.full - gradient(of.model, cross_entropy, of.data.without(scattered))
    alone = gradient(of.model, cross_entropy, of.data.only(scattered))
    assert norm({name: apart.total[name] - alone.total[name] for name in alone.total}) > 1000 * error


def test_the_floor_grows_with_the_micro_batches_that_were_touched():
    model, data = network("mlp").float(), classification(64, dtype=torch.float32)
    full = gradient(model, cross_entropy, data, micro_batch=8)
    floors = [
        full - gradient(model, cross_entropy, data.without(torch.tensor(gone)), micro_batch=8)
        for gone in ([], [3], [3, 5], [3, 12], [3, 12, 20, 30], list(range(0, 64, 8)))
    ]
    nothing, one, same_again, two, four, all_eight = (norm(difference.noise) for difference in floors)
    assert nothing < 1e-6 * one
    assert one == pytest.approx(same_again, rel=0.5)
    assert 1.3 * one < two < 2.5 * one
    assert 1.3 * two < four < 2.5 * two
    assert 1.3 * four < all_eight < 2.5 * four


def test_an_entry_is_informative_above_its_floor_and_not_at_it():
    full = gradient(nn.Linear(2, 1), lambda m, b: m(b[0])[:, 0], Examples(torch.tensor([[1.0, -2.0]])))
    noise = {"weight": torch.tensor([[1.0, 1.5]]), "bias": torch.tensor([1.5])}
    marked = dataclasses.replace(full, noise=noise).informative()
    assert (marked["weight"].tolist(), marked["bias"].tolist()) == ([[False, True]], [False])
    assert dataclasses.replace(full, noise=noise).relative_noise() == pytest.approx((5.5 / 6) ** 0.5)


def test_the_floor_follows_the_size_of_the_touched_micro_batch():
    """One micro-batch a hundred times the size of the others: its rounding is not their average."""
    data = classification(256, dtype=torch.float32)
    inputs, labels = data.tensors
    inputs = torch.cat([inputs[:4] * 100, inputs[4:]])
    model = network("mlp").float()
    for touched, limit in (
        (0, 0.9),
        (200, 0.9),
    ):  # a few of 57 entries may be off; an average floor holds for a quarter
        removed = torch.tensor([touched])
        passes = []
        for dtype in (torch.float32, torch.float64):
            examples, in_dtype = Examples(inputs.to(dtype), labels), copy.deepcopy(model).to(dtype)
            full = gradient(in_dtype, cross_entropy, examples, micro_batch=4)
            passes.append(full - gradient(in_dtype, cross_entropy, examples.without(removed), micro_batch=4))
        ours, exact = passes
        within = [(ours.total[n] - exact.total[n]).abs() <= ours.noise[n] for n in ours.total]
        assert float(torch.cat([mask.flatten() for mask in within]).double().mean()) >= limit
    # and a small one is not drowned by the large one
    assert ours.relative_noise() < 1e-3
