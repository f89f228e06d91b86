"""Fine-tuning in a loop of one's own, against the same training by a recipe."""

import copy
from dataclasses import replace

import pytest
import torch

from expunge import cross_entropy, train, unlearn
from expunge.methods import METHODS
from tests.contract import FORGET, KINDS, quick, same, state, world

WHOLLY = ("reload", "orthogonal-ascent", "class-orthogonal-ascent", "natural-ascent", "fine-tune")
PARTLY = ("duck", "unsir")  # their repair
MORE = {"reload": {"patience": 0, "tolerance": 0.0}}  # no end before the last epoch


def given(where, name, loop):
    return (where.blind if METHODS[name].blind else where.sighted)(train_further=loop)


@pytest.mark.parametrize("name", [*WHOLLY, *PARTLY])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_that_follows_the_recipe_gives_the_same_bits(name, kind):
    where, config = world(kind), replace(quick(name), **MORE.get(name, {}))
    called = []

    def loop(model, data, recipe, seed):
        called.append((model.training, torch.is_grad_enabled(), len(data), recipe.epochs))
        train(model, data, cross_entropy, recipe, seed=seed)

    model = copy.deepcopy(where.model).eval()
    own, usual = (unlearn(model, given(where, name, each), config, seed=3) for each in (loop, None))
    assert same(state(own.model), state(usual.model))
    assert not own.model.training
    settings = vars(config)
    further = settings.get("fine_tune") or settings.get("repair") or settings["recipe"]
    assert sum(epochs for *_, epochs in called) == further.epochs
    assert {each[:3] for each in called} == {(True, True, len(where.original) - len(FORGET))}
    assert own.trace.stopped == "the loop of one's own ended"


def test_what_a_loop_draws_follows_from_the_seed_and_leaves_the_global_generators_alone():
    where = world("plain")

    def loop(model, data, recipe, seed):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01 * torch.randn_like(p))

    before = torch.random.get_rng_state()
    one, again, other = (
        state(unlearn(where.model, where.blind(train_further=loop), quick("fine-tune"), seed=seed).model)
        for seed in (0, 0, 1)
    )
    assert same(one, again)
    assert not same(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_train_by_a_recipe_all_the_same_say_so(name):
    def loop(model, data, recipe, seed):
        pass

    where = world("plain")
    trace = unlearn(where.model, given(where, name, loop), quick(name)).trace
    told = [warning for warning in trace.warnings if "not with train_further" in warning]
    assert len(told) == (name not in (*WHOLLY, "retrain", "ssd", "fisher"))
