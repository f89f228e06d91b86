import copy
from dataclasses import astuple

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import wasserstein_distance
from sklearn.metrics import brier_score_loss
from torch import nn

from expunge import Examples, Recipe, cross_entropy, train
from expunge.errors import ConfigError, MismatchError
from expunge.metrics import membership
from expunge.metrics.calibration import brier, expected_calibration_error
from expunge.metrics.compare import Measured, distances, profile
from expunge.metrics.forgetting import Forgetting, against_unseen, signed_forgetting, zero_retrain_forgetting
from expunge.metrics.membership import loss_attack, matched_by_class
from expunge.metrics.outputs import Outputs
from expunge.metrics.relearning import relearn_time
from expunge.metrics.representation import activation_distance, activations, linear_cka, weight_distance
from expunge.training import mean_loss
from tests.contract import same, state, world


@pytest.fixture(autouse=True)
def _quick(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "DRAWS", 1)  # what the loss attack measures is tested elsewhere


def some(seed: int = 0, count: int = 40, classes: int = 5, scale: float = 3.0) -> Outputs:
    return Outputs(scale * np.random.default_rng(seed).normal(size=(count, classes)), np.arange(count) % classes)


def with_losses(*losses: float) -> Outputs:
    """Two classes, label 0, with these losses."""
    p = np.exp(-np.array(losses))
    return Outputs(np.stack([np.log(p), np.log1p(-p)], axis=1), np.zeros(len(losses), dtype=np.int64))


def probabilities(split: Outputs) -> np.ndarray:
    return np.exp(split.log_probabilities)


# Confidences


def test_confidences_are_log_odds_and_are_not_rounded_near_certainty():
    split = some()
    p = probabilities(split)[np.arange(40), split.labels]
    np.testing.assert_allclose(split.confidences, np.log(p / (1 - p)), rtol=1e-9)
    sure = Outputs(np.array([[100.0, 0.0, 0.0]]), np.array([0]))
    assert sure.confidences == pytest.approx([100 - np.log(2)])
    assert Outputs(np.array([[1.0, 3.5]]), np.array([1])).confidences == pytest.approx([2.5])


# Forgetting with a sign


def test_under_and_over_forgetting_by_hand_do_not_cancel():
    model, first, second = with_losses(0.5, 3.0, 1.0), with_losses(1.0, 1.0, 1.0), with_losses(2.0, 1.0, 1.0)
    assert astuple(signed_forgetting(model, [first])) == pytest.approx((0.5 / 3, 2 / 3))  # under, over
    assert astuple(signed_forgetting(model, [first, second])) == pytest.approx((1 / 3, 2 / 3))


def test_under_and_over_forgetting_add_up_to_the_gaps():
    model, retrained = some(0), some(1)
    found = signed_forgetting(model, [retrained])
    gap = model.losses - retrained.losses
    assert found.over - found.under == pytest.approx(gap.mean())
    assert found.over + found.under == pytest.approx(np.abs(gap).mean())
    assert astuple(signed_forgetting(retrained, [model])) == pytest.approx((found.over, found.under))
    assert signed_forgetting(model, [model]) == Forgetting(0.0, 0.0)


@pytest.mark.parametrize(("removed", "unseen"), [(10, 10), (10, 37), (50, 7)])
def test_against_unseen_records_the_two_sides_are_the_wasserstein_distance_of_scipy(removed, unseen):
    generator = np.random.default_rng(removed)
    a, b = generator.exponential(1.0, removed), generator.exponential(1.2, unseen)
    found = against_unseen(a, b)
    assert found.under + found.over == pytest.approx(wasserstein_distance(a, b))
    assert found.over - found.under == pytest.approx(a.mean() - b.mean())
    assert min(found.under, found.over) > 0


def test_against_unseen_records_the_sign_is_right():
    assert astuple(against_unseen(np.array([0.1, 0.2]), np.array([1.1, 1.2]))) == pytest.approx((1.0, 0.0))
    assert astuple(against_unseen(np.array([5.0]), np.array([1.0, 2.0]))) == pytest.approx((0.0, 3.5))


def test_zero_retrain_forgetting_is_one_less_the_divergence_of_scipy():
    model, untrained = some(0), some(1)
    p, q = probabilities(model), probabilities(untrained)
    expected = 1 - np.mean([jensenshannon(a, b, base=2) ** 2 for a, b in zip(p, q, strict=True)])
    assert zero_retrain_forgetting(model, untrained) == pytest.approx(expected)
    assert zero_retrain_forgetting(model, model) == pytest.approx(1)
    opposite = [Outputs(np.array([[a, -a]]), np.array([0])) for a in (500.0, -500.0)]
    assert zero_retrain_forgetting(*opposite) == pytest.approx(0)


# Calibration


def test_the_brier_score_is_that_of_scikit_learn():
    split = some()
    expected = brier_score_loss(split.labels, probabilities(split), labels=range(5), scale_by_half=False)
    assert brier(split) == pytest.approx(expected)


def test_the_calibration_error_is_that_of_a_naive_loop():
    split = some(count=200, scale=1.5)
    confidence = probabilities(split).max(axis=1)
    expected = 0.0
    for low in np.arange(10) / 10:
        inside = (confidence > low) & (confidence <= low + 0.1)
        if inside.any():
            expected += inside.mean() * abs(split.correct[inside].mean() - confidence[inside].mean())
    assert expected_calibration_error(split, bins=10) == pytest.approx(expected)
    assert expected > 0.1


def test_a_calibrated_model_has_no_calibration_error_and_a_boaster_all_of_it():
    fair = Outputs(np.log(np.tile([0.75, 0.25], (4, 1))), np.array([0, 0, 0, 1]))
    assert expected_calibration_error(fair) == pytest.approx(0)
    boaster = Outputs(np.tile([900.0, 0.0], (4, 1)), np.ones(4, dtype=np.int64))
    assert expected_calibration_error(boaster) == pytest.approx(1)


# Inside the models


def test_the_distance_of_weights_is_relative_and_by_layer():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    other = copy.deepcopy(model)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
        other[1].bias.zero_()
        model[1].bias.fill_(-2.0)
    found = weight_distance(model, other)
    assert found == pytest.approx({"0.weight": 0.5, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 2.0})


def test_the_distance_of_activations_is_euclidean():
    a, b = some(0), some(1)
    expected = np.mean(np.sqrt(((probabilities(a) - probabilities(b)) ** 2).sum(axis=1)))
    assert activation_distance(a, b) == pytest.approx(expected)


@pytest.mark.parametrize(("features", "others"), [(6, 4), (60, 70)])  # by covariances, by Gram matrices
def test_alignment_is_the_normalised_hsic_of_centred_gram_matrices(features, others):
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(30, features)) + 5, generator.normal(size=(30, others))
    b[:, :3] += a[:, :3]
    centre = np.eye(30) - 1 / 30
    k, m = centre @ a @ a.T @ centre, centre @ b @ b.T @ centre
    assert linear_cka(a, b) == pytest.approx(np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m)))
    rotation = np.linalg.qr(generator.normal(size=(features, features)))[0]
    assert linear_cka(a, 3 * a @ rotation + 1) == pytest.approx(1)


def test_activations_are_what_the_layers_put_out_in_order():
    here = world("batch-norm")
    model = copy.deepcopy(here.model).train()
    before = state(model)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = activations(model, here.original, layers, batch_size=7)
    assert same(before, state(model))
    assert model.training
    inputs = here.original.tensors[0]
    last = copy.deepcopy(model).eval()(inputs).detach().double().numpy()
    np.testing.assert_allclose(found[layers[-1]], last, rtol=1e-5, atol=1e-6)
    again = activations(model, here.original, layers, run=lambda m, batch: m(batch[0]))
    np.testing.assert_allclose(again[layers[0]], found[layers[0]], rtol=1e-5, atol=1e-6)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_that_runs_twice_is_refused():
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    with pytest.raises(ConfigError, match=r"layer '0' runs more than once in a forward pass, .* Name a layer that"):
        activations(model, Examples(torch.randn(7, 3)), ["0"], batch_size=4)
    assert activations(model, Examples(torch.randn(7, 3)), ["1"], batch_size=4)["1"].shape == (7, 3)


def test_layers_that_do_not_exist_or_run_are_named():
    here = world()
    with pytest.raises(ConfigError, match=r"layers=\['nowhere'\]: the model has no such layer"):
        activations(here.model, here.original, ["nowhere"])
    with pytest.raises(ConfigError, match="did not run in the forward pass"):
        activations(here.model, here.original, [""], run=lambda m, batch: None)


# Relearning


def test_a_model_that_only_hides_what_it_knew_relearns_it_sooner():
    here = world()
    forget = here.original.only(torch.arange(20))
    original = copy.deepcopy(here.model)
    train(original, here.original, cross_entropy, Recipe(epochs=30, lr=0.1, batch_size=20), seed=0)
    target = 1.05 * mean_loss(original, forget, cross_entropy)
    hidden = copy.deepcopy(original)
    with torch.no_grad():
        list(hidden.parameters())[-1][0] += 8.0  # one bias off: everything but the last layer is as it was
    untrained = copy.deepcopy(here.model)
    recipe = Recipe(epochs=40, lr=0.02, batch_size=20, schedule="constant", weight_decay=0.0)
    before = state(hidden)
    fast, slow = (relearn_time(m, forget, cross_entropy, recipe, target=target) for m in (hidden, untrained))
    assert same(before, state(hidden))
    assert fast.losses[0] > target >= fast.losses[-1]
    assert fast.epochs == len(fast.losses) - 1
    assert slow.epochs is None or slow.epochs > fast.epochs
    assert relearn_time(original, forget, cross_entropy, recipe, target=target).epochs == 0
    limited = relearn_time(untrained, forget, cross_entropy, Recipe(epochs=1, lr=1e-4, schedule="constant"), target=0.0)
    assert limited.epochs is None
    assert len(limited.losses) == 2


# All at once


def splits(seed: int, count: int = 30) -> dict[str, Outputs]:
    parts = {"retain": some(seed, 40), "forget": some(seed + 1, 20), "test": some(seed + 2, 120)}
    return parts | {"triggered": some(seed + 3, count), "domain": some(seed + 4, count)}


def test_the_second_group_is_there_when_asked_for(monkeypatch):
    monkeypatch.setattr(membership, "DRAWS", 10)  # so that 100 test records are judged, as 1 % takes
    model = splits(0)
    first, second = profile(model, seed=5).values, profile(model, seed=5, full=True).values
    assert [each.metric for each in first] == ["NA", "FA", "TA", "TA with trigger", "Acc_corr", "FE", "FMIA", "AUC"]
    attack = loss_attack(model["forget"].losses, model["test"].losses, seed=5)
    test = model["test"]
    unseen = test.losses[matched_by_class(model["forget"].labels, test.labels, times=None, seed=5)]
    signed = against_unseen(model["forget"].losses, unseen)
    assert len(unseen) == 120
    assert [each for each in second if each not in first] == [
        Measured("TPR at 1 % FPR", attack.true_positives[0].value, "fraction", "forget", 20),
        Measured("ECE", expected_calibration_error(test), "fraction", "test", 120),
        Measured("Brier", brier(test), "fraction", "test", 120),
        Measured("Loss below unseen", signed.under, "nats", "forget", 20),
        Measured("Loss above unseen", signed.over, "nats", "forget", 20),
    ]


def test_losses_are_not_compared_with_unseen_records_of_other_classes():
    model = splits(0)
    model["test"] = Outputs(model["test"].logits, model["test"].labels % 4)
    assert not any("unseen" in each.metric for each in profile(model, full=True).values)


def test_the_second_group_of_distances_is_there_when_asked_for():
    model, retrained = profile(splits(0)), profile(splits(100))
    first, second = distances(model, retrained), distances(model, retrained, full=True)
    signed = signed_forgetting(model.splits["forget"], [retrained.splits["forget"]])
    apart = activation_distance(model.splits["forget"], retrained.splits["forget"])
    assert second[: len(first)] == first
    assert second[len(first) :] == [
        Measured("Under-forgetting", signed.under, "nats", "forget", 20),
        Measured("Over-forgetting", signed.over, "nats", "forget", 20),
        Measured("Activation distance", apart, "fraction", "forget", 20),
    ]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: signed_forgetting(some(), []), ConfigError, "no retrained model"),
        (lambda: signed_forgetting(some(), [some(count=39)]), MismatchError, "the same split"),
        (lambda: zero_retrain_forgetting(some(), some(classes=4)), MismatchError, "the same split"),
        (lambda: activation_distance(some(), some(count=39)), MismatchError, "the same split"),
        (lambda: against_unseen(np.zeros(0), np.ones(2)), ConfigError, "0 removed and 2 unseen records"),
        (lambda: expected_calibration_error(some(), bins=0), ConfigError, "bins=0"),
        (lambda: linear_cka(np.ones((3, 2)), np.ones((4, 2))), MismatchError, "representations of 3 and 4 examples"),
        (lambda: linear_cka(np.ones((3, 2)), np.eye(3)), ConfigError, "does not vary over the examples"),
        (lambda: weight_distance(nn.Linear(2, 1), nn.Linear(3, 1)), MismatchError, "other names or shapes"),
        (
            lambda: relearn_time(nn.Linear(1, 1), [], cross_entropy, Recipe(epochs=5, lr=0.1), target=0.0),
            ConfigError,
            "schedule='cosine': relearning needs .* a constant learning rate",
        ),
    ],
)
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
