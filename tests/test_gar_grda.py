"""GAR and GRDA, the baselines for corrected data, against steps worked by hand in float64."""

import pytest
import torch
from torch import nn

from expunge import GAR, GRDA, Examples, Recipe, Sighted, cross_entropy, unlearn
from expunge.errors import ConfigError, ForgetSetAccessed, MismatchError
from expunge.training import mean_loss
from tests.zoo import CLASSES, classification, network, summed_by_autograd

FAULTY = torch.arange(0, 40, 4)
ONCE = Recipe(epochs=1, lr=0.1, batch_size=40, momentum=0.0, weight_decay=0.0, schedule="constant")
NEVER = Recipe(epochs=0, lr=0.1)


def corrected() -> tuple[Examples, Examples]:
    """Data with wrong labels at some positions, and the same with the right ones."""
    right = classification(40)
    inputs, labels = right.tensors
    wrong = labels.clone()
    wrong[FAULTY] = (labels[FAULTY] + 1) % CLASSES
    return Examples(inputs, wrong), right


def sighted(**changes) -> Sighted:
    faulty, right = corrected()
    given = {"retain": right, "forget": faulty.only(FAULTY), "original": faulty}
    return Sighted(**({"loss_terms": cross_entropy, "fresh": lambda seed: network("mlp", seed)} | given | changes))


def summed(model: nn.Module, data: Examples) -> dict[str, torch.Tensor]:
    return summed_by_autograd(model, [name for name, _ in model.named_parameters()], data.tensors)


def moved_by_hand(model: nn.Module, factor: float, gradient: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(factor * gradient[name])


def agree(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.allclose(x, y, rtol=1e-12, atol=1e-13) for x, y in pairs)


@pytest.mark.parametrize("kind", ["mlp", "batch-norm"])
@pytest.mark.parametrize("epochs", [1, 3])
def test_grda_steps_up_the_old_loss_and_down_the_new_one_from_where_it_is(kind, epochs):
    given, by_hand = sighted(), network(kind)
    result = unlearn(network(kind), given, GRDA(epochs=epochs, lr=0.3, batch_size=10, loss_bound=100.0))
    for _ in range(epochs):
        old, new = summed(by_hand, given.original), summed(by_hand, given.retain)
        moved_by_hand(by_hand, 0.3 / 10, {name: old[name] - new[name] for name in old})
    assert agree(result.model, by_hand)
    assert result.trace.backwarded == epochs * (40 + 40)
    assert result.trace.forwarded == epochs * 40
    assert result.trace.stopped == f"all {epochs} epochs done"


def test_grda_fits_the_corrections_and_loses_the_faults():
    given, model = sighted(), network("mlp")
    result = unlearn(model, given, GRDA(epochs=5, lr=0.1, batch_size=10)).model
    for data, sign in ((given.retain.only(FAULTY), -1), (given.forget, 1)):
        change = mean_loss(result, data, cross_entropy) - mean_loss(model, data, cross_entropy)
        assert sign * change > 0.01


def test_grda_of_a_deletion_climbs_the_loss_on_what_was_removed():
    whole = classification(40)
    given, by_hand = sighted(original=whole, retain=whole.without(FAULTY), forget=whole.only(FAULTY)), network("mlp")
    result = unlearn(network("mlp"), given, GRDA(epochs=1, lr=0.2, batch_size=20)).model
    moved_by_hand(by_hand, 0.2 / 20, summed(by_hand, given.forget))
    assert agree(result, by_hand)


def test_grda_takes_back_the_step_that_passes_the_bound():
    model = network("batch-norm")
    result = unlearn(model, sighted(), GRDA(lr=1e6, batch_size=1))
    assert "passed the bound 5; the epoch was taken back" in result.trace.stopped
    assert len(result.trace.losses) == 1
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_grda_refuses_more_records_than_there_were():
    faulty, right = corrected()
    with pytest.raises(MismatchError, match="retain data has 40 terms and the cached data had 30"):
        unlearn(network("mlp"), sighted(original=[faulty.without(FAULTY).tensors], retain=[right.tensors]), GRDA())


def test_gar_is_a_step_up_on_the_old_data_then_one_down_on_the_new():
    given, by_hand = sighted(), network("mlp")
    result = unlearn(network("mlp"), given, GAR(ascent=ONCE, descent=ONCE))
    moved_by_hand(by_hand, 0.1 / 40, summed(by_hand, given.original))
    moved_by_hand(by_hand, -0.1 / 40, summed(by_hand, given.retain))
    assert agree(result.model, by_hand)
    assert (result.trace.backwarded, result.trace.forwarded) == (40 + 40, 40 + 2 * 40)


def test_gar_ascends_then_descends():
    given, model, seen = sighted(), network("batch-norm"), {}
    config = GAR(
        ascent=Recipe(epochs=4, lr=0.02, batch_size=10, weight_decay=0.0, schedule="constant"),
        descent=Recipe(epochs=20, lr=0.05, batch_size=10),
    )

    def look(moment: str, now: nn.Module) -> None:
        losses = tuple(mean_loss(now, data, cross_entropy) for data in (given.original, given.retain))
        seen[moment] = (*losses, now[1].running_mean.clone())

    result = unlearn(model, given, config, watch=look)
    assert list(result.trace.seconds) == ["ascend", "relearn"]
    assert seen["ascend"][0] > mean_loss(model, given.original, cross_entropy) + 0.05
    assert seen["relearn"][1] < seen["ascend"][1] - 0.2
    assert torch.equal(seen["ascend"][2], model[1].running_mean)
    assert not torch.equal(seen["relearn"][2], model[1].running_mean)


def test_gar_relearns_from_before_the_epoch_that_passed_the_bound():
    model = network("mlp")
    wild = Recipe(epochs=5, lr=100.0, batch_size=40, weight_decay=0.0, schedule="constant")
    result = unlearn(model, sighted(), GAR(ascent=wild, descent=NEVER))
    assert "passed the bound 5; the epoch was taken back" in result.trace.facts["ascent_stopped"]
    assert result.trace.stopped == "all 0 epochs done"
    assert agree(result.model, model)
    assert not agree(unlearn(model, sighted(), GAR(ascent=wild, descent=NEVER, loss_bound=1e9)).model, model)


def test_gar_goes_back_by_one_epoch_not_to_the_start():
    def ascent(epochs: int) -> Recipe:
        return Recipe(epochs=epochs, lr=0.05, batch_size=10, weight_decay=0.0, schedule="constant")

    stopped = unlearn(network("batch-norm"), sighted(), GAR(ascent=ascent(50), descent=NEVER, loss_bound=3.0))
    good = len(stopped.trace.epoch_ends) - 1
    assert 1 < good < 49
    assert "taken back" in stopped.trace.facts["ascent_stopped"]
    straight = unlearn(network("batch-norm"), sighted(), GAR(ascent=ascent(good), descent=NEVER, loss_bound=3.0))
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(tensor, stopped.model.state_dict()[name])


@pytest.mark.parametrize(("config", "name"), [(GAR(), "gar"), (GRDA(), "grda")])
def test_without_the_original_data_they_refuse(config, name):
    with pytest.raises(ForgetSetAccessed, match=rf"original=None: {name} .*Give Sighted\(original=…\)"):
        unlearn(network("mlp"), sighted(original=None), config)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (GAR, {"loss_bound": 0.0}, "loss_bound=0.0: must be a positive"),
        (GRDA, {"lr": 0.0}, "lr=0.0: must be a positive"),
        (GRDA, {"loss_bound": float("nan")}, "loss_bound=nan"),
        (GRDA, {"epochs": 0}, "epochs=0, batch_size=128: must be at least 1"),
        (GRDA, {"batch_size": 0}, "batch_size=0: must be at least 1"),
    ],
)
def test_settings_that_cannot_work(kind, settings, message):
    with pytest.raises(ConfigError, match=message):
        kind(**settings)
