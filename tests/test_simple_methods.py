"""Retraining, fine-tuning and gradient ascent are plain training, and end within their bound."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from expunge import (
    Blind,
    CFk,
    Examples,
    FineTune,
    GradientAscent,
    Recipe,
    Reload,
    Retrain,
    cross_entropy,
    gradient,
    train,
    unlearn,
)
from expunge.errors import ConfigError
from expunge.methods.guard import keeping_what_is_left
from expunge.trace import Trace
from expunge.training import mean_loss
from tests.contract import BRIEF, World, same, state, world

ONE_STEP = Recipe(epochs=1, lr=0.5, batch_size=1000, momentum=0.0, weight_decay=0.0, schedule="constant")


@pytest.mark.parametrize("epochs", [0, 3])
def test_retraining_shares_no_value_with_the_original(epochs):
    here = world()
    result = unlearn(here.model, here.blind(), Retrain(recipe=Recipe(epochs=epochs, lr=0.05)), seed=2).model
    for original, retrained in zip(here.model.parameters(), result.parameters(), strict=True):
        assert not torch.isin(retrained, original).any()


@pytest.mark.parametrize("kind", ["plain", "batch-norm"])
def test_retraining_is_training_a_fresh_model_on_what_is_left_bit_for_bit(kind):
    here = world(kind)
    recipe = Recipe(epochs=4, lr=0.07, batch_size=10)
    result = unlearn(here.model, here.blind(), Retrain(recipe=recipe), seed=9)
    model = here.blind().fresh_model(9, here.model)
    trace = train(model, here.retain, cross_entropy, recipe, seed=9)
    assert same(state(result.model), state(model))
    assert result.trace.losses == trace.losses


@pytest.mark.parametrize("kind", ["plain", "batch-norm"])
def test_fine_tuning_is_training_the_original_on_what_is_left_bit_for_bit(kind):
    here = world(kind)
    recipe = Recipe(epochs=4, lr=0.07, batch_size=10)
    result = unlearn(here.model, here.blind(), FineTune(recipe=recipe), seed=9)
    model = copy.deepcopy(here.model)
    train(model, here.retain, cross_entropy, recipe, seed=9)
    assert same(state(result.model), state(model))


def in_float64() -> tuple[nn.Module, World]:
    here = world()
    tensors = here.original.tensors
    original = Examples(tensors[0].double(), tensors[1])
    model = copy.deepcopy(here.model).double()
    return model, World(model, here.fresh, original, gradient(model, cross_entropy, original))


def test_the_first_step_of_gradient_ascent_climbs_the_mean_loss_on_the_removed_records():
    model, here = in_float64()
    result = unlearn(model, here.sighted(), GradientAscent(recipe=ONE_STEP, loss_bound=100.0)).model
    inputs, labels = here.forget.tensors
    functional.cross_entropy(model(inputs), labels).backward()
    for before, after in zip(model.parameters(), result.parameters(), strict=True):
        torch.testing.assert_close(after, before + 0.5 * before.grad)
    assert mean_loss(result, here.forget, cross_entropy) > mean_loss(model, here.forget, cross_entropy)


def test_gradient_ascent_ends_before_its_bound():
    here = world()
    recipe = Recipe(epochs=100, lr=0.05, batch_size=12, weight_decay=0.0, schedule="constant")
    given = here.sighted()
    result = unlearn(here.model, given, GradientAscent(recipe=recipe, loss_bound=2.0))
    epochs = len(result.trace.epoch_ends)
    assert 1 < epochs < 100
    assert "passed the bound 2; the epoch was taken back" in result.trace.stopped
    assert mean_loss(result.model, here.forget, cross_entropy) <= 2.0
    unbounded = Recipe(epochs=epochs, lr=0.05, batch_size=12, weight_decay=0.0, schedule="constant")
    beyond = unlearn(here.model, given, GradientAscent(recipe=unbounded, loss_bound=1e6))
    assert beyond.trace.stopped == f"all {epochs} epochs done"
    assert mean_loss(beyond.model, here.forget, cross_entropy) > 2.0
    just_before = Recipe(epochs=epochs - 1, lr=0.05, batch_size=12, weight_decay=0.0, schedule="constant")
    within = unlearn(here.model, given, GradientAscent(recipe=just_before, loss_bound=1e6))
    assert same(state(result.model), state(within.model))


@pytest.mark.parametrize(("kind", "lr"), [(FineTune, 20.0), (CFk, 1e4)])
def test_training_that_ends_past_its_bound_is_taken_back(kind, lr):
    here = world()
    recipe = Recipe(epochs=3, lr=lr, batch_size=8, schedule="constant")
    settings = {"recipe": recipe} if kind is FineTune else {"recipe": recipe, "k": 1}
    with pytest.warns(UserWarning, match=r"was taken back. Lower the learning rate, or raise loss_bound"):
        result = unlearn(here.model, here.blind(), kind(**settings))
    assert len(result.trace.epoch_ends) == 3
    assert "passed the bound 5; all after epoch 0 was taken back" in result.trace.stopped
    assert same(state(result.model), state(here.model))


def test_an_epoch_past_the_bound_is_no_end_if_what_follows_is_fine():
    here, trace = world(), Trace("test", 0)
    model, wreck = copy.deepcopy(here.model), copy.deepcopy(here.model)
    with torch.no_grad():
        for p in wreck.parameters():
            p.mul_(-30)
    stop = keeping_what_is_left(model, here.blind(), 5.0, trace, epochs=4)
    for state_of, ends in ((wreck, False), (here.model, False), (wreck, False), (wreck, True)):
        model.load_state_dict(state_of.state_dict())
        assert bool(stop(model, 0.0)) == ends
    assert same(state(model), state(here.model))
    assert "all after epoch 2 was taken back" in trace.warnings[0]


def test_a_loss_that_is_large_by_nature_does_not_count_as_passing_the_bound():
    here = world()

    def large(model: nn.Module, batch: Any) -> Tensor:
        return 30 + cross_entropy(model, batch)

    given = Blind(retain=here.retain, loss_terms=large, fresh=here.fresh)
    assert unlearn(here.model, given, FineTune(recipe=BRIEF)).trace.stopped == "all 3 epochs done"


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
def test_a_loss_bound_that_cannot_work_is_refused(bound):
    with pytest.raises(ConfigError, match=f"loss_bound={bound}: must be a positive number of nats a term"):
        GradientAscent(loss_bound=bound)
    for kind in (FineTune, CFk):
        with pytest.raises(ConfigError, match=f"loss_bound={bound}: must be a positive number of nats a term"):
            kind(loss_bound=bound)


def test_all_of_the_defaults_are_those_of_the_sources():
    assert (FineTune().recipe.epochs, FineTune().recipe.lr) == (10, 0.01)  # SalUn
    assert (GradientAscent().recipe.epochs, GradientAscent().recipe.lr) == (5, 1e-3)  # SalUn
    assert (GradientAscent().recipe.weight_decay, GradientAscent().recipe.schedule) == (0, "constant")
    assert (Reload().published_code, Reload().selector) == ((), "small-kv")  # the paper, not its released code
    assert Reload().fine_tune.epochs == 35  # the paper
    assert (Reload().priming_lr, Reload().tolerance, Reload().reset_untouched) == (1.0, 0.05, False)
