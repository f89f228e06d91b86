import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from expunge import Blind, Examples, FineTune, L1Sparse, Recipe, cross_entropy, squared_error, unlearn
from expunge.errors import ConfigError
from tests.contract import same, state, world

BRIEF = Recipe(epochs=3, lr=0.05, batch_size=16)


def test_loss_and_steps_by_hand():
    """Two weights, one example, no momentum: every step and its penalty can be written down."""
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, -2.0]])
    given = Blind(
        retain=Examples(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5]])),
        loss_terms=squared_error,
        fresh=lambda _: nn.Linear(2, 1, bias=False),
    )
    recipe = Recipe(epochs=2, lr=0.1, momentum=0.0, weight_decay=0.0, schedule="constant")
    result = unlearn(model, given, L1Sparse(alpha=0.4, recipe=recipe))
    # α_0 = 0.4: loss 0.25 + 0.4 · 3; gradient (1 + 0.4, -0.4)
    # α_1 = 0.2: weights (0.86, -1.96); loss 0.36² + 0.2 · 2.82; gradient (0.72 + 0.2, -0.2)
    assert result.trace.losses == pytest.approx([1.45, 0.1296 + 0.564])
    assert result.model.weight[0].tolist() == pytest.approx([0.86 - 0.092, -1.96 + 0.02])
    assert result.trace.facts == pytest.approx({"l1_before": 3.0, "l1_after": 0.768 + 1.94})


@pytest.mark.parametrize("kind", ["plain", "batch-norm"])
def test_equals_a_loop_by_hand_on_a_network(kind):
    here = world(kind)
    batches = list(here.retain.fetch(torch.arange(len(here.retain)).split(16)))
    recipe = Recipe(epochs=3, lr=0.05, momentum=0.0, weight_decay=0.01, schedule="constant")
    config = L1Sparse(alpha=0.01, recipe=recipe)
    model = world(kind).model
    if kind == "batch-norm":
        model = nn.Sequential(*(module for module in model if not isinstance(module, nn.Dropout)))
    result = unlearn(model, here.blind(retain=batches, full=None), config)
    theirs = unlearn(model, here.blind(retain=batches, full=None), L1Sparse(recipe=Recipe(epochs=0, lr=1.0))).model
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.05, weight_decay=0.01)
    theirs.train()
    for strength in (0.01, 0.01 * 2 / 3, 0.01 / 3):
        for inputs, labels in batches:
            optimizer.zero_grad()
            penalty = sum(p.abs().sum() for p in theirs.parameters())
            (functional.cross_entropy(theirs(inputs), labels) + strength * penalty).backward()
            optimizer.step()
    for a, b in zip(result.model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "batch-norm"])
def test_without_a_penalty_it_is_fine_tuning_bit_for_bit(kind):
    here = world(kind)
    tuned = unlearn(here.model, here.blind(), FineTune(recipe=BRIEF), seed=2)
    for alpha in (0.0, 1e-3):
        result = unlearn(here.model, here.blind(), L1Sparse(alpha=alpha, recipe=BRIEF), seed=2)
        assert same(state(tuned.model), state(result.model)) == (alpha == 0)
        assert (tuned.trace.losses == result.trace.losses) == (alpha == 0)
        assert tuned.trace.backwarded == result.trace.backwarded


def test_a_larger_penalty_makes_it_sparser():
    here = world()
    recipe = Recipe(epochs=20, lr=0.05, batch_size=16)
    small, norms = [], []
    for alpha in (0.0, 0.003, 0.03):
        result = unlearn(here.model, here.blind(), L1Sparse(alpha=alpha, recipe=recipe), seed=2)
        weights = torch.cat([p.detach().flatten().abs() for p in result.model.parameters()])
        small.append(int((weights < 0.01).sum()))
        norms.append(float(weights.sum()))
        assert result.trace.facts["l1_after"] == pytest.approx(norms[-1], rel=1e-5)
    assert small == sorted(set(small))
    assert norms == sorted(set(norms), reverse=True)
    assert small[-1] > 10 + 2 * small[0]


def test_frozen_weights_are_not_penalised():
    here = world(frozen=True)
    theta = [p for p in here.model.parameters() if p.requires_grad]
    result = unlearn(here.model, here.blind(), L1Sparse(recipe=BRIEF))
    assert result.trace.facts["l1_before"] == pytest.approx(float(sum(p.detach().abs().sum() for p in theta)))


def test_an_epoch_past_the_loss_bound_is_taken_back():
    here = world("batch-norm")
    wild = Recipe(epochs=5, lr=200.0, batch_size=16, schedule="constant")
    result = unlearn(here.model, here.blind(), L1Sparse(recipe=wild, loss_bound=1.0))
    assert "passed the bound 1; the epoch was taken back" in result.trace.stopped
    assert len(result.trace.epoch_ends) == 1
    assert same(state(result.model), state(here.model))


def test_the_bound_is_on_the_loss_without_the_penalty():
    here = world()
    config = L1Sparse(alpha=1.0, recipe=Recipe(epochs=2, lr=1e-4, batch_size=16), loss_bound=5.0)
    result = unlearn(here.model, here.blind(), config)
    assert min(result.trace.losses) > 5
    assert result.trace.stopped == "all 2 epochs done"


@pytest.mark.parametrize(
    "settings", [{"alpha": -1.0}, {"alpha": math.inf}, {"loss_bound": 0.0}, {"loss_bound": math.nan}]
)
def test_settings_that_cannot_work(settings):
    with pytest.raises(ConfigError, match=f"{next(iter(settings))}={next(iter(settings.values()))}"):
        L1Sparse(**settings)


def test_other_losses_will_do():
    generator = torch.Generator().manual_seed(0)
    data = Examples(torch.randn(20, 3, generator=generator), torch.randn(20, 1, generator=generator))
    model = nn.Linear(3, 1)
    given = Blind(retain=data, loss_terms=squared_error, fresh=lambda _: nn.Linear(3, 1))
    assert cross_entropy is not given.loss_terms
    assert not torch.equal(unlearn(model, given, L1Sparse(recipe=BRIEF)).model.weight, model.weight)
