"""Fisher forgetting: its variances, its noise, and what it refuses."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from expunge import Blind, Examples, FisherForgetting, squared_error, unlearn
from expunge.errors import ConfigError, UnsupportedModule
from expunge.methods.fisher import add_noise_, every_class, noise_variances
from expunge.methods.per_example import squared_gradients
from tests.contract import without_type_checks, world
from tests.test_per_example import close, one_by_one
from tests.zoo import CLASSES, classification, network


def test_every_class_weighs_the_squared_gradients_by_their_probability():
    model, data = network("mlp"), classification(7)
    truth = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in range(7):
        inputs = data.tensors[0][row : row + 1]
        for label in range(CLASSES):
            p = model(inputs).softmax(1)[0, label].detach()
            loss = functional.cross_entropy(model(inputs), torch.tensor([label]))
            for own, slope in zip(truth.values(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
                own.add_(p * slope.square())
    close(squared_gradients(model, every_class, data), truth)


def test_variances_by_hand():
    information = {
        "a.weight": torch.tensor([[0.01, 1.0], [0.0, 0.1]]).double(),
        "a.bias": torch.tensor([0.5, 0.0]).double(),
        "head.weight": torch.tensor([[0.0, 0.1], [0.01, 0.05]]).double(),
        "head.bias": torch.tensor([0.001, 2.0]).double(),
    }
    last = frozenset({"head.weight", "head.bias"})
    found = noise_variances(information, last, 2.0)
    expected = {
        "a.weight": [[101.0, 101.0], [1010.0, 1010.0]],  # 2 mean(100, 1) and 2 mean(1000, 10)
        "a.bias": [40.0, 20000.0],  # 20 · 2 and 20 · 1000
        "head.weight": [[1100.0, 1100.0], [1200.0, 1200.0]],  # 20 mean(100, 10) and 20 mean(100, 20)
        "head.bias": [2000.0, 10.0],  # 20 · 100, not 20 · 1000, and not 200 · 100
    }
    for name, values in expected.items():
        torch.testing.assert_close(found[name], torch.tensor(values).double(), rtol=1e-5, atol=0)
    removed = noise_variances(information, last, 2.0, (1,))
    torch.testing.assert_close(
        removed["head.weight"],
        torch.stack([found["head.weight"][0], torch.full((2,), 1e-4, dtype=torch.float64)]),
        rtol=0,
        atol=1e-12,
    )
    assert removed["head.bias"].tolist() == [found["head.bias"][0].item(), 1e-4]
    assert all(torch.equal(removed[name], found[name]) for name in ("a.weight", "a.bias"))


def test_noise_has_the_variance_it_is_given_and_a_removed_row_loses_its_mean():
    theta = {"a": nn.Parameter(torch.full((4, 50000), 7.0)), "head": nn.Parameter(torch.full((4, 50000), 7.0))}
    per_row = torch.tensor([1e-4, 1e-2, 1.0, 25.0]).double()[:, None].expand(4, 50000)
    add_noise_(theta, {"a": per_row, "head": per_row}, frozenset({"head"}), (0,), 5)
    for name, means in (("a", [7, 7, 7, 7]), ("head", [0, 7, 7, 7])):
        rows = theta[name].detach().double()
        off = (rows.mean(1) - torch.tensor(means)) / (per_row[:, 0] / 50000).sqrt()
        assert float(off.abs().max()) < 4
        torch.testing.assert_close(rows.var(1), per_row[:, 0], rtol=0.03, atol=0)
    assert not torch.equal(theta["a"][1:], theta["head"][1:])


def test_the_method_adds_noise_of_the_published_size_around_the_original():
    here, alpha = world("batch-norm"), 1e-5
    model, retain = here.model, here.retain
    result = unlearn(model, here.blind(), FisherForgetting(alpha=alpha), seed=2)
    truth = {name: total / len(retain) for name, total in one_by_one(model, every_class, retain).items()}
    model.train()
    variances = noise_variances({n: v.double() for n, v in truth.items()}, frozenset({"4.weight", "4.bias"}), alpha)
    before, after = dict(model.named_parameters()), dict(result.model.named_parameters())
    scores = torch.cat([((after[n] - before[n]).detach().double() / v.sqrt()).flatten() for n, v in variances.items()])
    assert float(scores.square().mean()) == pytest.approx(1, abs=4 * (2 / len(scores)) ** 0.5)
    assert abs(float(scores.mean())) < 4 / len(scores) ** 0.5
    assert result.trace.facts["examples"] == len(retain)
    assert result.trace.backwarded == len(retain) * 3
    assert result.trace.forwarded == 8 - 2 + len(retain)  # positions 0 to 7 without 0 and 5, then the check


def test_a_subsample_costs_less_and_still_adds_noise():
    here = world()
    result = unlearn(here.model, here.blind(), FisherForgetting(limit=10))
    assert (result.trace.facts["examples"], result.trace.backwarded) == (10, 30)
    assert result.trace.facts["noise_norm"] > 0


def test_a_removed_class_keeps_nothing_in_the_last_layer():
    here = world()
    result = unlearn(here.model, here.blind(), FisherForgetting(removed_classes=(1,), alpha=1e-12)).model
    before, after = here.model.state_dict(), result.state_dict()
    last = "layers.linear2"
    assert float(before[f"{last}.weight"][1].abs().max()) > 0.2
    assert float(after[f"{last}.weight"][1].abs().max()) < 0.05
    assert float(after[f"{last}.bias"][1].abs()) < 0.05
    torch.testing.assert_close(after[f"{last}.weight"][0], before[f"{last}.weight"][0], rtol=0, atol=1e-3)


def test_a_removed_class_whose_row_is_frozen_is_refused():
    here = world()
    model = copy.deepcopy(here.model)
    model.layers.linear2.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"removed_classes=\(1,\): the last layer is frozen"):
        unlearn(model, here.blind(), FisherForgetting(removed_classes=(1,)))


def test_noise_that_destroys_the_model_is_taken_back_and_said():
    here = world("batch-norm")
    with pytest.warns(UserWarning, match=r"passed the bound 5; the noise was taken back.*Lower alpha"):
        result = unlearn(here.model, here.blind(), FisherForgetting(alpha=10.0))
    assert "taken back" in result.trace.stopped
    assert len(result.trace.warnings) == 1
    assert all(torch.equal(a, b) for a, b in zip(here.model.parameters(), result.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.0}, "alpha=0"),
        ({"loss_bound": float("nan")}, "loss_bound=nan"),
        ({"limit": 0}, "limit=0"),
        ({"chunk": 0}, "chunk=0"),
        ({"removed_classes": (0, -1)}, "classes count from 0"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        FisherForgetting(**settings)


def test_refuses_what_is_no_classifier():
    here = world()
    with pytest.raises(ConfigError, match="the model has classes 0 to 2"):
        unlearn(here.model, here.blind(), FisherForgetting(removed_classes=(3,)))
    data = Examples(torch.randn(8, 6), torch.randn(8, 3))
    given = Blind(retain=data, loss_terms=squared_error, fresh=here.fresh)
    with without_type_checks(), pytest.raises(UnsupportedModule, match="fisher works on classifiers"):
        unlearn(here.model, given, FisherForgetting())
