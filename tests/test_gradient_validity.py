"""What must be refused, because a difference of two gradients would mean nothing. Messages: value, reason, cure."""

import dataclasses
import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

from expunge.batches import Examples
from expunge.errors import ConfigError, MismatchError, NonDeterministicLoss, NotFinite
from expunge.gradient import gradient
from expunge.losses import cross_entropy, squared_error
from tests.zoo import classification, network, tensors

DATA = classification(20)


class FunctionalDropout(nn.Module):
    def __init__(self, rate: float, training: bool | None = None) -> None:
        super().__init__()
        self.inner, self.rate, self.always = network("mlp"), rate, training

    def forward(self, inputs):
        training = self.training if self.always is None else self.always
        return functional.dropout(self.inner(inputs), self.rate, training=training)


class Noisy(FunctionalDropout):
    def forward(self, inputs):
        return self.inner(inputs + 1e-9 * torch.randn_like(inputs))


class Augmented(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        inputs, label = DATA.tensors[0][index], DATA.tensors[1][index]
        return inputs + 0.01 * torch.randn(inputs.shape), label


class Reshuffled:
    """Other batches at every reading; perhaps other numbers of them."""

    def __init__(self, fewer: bool = False) -> None:
        self.fewer, self.readings = fewer, 0

    def __iter__(self):
        self.readings += 1
        if self.fewer:
            return iter([tuple(DATA.tensors)] * (1 + self.readings % 2))
        order = torch.randperm(20, generator=torch.Generator().manual_seed(self.readings))
        return iter([tuple(tensor[rows] for tensor in DATA.tensors) for rows in order.split(5)])


class UsedUp:
    """Can be asked for an iterator as often as one likes; it is always the same one."""

    def __init__(self, batches: int) -> None:
        self.left = iter([tuple(DATA.tensors)] * batches)

    def __iter__(self):
        return self.left


def batch_norm_without_statistics() -> nn.Module:
    layers = [nn.Linear(5, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3)]
    return nn.Sequential(*layers).double()


def contrastive(model, batch):
    outputs = model(batch[0])
    return functional.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)), reduction="none")


NOT_REPEATABLE = [
    (
        lambda: gradient(FunctionalDropout(0.5, training=True), cross_entropy, DATA),
        r"the same 8 examples gave two different losses in eval mode \(summed .* then .*dropout as a function \(pass "
        r"training=self.training\) or noise in forward",
    ),
    (lambda: gradient(Noisy(0.0), cross_entropy, DATA), "two different losses in eval mode"),
    (lambda: gradient(Noisy(0.0), cross_entropy, [tuple(DATA.tensors)]), "two different losses"),
    (
        lambda: gradient(network("mlp"), cross_entropy, Augmented()),
        "reading the data twice gave two different first batches. Switch off random augmentation and shuffling",
    ),
    (lambda: gradient(network("mlp"), cross_entropy, DataLoader(Augmented(), batch_size=4)), "reading the data twice"),
    (lambda: gradient(network("mlp"), cross_entropy, Reshuffled()), "reading the data twice"),
    (lambda: gradient(network("mlp"), cross_entropy, Reshuffled(fewer=True)), "reading the data twice"),
    (
        lambda: gradient(batch_norm_without_statistics(), cross_entropy, DATA),
        "summed loss of .* together and .* in two halves: .*BatchNorm without running statistics",
    ),
    (lambda: gradient(network("mlp"), contrastive, DATA), "other examples of the batch used as negatives"),
    (
        lambda: gradient(network("mlp"), lambda m, b: cross_entropy(m, b) * len(b[0]), DATA),
        "in two halves: the loss of an example depends on its batch",
    ),
    (
        lambda: gradient(network("mlp"), lambda m, b: m(b["x"]).sum(1) * torch.rand(1), [{"x": DATA.tensors[0]}]),
        "the same 8 examples gave two different losses",
    ),
    (
        lambda: gradient(
            network("mlp"), lambda m, b: m(torch.as_tensor(b)).sum(1) * torch.rand(1), [DATA.tensors[0].numpy()]
        ),
        "the same few examples gave two different losses",
    ),
]


@pytest.mark.parametrize(("call", "message"), NOT_REPEATABLE)
def test_a_loss_or_data_that_does_not_repeat_is_refused(call, message):
    with pytest.raises(NonDeterministicLoss, match=message):
        call()


@pytest.mark.parametrize("kind", ["dropout", "batch-norm"])
def test_modules_that_know_eval_mode_are_fine(kind):
    assert gradient(network(kind).train(), cross_entropy, DATA).count == 20
    assert gradient(FunctionalDropout(0.5).train(), cross_entropy, DATA).count == 20


@pytest.mark.parametrize(
    ("loss_terms", "message"),
    [
        (lambda m, b: cross_entropy(m, b).mean(), r"returned shape \(\), torch.float64; .*\(terms,\). Use reduction"),
        (lambda m, b: cross_entropy(m, b).mean()[None], r"returned 1 terms for a few examples, and 1 \+ 1 for their"),
        (lambda m, b: cross_entropy(m, b)[:, None], r"returned shape \(8, 1\)"),
        (lambda m, b: float(cross_entropy(m, b).sum()), "returned float; it must return one loss a term"),
        (lambda m, b: None, "returned NoneType"),
        (lambda m, b: m(b[0]).argmax(1), r"returned shape \(8,\), torch.int64"),
        (lambda m, b: cross_entropy(m, b).detach(), r"loss without a gradient: .*Look for .detach\(\)"),
        (lambda m, b: cross_entropy(m, b)[:0], "1 batches gave no loss term. Are all targets masked"),
    ],
)
@pytest.mark.parametrize("data", [DATA, [DATA.tensors]])
def test_a_loss_that_is_not_one_number_a_term_is_refused(loss_terms, message, data):
    with pytest.raises(ConfigError, match=message):
        gradient(network("mlp"), loss_terms, data)


def test_parameters_that_the_loss_does_not_reach_are_refused():
    model = network("mlp")
    model.register_parameter("spare", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    with pytest.raises(ConfigError, match=r"does not depend on the selected parameters.*wrong choice of parameters"):
        gradient(model, cross_entropy, DATA, parameters=["spare"])


def test_outputs_and_targets_of_different_shape_are_not_broadcast():
    with pytest.raises(MismatchError, match=r"shape \(8, 1\) and the targets have \(8,\): .*Reshape one of them"):
        gradient(nn.Linear(5, 1).double(), squared_error, Examples(DATA.tensors[0], DATA.tensors[0][:, 0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gradient(network("mlp").requires_grad_(False), cross_entropy, DATA), "nothing trainable: 4 param"),
        (lambda: gradient(network("mlp"), cross_entropy, DATA, parameters=["nope"]), r"\['nope'\]: .* no such param"),
        (lambda: gradient(network("mlp"), cross_entropy, DATA, parameters=[]), "nothing trainable"),
        (lambda: gradient(network("mlp"), cross_entropy, DATA, micro_batch=0), "micro_batch=0: .*at least one"),
        (lambda: gradient(network("mlp"), cross_entropy, iter([DATA.tensors])), "can be read only once"),
        (lambda: gradient(network("mlp"), cross_entropy, UsedUp(1)), "can be read only once"),
        (lambda: gradient(network("mlp"), cross_entropy, []), "is empty: there is nothing left to learn from"),
        (lambda: gradient(network("mlp"), cross_entropy, DATA.only(torch.tensor([]))), "is empty"),
        (
            lambda: gradient(
                network("mlp"), cross_entropy, DataLoader(TensorDataset(*DATA.tensors), batch_size=8, drop_last=True)
            ),
            "drop_last=True",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(bad):
    model = network("frozen")
    model[0].weight.data[2, 1] = bad
    with pytest.raises(NotFinite, match=r"before the gradient pass: tensor '0.weight' has 1 of 30 entries"):
        gradient(model, cross_entropy, DATA)


def test_a_buffer_may_hold_infinity_as_attention_masks_do_but_not_nan():
    model = network("batch-norm")
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    assert gradient(model, cross_entropy, DATA).count == 20
    model[1].running_mean[0] = math.nan
    with pytest.raises(NotFinite, match=r"'1.running_mean' has 1 of 6"):
        gradient(model, cross_entropy, DATA)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("position", [0, 5, 17])
def test_a_loss_that_is_not_finite_names_the_batch(bad, position):
    inputs, labels = tensors(20)
    inputs[position] = bad
    first = position // 4 * 4
    message = rf"the loss of batch {position // 4} \(positions {first} to {first + 3}\) is nan; 1 of 5 batches"
    with pytest.raises(NotFinite, match=message):
        gradient(network("mlp"), cross_entropy, Examples(inputs, labels), micro_batch=4)
    with pytest.raises(NotFinite, match=f"the loss of batch {position // 10} is nan; 1 of 2 batches"):
        gradient(
            network("mlp"), cross_entropy, [(x, y) for x, y in zip(inputs.split(10), labels.split(10), strict=True)]
        )


def test_a_gradient_that_is_not_finite_is_named():
    model = nn.Sequential(nn.Linear(5, 1)).double()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    with pytest.raises(NotFinite, match=r"after the gradient pass: tensor '0.weight' has 5 of 5"):
        gradient(model, lambda m, b: m(b[0]).abs().sqrt().sum(1), DATA)


def subtract_after(change) -> None:
    """Take a gradient, change something, take that of what is left, and subtract."""
    model = network("batch-norm")
    full = gradient(model, cross_entropy, DATA, micro_batch=4)
    loss = change(model) or cross_entropy
    full - gradient(model, loss, DATA.without(torch.tensor([3])), micro_batch=4)


def one_more_update(model) -> None:
    model[0].bias.data[0] += 1e-12


def through_bfloat16(model) -> None:
    model.bfloat16().double()


def in_train_mode(model) -> None:
    model.train()(DATA.tensors[0])


def other_loss(model):
    def negated(model, batch):
        return -cross_entropy(model, batch)

    return negated


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_more_update, "taken at weights .*One more update, .* a cast is enough. Load the weights that were cached"),
        (through_bfloat16, "taken at weights .*checkpoint in lower precision"),
        (in_train_mode, "taken with buffers .*BatchNorm statistics .* have moved since.*train mode"),
        (other_loss, "of the loss 'cross_entropy', and now '.*negated' is used. Use the same loss"),
    ],
)
def test_gradients_of_different_origin_are_not_subtracted(change, message):
    with pytest.raises(MismatchError, match=message):
        subtract_after(change)


def test_other_parameters_are_not_subtracted():
    model = network("mlp")
    some, all_ = (gradient(model, cross_entropy, DATA, parameters=select) for select in (["0.bias"], None))
    with pytest.raises(
        MismatchError, match=r"only the gradient of the retain data has '0.weight', '3.weight', '3.bias'"
    ):
        some - all_


def test_more_data_than_was_cached_is_not_subtracted():
    model = network("mlp")
    full, more = (gradient(model, cross_entropy, classification(n)) for n in (19, 20))
    with pytest.raises(
        MismatchError, match=r"the retain data has 20 terms and the cached data had 19.*belongs to this"
    ):
        full - more


@pytest.mark.parametrize("positions", [[0, 1, 16, 17], [1, 2, 8, 9]])
def test_positions_that_the_cached_data_did_not_have_are_refused(positions):
    model = network("mlp")
    full = gradient(model, cross_entropy, DATA.only(torch.tensor([0, 1, 2, 3, 4, 5, 12, 13])), micro_batch=4)
    strangers = gradient(model, cross_entropy, DATA.only(torch.tensor(positions)), micro_batch=4)
    first = positions[2] // 4 * 4
    with pytest.raises(MismatchError, match=f"at positions {first} to {first + 3}, where the cached data had none"):
        full - strangers


def test_another_micro_batch_size_is_honest_but_not_aligned():
    model, left = network("mlp").float(), classification(64, dtype=torch.float32)
    full, same, other = (gradient(model, cross_entropy, left, micro_batch=size) for size in (4, 4, 8))
    aligned, apart = full - same, full - other
    assert all((aligned.noise[n] * 5 < apart.noise[n]).all() for n in aligned.noise if (full.noise[n] > 0).all())
    assert all((apart.total[n].abs() <= apart.noise[n]).all() for n in apart.noise)


def test_a_gradient_without_a_floor_is_subtracted_without_one():
    full = gradient(network("mlp"), cross_entropy, DATA)
    assert (dataclasses.replace(full, noise=None) - full).noise is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda y: y.float(), r"labels float32 \(8,\) do not fit logits float64 \(8, 3\)"),
        (lambda y: y.int(), r"labels int32 \(8,\) do not fit"),
        (lambda y: y[:, None], r"labels int64 \(8, 1\) do not fit"),
        (lambda y: y + 3, r"labels int64 \(8,\) do not fit .* out of bounds"),
    ],
)
def test_labels_that_do_not_fit_are_named_with_the_cure(change, said):
    inputs, labels = tensors(8)
    with pytest.raises(ConfigError, match=said + r".* Give class numbers, int64"):
        gradient(network("mlp"), cross_entropy, Examples(inputs, change(labels)))


@pytest.mark.parametrize("batch", [torch.zeros(3, 5), (torch.zeros(3, 5), [0, 1, 2]), (torch.zeros(3, 5),)])
def test_batches_that_are_no_pair_are_named_with_the_cure(batch):
    with pytest.raises(ConfigError, match=r"a batch is .*, and this loss takes two tensors, \(inputs, targets\)"):
        cross_entropy(network("mlp"), batch)


def unpacking(model, batch):
    inputs, labels = batch
    return functional.cross_entropy(model(inputs), labels, reduction="none")


@pytest.mark.parametrize(
    ("batch", "raised", "note"),
    [
        (
            dict(zip(("inputs", "labels"), DATA.tensors, strict=True)),
            TypeError,
            r"dict \{'inputs': float64 \(8, 5\), 'labels': int64 \(8,\)\}\. To unpack it .*: take batch\['inputs'\]\.",
        ),
        ([*DATA.tensors, DATA.tensors[1]], ValueError, r"list \(float64 \(8, 5\), int64 \(8,\), int64 \(8,\)\)\."),
        (DATA.tensors[0], ValueError, r"float64 \(8, 5\)\."),
    ],
)
def test_what_a_loss_raises_over_its_batch_has_a_note_of_what_the_batch_was(batch, raised, note):
    with pytest.raises(raised) as error:
        gradient(network("mlp"), unpacking, [batch])
    (said,) = error.value.__notes__
    assert re.fullmatch("The loss was called with a few examples, in the form of your data: " + note, said)
