"""UNSIR: noise that raises the class loss, an impair epoch that harms the class, a repair that restores the rest."""

import copy
import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from expunge import Examples, Recipe, Sighted, Unsir, cross_entropy, seeded, squared_error, stream, train, unlearn
from expunge.errors import ConfigError, UnsupportedModule
from expunge.methods.unsir import error_maximising
from tests.contract import KINDS, World, world
from tests.zoo import network

CLASS_0 = torch.arange(0, 60, 3)


def adam(epochs: int, lr: float, batch_size: int = 8) -> Recipe:
    return Recipe(epochs=epochs, lr=lr, batch_size=batch_size, optimizer="adamw", weight_decay=0.0, schedule="constant")


CONFIG = Unsir(noise_examples=32, impair=adam(3, 0.03), repair=adam(5, 0.02), noise_share=1.0)


def without_class_0(here: World, **changes) -> Sighted:
    parts = {"retain": here.original.without(CLASS_0), "forget": here.original.only(CLASS_0)}
    return here.sighted(**(parts | changes))


def accuracy(model: nn.Module, data: Examples) -> float:
    inputs, labels = data.tensors
    with torch.no_grad():
        return float((copy.deepcopy(model).eval()(inputs).argmax(1) == labels).double().mean())


def test_two_steps_on_the_noise_by_hand():
    model, start = network("mlp").eval(), torch.randn(7, 5, generator=stream(0, "noise"), dtype=torch.float64)
    noise, _, _ = error_maximising(model, start, 1, cross_entropy, Unsir(noise_steps=2, noise_decay=0.3))
    x, m, v = start.clone(), torch.zeros(7, 5).double(), torch.zeros(7, 5).double()
    for step in (1, 2):
        x.requires_grad_(True)
        likelihood = model(x).log_softmax(1)[:, 1].mean()  # -CE
        (gradient,) = torch.autograd.grad(likelihood + 0.3 * (x**2).sum() / 7, x)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        x = (x - 0.1 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)).detach()
    assert torch.allclose(noise, x, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(noise, start, atol=0.05)
    assert not noise.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_noise_raises_the_loss_of_its_class(kind):
    here = world(kind)
    facts = unlearn(here.model, without_class_0(here), CONFIG).trace.facts
    before, after = facts["noise_loss"]["0"]
    assert facts["classes"] == [0]
    assert after > before + 1.0
    model, start = copy.deepcopy(here.model).eval(), torch.randn(32, 6, generator=stream(0, "noise", 0))
    noise, _, _ = error_maximising(model, start, 0, cross_entropy, CONFIG)
    with torch.no_grad():
        losses = [float(-model(each).log_softmax(1)[:, 0].mean()) for each in (start, noise)]
    assert (before, after) == pytest.approx(losses, rel=1e-4)


def digits_network(norm: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64) if norm else nn.Identity(), nn.ReLU(), nn.Linear(64, 10))


@pytest.mark.parametrize("norm", [False, True], ids=KINDS)
def test_impair_harms_the_class_and_repair_restores_the_others(norm):
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    data = Examples(images[:600], labels[:600])
    threes = data.positions[data.tensors[1] == 3]
    unseen = [Examples(images[600:][kept], labels[600:][kept]) for kept in (labels[600:] == 3, labels[600:] != 3)]
    with seeded(0, "model"):
        model = digits_network(norm)
    train(model, data, cross_entropy, Recipe(epochs=10, lr=0.05, batch_size=32), seed=0)
    given = Sighted(
        retain=data.without(threes), forget=data.only(threes), loss_terms=cross_entropy, fresh=lambda _: model
    )
    seen, statistics = {}, {}

    def look(moment: str, now: nn.Module) -> None:
        seen[moment] = tuple(accuracy(now, part) for part in unseen)
        statistics[moment] = [buffer.clone() for buffer in now.buffers()]

    config = Unsir(impair=adam(1, 0.02, 32), repair=adam(1, 0.01, 32))  # rates of the paper
    trace = unlearn(model, given, config, watch=look).trace
    assert list(trace.seconds) == ["noise", "impair", "repair"]
    assert all(map(torch.equal, statistics["impair"], model.buffers()))  # noise leaves them alone
    assert not norm or not torch.equal(statistics["repair"][0], statistics["impair"][0])
    assert min(seen["noise"]) > 0.8  # the original
    assert seen["impair"][0] < seen["noise"][0] - 0.2
    assert seen["impair"][1] < seen["noise"][1] - 0.05
    assert seen["repair"][0] < 0.1
    assert seen["repair"][1] > max(seen["impair"][1] + 0.05, 0.83)


def test_noise_goes_in_under_the_forgotten_label_at_its_share():
    here, seen = world("plain"), []

    def recorded(model, batch):
        if model.training:
            seen.append(tuple(tensor.detach().clone() for tensor in batch))
        return cross_entropy(model, batch)

    config = Unsir(noise_examples=4, noise_share=0.3, impair=adam(1, 0.01, 16), repair=adam(1, 0.01, 16))
    given = without_class_0(here, loss_terms=recorded, full=None)
    trace = unlearn(here.model, given, config).trace
    kept = given.retain.tensors[0]
    assert len(seen) == 6
    for inputs, labels in seen[:3]:
        real = (inputs[:, None] == kept[None]).all(2).any(1)
        count = int(real.sum())
        assert len(inputs) - count == math.ceil(0.3 * count)
        assert labels[~real].tolist() == [0] * (len(inputs) - count)
        assert 0 not in labels[real].tolist()
        assert len(inputs[~real].unique(dim=0)) <= 4
    assert all(bool((inputs[:, None] == kept[None]).all(2).any(1).all()) for inputs, _ in seen[3:])
    noise = sum(math.ceil(0.3 * count) for count in (16, 16, 8))
    assert trace.backwarded == 25 * 4 + (40 + noise) + 40
    assert trace.forwarded == 4 + 40


def test_needs_the_labels_of_the_removed_records_only():
    here = world("batch-norm")
    given = without_class_0(here)
    inputs, labels = given.forget.tensors
    nonsense = Examples(torch.full_like(inputs, 1e6), labels, positions=given.forget.positions)
    other = without_class_0(here, forget=nonsense)
    a, b = (unlearn(here.model, each, CONFIG).model.state_dict() for each in (given, other))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_gives_the_original_back_if_the_repair_fails():
    here = world("batch-norm")
    result = unlearn(here.model, without_class_0(here), Unsir(impair=adam(1, 10.0), repair=adam(0, 1.0)))
    assert "passed the bound 5; everything was taken back" in result.trace.stopped
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, here.model.state_dict()[name])


def test_refuses_a_forget_set_that_is_not_class_wise_unless_told_otherwise():
    here = world("plain")
    with pytest.raises(ConfigError, match=r"unsir removes whole classes, and class 0 is both .*any_forget_set=True"):
        unlearn(here.model, here.sighted(), CONFIG)
    result = unlearn(here.model, here.sighted(), Unsir(any_forget_set=True))
    assert result.trace.facts["classes"] == [0, 1, 2]


def test_refuses_inputs_that_cannot_be_learned_and_what_is_no_classifier():
    tokens = Examples(torch.arange(12).view(6, 2) % 4, torch.arange(6) % 3)
    model = nn.Sequential(nn.Embedding(4, 3), nn.Flatten(), nn.Linear(6, 3))
    removed = torch.tensor([0, 3])
    given = Sighted(
        retain=tokens.without(removed), forget=tokens.only(removed), loss_terms=cross_entropy, fresh=lambda seed: model
    )
    with pytest.raises(UnsupportedModule, match=r"torch.int64 inputs cannot be learned"):
        unlearn(model, given, Unsir())
    here = world("plain")
    inputs = here.original.tensors[0]
    data = Examples(inputs, inputs[:, :3])
    given = Sighted(retain=data, forget=data, loss_terms=squared_error, fresh=here.fresh)
    with pytest.raises(UnsupportedModule, match="unsir works on classifiers"):
        unlearn(here.model, given, Unsir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_examples": 0}, "noise_examples=0, noise_steps=25: must be at least 1 and 0"),
        ({"noise_steps": -1}, "noise_steps=-1"),
        ({"noise_lr": 0.0}, "noise_lr=0.0: must be a positive"),
        ({"noise_share": float("nan")}, "noise_share=nan"),
        ({"noise_decay": -0.1}, "noise_decay=-0.1: must be 0 or more"),
        ({"loss_bound": 0.0}, "loss_bound=0.0"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        Unsir(**settings)
