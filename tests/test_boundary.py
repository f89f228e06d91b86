"""Boundary shrink and boundary expand: the neighbour by hand, the shadow class pruned."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from expunge import BoundaryExpand, BoundaryShrink, Examples, Recipe, Sighted, cross_entropy, squared_error, unlearn
from expunge.errors import ConfigError, UnsupportedModule
from expunge.methods.boundary_expand import Expanded
from expunge.methods.boundary_shrink import nearest_wrong, neighbours
from expunge.methods.classifier import classifying_layer
from tests.contract import KINDS, World, world
from tests.zoo import CLASSES, classification, network

CLASS_0 = torch.arange(0, 60, 3)
RECIPE = Recipe(epochs=8, lr=0.05, batch_size=8, schedule="constant")
CONFIGS = (BoundaryShrink(recipe=RECIPE), BoundaryExpand(recipe=RECIPE))
both = pytest.mark.parametrize("config", CONFIGS, ids=["shrink", "expand"])


def without_class_0(here: World, **changes) -> Sighted:
    parts = {"retain": here.original.without(CLASS_0), "forget": here.original.only(CLASS_0)}
    return here.sighted(**(parts | changes))


def accuracy(model: nn.Module, data: Examples) -> float:
    inputs, labels = data.tensors
    with torch.no_grad():
        return float((copy.deepcopy(model).eval()(inputs).argmax(1) == labels).double().mean())


def test_the_neighbour_of_a_linear_model_by_hand():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(5, CLASSES).double()
    inputs, labels = classification(30).tensors
    near = neighbours(model, inputs, labels, cross_entropy, 0.25)
    weight, bias = model.weight.detach().numpy(), model.bias.detach().numpy()
    scores = np.exp(inputs.numpy() @ weight.T + bias)
    error = scores / scores.sum(1, keepdims=True) - np.eye(CLASSES)[labels.numpy()]
    assert np.array_equal(near.numpy(), inputs.numpy() + 0.25 * np.sign(error @ weight))
    assert model.weight.grad is None
    assert not inputs.requires_grad


@pytest.mark.parametrize("kind", ["mlp", "batch-norm"])
def test_the_neighbour_is_within_the_bound_and_harder(kind):
    model = network(kind).eval()
    inputs, labels = classification(30).tensors
    near = neighbours(model, inputs, labels, cross_entropy, 0.01)
    assert float((near - inputs).abs().max()) == pytest.approx(0.01, rel=1e-9)
    with torch.no_grad():
        assert bool((cross_entropy(model, (near, labels)) > cross_entropy(model, (inputs, labels))).all())


def test_new_labels_are_the_nearest_wrong_class():
    model = network("mlp").eval()
    inputs, labels = classification(200).tensors
    targets, crossed = nearest_wrong(model, inputs, labels)
    with torch.no_grad():
        scores = model(inputs).numpy()
    for row, (label, target) in enumerate(zip(labels.tolist(), targets.tolist(), strict=True)):
        wrong = [each for each in range(CLASSES) if each != label]
        assert target == max(wrong, key=lambda each, row=row: scores[row, each])
        assert bool(crossed[row]) == (scores[row].argmax() != label)
    assert 0 < int(crossed.sum()) < 200


@pytest.mark.parametrize("kind", KINDS)
def test_shrink_trains_on_the_removed_records_alone_with_labels_of_the_original_model(kind):
    here, seen = world(kind), []

    def recorded(model, batch):
        if model.training:
            seen.append(tuple(tensor.detach().clone() for tensor in batch))
        return cross_entropy(model, batch)

    config = BoundaryShrink(bound=0.5, recipe=Recipe(epochs=2, lr=0.1, batch_size=6))
    result = unlearn(here.model, without_class_0(here, loss_terms=recorded, full=None), config)
    inputs, labels = (torch.cat(part) for part in zip(*seen, strict=True))
    original = copy.deepcopy(here.model).eval()
    removed = here.original.tensors[0][CLASS_0].clone().requires_grad_(True)
    functional.cross_entropy(original(removed), torch.zeros(20, dtype=torch.int64), reduction="sum").backward()
    near = removed + 0.5 * removed.grad.sign()
    with torch.no_grad():
        expected = 1 + original(near)[:, 1:].argmax(1)  # all are of class 0
        share = float((original(near).argmax(1) != 0).double().mean())
    assert len(inputs) == 2 * 20
    for each, label in zip(inputs, labels, strict=True):
        [row] = (removed == each).all(1).nonzero()
        assert int(label) == int(expected[row])
    assert result.trace.facts["crossed_share"] == pytest.approx(share)
    assert result.trace.backwarded == 20 + 2 * 20
    assert result.trace.forwarded == 20 + 2 * (20 + 40)  # 40 are left


@both
@pytest.mark.parametrize("kind", KINDS)
def test_forgets_the_class_and_keeps_batch_norm_statistics(config, kind):
    here = world(kind)
    result = unlearn(here.model, without_class_0(here), config).model
    assert accuracy(here.model, here.original.only(CLASS_0)) > 0.8
    assert accuracy(result, here.original.only(CLASS_0)) < 0.3
    buffers = dict(here.model.named_buffers())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in result.named_buffers())
    assert any(not torch.equal(a, b) for a, b in zip(here.model.parameters(), result.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_expand_leaves_the_original_number_of_classes_and_no_trace_of_the_shadow(kind):
    here = world(kind)
    result = unlearn(here.model, without_class_0(here), BoundaryExpand(recipe=RECIPE)).model
    before, after = here.model.state_dict(), result.state_dict()
    assert [(name, tensor.shape, tensor.dtype) for name, tensor in after.items()] == [
        (name, tensor.shape, tensor.dtype) for name, tensor in before.items()
    ]
    assert [type(module) for module in result.modules()] == [type(module) for module in here.model.modules()]
    assert result(here.original.tensors[0]).shape == (60, 3)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in result.modules())


def test_the_shadow_class_stands_behind_the_others_and_shares_their_weights():
    model = network("mlp")
    inputs = classification(10).tensors[0]
    layer = classifying_layer(model, inputs, "boundary-expand")
    expanded = Expanded(model, layer, seed=4)
    found = expanded(inputs)
    assert torch.equal(found[:, :CLASSES], model(inputs))
    assert torch.equal(found[:, CLASSES:], expanded.shadow(model[:-1](inputs)))
    assert expanded.shadow.weight.dtype == torch.float64
    own = {id(parameter) for parameter in model.parameters()}
    assert len(list(expanded.parameters())) == len(own) + 2
    assert own < {id(parameter) for parameter in expanded.parameters()}
    assert torch.equal(expanded.shadow.weight, Expanded(model, layer, seed=4).shadow.weight)
    assert not torch.equal(expanded.shadow.weight, Expanded(model, layer, seed=5).shadow.weight)


def test_expand_moves_the_removed_records_into_the_shadow_class():
    here, wide = world("plain"), []

    def look(moment: str, model: nn.Module) -> None:
        if moment.startswith("epoch"):
            with torch.no_grad():
                wide.append(model(here.original.tensors[0][CLASS_0]).clone())

    trace = unlearn(here.model, without_class_0(here), BoundaryExpand(recipe=RECIPE), watch=look).trace
    assert [tuple(found.shape) for found in wide] == [(20, 4)] * 8
    assert bool((wide[-1].argmax(1) == 3).all())
    shadow = torch.full((20,), 3)
    expected = [float(functional.cross_entropy(found.double(), shadow)) for found in wide]
    assert trace.facts["shadow_loss"] == pytest.approx(expected, rel=1e-5)
    assert (trace.backwarded, trace.forwarded) == (8 * 20, 8 + 8 * (20 + 40))  # 40 are left


@both
def test_takes_back_an_epoch_that_ends_past_the_bound(config):
    here = world("batch-norm")
    result = unlearn(here.model, without_class_0(here), dataclasses.replace(config, loss_bound=0.01))
    assert "passed the bound 0.01; the epoch was taken back" in result.trace.stopped
    assert len(result.trace.epoch_ends) == 1
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, here.model.state_dict()[name])


@both
def test_refuses_a_forget_set_that_is_not_class_wise_unless_told_otherwise(config):
    here = world("plain")
    with pytest.raises(ConfigError, match=r"class 0 is both .*\(3 of 3 such classes\).*any_forget_set=True"):
        unlearn(here.model, here.sighted(), config)
    left = CLASS_0[1:]  # a single record of the class is left
    given = here.sighted(retain=here.original.without(left), forget=here.original.only(left))
    with pytest.raises(ConfigError, match=r"class 0 is both .*\(1 of 1 such classes\)"):
        unlearn(here.model, given, config)
    anyway = type(config)(recipe=RECIPE, any_forget_set=True)
    result = unlearn(here.model, here.sighted(), anyway).model
    assert accuracy(result, here.forget) < accuracy(here.model, here.forget)


@both
def test_refuses_what_is_no_classifier(config):
    here = world("plain")
    inputs = here.original.tensors[0]
    data = Examples(inputs, inputs[:, :3])
    given = Sighted(retain=data, forget=data, loss_terms=squared_error, fresh=here.fresh)
    with pytest.raises(UnsupportedModule, match=r"boundary-.* works on classifiers"):
        unlearn(here.model, given, config)


def test_shrink_refuses_inputs_without_a_gradient():
    tokens = Examples(torch.arange(12).view(6, 2) % 4, torch.arange(6) % 3)
    model = nn.Sequential(nn.Embedding(4, 3), nn.Flatten(), nn.Linear(6, 3))
    given = Sighted(
        retain=tokens.without(torch.tensor([0, 3])),
        forget=tokens.only(torch.tensor([0, 3])),
        loss_terms=cross_entropy,
        fresh=lambda seed: model,
    )
    with pytest.raises(UnsupportedModule, match=r"torch.int64 inputs have none.*take boundary-expand"):
        unlearn(model, given, BoundaryShrink())
    unlearn(model, given, BoundaryExpand())


def test_expand_refuses_logits_that_do_not_come_from_a_linear_layer():
    here = world("plain")
    model = nn.Sequential(nn.Linear(6, 3), nn.LogSoftmax(1))
    with pytest.raises(UnsupportedModule, match=r"boundary-expand works on the embeddings .*those of Sequential"):
        unlearn(model, without_class_0(here, full=None), BoundaryExpand())


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (BoundaryShrink, {"bound": 0.0}, "bound=0.0: must be a positive"),
        (BoundaryShrink, {"loss_bound": float("inf")}, "loss_bound=inf"),
        (BoundaryExpand, {"loss_bound": -1.0}, "loss_bound=-1.0: must be a positive"),
    ],
)
def test_settings_that_cannot_work(kind, settings, message):
    with pytest.raises(ConfigError, match=message):
        kind(**settings)
