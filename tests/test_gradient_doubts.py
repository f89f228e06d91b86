"""Differences of gradients that look right and may mean nothing: what is noticed, and what cannot be."""

import pytest
import torch

from expunge import Blind, Examples, Recipe, Reload, cross_entropy, gradient, unlearn
from tests.zoo import classification, network

DATA = classification(20)


def twice(model, batch):
    return 2 * cross_entropy(model, batch)


def half(model, batch):
    return cross_entropy(model, batch) / 2


twice.__qualname__ = half.__qualname__ = "cross_entropy"  # of a loss that was edited the name alone is known


def below_zero(model, batch):
    return cross_entropy(model, batch) - 10


@pytest.mark.parametrize(
    ("gone", "now", "said"),
    [
        (range(3), cross_entropy, ""),
        (range(3), twice, "4 of 4 micro-batches with as many terms as in the cache have another loss than they had"),
        (range(3), half, "4 of 4 micro-batches with as many terms as in the cache have another loss than they had"),
        (range(0, 20, 4), cross_entropy, ""),  # each micro-batch lost one
        (range(0, 20, 4), twice, "the loss of all data was "),
        (range(0, 20, 4), half, ""),  # which nobody can tell
    ],
)
def test_a_loss_that_was_edited_is_noticed_by_what_it_gives(gone, now, said):
    model = network("mlp")
    full = gradient(model, cross_entropy, DATA, micro_batch=4)
    left = gradient(model, now, DATA.without(torch.tensor(list(gone))), micro_batch=4)
    assert full.doubts(left).startswith(said)
    assert bool(full.doubts(left)) == bool(said)


def test_a_loss_that_changed_for_most_of_the_records_is_noticed():
    """As a weight of one class does: a micro-batch without that class reads as it did."""

    def weighted(model, batch):
        return cross_entropy(model, batch) * torch.where(batch[1] == 0, 2.0, 1.0)

    weighted.__qualname__ = "cross_entropy"
    labels = DATA.tensors[1].clone()
    labels[4:8], labels[8::4] = 1, 0
    data, model = Examples(DATA.tensors[0], labels), network("mlp")
    full = gradient(model, cross_entropy, data, micro_batch=4)
    left = gradient(model, weighted, data.without(torch.arange(2)), micro_batch=4)
    assert full.doubts(left).startswith("3 of 4 micro-batches with as many terms as in the cache have another loss")


def test_losses_that_may_be_negative_and_corrections_raise_no_doubts():
    model = network("mlp")
    full = gradient(model, below_zero, DATA, micro_batch=4)
    assert full.doubts(gradient(model, below_zero, DATA.without(torch.arange(0, 20, 4)), micro_batch=4)) == ""
    other = Examples(DATA.tensors[0], DATA.tensors[1].roll(1))
    cached = gradient(model, cross_entropy, DATA, micro_batch=4)
    assert cached.doubts(gradient(model, cross_entropy, other, micro_batch=4)) == ""


def test_an_unlearning_warns_of_positions_that_were_counted_anew():
    model = network("mlp")
    full = gradient(model, cross_entropy, DATA, micro_batch=4)
    for left, doubted in (
        (DATA.without(torch.arange(6)), False),
        (Examples(*DATA.without(torch.arange(6)).tensors), True),
    ):
        given = Blind(retain=left, loss_terms=cross_entropy, fresh=lambda _: network("mlp", 1), full=full)
        warned = unlearn(model, given, Reload(fine_tune=Recipe(epochs=0, lr=0.1))).trace.warnings
        assert any("Were positions counted anew" in text for text in warned) == doubted


def test_corrections_beside_a_deletion_raise_no_doubts():
    model = network("mlp")
    full = gradient(model, cross_entropy, DATA, micro_batch=4)
    labels = DATA.tensors[1].clone()
    labels[8:16] = model(DATA.tensors[0][8:16]).argmin(1)  # as wrong as can be: what is left loses more than all did
    left = gradient(model, cross_entropy, Examples(DATA.tensors[0], labels).without(torch.arange(2)), micro_batch=4)
    assert left.loss > full.loss
    assert full.doubts(left) == ""  # a micro-batch is as it was
