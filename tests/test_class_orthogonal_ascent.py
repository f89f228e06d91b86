"""Class-orthogonal ascent against directions worked by hand in float64, and what it is for."""

import math

import pytest
import torch
from torch import Tensor, nn

from expunge import (
    Blind,
    ClassOrthogonalAscent,
    Examples,
    OrthogonalAscent,
    Recipe,
    cross_entropy,
    gradient,
    logit_margin,
    train,
    unlearn,
)
from expunge.errors import ConfigError, MismatchError, NotInformative
from expunge.methods import class_orthogonal_ascent as method
from expunge.trace import Trace
from expunge.training import mean_loss
from tests.contract import without_type_checks, world
from tests.test_orthogonal_ascent import REMOVED, flat, given, weights
from tests.test_orthogonal_ascent import by_hand as of_margins
from tests.zoo import classification, network

ONCE = Recipe(epochs=1, lr=0.05, batch_size=8)


def ascended(model: nn.Module, blind: Blind, config: object) -> Tensor:
    """How the weights have moved after the first ascent."""
    found = []

    def watch(moment, now):
        if moment == "ascend":
            found.append(flat(weights(now)) - flat(weights(model)))

    unlearn(model, blind, config, watch=watch)
    return found[0]


def by_hand(model: nn.Module, data: Examples, left: Examples) -> Tensor:
    """What of the removed records' gradient no class of what is left has, by QR."""
    labels = left.tensors[1]
    rows = [of_margins(model, left.only(left.positions[labels == label])) for label in labels.unique()]
    basis = torch.linalg.qr(torch.stack(rows).T)[0]
    removed = of_margins(model, data) - of_margins(model, left)
    return removed - basis @ (basis.T @ removed)


@pytest.mark.parametrize("kind", ["mlp", "batch-norm", "tied", "frozen"])
def test_it_ascends_where_no_class_of_what_is_left_points(kind):
    model = network(kind).eval()
    config = ClassOrthogonalAscent(step=0.4, growth=0.0, rounds=1, fine_tune=ONCE)
    blind, data = given(kind, model), classification(40)
    step = ascended(model, blind, config)
    direction = by_hand(model, data, data.without(REMOVED))
    assert torch.allclose(step / step.norm(), direction / direction.norm(), atol=1e-9)
    assert step.norm() == pytest.approx(0.4 * float(flat(weights(model)).norm()))
    trace = unlearn(model, blind, config).trace
    assert trace.facts == {
        "removed_count": 8,
        "cached_count": 40,
        "classes": 3,
        "alone": pytest.approx(float(direction.norm() / of_margins(model, data).norm())),
        "ascent_share": 0.4,
        "ascent": pytest.approx(float(step.norm())),
    }
    assert trace.backwarded == 32 + 32
    assert trace.stopped == "all 1 epochs done"


def test_no_class_moves_to_first_order_where_orthogonal_ascent_moves_them_against_each_other():
    model, data = network("mlp"), classification(40)
    left = data.without(REMOVED)
    labels = left.tensors[1]
    parts = [left.only(left.positions[labels == label]) for label in labels.unique()]
    moves = {}
    for config in (ClassOrthogonalAscent, OrthogonalAscent):
        step = ascended(model, given("mlp", model), config(step=0.1, rounds=1, fine_tune=ONCE))
        moves[config] = max(abs(float(of_margins(model, part) @ step)) for part in parts)
    assert moves[ClassOrthogonalAscent] < 1e-9 * moves[OrthogonalAscent]


def test_records_need_no_positions_and_come_in_any_order_and_batches():
    model = network("mlp")
    config = ClassOrthogonalAscent(step=0.4, rounds=1, fine_tune=ONCE)
    inputs, labels = classification(40).without(REMOVED).tensors
    shuffled = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    batches = [(inputs[rows], labels[rows]) for rows in shuffled.split(7)]
    one, other = (ascended(model, given("mlp", model, **changed), config) for changed in ({}, {"retain": batches}))
    assert torch.allclose(one, other, rtol=1e-9)


def test_records_of_a_class_are_gathered_and_none_waits_for_ever(monkeypatch):
    monkeypatch.setattr(method, "ROWS", 4)
    monkeypatch.setattr(method, "WAITING", 6)
    data = classification(41)
    found = [(label, batch) for label, batch in method._by_class(data, torch.device("cpu"))]
    assert all(batch[1].eq(label).all() and len(batch[1]) <= 4 for label, batch in found)
    seen = torch.cat([batch[0] for _, batch in found])
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, data.tensors[0].tolist()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_projection_leaves_nothing_along_rows_that_depend_on_each_other_or_are_zero(dtype):
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 30, generator=draw, dtype=torch.float64)
    rows = torch.cat([rows, 1e-6 * rows[:1], rows[:1] + rows[1:2], torch.zeros(1, 30)]).to(dtype)
    total = {"a": torch.randn(5, 2, generator=draw), "b": torch.randn(20, generator=draw)}
    spans = {"a": rows[:, :10], "b": rows[:, 10:]}
    left = flat(method.outside(total, spans).values())
    truth = flat(total.values()).double()
    basis = torch.linalg.qr(rows[:4].double().T)[0]
    assert torch.allclose(left, truth - basis @ (basis.T @ truth), atol=1e-6 if dtype == torch.float32 else 1e-9)


def test_removed_records_of_one_class_are_forgotten_and_the_rest_of_it_suffers_less():
    draw = torch.Generator().manual_seed(0)
    data, test = (Examples(torch.randn(n, 20, generator=draw), torch.arange(n) % 3) for n in (120, 400))

    def fresh(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3))

    model = fresh(0)
    train(model, data, cross_entropy, Recipe(epochs=60, lr=0.1, batch_size=16), seed=0)
    gone = torch.arange(0, 30, 3)
    blind = Blind(
        retain=data.without(gone),
        loss_terms=cross_entropy,
        fresh=fresh,
        full=gradient(model, logit_margin, data),
        cached_loss=logit_margin,
    )
    brief = Recipe(epochs=4, lr=0.03, batch_size=16)
    models = [
        unlearn(model, blind, c(step=0.05, growth=0.0, fine_tune=brief)).model
        for c in (ClassOrthogonalAscent, OrthogonalAscent)
    ]
    unseen = test.only(torch.arange(0, 400, 3))  # of the same class
    risen = [
        [mean_loss(each, part, cross_entropy) - mean_loss(model, part, cross_entropy) for each in models]
        for part in (data.only(gone), data.without(gone), unseen)
    ]
    assert risen[0][0] > risen[0][1] > 1
    assert max(risen[1]) < 0.02
    assert 0 < risen[2][0] < 0.7 * risen[2][1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_removed_copies_of_what_is_left_have_nothing_of_their_own(dtype):
    model, (inputs, labels) = network("mlp").to(dtype), classification(20, dtype=dtype).tensors
    doubled = Examples(torch.cat([inputs, inputs]), torch.cat([labels, labels]))
    full = gradient(model, logit_margin, doubled, micro_batch=8)
    with pytest.raises(NotInformative, match=r"not along the gradients of the 3 classes.*copies of it"):
        unlearn(
            model,
            given("mlp", model, full=full, retain=doubled.only(torch.arange(20))),
            ClassOrthogonalAscent(rounds=1, fine_tune=ONCE),
        )


def test_nothing_removed_shows_nothing():
    model = network("mlp")
    with pytest.raises(NotInformative, match="rounding floor"):
        unlearn(model, given("mlp", model, retain=classification(40)), ClassOrthogonalAscent(rounds=1, fine_tune=ONCE))


def test_more_records_than_there_were_are_refused():
    model = network("mlp")
    config = ClassOrthogonalAscent(rounds=1, fine_tune=ONCE)
    with pytest.raises(MismatchError, match="50 records are left of 40 that were cached"):
        unlearn(model, given("mlp", model, retain=classification(50)), config)


def test_a_cache_of_lower_precision_raises_the_floor():
    w = world("plain")
    full = gradient(w.model, logit_margin, w.original, micro_batch=8)
    coarse = full.__class__(**{**vars(full), "storage_roundoff": 1.0})
    config = ClassOrthogonalAscent(rounds=1, fine_tune=ONCE)
    unlearn(w.model, w.blind(full=full, cached_loss=logit_margin), config)
    with pytest.raises(NotInformative):
        unlearn(w.model, w.blind(full=coarse, cached_loss=logit_margin), config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step": math.nan}, "step=nan: must be a share of the norm"),
        ({"rounds": 0}, "rounds=0: must be a whole number, at least 1"),
        ({"rounds": 2, "fine_tune": ONCE}, "fine_tune.epochs=1, rounds=2: an ascent without an epoch"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with without_type_checks(), pytest.raises(ConfigError, match=message):
        ClassOrthogonalAscent(**settings)


def convolutions(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def perceptron(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("build", [convolutions, perceptron])
def test_where_nothing_was_removed_rounding_is_not_taken_for_it(build, dtype):
    draw = torch.Generator().manual_seed(0)
    data = Examples(torch.randn(600, 3, 8, 8, generator=draw).to(dtype), torch.randint(10, (600,), generator=draw))
    model = build(0).to(dtype)
    train(model, data, cross_entropy, Recipe(epochs=2, lr=0.02), seed=0)
    full = gradient(model, logit_margin, data)
    blind = Blind(retain=data, loss_terms=cross_entropy, fresh=build, full=full, cached_loss=logit_margin)
    config = ClassOrthogonalAscent(rounds=1, fine_tune=ONCE)
    with pytest.raises(NotInformative):
        unlearn(model, blind, config)
    if dtype != torch.bfloat16:  # a tenth is seen above it
        left = data.without(torch.arange(0, 600, 10))
        unlearn(model, Blind(**{**vars(blind), "retain": left}), config)


def test_sums_of_coarse_numbers_do_not_stagnate(monkeypatch):
    monkeypatch.setattr(method, "ROWS", 2)
    inputs = torch.ones(3000, 1, dtype=torch.bfloat16)
    model = nn.Linear(1, 2, dtype=torch.bfloat16)
    data = Examples(inputs, torch.zeros(3000, dtype=torch.int64))
    full = gradient(model, logit_margin, data)
    blind = Blind(retain=data, loss_terms=cross_entropy, fresh=lambda _: model, full=full, cached_loss=logit_margin)
    found, count = method.class_gradients(model, {"weight": model.weight}, blind, Trace("test", 0))
    assert count == 3000
    assert torch.allclose(found["weight"].double().flatten(), full.total["weight"].flatten(), rtol=1e-2)


def test_a_model_with_a_compiled_part_ascends_as_without():
    config = ClassOrthogonalAscent(rounds=1, fine_tune=ONCE)
    model, compiled = network("mlp"), network("mlp")
    compiled[0] = torch.compile(compiled[0], backend="eager")
    whole, part = (unlearn(each, given("mlp", each), config).model for each in (model, compiled))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), part.parameters(), strict=True))


def test_records_of_other_shapes_wait_by_themselves():
    batches = [(torch.ones(6, length), torch.arange(6) % 2) for length in (5, 7, 5)]
    found = [(label, tuple(batch[0].shape)) for label, batch in method._by_class(batches, torch.device("cpu"))]
    assert sorted(found) == [(0, (3, 7)), (0, (6, 5)), (1, (3, 7)), (1, (6, 5))]
