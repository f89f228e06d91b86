"""The step of methods that ascend and fine-tune in turns: that of the settings, or one for how much was removed."""

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
from expunge.trace import Trace
from tests.zoo import classification, network

AT_A_TENTH = {NaturalAscent: 0.2, ClassOrthogonalAscent: 0.1, OrthogonalAscent: 0.2}
TWICE = Recipe(epochs=2, lr=0.05, batch_size=8)


def unlearned(method: type, before: Examples, left: Examples, **settings) -> Trace:
    model = network("mlp")
    full = gradient(model, cross_entropy, before, micro_batch=8)
    given = Blind(retain=left, loss_terms=cross_entropy, fresh=lambda seed: network("mlp", seed), full=full)
    return unlearn(model, given, method(fine_tune=TWICE, **settings)).trace


AT_MOST = {OrthogonalAscent: 0.2}


@pytest.mark.parametrize("method", AT_A_TENTH)
@pytest.mark.parametrize(("removed", "longer"), [(1, 0.25 ** (2 / 3)), (4, 1.0), (32, 4.0)])
def test_without_a_step_of_its_own_it_grows_with_the_share_that_was_removed(method, removed, longer):
    data = classification(40)
    trace = unlearned(method, data, data.without(torch.arange(removed)))
    assert trace.facts["step"] == pytest.approx(min(longer * AT_A_TENTH[method], AT_MOST.get(method, 1.0)))


@pytest.mark.parametrize("method", AT_A_TENTH)
def test_a_step_of_its_own_is_taken_whatever_was_removed(method):
    data = classification(40)
    trace = unlearned(method, data, data.without(torch.arange(1)), step=0.3)
    assert trace.facts["step"] == 0.3


@pytest.mark.parametrize("method", [NaturalAscent, OrthogonalAscent])
def test_a_correction_removes_nothing_and_counts_as_a_tenth(method):
    right = classification(40)
    inputs, labels = right.tensors
    wrong = Examples(inputs, torch.cat([(labels[:2] + 1) % 3, labels[2:]]))
    assert unlearned(method, wrong, right).facts["step"] == AT_A_TENTH[method]
