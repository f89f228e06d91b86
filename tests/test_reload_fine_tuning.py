"""How RELOAD's fine-tuning ends, and what it says of what was lost."""

import re
import warnings

import pytest
import torch
from torch import nn

from expunge import Blind, Examples, Recipe, Reload, cross_entropy, gradient, logit_margin, train, unlearn
from expunge.models.mlp import MLP
from expunge.training import mean_loss
from tests.contract import world


def test_corrected_labels_are_learned_and_the_counts_match():
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(90) % 3
    inputs = 2 * torch.randn(3, 6, generator=generator)[labels] + torch.randn(90, 6, generator=generator)
    faulty = torch.arange(0, 90, 9)
    wrong = labels.clone()
    wrong[faulty] = (labels[faulty] + 1) % 3
    recipe = Recipe(epochs=60, lr=0.1, batch_size=30, weight_decay=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MLP((6, 40, 3))
    train(model, Examples(inputs, wrong), cross_entropy, recipe, seed=0)
    full = gradient(model, cross_entropy, Examples(inputs, wrong))
    corrected = Examples(inputs, labels)
    given = Blind(retain=corrected, loss_terms=cross_entropy, fresh=lambda seed: MLP((6, 40, 3)), full=full)
    result = unlearn(model, given, Reload(reset_fraction=0.2, fine_tune=recipe))
    only = corrected.only(faulty)
    assert (model(only.tensors[0]).argmax(1) == labels[faulty]).double().mean() < 0.5
    assert (result.model(only.tensors[0]).argmax(1) == labels[faulty]).double().mean() > 0.8
    assert mean_loss(result.model, corrected, cross_entropy) < mean_loss(model, corrected, cross_entropy) / 2
    assert result.trace.facts["target_loss"] == pytest.approx(full.loss / 90)
    assert (full - gradient(model, cross_entropy, corrected)).count == 0


def test_with_a_cache_of_another_loss_fine_tuning_has_no_aim_and_takes_all_its_epochs():
    here = world("batch-norm")
    wrong = here.original.tensors[1].clone()
    wrong[:20] = (wrong[:20] + 1) % 3
    faulty = Examples(here.original.tensors[0], wrong)
    model = train_on(faulty)
    recipe = Recipe(epochs=6, lr=0.05, batch_size=16)
    for retain in (faulty.without(torch.arange(20)), here.original):  # a removal, and a correction
        margins = gradient(model, logit_margin, faulty, micro_batch=8)
        given = here.blind(full=margins, cached_loss=logit_margin, retain=retain)
        trace = unlearn(model, given, Reload(priming_lr=None, fine_tune=recipe)).trace
        assert trace.facts["target_loss"] is None
        assert trace.stopped == "all 6 epochs done"
        assert trace.forwarded == 0


def train_on(data: Examples) -> nn.Module:
    model = world("batch-norm").fresh(1)
    train(model, data, cross_entropy, Recipe(epochs=15, lr=0.05, batch_size=16), seed=1)
    return model


def test_fine_tuning_ends_when_the_loss_of_the_original_is_reached():
    here = world()
    config = Reload(reset_fraction=0.1, tolerance=0.5, fine_tune=Recipe(epochs=200, lr=0.05, batch_size=16))
    result = unlearn(here.model, here.blind(), config)
    target = result.trace.facts["target_loss"]
    reached = mean_loss(result.model, here.retain, cross_entropy)
    assert reached <= 1.5 * target
    assert result.trace.stopped == f"loss {reached:.4g} reached the original's {target:.4g} (tolerance 50%)"
    assert len(result.trace.epoch_ends) < 200


def test_fine_tuning_ends_on_a_plateau():
    here = world()
    batches = list(here.retain.fetch(torch.arange(48).split(12)))  # in the same order every epoch
    recipe = Recipe(epochs=50, lr=1e-20, batch_size=16)
    config = Reload(reset_fraction=0.5, tolerance=0.0, patience=2, fine_tune=recipe)
    trace = unlearn(here.model, here.blind(retain=batches), config).trace
    assert trace.stopped == "plateau: no lower loss for 2 epochs"
    assert len(trace.epoch_ends) == 3


def test_fine_tuning_ends_at_the_cap():
    here = world()
    config = Reload(reset_fraction=0.5, tolerance=0.0, fine_tune=Recipe(epochs=2, lr=1e-4, batch_size=16))
    trace = unlearn(here.model, here.blind(), config).trace
    assert trace.stopped == "all 2 epochs done"
    assert len(trace.epoch_ends) == 2


@pytest.mark.parametrize(
    ("fraction", "said"),
    [
        (0.02, ""),
        (
            0.3,
            r"went from 0.015 to 0.313 a term, and an untrained model has 1.17: 26% of what training had gained",
        ),
        (0.5, "the model is destroyed"),
    ],
)
def test_what_is_lost_of_what_is_left_is_named(fraction, said):
    here = world()
    config = Reload(reset_fraction=fraction, priming_lr=None, fine_tune=Recipe(epochs=0, lr=1.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        noted = unlearn(here.model, here.blind(), config).trace.warnings
    assert [str(each.message) for each in caught if each.category is UserWarning] == noted
    assert len(noted) == bool(said)
    assert all(re.search(said, warning) for warning in noted)


def test_fine_tuning_may_get_worse_before_it_gets_better_and_a_wreck_at_the_end_is_named():
    here = world()
    wild = Recipe(epochs=4, lr=30.0, batch_size=16, momentum=0.0, weight_decay=0.0, schedule="constant")
    with pytest.warns(UserWarning, match="reload: .* the model is destroyed"):
        result = unlearn(here.model, here.blind(), Reload(reset_fraction=0.1, priming_lr=None, fine_tune=wild))
    assert any("destroyed" in warning for warning in result.trace.warnings)
    assert len(result.trace.epoch_ends) == 4
