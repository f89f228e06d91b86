"""Orthogonal ascent against steps worked by hand in float64, and what it is for."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from expunge import (
    Blind,
    Examples,
    FineTune,
    OrthogonalAscent,
    Recipe,
    Reload,
    cross_entropy,
    gradient,
    logit_margin,
    tempered_margin,
    train,
    unlearn,
)
from expunge.errors import ConfigError, MismatchError, NotInformative
from expunge.seeds import derive
from expunge.training import mean_loss
from tests.contract import without_type_checks, world
from tests.zoo import classification, network

REMOVED = torch.arange(0, 40, 5)
TWICE = Recipe(epochs=3, lr=0.05, batch_size=8)


class Says(nn.Module):
    """Always the same logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, _: Tensor) -> Tensor:
        return self.logits


def odds_against(logits: Tensor, labels: Tensor) -> Tensor:
    """The margin, the long way round."""
    probability = logits.softmax(1)[torch.arange(len(labels)), labels]
    return ((1 - probability) / probability).log()


def given(kind: str, model: nn.Module, **changes) -> Blind:
    data = classification(40)
    blind = {"retain": data.without(REMOVED), "loss_terms": cross_entropy, "cached_loss": logit_margin}
    if "full" not in changes:
        blind["full"] = gradient(model, logit_margin, data, micro_batch=8)
    return Blind(**({"fresh": lambda seed: network(kind, seed + 100)} | blind | changes))


def flat(tensors) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def by_hand(model: nn.Module, data: Examples) -> Tensor:
    """The summed gradient of the margins."""
    inputs, labels = data.tensors
    return flat(torch.autograd.grad(odds_against(model(inputs), labels).sum(), weights(model)))


def weights(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad and p.ndim > 1]


def moved(model: nn.Module, step: Tensor) -> None:
    own = weights(model)
    with torch.no_grad():
        for p, part in zip(own, step.split([p.numel() for p in own]), strict=True):
            p.add_(part.view_as(p))


@pytest.mark.parametrize("kind", ["mlp", "batch-norm", "tied", "frozen"])
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_it_ascends_where_only_the_removed_records_point_and_fine_tunes_in_turns(kind, rounds):
    model, own = network(kind).eval(), network(kind).eval()
    result = unlearn(model, given(kind, model), OrthogonalAscent(step=0.4, rounds=rounds, fine_tune=TWICE), seed=3)

    data = classification(40)
    retain = by_hand(own, data.without(REMOVED))
    removed = by_hand(own, data) - retain
    direction = removed - (removed @ retain) / (retain @ retain) * retain
    step = 0.4 * flat(weights(own)).norm() * direction / direction.norm()
    for number, epochs in enumerate({1: [3], 2: [1, 2], 3: [1, 1, 1]}[rounds]):
        moved(own, step)
        recipe = Recipe(epochs=epochs, lr=0.05, batch_size=8)
        train(own, data.without(REMOVED), cross_entropy, recipe, seed=derive(3, "round", number))

    assert torch.allclose(flat(result.model.state_dict().values()), flat(own.state_dict().values()), rtol=1e-9)
    facts = result.trace.facts
    assert facts["ascent"] == pytest.approx(float(step.norm()))
    assert facts["alignment"] == pytest.approx(float(removed @ retain / (removed.norm() * retain.norm())))
    assert facts["removed_count"] == len(REMOVED)
    assert result.trace.backwarded == 32 + 3 * 32
    assert result.trace.stopped == "all 3 epochs done"


@pytest.mark.parametrize("direction", ["difference", "reversed", "random"])
def test_controls_take_steps_of_the_same_length_in_other_directions(direction):
    model, after = network("mlp"), {}
    for name in ("orthogonal", direction):
        config = OrthogonalAscent(step=0.4, rounds=1, direction=name, fine_tune=TWICE)

        def watch(moment, now, name=name):
            if moment == "ascend":
                after[name] = flat(weights(now)) - flat(weights(model))

        unlearn(model, given("mlp", model), config, seed=3, watch=watch)
    assert after[direction].norm() == pytest.approx(after["orthogonal"].norm())
    cosine = float(after[direction] @ after["orthogonal"] / after["orthogonal"].norm() ** 2)
    removed = by_hand(model, classification(40).only(REMOVED))
    alike = {"difference": float(after["orthogonal"] @ removed / (after["orthogonal"].norm() * removed.norm()))}
    if direction == "random":
        assert 1e-6 < abs(cosine) < 0.6
    else:
        assert cosine == pytest.approx({"reversed": -1.0, **alike}[direction])


def test_the_loss_on_what_is_left_does_not_move_to_first_order():
    at = network("mlp")
    blind, before = given("mlp", at, cached_loss=None, full=gradient(at, cross_entropy, classification(40))), []

    def watch(moment, model):
        if moment == "ascend":
            before.append(copy.deepcopy(model))

    unlearn(at, blind, OrthogonalAscent(step=1e-5, rounds=1, fine_tune=TWICE), watch=watch)
    on = [
        [mean_loss(model, data, cross_entropy) for model in (at, before[0])]
        for data in (classification(40).without(REMOVED), classification(40).only(REMOVED))
    ]
    kept, removed = (after - now for now, after in on)
    assert removed > 0
    assert abs(kept) < 1e-3 * removed


def test_the_removed_records_are_forgotten_where_fine_tuning_and_reloads_ascent_keep_them():
    w = world("batch-norm")
    brief = Recipe(epochs=4, lr=0.03, batch_size=16)
    margins = w.blind(full=gradient(w.model, logit_margin, w.original, micro_batch=8), cached_loss=logit_margin)

    def losses(config: object, blind: Blind) -> tuple[float, float]:
        model = unlearn(w.model, blind, config).model
        return mean_loss(model, w.forget, cross_entropy), mean_loss(model, w.retain, cross_entropy)

    forgotten, kept = losses(OrthogonalAscent(fine_tune=brief), margins)
    tuned = losses(FineTune(recipe=brief), w.blind())[0]
    climbed = losses(Reload(reset_fraction=0.0, fine_tune=brief), w.blind())[0]
    assert forgotten > 5 * max(tuned, climbed)
    assert kept < 0.2


def test_of_a_cache_with_groups_only_the_touched_ones_are_computed():
    model, data = network("mlp"), classification(40)
    config, gone = OrthogonalAscent(rounds=1, fine_tune=TWICE), torch.tensor([1, 3])
    results = {}
    for groups in (None, 5):
        full = gradient(model, logit_margin, data, micro_batch=8, groups=groups)
        results[groups] = unlearn(model, given("mlp", model, full=full, retain=data.without(gone)), config)
    trace = results[5].trace
    assert (trace.facts["groups_computed"], trace.facts["groups"]) == (1, 5)
    assert trace.backwarded == results[None].trace.backwarded - 32
    a, b = (flat(results[groups].model.parameters()) for groups in (None, 5))
    assert torch.allclose(a, b, rtol=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step": 0.0}, "step=0.0: must be a share of the norm of the weights, above 0 and below 1"),
        ({"step": 1.0}, "step=1.0: must be a share"),
        ({"rounds": 0}, "rounds=0: must be a whole number, at least 1"),
        ({"rounds": 1.5}, "rounds=1.5: must be a whole number"),
        ({"direction": "up"}, "direction='up': choose from orthogonal, difference, reversed, random"),
        ({"rounds": 4, "fine_tune": TWICE}, "fine_tune.epochs=3, rounds=4: an ascent without an epoch"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with without_type_checks(), pytest.raises(ConfigError, match=message):
        OrthogonalAscent(**settings)


def test_without_a_cache_it_says_what_to_give():
    model = network("mlp")
    with pytest.raises(ConfigError, match="full=None"):
        unlearn(model, given("mlp", model, full=None), OrthogonalAscent(fine_tune=TWICE))


def test_a_cache_of_another_loss_is_refused_by_name():
    model = network("mlp")
    with pytest.raises(MismatchError, match="of the loss 'logit_margin', and now 'cross_entropy'"):
        unlearn(model, given("mlp", model, cached_loss=None), OrthogonalAscent(fine_tune=TWICE))


def test_nothing_removed_shows_nothing():
    model = network("mlp")
    with pytest.raises(NotInformative, match="below its rounding floor"):
        unlearn(model, given("mlp", model, retain=classification(40)), OrthogonalAscent(fine_tune=TWICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_removed_copies_of_what_is_left_have_no_direction_of_their_own(dtype):
    model, (inputs, labels) = network("mlp").to(dtype), classification(20, dtype=dtype).tensors
    doubled = Examples(torch.cat([inputs, inputs]), torch.cat([labels, labels]))
    full = gradient(model, logit_margin, doubled, micro_batch=8)
    left = doubled.only(torch.arange(20))
    with pytest.raises(NotInformative, match="copies"):
        unlearn(model, given("mlp", model, full=full, retain=left), OrthogonalAscent(fine_tune=TWICE))


def test_a_margin_is_the_log_odds_against_the_label_and_its_gradient_that_of_cross_entropy_unweighted():
    model, (inputs, labels) = network("mlp"), classification(7).tensors
    assert torch.allclose(logit_margin(model, (inputs, labels)), odds_against(model(inputs), labels))
    wrong = 1 - model(inputs).softmax(1)[torch.arange(7), labels]
    for row in range(7):
        one = inputs[row : row + 1], labels[row : row + 1]
        weight = model[-1].weight
        margin, entropy = (
            torch.autograd.grad(loss(model, one).sum(), weight)[0] for loss in (logit_margin, cross_entropy)
        )
        assert torch.allclose(wrong[row] * margin, entropy)


def test_a_tempered_margin_has_the_gradient_of_cross_entropy_with_the_root_of_its_weight():
    z = torch.tensor([-12.0, -2.0, 0.0, 3.0, 30.0], dtype=torch.float64)
    labels = torch.ones(5)
    p = z.sigmoid()
    torch.testing.assert_close(tempered_margin(nn.Identity(), (z, labels)), 2 * (1 - p).sqrt().atanh())
    for loss, power in ((cross_entropy, 1.0), (tempered_margin, 0.5), (logit_margin, 0.0)):
        logits = torch.stack([torch.zeros_like(z), z], 1).requires_grad_()
        loss(nn.Identity(), (logits, labels.long())).sum().backward()
        torch.testing.assert_close(-logits.grad[:, 1], (1 - p) ** power)


def test_tempered_margins_are_finite_where_a_label_is_certain_or_impossible():
    z = torch.tensor([-200.0, 200.0]).requires_grad_()
    found = tempered_margin(nn.Identity(), (z, torch.ones(2)))
    torch.testing.assert_close(found.detach().float(), torch.tensor([200 + 2 * math.log(2), 0.0]))
    found.sum().backward()
    torch.testing.assert_close(z.grad, torch.tensor([-1.0, 0.0]))


def test_a_margin_of_a_record_fitted_beyond_float32_is_finite_and_still_moves():
    logits = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    margin = logit_margin(Says(logits), (torch.zeros(1), torch.tensor([0])))
    (moves,) = torch.autograd.grad(margin.sum(), logits)
    assert float(margin.detach()) == pytest.approx(-60 + math.log(2))
    assert moves.tolist() == [[-1.0, 0.5, 0.5]]


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_a_margin_of_one_logit_is_that_of_two(shape, dtype):
    z, labels = torch.tensor([-2.0, 0.5, 3.0, -1.0]), torch.tensor([0, 1, 1, 1])
    two = logit_margin(nn.Identity(), (torch.stack([torch.zeros(4), z], 1), labels))
    for mine in (labels, labels.view(shape)):
        torch.testing.assert_close(logit_margin(nn.Identity(), (z.view(shape), mine.to(dtype))), two)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (torch.zeros(4, 3), torch.zeros(4)),
        (torch.zeros(4, 3), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(4, 1), torch.full((4,), 2)),
        (torch.zeros(4), torch.full((4,), 0.5)),
        (torch.zeros(4), torch.zeros(4, 2)),
    ],
)
def test_labels_and_logits_without_margins_are_refused(logits, labels):
    with pytest.raises(ConfigError, match=r"a margin takes (class numbers, int64|0 or 1 for each example)"):
        logit_margin(Says(logits), (torch.zeros(4), labels))


@pytest.mark.parametrize("label", [3, -1, -100])
def test_labels_of_no_class_have_no_margin(label):
    labels = torch.tensor([0, label, 2])
    with pytest.raises(ConfigError, match=r"a margin is one of a class, 0 to 2\. Leave records without a class out"):
        logit_margin(Says(torch.zeros(3, 3)), (torch.zeros(3), labels))
