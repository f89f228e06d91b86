import pytest
import torch
from torch import nn
from torch.nn import functional

from expunge import Blind, Examples, Trace, cross_entropy
from expunge.errors import ConfigError, MismatchError
from expunge.methods.leaf_layers import last_layers
from expunge.methods.per_example import squared_gradients
from expunge.models import MODELS, build
from expunge.models.mlp import MLP
from expunge.models.resnet import BasicBlock, Bottleneck, ResNet18, ResNet20, ResNet50, Subsampled
from expunge.models.vgg import VGG16
from expunge.models.vit import Attention, Block, ViT
from expunge.params import weights_fingerprint

SMALL = {  # name: settings, size of the images, weight layers
    "mlp": ({"widths": (48, 5, 5, 3)}, 4, 3),
    "convnet": ({"channels": 3, "classes": 3, "widths": (2, 3)}, 8, 3),
    "resnet18": ({"classes": 3, "width": 2}, 8, 17 + 3 + 1),
    "resnet20": ({"classes": 3, "width": 2}, 8, 19 + 1),
    "resnet50": ({"classes": 3, "width": 4}, 8, 49 + 4 + 1),
    "vgg16": ({"classes": 3, "width": 2}, 32, 13 + 1),
    "vit": ({"classes": 3, "size": 8, "width": 8, "depth": 2, "heads": 2}, 8, 1 + 2 * 4 + 1),
}


def small(name: str) -> tuple[nn.Module, Examples]:
    """A narrow model with moved statistics, and five images it can take."""
    settings, size, _ = SMALL[name]
    model = build(name, seed=1, **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model(torch.rand(16, 3, size, size, generator=generator))
    data = Examples(torch.randn(5, 3, size, size, generator=generator), torch.tensor([0, 1, 2, 1, 0]))
    return model.eval(), data


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_model_of_the_table_is_tested_here():
    assert set(SMALL) == set(MODELS)


@pytest.mark.parametrize("name", SMALL)
def test_a_model_depends_on_its_seed_alone(name):
    settings = SMALL[name][0]
    before = torch.get_rng_state()
    first, other = build(name, seed=3, **settings), build(name, seed=4, **settings)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        again = build(name, seed=3, **settings)
    assert weights_fingerprint(first) == weights_fingerprint(again) != weights_fingerprint(other)


@pytest.mark.parametrize("name", SMALL)
def test_a_model_in_eval_mode_gives_the_same_bits_and_one_example_as_in_a_batch(name):
    model, data = small(name)
    images = data.tensors[0]
    with torch.no_grad():
        logits = model(images)
        assert logits.shape == (5, 3)
        assert torch.equal(logits, model(images))
        alone = torch.cat([model(image[None]) for image in images])
    assert torch.allclose(alone, logits, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_weight_layers_are_counted_as_published_and_as_they_run(name):
    model, data = small(name)
    count = SMALL[name][2]
    trace = Trace(method="a test", seed=0)
    given = Blind(retain=data, loss_terms=cross_entropy, fresh=lambda seed: build(name, seed=seed, **SMALL[name][0]))
    last_layers(model, given, count, "a test", trace)
    assert trace.facts["weight_layers"] == count
    named = dict(model.named_modules())
    layers = [named[layer] for layer in trace.facts["trained_layers"]]
    assert layers[-1].out_features == 3  # the head
    for layer in layers:
        assert isinstance(layer, nn.Conv2d | nn.Linear)
    assert len({id(layer) for layer in layers}) == count
    if name != "mlp":
        assert isinstance(layers[0], nn.Conv2d)
        assert layers[0].in_channels == 3


@pytest.mark.parametrize("name", SMALL)
def test_squared_gradients_of_single_examples_are_those_of_a_loop(name):
    model, data = small(name)
    model.double()
    data = Examples(data.tensors[0].double(), data.tensors[1])
    found = squared_gradients(model, cross_entropy, data, chunk=3)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for image, label in zip(*data.tensors, strict=True):
        loss = functional.cross_entropy(model(image[None]), label[None])
        for own, slope in zip(expected.values(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            own.add_(slope**2)
    assert set(found) == set(expected)
    for own, square in expected.items():
        assert torch.allclose(found[own], square, rtol=1e-6, atol=1e-14), own


@pytest.mark.parametrize(
    ("model", "count"),
    [  # by hand from the papers' tables, with BatchNorm's scale and shift, for ten classes
        (ResNet20, 269_722),
        (ResNet18, 11_173_962),
        (ResNet50, 23_520_842),
        (VGG16, 14_724_042),
        (ViT, 3_716_874),
    ],
)
def test_networks_of_full_width_have_the_published_number_of_parameters(model, count):
    with torch.device("meta"):
        assert parameters(model()) == count


def test_a_perceptron_has_inputs_and_outputs():
    with pytest.raises(ConfigError, match=r"widths=\(64,\): give at least"):
        MLP((64,))


def test_a_hundred_classes_need_ninety_more_rows_in_the_head():
    with torch.device("meta"):
        for model, features in ((ResNet18, 512), (ResNet20, 64), (ResNet50, 2048), (VGG16, 512), (ViT, 256)):
            assert parameters(model(100)) - parameters(model(10)) == 90 * (features + 1)


def test_shortcut_a_takes_every_second_pixel_and_pads_channels_with_zeros():
    images = torch.arange(2 * 2 * 4 * 4.0).reshape(2, 2, 4, 4)
    through = Subsampled(2, 4, 2)(images)
    assert through.shape == (2, 4, 2, 2)
    assert torch.equal(through[:, 1:3], images[:, :, [0, 2]][:, :, :, [0, 2]])
    assert not through[:, [0, 3]].any()


def test_shortcut_b_of_resnet20_has_two_more_convolutions_and_no_other_difference():
    a, b = ResNet20(), ResNet20(shortcut="B")
    assert parameters(b) - parameters(a) == 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    with pytest.raises(ConfigError, match="shortcut='C': A pads with zeros, B has a 1 x 1 convolution"):
        build("resnet20", seed=0, shortcut="C")


def test_bottlenecks_add_to_their_shortcut_and_stride_inside():
    block, images = Bottleneck(8, 16, 2).eval(), torch.rand(2, 8, 6, 6)
    assert (block.conv1.stride, block.conv2.stride, block.conv3.stride) == ((1, 1), (2, 2), (1, 1))
    assert block.conv2.weight.shape == (4, 4, 3, 3)
    through = functional.relu(block.shortcut(images))
    assert not torch.equal(block(images), through)
    nn.init.zeros_(block.norm3.weight)
    assert torch.equal(block(images), through)


@pytest.mark.parametrize(
    ("model", "features", "depths"),
    [(ResNet18(3, 2), 16, (2, 2, 2, 2)), (ResNet20(3, 2), 8, (3, 3, 3)), (ResNet50(3, 2), 64, (3, 4, 6, 3))],
)
def test_residual_networks_halve_the_image_at_every_stage_but_the_first(model, features, depths):
    assert len(model.blocks) == sum(depths)
    images = torch.rand(2, 3, 16, 16)
    assert model.blocks(model.norm(model.conv(images))).shape == (2, features, *[16 // 2 ** (len(depths) - 1)] * 2)
    strides = [
        block.conv2.stride[0] if isinstance(block, Bottleneck) else block.conv1.stride[0] for block in model.blocks
    ]
    starts = [sum(depths[:stage]) for stage in range(1, len(depths))]
    assert [place for place, stride in enumerate(strides) if stride == 2] == starts
    assert all(isinstance(block, BasicBlock | Bottleneck) for block in model.blocks)


def test_vgg_is_configuration_d():
    model = VGG16(width=64)
    plan = [
        "M" if isinstance(layer, nn.MaxPool2d) else layer.out_channels
        for layer in model.features
        if isinstance(layer, nn.MaxPool2d | nn.Conv2d)
    ]
    assert plan == [64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3, "M"]
    norms = [layer.num_features for layer in model.features if isinstance(layer, nn.BatchNorm2d)]
    assert norms == [width for width in plan if width != "M"]


def test_vgg_refuses_images_that_would_vanish():
    with pytest.raises(ConfigError, match="images of 28 x 32: VGG-16 halves them five times and needs 32 x 32"):
        VGG16(width=1)(torch.zeros(1, 3, 28, 32))


def test_attention_is_that_of_torch():
    own, theirs = Attention(12, 3), nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": own.qkv.weight.detach(),
            "in_proj_bias": torch.zeros(36),
            "out_proj.weight": own.out.weight.detach(),
            "out_proj.bias": own.out.bias.detach(),
        }
    )
    tokens = torch.randn(2, 5, 12)
    assert torch.allclose(own(tokens), theirs(tokens, tokens, tokens)[0], atol=1e-6)


def test_a_block_is_an_encoder_layer_of_torch():
    own = Block(12, 3, 20)
    theirs = nn.TransformerEncoderLayer(12, 3, 20, 0.0, "gelu", batch_first=True, norm_first=True)
    state = {"self_attn.in_proj_bias": torch.zeros(36)}
    for name, value in own.state_dict().items():
        theirs_is = name.replace("attention.qkv.weight", "self_attn.in_proj_weight")
        state[theirs_is.replace("attention.out", "self_attn.out_proj")] = value
    theirs.load_state_dict(state)
    tokens = torch.randn(2, 5, 12)
    assert torch.allclose(own(tokens), theirs(tokens), atol=1e-5)


def test_a_vit_reads_patches_in_their_places():
    model, images = ViT(3, size=8, width=8, depth=1, heads=2).eval(), torch.randn(1, 3, 8, 8)
    swapped = images.roll(4, 3)  # the same patches in other places
    with torch.no_grad():
        assert not torch.allclose(model(images), model(swapped), atol=1e-6)
        model.places.zero_()
        assert torch.allclose(model(images), model(swapped), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch": 5}, "patch=5: images of size=32 must be a whole number of patches wide"),
        ({"heads": 3}, "heads=3: they must share width=256 evenly"),
        ({"depth": 0}, "depth=0: must be at least 1"),
    ],
)
def test_settings_of_a_vit_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        build("vit", seed=0, **settings)


def test_a_vit_refuses_images_of_another_size():
    with pytest.raises(MismatchError, match="images of 16 x 8: this ViT has places for 8 x 8"):
        ViT(3, size=8, width=8, depth=1, heads=2)(torch.zeros(1, 3, 16, 8))


def test_models_and_settings_that_do_not_exist_are_refused_by_name():
    with pytest.raises(ConfigError, match="model='resnet19': there are mlp, convnet, resnet18"):
        build("resnet19", seed=0)
    with pytest.raises(ConfigError, match=r"mlp does not take \{'depth': 3\}"):
        build("mlp", seed=0, depth=3)
