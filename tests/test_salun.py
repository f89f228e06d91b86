"""SalUn: its mask against plain autograd, and that nothing outside it moves by a bit."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from expunge import Amnesiac, Examples, Recipe, SalUn, Sighted, squared_error, unlearn
from expunge.errors import ConfigError, UnsupportedModule
from expunge.methods import salun as module
from expunge.methods.salun import keeping, mask
from expunge.params import named_parameters
from expunge.training import Step
from tests.contract import World, same, state, world

SGD = Recipe(epochs=3, lr=0.05, batch_size=16, momentum=0.9, weight_decay=0.1)
ADAMW = Recipe(epochs=3, lr=0.01, batch_size=16, optimizer="adamw", weight_decay=0.1)


def largest(here: World, share: float) -> dict[str, Tensor]:
    """The entries with the largest |gradient| of the forget loss, one by one, by autograd and a sort."""
    model = copy.deepcopy(here.model).eval().double()
    inputs, labels = here.forget.tensors
    functional.cross_entropy(model(inputs.double()), labels).backward()
    scores = {name: p.grad.abs() for name, p in model.named_parameters()}
    everything = torch.cat([score.flatten() for score in scores.values()])
    order = everything.argsort(descending=True, stable=True)[: math.floor(share * len(everything))]
    chosen = torch.zeros(len(everything), dtype=torch.bool)
    chosen[order] = True
    parts = chosen.split([score.numel() for score in scores.values()])
    return {name: part.view_as(scores[name]) for name, part in zip(scores, parts, strict=True)}


@pytest.mark.parametrize("kind", ["plain", "batch-norm"])
@pytest.mark.parametrize("recipe", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("share", [0.5, 0.1])
def test_exactly_the_entries_outside_the_mask_keep_every_bit(kind, recipe, share):
    here = world(kind)
    result = unlearn(here.model, here.sighted(), SalUn(recipe=recipe, share=share))
    movable, after = largest(here, share), dict(result.model.named_parameters())
    moved = 0
    for name, before in here.model.named_parameters():
        assert torch.equal(before[~movable[name]], after[name][~movable[name]])
        moved += int((before != after[name]).sum())
    total = sum(p.numel() for p in here.model.parameters())
    assert result.trace.facts["salient_count"] == math.floor(share * total)
    assert moved > 0.9 * share * total  # a few inside may stand still


def test_the_mask_has_exactly_its_share_also_where_the_product_of_floats_falls_short():
    removed = {"a": torch.arange(60.0).neg(), "b": torch.arange(60.0, 100.0)}
    assert math.floor(0.29 * 100) == 28
    chosen = mask(removed, 0.29)
    assert torch.cat([chosen["a"], chosen["b"]]).nonzero().flatten().tolist() == list(range(71, 100))
    assert removed["b"][0] == 60  # the gradient is left alone


@pytest.mark.parametrize("make", ["sgd", "adamw"])
def test_what_the_optimiser_remembers_of_fixed_entries_is_zeroed_and_nothing_else(make):
    model = nn.Linear(4, 3)
    theta = named_parameters(model)
    before = {name: p.detach().clone() for name, p in theta.items()}
    movable = {"weight": torch.eye(3, 4) > 0, "bias": torch.tensor([True, False, False])}
    settings = {"momentum": 0.9} if make == "sgd" else {}
    kind = torch.optim.SGD if make == "sgd" else torch.optim.AdamW
    optimizer = kind(list(theta.values()), lr=0.1, weight_decay=0.5, **settings)
    restore = keeping(theta, movable)
    for _ in range(3):
        optimizer.zero_grad()
        (model(torch.randn(5, 4)) ** 2).sum().backward()
        optimizer.step()
        for name, p in theta.items():
            assert not torch.equal(p[~movable[name]], before[name][~movable[name]])  # it does move without
        restore(Step(None, optimizer))
        for name, p in theta.items():
            assert torch.equal(p[~movable[name]], before[name][~movable[name]])
            assert (p != before[name])[movable[name]].all()
            shaped = [m for m in optimizer.state[p].values() if isinstance(m, Tensor) and m.shape == p.shape]
            assert len(shaped) == (1 if make == "sgd" else 2)
            for remembered in shaped:
                assert not remembered[~movable[name]].any()
                assert remembered[movable[name]].all()


def test_infinite_or_negative_zero_weights_outside_the_mask_come_back_bit_for_bit():
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-0.0, 1e-45, 1.0]]))
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    restore = keeping(named_parameters(model), {"weight": torch.tensor([[False, False, True]])})
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    restore(Step(None, optimizer))
    bits, was = model.weight.detach().view(torch.int32), before.view(torch.int32)
    assert torch.equal(bits[:, :2], was[:, :2])
    assert bits[0, 2] != was[0, 2]


def test_a_mask_of_everything_is_the_amnesiac_method():
    here = world("batch-norm")
    everything = unlearn(here.model, here.sighted(), SalUn(recipe=SGD, share=1.0), seed=3).model
    assert same(state(everything), state(unlearn(here.model, here.sighted(), Amnesiac(recipe=SGD), seed=3).model))
    half = unlearn(here.model, here.sighted(), SalUn(recipe=SGD), seed=3).model
    assert not same(state(everything), state(half))


def test_trains_on_wrong_labels_for_the_removed_records(monkeypatch):
    here, seen = world(), []
    original = module.relabelled

    def spied(*args: Any) -> Examples:
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(module, "relabelled", spied)
    result = unlearn(here.model, here.sighted(), SalUn(recipe=Recipe(epochs=30, lr=0.1, batch_size=16))).model
    inputs, labels = seen[0].tensors
    assert torch.equal(inputs, here.forget.tensors[0])
    assert (labels != here.forget.tensors[1]).all()
    before, after = (functional.cross_entropy(model(inputs), labels) for model in (here.model, result))
    assert after < before


def test_the_work_is_counted():
    here = world()
    trace = unlearn(here.model, here.sighted(), SalUn(recipe=SGD)).trace
    assert trace.backwarded == len(here.forget) + 3 * len(here.original)
    assert list(trace.seconds) == ["mask", "relabel", "train"]


def test_an_epoch_that_destroys_the_model_is_taken_back():
    here = world()
    recipe = Recipe(epochs=4, lr=3.0, batch_size=8, schedule="constant")
    result = unlearn(here.model, here.sighted(), SalUn(recipe=recipe, loss_bound=2.0))
    assert "passed the bound 2; the epoch was taken back" in result.trace.stopped


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 0.0}, r"share=0.0: must be in \(0, 1\]"),
        ({"share": 50.0}, r"share=50.0: must be in \(0, 1\]"),
        ({"share": math.nan}, r"share=nan: must be in \(0, 1\]"),
        ({"loss_bound": math.inf}, r"loss_bound=inf: must be a positive number"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        SalUn(**changes)


def test_a_share_that_is_no_weight_is_refused():
    with pytest.raises(ConfigError, match=r"share=0\.01 of 12 weights is none"):
        mask({"weight": torch.randn(12)}, 0.01)


def test_what_is_no_classifier_is_refused():
    here = world()
    x = here.original.tensors[0]
    regression = Examples(x, torch.zeros(len(x), 3))
    given = Sighted(retain=regression, forget=regression, loss_terms=squared_error, fresh=here.fresh)
    with pytest.raises(UnsupportedModule, match="salun works on classifiers"):
        unlearn(here.model, given, SalUn())


def test_the_defaults_are_those_of_the_paper():
    recipe = SalUn().recipe
    assert (SalUn().share, recipe.lr, recipe.epochs, recipe.batch_size) == (0.5, 0.013, 10, 256)
