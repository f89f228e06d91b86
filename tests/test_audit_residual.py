"""A model that remembers must be caught, a retrained one must not."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from torch import nn

from expunge import Examples, Recipe, cross_entropy, seeded, train
from expunge.audit import residual
from expunge.audit.quantise import quantised, rounded
from expunge.audit.residual import RELEARN, Subject, membership, quantisation, relearning, trigger
from expunge.data.digits import digits
from expunge.errors import ConfigError
from expunge.metrics.membership import loss_attack
from expunge.metrics.outputs import outputs
from expunge.metrics.relearning import Relearning
from expunge.models.mlp import MLP

COUNT, REMOVED = 120, 40
WIDTHS = (20, 64, 4)
MEMORISE = Recipe(epochs=60, lr=0.1, batch_size=32, weight_decay=0.0)


def random_labels(count, seed):
    """Nothing to learn but by heart, so that whoever knows a label has seen it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 20, generator=generator), torch.randint(4, (count,), generator=generator)


@functools.cache
def trained(first, seed):
    """A model of all records from a position on."""
    with seeded(seed, "residual"):
        model = MLP(WIDTHS)
    inputs, labels = random_labels(COUNT, 0)
    train(model, Examples(inputs[first:], labels[first:]), cross_entropy, MEMORISE, seed=seed)
    return model


def forget():
    inputs, labels = random_labels(COUNT, 0)
    return Examples(inputs[:REMOVED], labels[:REMOVED])


def unseen():
    return Examples(*random_labels(80, 1))


def subject(unlearned, retrained=(1,), original=True):
    return Subject(
        unlearned=unlearned,
        loss_terms=cross_entropy,
        original=trained(0, 0) if original else None,
        retrained=[trained(REMOVED, seed) for seed in retrained],
    )


def hidden(size=3.0):
    """The original with its output biased: it says the wrong thing, and knows the right one."""
    model = copy.deepcopy(trained(0, 0))
    with torch.no_grad():
        model.layers.linear2.bias[0] += size
    return model


def test_the_original_is_caught_and_another_retrained_model_is_not_by_membership():
    found = membership(subject(trained(0, 0)), forget(), unseen())
    assert found.verdict == "a trace was found"
    assert found.numbers["AUC"] > 0.9
    clean = membership(subject(trained(REMOVED, 2)), forget(), unseen())
    assert clean.verdict == "no trace found"
    assert abs(clean.numbers["AUC"] - 0.5) < 4 * (81 / (12 * 40 * 40)) ** 0.5  # sd of 40 against 40 by chance


def test_membership_without_a_retrained_model_finds_nothing_or_cannot_tell():
    found = membership(subject(trained(0, 0), ()), forget(), unseen())
    assert found.verdict == "cannot tell"
    assert "--retrained" in found.words
    assert membership(subject(trained(REMOVED, 2), ()), forget(), unseen()).verdict == "no trace found"
    few = Examples(*(tensor[:3] for tensor in forget().tensors))
    assert membership(subject(trained(0, 0)), few, unseen()).verdict == "cannot tell"


def test_membership_of_one_class_is_told_from_others_of_that_class():
    """A model without most of class 6 is bad at the rest of it, removed or never seen, and that is no trace."""
    split = digits(900, seed=0)
    images, labels = (torch.cat(pair) for pair in zip(split.train.tensors, split.test.tensors, strict=True))
    pool, test = torch.arange(900), torch.arange(900, len(labels))
    gone, kept = pool[labels[pool] == 6][:70], pool[labels[pool] != 6]
    models = []
    for seed in (0, 1):
        with seeded(seed, "digits"):
            models.append(MLP((64, 32, 10)))
        data = Examples(images[kept], labels[kept])
        train(models[-1], data, cross_entropy, Recipe(epochs=8, lr=0.1, batch_size=64), seed=seed)
    out, others = (Examples(images[rows], labels[rows]) for rows in (gone, test))
    apart = [outputs(models[0], data).losses for data in (out, others)]
    assert loss_attack(*apart).auc > 0.7  # classes are told, not members
    for retrained in ([], models[1:]):
        found = membership(Subject(unlearned=models[0], loss_terms=cross_entropy, retrained=retrained), out, others)
        assert found.verdict == "no trace found", found.words
        assert abs(found.numbers["AUC"] - 0.5) < 0.12
        assert found.numbers["unseen compared"] == 70
    few = Examples(images[test[labels[test] != 6]], labels[test[labels[test] != 6]])
    unmatched = membership(Subject(unlearned=models[0], loss_terms=cross_entropy, retrained=models[1:]), out, few)
    assert unmatched.verdict == "cannot tell"
    assert "more records" in unmatched.words


def test_a_model_that_only_hides_relearns_sooner_than_retrained_ones():
    recipe = Recipe(epochs=60, lr=0.1, batch_size=8, momentum=0.5, weight_decay=0.0, schedule="constant")
    found = relearning(subject(hidden(), (1, 2)), forget(), recipe=recipe)
    assert found.verdict == "a trace was found"
    assert 0 < found.numbers["epochs"] < 60
    clean = relearning(subject(trained(REMOVED, 3), (1, 2)), forget(), recipe=recipe)
    assert clean.verdict == "no trace found"
    assert "It never left" in relearning(subject(trained(0, 0)), forget(), recipe=recipe).words


def test_relearning_says_when_it_cannot_tell():
    assert "--original" in relearning(subject(hidden(), original=False), forget()).words
    assert relearning(subject(trained(0, 0), ()), forget()).verdict == "cannot tell"
    slow = Recipe(epochs=1, lr=1e-6, momentum=0.0, weight_decay=0.0, schedule="constant")
    found = relearning(subject(trained(REMOVED, 2)), forget(), recipe=slow)
    assert found.verdict == "cannot tell"
    assert "No model has the original's loss back after 1 epochs, at learning rates up to 0.0001." in found.words


def test_relearning_just_before_the_others_were_given_up_on_tells_nothing(monkeypatch):
    ends = iter((43, None, None))  # epochs of the model in question and of the retrained ones, of 50 at most
    monkeypatch.setattr(residual, "relearn_time", lambda *_, **__: Relearning(next(ends), (1.0,)))
    said = relearning(subject(hidden(), (1, 2)), forget())
    assert said.verdict == "cannot tell"
    assert "back after 43 epochs; retrained models take more than 50. How many more was not tried" in said.words
    ends = iter((40, None, None))
    assert relearning(subject(hidden(), (1, 2)), forget()).verdict == "a trace was found"  # 40 is below 0.8 of any


def test_relearning_that_takes_too_long_is_tried_with_larger_learning_rates():
    slow = Recipe(epochs=60, lr=0.001, batch_size=8, momentum=0.5, weight_decay=0.0, schedule="constant")
    found = relearning(subject(hidden(), (1, 2)), forget(), recipe=slow)
    assert found.numbers["learning rate"] == pytest.approx(0.01)
    assert found.verdict == "a trace was found"


def test_a_learning_rate_that_is_too_large_ends_the_search_for_one():
    slow = Recipe(epochs=3, lr=1e-6, batch_size=8, momentum=0.0, weight_decay=0.0, schedule="constant")

    def steep(model, batch):
        return 1e6 * model(batch[0]).square().sum(1)

    who = subject(trained(REMOVED, 2))
    found = relearning(replace(who, loss_terms=steep), forget(), recipe=slow)
    assert found.numbers["learning rate"] < 1e-4


def test_a_negative_loss_that_never_left_is_back_at_once():
    def shifted(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none") - 10

    who = subject(trained(0, 0))
    assert relearning(replace(who, loss_terms=shifted), forget()).numbers["epochs"] == 0


def test_relearning_is_slow_and_constant():
    assert RELEARN.schedule == "constant"


def nudged():
    """The original, moved by less than half a step of a 4-bit grid: wrong in float32, and back when rounded."""
    model = quantised(trained(0, 0), 4, per_channel=True)
    inputs, labels = forget().tensors
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(80):
        loss = -nn.functional.cross_entropy(model(inputs), labels)
        slopes = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for (name, p), slope in zip(model.named_parameters(), slopes, strict=True):
                if p.ndim < 2:
                    continue
                step = start[name].abs().amax(1, keepdim=True) / 7
                p.sub_(0.05 * step * slope.sign())
                p.copy_(torch.minimum(torch.maximum(p, start[name] - 0.4 * step), start[name] + 0.4 * step))
                largest = start[name].abs() == start[name].abs().amax(1, keepdim=True)
                p.copy_(torch.where(largest, start[name], p))  # the grid stays as it is
    return model


def test_what_rounding_brings_back_is_caught():
    found = quantisation(subject(nudged()), forget())
    assert found.verdict == "a trace was found"
    by_grid = {row["grid"]: row for row in found.numbers["grids"]}
    assert by_grid["4 bits, per channel"]["forget accuracy"] > found.numbers["forget accuracy"] + 30
    assert "4 bits, per channel" in found.words
    clean = quantisation(subject(trained(REMOVED, 2), (1, 3)), forget())
    assert clean.verdict == "no trace found"
    assert "nothing" not in clean.words


def test_a_backdoor_that_still_opens_is_caught():
    shut, original = trained(REMOVED, 1), trained(0, 0)
    known = Examples(*forget().tensors)  # the original is right on these, a model without them is not
    assert trigger(Subject(unlearned=shut, loss_terms=cross_entropy, retrained=[original]), known, None).verdict == (
        "a trace was found"
    )
    assert trigger(subject(trained(REMOVED, 2)), known, None).verdict == "no trace found"
    alone = Subject(unlearned=shut, loss_terms=cross_entropy)
    assert trigger(alone, known, None).verdict == "cannot tell"
    kept = Examples(*(tensor[REMOVED:] for tensor in random_labels(COUNT, 0)))
    assert trigger(alone, known, kept).verdict == "a trace was found"


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_agrees_with_a_loop_over_the_entries(bits, per_channel):
    values = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = rounded(values, bits, per_channel=per_channel)
    for channel in range(3):
        widest = (values[channel] if per_channel else values).abs().max()
        step = float(widest) / (2 ** (bits - 1) - 1)
        expected = [round(float(value) / step) * step for value in values[channel].flatten()]
        assert torch.allclose(result[channel].flatten(), torch.tensor(expected, dtype=torch.float64))
    assert torch.equal(rounded(torch.zeros(2, 3), bits, per_channel=per_channel), torch.zeros(2, 3))


def test_quantisation_leaves_biases_and_the_model_alone():
    model = trained(0, 0)
    before = model.layers.linear1.weight.clone()
    result = quantised(model, 4, per_channel=True)
    assert torch.equal(model.layers.linear1.weight, before)
    assert torch.equal(result.layers.linear1.bias, model.layers.linear1.bias)
    assert len(result.layers.linear1.weight[0].unique()) <= 15


@pytest.mark.parametrize("bits", [1, 17])
def test_other_numbers_of_bits_are_refused(bits):
    with pytest.raises(ConfigError, match=f"bits={bits}"):
        rounded(torch.ones(2, 2), bits, per_channel=True)
