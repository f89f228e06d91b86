import itertools
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from expunge.data.digits import COUNT, digits
from expunge.errors import ConfigError, MissingExtra
from expunge.models.convnet import ConvNet
from expunge.models.mlp import MLP
from expunge.models.resnet import BasicBlock, ResNet18


def rows(images: torch.Tensor) -> list[tuple[float, ...]]:
    return list(map(tuple, images.flatten(1).tolist()))


def test_digits_are_images_in_the_unit_range_with_labels_of_ten_classes():
    split = digits(1000, seed=0)
    for part, count in ((split.train, 1000), (split.test, 797)):
        images, labels = part.tensors
        assert (images.shape, images.dtype) == ((count, 1, 8, 8), torch.float32)
        assert (labels.shape, labels.dtype) == ((count,), torch.int64)
        assert (float(images.min()), float(images.max())) == (0, 1)
        assert set(labels.tolist()) == set(range(10))
        assert part.positions.tolist() == list(range(count))


def test_training_and_test_digits_are_disjoint_and_together_all_of_them():
    from sklearn.datasets import load_digits

    split = digits(700, seed=3)
    everything = rows(torch.from_numpy(load_digits().images).float().div(16))
    assert sorted(rows(split.train.tensors[0]) + rows(split.test.tensors[0])) == sorted(everything)
    assert len(set(everything)) == COUNT  # all different, so that the line above means disjoint


def test_every_digit_keeps_its_label():
    from sklearn.datasets import load_digits

    bundle, split = load_digits(), digits(20, seed=5)
    label_of = dict(zip(rows(torch.from_numpy(bundle.images).float().div(16)), bundle.target.tolist(), strict=True))
    images, labels = split.train.tensors
    assert [label_of[row] for row in rows(images)] == labels.tolist()


def test_digits_depend_on_the_seed_alone():
    before = torch.get_rng_state()
    first = digits(50, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(8)
        again, other = digits(50, seed=1), digits(50, seed=2)
    assert torch.equal(first.train.tensors[0], again.train.tensors[0])
    assert not torch.equal(first.train.tensors[0], other.train.tensors[0])


@pytest.mark.parametrize("train", [0, -1, 1797, 5000])
def test_sizes_that_leave_one_part_empty_are_refused(train):
    with pytest.raises(ConfigError, match=f"train={train}: the digits are 1797 images, and both parts need some"):
        digits(train, seed=0)


@pytest.mark.parametrize("train", [1, 1796])
def test_the_smallest_parts_have_one_image(train):
    split = digits(train, seed=0)
    assert (len(split.train), len(split.test)) == (train, 1797 - train)


def test_without_scikit_learn_the_cure_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install 'expunge\[eval\]'"):
        digits(10, seed=0)


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize(
    ("channels", "size", "classes", "widths"), [(1, 8, 10, (4, 6, 8)), (3, 5, 2, (3,)), (3, 4, 7, (2, 2, 2))]
)
def test_convnet_maps_images_to_logits(batch_norm, channels, size, classes, widths):
    model = ConvNet(channels, classes, widths, batch_norm)
    images = torch.randn(5, channels, size, size + 1)
    shrunk = 2 ** (len(widths) - 1)
    assert model.features(images).shape == (5, widths[-1], size // shrunk, (size + 1) // shrunk)
    assert model(images).shape == (5, classes)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert [norm.num_features for norm in norms] == (list(widths) if batch_norm else [])
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == list(widths)
    assert all((layer.bias is None) == batch_norm for layer in convolutions)
    assert sum(isinstance(module, nn.MaxPool2d) for module in model.modules()) == len(widths) - 1


def test_convnet_names_its_layers():
    names = set(ConvNet(widths=(2, 2)).state_dict())
    assert {"features.conv1.weight", "features.norm2.running_mean", "head.weight"} <= names


@pytest.mark.parametrize(("channels", "classes", "width"), [(3, 10, 4), (1, 7, 2)])
def test_resnet_halves_three_times_and_doubles_its_channels(channels, classes, width):
    model = ResNet18(classes, width, channels)
    images = torch.randn(2, channels, 16, 16)
    assert model(images).shape == (2, classes)
    assert model.blocks(model.norm(model.conv(images))).shape == (2, 8 * width, 2, 2)
    assert len(model.blocks) == 8
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert sum(layer.kernel_size == (3, 3) for layer in convolutions) == 17  # and the head: 18 layers
    assert sum(layer.kernel_size == (1, 1) for layer in convolutions) == 3


@pytest.mark.parametrize(("outputs", "stride"), [(4, 1), (6, 2)])
def test_a_residual_block_adds_to_its_shortcut(outputs, stride):
    block, images = BasicBlock(4, outputs, stride).eval(), torch.rand(2, 4, 6, 6)
    through = functional.relu(block.shortcut(images))
    assert not torch.equal(block(images), through)
    nn.init.zeros_(block.norm2.weight)
    assert torch.equal(block(images), through)


def test_resnet_of_full_width_has_the_published_number_of_parameters():
    assert sum(parameter.numel() for parameter in ResNet18().parameters()) == 11_173_962


@pytest.mark.parametrize(("widths", "layers"), [((6, 3), 1), ((4, 5, 2), 2), ((64, 7, 7, 10), 3)])
def test_mlp_maps_flattened_inputs_to_logits(widths, layers):
    model = MLP(widths)
    assert model(torch.randn(3, widths[0])).shape == (3, widths[-1])
    assert model(torch.randn(3, 1, widths[0] // 2, 2)).shape == (3, widths[-1])
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == list(itertools.pairwise(widths))
    assert len(linear) == layers
    assert sum(isinstance(module, nn.ReLU) for module in model.modules()) == layers - 1


def test_mlp_ends_without_an_activation():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert bool((MLP((4, 5, 3))(torch.randn(50, 4)) < 0).any())
