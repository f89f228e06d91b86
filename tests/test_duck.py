"""DUCK: centres against scikit-learn, targets against SciPy, the loss by hand."""

import copy

import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestCentroid
from torch import nn
from torch.nn import functional

from expunge import Duck, Examples, Recipe, Sighted, Trace, cross_entropy, squared_error, unlearn
from expunge.errors import ConfigError, UnsupportedModule
from expunge.methods.classifier import classifying_layer
from expunge.methods.duck import centroids, nearest_wrong
from tests.contract import World, world
from tests.zoo import classification, network

CLASS_0 = torch.arange(0, 60, 3)


def adam(epochs: int, lr: float = 0.01, batch_size: int = 64) -> Recipe:
    return Recipe(epochs=epochs, lr=lr, batch_size=batch_size, optimizer="adamw", weight_decay=0.0, schedule="constant")


def without_class_0(here: World) -> Sighted:
    return here.sighted(retain=here.original.without(CLASS_0), forget=here.original.only(CLASS_0))


def missing_a_class() -> Examples:
    data = classification(50)
    return data.only(data.positions[data.tensors[1] != 1])


def head_and_body(model: nn.Module) -> tuple[nn.Linear, nn.Module]:
    layers = list(model.layers if hasattr(model, "layers") else model)
    return layers[-1], nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("kind", ["mlp", "batch-norm", "dropout"])
def test_centres_are_those_of_scikit_learn(kind):
    model, data, trace = network(kind).train(), missing_a_class(), Trace("duck", 0)
    before = copy.deepcopy(model.state_dict())
    inputs, labels = data.tensors
    layer = classifying_layer(model, inputs[:4], "duck")
    head, body = head_and_body(model)
    assert layer is head
    centres, classes = centroids(model, layer, data, trace)
    assert model.training
    assert trace.forwarded == len(data)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        expected = NearestCentroid().fit(body.eval()(inputs).numpy(), labels.numpy())
    assert classes.tolist() == expected.classes_.tolist() == [0, 2]
    assert torch.allclose(centres, torch.from_numpy(expected.centroids_), rtol=1e-12, atol=1e-14)


def test_targets_are_the_nearest_of_the_wrong_classes_and_never_the_own():
    generator = torch.Generator().manual_seed(0)
    classes = torch.tensor([0, 2, 5, 7])
    centres = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(8, (200,), generator=generator)
    own = centres[(labels[:, None] == classes).double().argmax(1)]
    embedded = own + 0.3 * torch.randn(200, 6, generator=generator, dtype=torch.float64)  # nearest would be the own
    targets = nearest_wrong(embedded, labels, centres, classes)
    distances = cdist(embedded.numpy(), centres.numpy(), "cosine")
    for row, (label, target) in enumerate(zip(labels.tolist(), targets.tolist(), strict=True)):
        allowed = [number for number, each in enumerate(classes.tolist()) if each != label]
        assert target == min(allowed, key=lambda number, row=row: distances[row, number])
        assert int(classes[target]) != label


def test_first_loss_by_hand():
    here = world("plain")
    given = without_class_0(here)
    config = Duck(recipe=adam(1), repair=adam(0), forget_weight=0.7, retain_weight=1.3, temperature=3.0)
    trace = unlearn(here.model, given, config).trace
    head, body = head_and_body(here.model)
    (kept, kept_labels), (removed, _) = given.retain.tensors, given.forget.tensors
    with torch.no_grad():
        embedded = body(kept)
        centres = torch.stack([embedded[kept_labels == each].mean(0) for each in (1, 2)])
        distance = torch.from_numpy(cdist(body(removed).numpy(), centres.numpy(), "cosine")).min(1).values.mean()
        classified = functional.cross_entropy(head(embedded) / 3.0, kept_labels)
    assert trace.losses[0] == pytest.approx(1.3 * float(classified) + 0.7 * float(distance), rel=1e-5)


def test_forgets_a_class_stops_when_it_has_and_counts_the_repair():
    here = world("plain")
    given = without_class_0(here)
    config = Duck(recipe=adam(50, 0.02), repair=adam(2, 1e-4))
    result = unlearn(here.model, given, config)
    assert "fell below 1.0%" in result.trace.facts["distance_stopped"]
    assert result.trace.facts["forget_accuracy"] == 0.0
    assert list(result.trace.seconds) == ["centres", "distance", "repair"]
    epochs = len(result.trace.epoch_ends) - 2
    assert 0 < epochs < 50
    assert result.trace.backwarded == epochs * (40 + 20) + 2 * 40
    assert result.trace.forwarded == 40 + 8 + epochs * 20 + 3 * 40
    with torch.no_grad():
        inputs, labels = given.forget.tensors
        assert (here.model(inputs).argmax(1) == labels).float().mean() > 0.8
        assert (result.model(inputs).argmax(1) == labels).float().mean() < 0.05
        inputs, labels = given.retain.tensors
        assert (result.model(inputs).argmax(1) == labels).float().mean() > 0.9


def test_pulls_embeddings_towards_the_wrong_centres():
    here = world("plain")
    given = without_class_0(here)
    config = Duck(recipe=adam(30, 0.02), repair=adam(0), stop_accuracy=0.0)
    result = unlearn(here.model, given, config)
    inputs, labels = given.retain.tensors
    removed = given.forget.tensors[0]

    def distance(model: nn.Module) -> float:
        with torch.no_grad():
            body = head_and_body(here.model)[1]
            centres = torch.stack([body(inputs)[labels == each].mean(0) for each in (1, 2)])
            return cdist(head_and_body(model)[1](removed).numpy(), centres.numpy(), "cosine").min(1).mean()

    assert len(result.trace.epoch_ends) == 30
    assert distance(result.model) < 0.7 * distance(here.model)


def test_removed_records_move_the_weights_but_no_batch_norm_statistics():
    here = world("batch-norm")
    seen = {}
    unlearn(
        here.model,
        without_class_0(here),
        Duck(recipe=adam(2), repair=adam(1)),
        watch=lambda moment, model: seen.update({moment: copy.deepcopy(model)}),
    )
    original, pulled, repaired = here.model[1], seen["distance"][1], seen["repair"][1]
    assert torch.equal(pulled.running_mean, original.running_mean)
    assert not torch.equal(pulled.weight, original.weight)
    assert not torch.equal(repaired.running_mean, original.running_mean)


def test_takes_back_an_epoch_that_diverges():
    here = world("plain")
    result = unlearn(here.model, without_class_0(here), Duck(recipe=adam(5, 1e3, 8), repair=adam(0)))
    assert "passed the bound 10; the epoch was taken back" in result.trace.facts["distance_stopped"]
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, here.model.state_dict()[name])


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, inputs):
        return 2 * self.head(inputs)


CONVOLUTION = nn.Sequential(nn.Unflatten(1, (6, 1)), nn.Conv1d(6, 3, 1), nn.Flatten())


@pytest.mark.parametrize("model", [Scaled(), CONVOLUTION], ids=["scaled", "convolution"])
def test_refuses_logits_that_do_not_come_from_a_linear_layer(model):
    here = world()
    with pytest.raises(UnsupportedModule, match=r"those of \w+ come from something else. End the model"):
        unlearn(model, here.sighted(full=None), Duck())


def test_works_on_inputs_that_are_no_floating_point_numbers():
    tokens = Examples(torch.arange(24).view(12, 2) % 4, torch.arange(12) % 3)
    removed = torch.tensor([0, 3, 4])
    model = nn.Sequential(nn.Embedding(4, 3), nn.Flatten(), nn.Linear(6, 3))
    given = Sighted(
        retain=tokens.without(removed), forget=tokens.only(removed), loss_terms=cross_entropy, fresh=lambda _: model
    )
    result = unlearn(model, given, Duck(recipe=adam(1), repair=adam(0))).model
    assert not torch.equal(result[0].weight, model[0].weight)


def test_refuses_what_is_no_classifier():
    here = world()
    inputs = here.original.tensors[0]
    data = Examples(inputs, inputs[:, :3])
    given = Sighted(retain=data, forget=data, loss_terms=squared_error, fresh=here.fresh)
    with pytest.raises(UnsupportedModule, match="duck works on classifiers"):
        unlearn(here.model, given, Duck())


def test_refuses_a_class_with_no_other_to_move_to():
    here = world()
    others = here.original.only(CLASS_0)
    given = here.sighted(retain=others.without(CLASS_0[:5]), forget=others.only(CLASS_0[:5]))
    with pytest.raises(ConfigError, match=r"one class only, \[0\]"):
        unlearn(here.model, given, Duck())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0: must be a positive"),
        ({"forget_weight": float("inf")}, "forget_weight=inf"),
        ({"retain_weight": -1.0}, "retain_weight=-1.0"),
        ({"loss_bound": 0.0}, "loss_bound=0.0"),
        ({"stop_accuracy": 1.5}, r"stop_accuracy=1.5: must be in \[0, 1\]"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        Duck(**settings)


def test_uses_cross_entropy_of_its_own_and_the_given_loss_for_the_repair():
    here = world("plain")
    calls = []

    def recorded(model, batch):
        calls.append(len(batch[1]))
        return cross_entropy(model, batch)

    given = here.sighted(retain=here.original.without(CLASS_0), loss_terms=recorded, full=None)
    unlearn(here.model, given, Duck(recipe=adam(2), repair=adam(3)))
    assert calls == [40] * 9  # before and in three epochs of repair, after each, and twice at the end
