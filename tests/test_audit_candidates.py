"""Whoever was removed is found in a list of candidates, and nobody else is accused."""

import pytest
import torch
from torch import nn

from expunge import Examples, Recipe, cross_entropy, gradient, seeded, train
from expunge.audit.candidates import judged_list, score, singly
from expunge.audit.finding import Truth
from expunge.data.digits import digits
from expunge.errors import ConfigError
from expunge.models.mlp import MLP
from expunge.params import norm
from tests.attacked import seen
from tests.zoo import classification, network


def test_least_squares_over_candidates_gives_ones_and_zeros(five_removed):
    has, forget = five_removed
    others = classification(20, seed=5)
    found = score(has, [*singly(forget).values(), *singly(others).values()])
    assert torch.allclose(found.weights, torch.tensor([1.0] * 5 + [0.0] * 20, dtype=torch.float64), atol=1e-3)
    assert found.residual < 1e-6
    judgement = judged_list(has, Truth(forget=forget, unseen=others))
    assert judgement.numbers["AUC of least squares"] == 1
    assert judgement.verdict == "partly recoverable"


def test_a_list_without_the_truth_names_the_removed(five_removed):
    has, forget = five_removed
    others = classification(20, seed=5)
    listed = Examples(*(torch.cat(pair) for pair in zip(others.tensors, forget.tensors, strict=True)))
    found = judged_list(has, Truth(candidates=listed))
    assert found.numbers["found"] == [20, 21, 22, 23, 24]
    assert found.verdict == "partly recoverable"
    assert judged_list(has, Truth(candidates=others)).verdict == "not shown"
    assert judged_list(has, Truth()) is None


def test_candidates_who_were_not_removed_have_an_auc_of_a_half():
    model, data = network("mlp"), classification(300)
    has, _ = seen(model, data, torch.arange(10))
    areas = []
    for seed in range(6):
        null = Truth(forget=classification(40, seed=100 + seed), unseen=classification(40, seed=200 + seed))
        found = judged_list(has, null)
        areas += [found.numbers["AUC of least squares"], found.numbers["AUC of matched filter"]]
        assert found.verdict == "not shown"
    sd = (81 / (12 * 40 * 40)) ** 0.5
    assert abs(sum(areas[::2]) / 6 - 0.5) < 4 * sd / 6**0.5
    assert abs(sum(areas[1::2]) / 6 - 0.5) < 4 * sd / 6**0.5


@pytest.mark.parametrize("count", [8, 12, 20])
def test_strangers_are_not_accused_where_any_list_fits(count):
    model = nn.Sequential(nn.Linear(4, 3)).double()  # gradients have 15 entries and span 2 x 5 directions
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        inputs, labels = torch.randn(80, 4, generator=generator).double(), torch.arange(80) % 3
        data = Examples(inputs[:60], labels[:60])
        has, forget = seen(model, data, torch.arange(5))
        strangers = Examples(inputs[60 : 60 + count], labels[60 : 60 + count])
        found = judged_list(has, Truth(candidates=strangers))
        assert found.verdict == "not shown"
        assert found.numbers["directions"] == 10
        assert found.numbers["found"] == []
        assert f"span 10 directions, and {count} candidates need {count + count // 2 + 4}" in found.words
        assert judged_list(has, Truth(forget=forget, unseen=strangers)).numbers["directions"] == 10


def test_few_candidates_are_told_apart_by_few_equations():
    model = nn.Sequential(nn.Linear(4, 3)).double()
    data = Examples(torch.randn(60, 4, generator=torch.Generator().manual_seed(0)).double(), torch.arange(60) % 3)
    has, _ = seen(model, data, torch.tensor([3, 8]))
    listed = data.only(torch.tensor([3, 7, 8, 9]))
    found = judged_list(has, Truth(candidates=listed))
    assert found.numbers["found"] == [0, 2]
    assert found.verdict == "partly recoverable"
    half = judged_list(has, Truth(candidates=data.only(torch.tensor([3, 7, 9]))))
    assert half.verdict == "not shown"
    assert half.numbers["unexplained share"] > 0.3


def test_only_the_named_explain_anything(five_removed):
    """Each of them once, as in a sum of removed records: a free weight lets strangers fit what is missing."""
    has, forget = five_removed
    listed = [*singly(classification(10, seed=5)).values(), singly(forget)[0]]
    found = score(has, listed)
    left = dict(has.removed.total)
    for record, weight in zip(listed, found.weights.tolist(), strict=True):
        if weight > 0.5:
            own = gradient(has.model, cross_entropy, Examples(*record)).total
            left = {name: tensor - own[name] for name, tensor in left.items()}
    assert 10 in found.named
    assert found.residual == pytest.approx(norm(left) / norm(has.removed.total), rel=1e-6)


def test_of_a_list_longer_than_is_tried_the_right_places_are_named():
    model = nn.Sequential(nn.Linear(30, 16)).double()
    data = Examples(torch.randn(400, 30, generator=torch.Generator().manual_seed(0)).double(), torch.arange(400) % 16)
    has, _ = seen(model, data, torch.tensor([280, 290, 298]))
    found = judged_list(has, Truth(candidates=data.only(torch.arange(300))))
    assert found.numbers["candidates"] == 256
    assert found.numbers["found"] == [280, 290, 298]
    assert found.verdict == "partly recoverable"
    assert "No more than 256 candidates are tried" in found.words
    short = judged_list(has, Truth(candidates=data.only(torch.arange(200, 300))))
    assert short.numbers["found"] == [80, 90, 98]
    assert "are tried" not in short.words


def test_a_list_that_lacks_some_of_the_removed_accuses_nobody_in_their_place():
    """Strangers with small gradients would fit what the missing ones left."""
    split = digits(1500, seed=0)
    with seeded(0, "test"):
        model = MLP((64, 64, 10))
    train(model, split.train, cross_entropy, Recipe(epochs=10, lr=0.1, batch_size=64), seed=0)
    has, forget = seen(model, split.train, torch.arange(30))
    others = split.test.only(torch.arange(150)).tensors
    for count, verdict in ((30, "partly recoverable"), (27, "not shown")):
        part = forget.only(torch.arange(count)).tensors
        listed = Examples(*(torch.cat(pair) for pair in zip(part, others, strict=True)))
        found = judged_list(has, Truth(candidates=listed))
        assert found.verdict == verdict, found.words
        if count == 30:
            assert found.numbers["found"] == list(range(30))


def test_candidates_need_a_row_each(one_removed):
    with pytest.raises(ConfigError, match="one row an example"):
        judged_list(one_removed[0], Truth(candidates=[(torch.zeros(2, 5), torch.zeros(3))]))
