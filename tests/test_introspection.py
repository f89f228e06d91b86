import re
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from expunge import Blind, Examples, Recipe, Reload, cross_entropy, gradient, unlearn
from expunge.bench import introspection
from expunge.bench.introspection import convolutions, embedded, features, inside, introspect
from expunge.errors import ConfigError, MissingExtra, UnsupportedModule
from expunge.models import build
from expunge.report.introspection import write_figure

CONFIG = Reload(reset_fraction=0.3, fine_tune=Recipe(epochs=1, lr=0.05, batch_size=16))


def network(seed=0):
    return build("convnet", seed=seed, classes=3, widths=(4, 4))


def examples(count=40, seed=0, shape=(1, 6, 6)):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return Examples(torch.randn(count, *shape, generator=generator) + labels.view(-1, *[1] * len(shape)), labels)


def problem(model, fresh=network, data=None):
    data = data or examples()
    gone = (data.tensors[1] == 1).nonzero()[:, 0]
    full = gradient(model, cross_entropy, data)
    return Blind(retain=data.without(gone), loss_terms=cross_entropy, fresh=fresh, full=full), data.only(gone)


@pytest.fixture(scope="module")
def found():
    model = network()
    given, removed = problem(model)
    return introspect(model, given, CONFIG, removed, examples(30, 1), seed=0)


def test_the_steps_are_those_of_algorithm_1(found):
    assert [(step.number, step.name) for step in found.steps] == [
        (1, "trained"),
        (3, "after the ascent"),
        (4, "re-initialised"),
        (5, "fine-tuned"),
    ]
    assert found.label == 1
    assert found.layers == ("features.conv1", "features.conv2")


def test_looking_into_a_layer_that_runs_twice_leaves_the_network_as_it_is():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.head = nn.Conv2d(1, 1, 3, padding=1), nn.ReLU(inplace=True), nn.Linear(36, 3)

        def forward(self, images):
            return self.head(self.relu(self.conv(self.relu(self.conv(images)))).flatten(1))

    torch.manual_seed(0)
    model, image = Twice().eval(), examples().tensors[0][:1]
    maps, logs = inside(model, image, ["conv"])
    with torch.no_grad():
        np.testing.assert_allclose(maps[0], model.conv(image)[0, 0].numpy(), rtol=1e-6)  # of the first run, before ReLU
        np.testing.assert_allclose(logs, model(image).double().log_softmax(1)[0].numpy(), rtol=1e-6)


def test_each_step_shows_the_model_of_that_step(found):
    model = network()
    given, removed = problem(model)
    image = removed.tensors[0][:1]

    def told(current):
        with torch.no_grad():
            return current.eval()(image).double().log_softmax(1)[0].numpy()

    truths = {"trained": told(network())}
    full, left = given.full, gradient(model, cross_entropy, given.retain)
    primed = network()
    with torch.no_grad():
        for name, p in primed.named_parameters():
            p.add_(CONFIG.priming_lr * (full.total[name] - left.total[name]).float() / full.count)
    truths["after the ascent"] = told(primed)
    truths["fine-tuned"] = told(unlearn(model, given, CONFIG, seed=0).model)
    for step in found.steps:
        if step.name in truths:
            np.testing.assert_allclose(step.log_probabilities, truths[step.name], rtol=1e-4, atol=1e-5)
    different = {tuple(step.log_probabilities) for step in found.steps}
    assert len(different) == 4


def test_shapes_are_those_of_layers_classes_and_test_records(found):
    for step in found.steps:
        assert [each.shape for each in step.maps] == [(6, 6), (3, 3)]
        assert step.log_probabilities.shape == (3,)
        assert np.exp(step.log_probabilities).sum() == pytest.approx(1)
        assert step.embedding.shape == (30, 2)
    assert found.image.shape == (6, 6)
    assert found.image.min() == 0
    assert found.image.max() == 1


def test_a_map_is_the_first_channel_of_what_the_convolution_puts_out():
    model, image = network(), examples().tensors[0][:1]
    maps, _ = inside(model, image, ["features.conv1"])
    weight = model.features.conv1.weight.detach()
    expected = functional.conv2d(image, weight, padding=1)[0, 0]
    np.testing.assert_allclose(maps[0], expected.numpy(), atol=1e-6)


def test_features_are_what_the_last_layer_sees():
    model, inputs = network().eval(), examples(20).tensors[0]
    seen = features(model, inputs)
    with torch.no_grad():
        np.testing.assert_allclose(model.head(torch.from_numpy(seen).float()), model(inputs), atol=1e-5)


@pytest.mark.parametrize(
    ("count", "expected"), [(0, []), (1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2]), (5, [0, 2, 4]), (9, [0, 2, 4])]
)
def test_the_first_third_and_fifth_convolution_or_as_many_as_there_are(count, expected):
    layers = nn.Sequential(*(layer for _ in range(count) for layer in (nn.Conv2d(1, 1, 1), nn.ReLU())))
    assert convolutions(layers) == [str(2 * number) for number in expected]


def test_records_of_one_class_are_embedded_together_and_the_same_every_time():
    generator = np.random.default_rng(0)
    points = np.concatenate([generator.normal(size=(20, 5)), generator.normal(size=(20, 5)) + 30])
    flat = embedded(points, 0)
    centres = flat[:20].mean(axis=0), flat[20:].mean(axis=0)
    spread = max(flat[:20].std(), flat[20:].std())
    assert np.linalg.norm(centres[0] - centres[1]) > 2 * spread
    assert np.array_equal(flat, embedded(points, 0))


def test_both_files_are_written_with_the_same_bytes_every_time(found, tmp_path):
    paths = write_figure(tmp_path / "a" / "figure", found, "A title")
    again = write_figure(tmp_path / "b" / "figure", found, "A title")
    assert [path.name for path in paths] == ["figure.svg", "figure.png"]
    for one, other in zip(paths, again, strict=True):
        assert one.read_bytes() == other.read_bytes()
    text = paths[0].read_text(encoding="utf-8")
    for words in ("A title", "step 1: trained", "step 3: after the ascent", "step 5: fine-tuned", "image of 1"):
        assert words in text
    assert len(re.findall("step 4", text)) == 2  # inside the network, and above its embedding
    assert len(re.findall("step 5", text)) == 1
    assert paths[1].read_bytes().startswith(b"\x89PNG")


def test_a_network_without_convolutions_and_pictures_in_colour_can_be_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(introspection, "embedded", lambda points, _: points[:, :2])

    def mlp(seed=0):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(75, 8), nn.ReLU(), nn.Linear(8, 3))

    given, removed = problem(mlp(), mlp, examples(shape=(3, 5, 5)))
    found = introspect(mlp(), given, CONFIG, removed, examples(12, 1, (3, 5, 5)), seed=0)
    assert found.layers == ()
    assert found.image.shape == (5, 5, 3)
    assert all(path.exists() for path in write_figure(tmp_path / "f", found, "MLP"))


def test_what_cannot_be_drawn_is_refused(monkeypatch):
    model = network()
    given, removed = problem(model)
    with pytest.raises(ConfigError, match=r"images of shape \(4,\): the figure needs \(channels, height, width\)"):
        introspect(model, given, CONFIG, examples(shape=(4,)), examples(), seed=0)
    with pytest.raises(ConfigError, match="3 test records: an embedding shows nothing of so few"):
        introspect(model, given, CONFIG, removed, examples(3), seed=0)
    with pytest.raises(UnsupportedModule, match=r"End the model with an nn\.Linear"):
        features(nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.Tanh()), examples().tensors[0])
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(MissingExtra, match=r"expunge\[eval\]"):
        embedded(np.zeros((10, 2)), 0)
