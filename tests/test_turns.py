"""The step of methods that ascend and fine-tune in turns: it grows with what was removed."""

import math

import pytest
import torch

from expunge import (
    Blind,
    ClassOrthogonalAscent,
    Examples,
    NaturalAscent,
    OrthogonalAscent,
    Recipe,
    cross_entropy,
    gradient,
    unlearn,
)
from expunge.errors import ConfigError
from expunge.methods import turns
from expunge.trace import Trace
from tests.zoo import classification, network

METHODS = (NaturalAscent, ClassOrthogonalAscent, OrthogonalAscent)
TWICE = Recipe(epochs=2, lr=0.05, batch_size=8)


def unlearned(method: type, before: Examples, left: Examples, **settings) -> Trace:
    model = network("mlp")
    full = gradient(model, cross_entropy, before, micro_batch=8)
    given = Blind(retain=left, loss_terms=cross_entropy, fresh=lambda seed: network("mlp", seed), full=full)
    return unlearn(model, given, method(fine_tune=TWICE, **settings)).trace


@pytest.mark.parametrize("method", [ClassOrthogonalAscent, OrthogonalAscent])
@pytest.mark.parametrize(("removed", "tenths"), [(1, 0.25), (4, 1.0), (8, 2.0), (32, 2.5)])
def test_a_step_grows_with_the_share_that_was_removed_up_to_a_quarter(method, removed, tenths):
    data = classification(40)
    trace = unlearned(method, data, data.without(torch.arange(removed)), step=0.1)
    most = 1.0 if method is OrthogonalAscent else math.inf
    assert trace.facts["ascent_share"] == pytest.approx(0.1 * min(tenths, most) ** (2 / 3))


@pytest.mark.parametrize("method", METHODS)
def test_without_growth_it_is_the_same_whatever_was_removed(method):
    data = classification(40)
    trace = unlearned(method, data, data.without(torch.arange(1)), step=0.3, growth=0.0)
    assert trace.facts["ascent_share"] == 0.3


@pytest.mark.parametrize("method", [NaturalAscent, OrthogonalAscent])
def test_a_correction_removes_nothing_and_has_the_step_itself(method):
    right = classification(40)
    inputs, labels = right.tensors
    wrong = Examples(inputs, torch.cat([(labels[:2] + 1) % 3, labels[2:]]))
    assert unlearned(method, wrong, right, step=0.3).facts["ascent_share"] == 0.3


@pytest.mark.parametrize("method", METHODS)
def test_the_milestones_of_a_recipe_move_with_the_epochs_of_a_round(method, monkeypatch):
    recipes, train = [], turns.train_further
    monkeypatch.setattr(turns, "train_further", lambda *g, **named: recipes.append(g[2]) or train(*g, **named))
    data, model = classification(40), network("mlp")
    full = gradient(model, cross_entropy, data, micro_batch=8)
    left = data.without(torch.arange(4))
    given = Blind(retain=left, loss_terms=cross_entropy, fresh=lambda seed: network("mlp", seed), full=full)
    steps = Recipe(epochs=10, lr=0.05, batch_size=16, schedule="step", milestones=(4, 8))
    unlearn(model, given, method(fine_tune=steps, rounds=2))
    assert [(each.epochs, each.milestones) for each in recipes] == [(5, (2, 4))] * 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("growth", [-0.1, 1.5, math.nan])
def test_a_growth_that_cannot_be_is_refused(method, growth):
    with pytest.raises(ConfigError, match=f"growth={growth}: must be from 0, the same step whatever was removed, to 1"):
        method(growth=growth)
