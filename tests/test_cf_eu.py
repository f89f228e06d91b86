import copy

import pytest
import torch
from torch import Tensor, nn

from expunge import Blind, CFk, EUk, Examples, FineTune, Recipe, cross_entropy, unlearn
from expunge.errors import ConfigError, MismatchError
from expunge.methods.leaf_layers import last_layers
from expunge.models.convnet import ConvNet
from expunge.models.resnet import ResNet18
from expunge.trace import Trace
from tests.contract import same, state, world

BRIEF = Recipe(epochs=2, lr=0.05, batch_size=8)
NONE = Recipe(epochs=0, lr=0.05)


def images(channels: int) -> Examples:
    generator = torch.Generator().manual_seed(4)
    return Examples(torch.randn(24, channels, 8, 8, generator=generator), torch.arange(24) % 3)


class Backwards(nn.Module):
    """Defines its layers in another order than it runs them, in nested blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)
        self.body = nn.ModuleDict(
            {"late": nn.Sequential(nn.Linear(5, 5), nn.LayerNorm((5,))), "early": nn.Linear(6, 5)}
        )
        self.unused = nn.Parameter(torch.ones(2, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body["late"](self.body["early"](inputs).tanh()))


class Attending(nn.Module):
    """An attention, whose output projection never runs by itself, between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.first = nn.Linear(6, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)[:, None].expand(-1, 2, -1)
        return self.head(self.attention(hidden, hidden, hidden)[0].mean(1))


def counted(make, data: Examples, k: int) -> tuple[Trace, set[str]]:
    model, trace = make(), Trace("test", 0)
    given = Blind(retain=data, loss_terms=cross_entropy, fresh=lambda _: make())
    chosen = last_layers(model, given, k, "cf-k", trace)
    return trace, {name for name, module in model.named_modules() if module in set(chosen)}


def built(name: str) -> tuple[nn.Module, Blind]:
    make = {
        "convnet": lambda: ConvNet(1, 3, (4, 4, 4)),
        "resnet": lambda: ResNet18(3, width=2, channels=1),
        "backwards": Backwards,
    }[name]

    def fresh(seed: int) -> nn.Module:
        return make()

    with torch.random.fork_rng():
        torch.manual_seed(8)
        model = make()
    data = Examples(torch.randn(24, 6), torch.arange(24) % 3) if name == "backwards" else images(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(-0.3)  # keeps the units alive
            module.num_batches_tracked.fill_(7)
    return model, Blind(retain=data, loss_terms=cross_entropy, fresh=fresh)


@pytest.mark.parametrize(
    ("k", "names"),
    [
        (1, {"head"}),
        (2, {"head", "features.conv3", "features.norm3"}),
        (3, {"head", "features.conv3", "features.norm3", "features.conv2", "features.norm2"}),
        (4, {"head", *(f"features.{kind}{number}" for kind in ("conv", "norm") for number in (1, 2, 3))}),
    ],
)
def test_counts_the_layers_of_a_convnet(k, names):
    trace, chosen = counted(lambda: ConvNet(1, 3, (4, 4, 4)), images(1), k)
    assert chosen == names
    assert trace.facts["weight_layers"] == 4
    assert trace.facts["trained_layers"][-1] == "head"
    assert len(trace.facts["trained_layers"]) == k
    assert trace.forwarded == 8


def test_counts_the_layers_inside_the_blocks_of_a_resnet():
    def make() -> nn.Module:
        return ResNet18(3, width=2)

    trace, chosen = counted(make, images(3), 3)
    assert trace.facts["weight_layers"] == 1 + 16 + 3 + 1  # stem, two a block, shortcuts of three stages, head
    assert trace.facts["trained_layers"] == ["blocks.7.conv1", "blocks.7.conv2", "head"]
    assert chosen == {"head", *(f"blocks.7.{name}" for name in ("conv1", "norm1", "conv2", "norm2"))}
    trace, chosen = counted(make, images(3), 5)
    assert trace.facts["trained_layers"][:2] == ["blocks.6.conv2", "blocks.6.shortcut.0"]
    assert {"blocks.6.shortcut.1", "blocks.6.norm2"} < chosen
    assert "blocks.6.norm1" not in chosen


class VGGLike(nn.Module):
    """Convolutions with BatchNorm and pooling in one Sequential, then a classifier of three layers in another."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for entering, leaving in ((1, 4), (4, 4), (4, 8)):
            layers += [nn.Conv2d(entering, leaving, 3, padding=1), nn.BatchNorm2d(leaving), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2))
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


@pytest.mark.parametrize(
    ("k", "names"),
    [
        (1, ["classifier.6"]),
        (3, ["classifier.1", "classifier.4", "classifier.6"]),
        (4, ["features.6", "classifier.1", "classifier.4", "classifier.6"]),
    ],
)
def test_counts_the_layers_of_a_vgg(k, names):
    model, data, trace = VGGLike(), images(1), Trace("test", 0)
    given = Blind(retain=data, loss_terms=cross_entropy, fresh=lambda seed: VGGLike())
    layers = last_layers(model, given, k, "cf-k", trace)
    assert trace.facts == {"weight_layers": 6, "trained_layers": names}
    moving = {name for name, module in model.named_modules() if module in layers}
    assert moving == {*names, *(["features.7"] if k == 4 else [])}  # a BatchNorm belongs to the layer before it


def test_counts_in_the_order_in_which_layers_run():
    data = Examples(torch.randn(9, 6), torch.arange(9) % 3)
    assert counted(Backwards, data, 1)[1] == {"head"}
    assert counted(Backwards, data, 2)[1] == {"head", "body.late.0", "body.late.1"}
    trace, chosen = counted(Backwards, data, 3)
    assert trace.facts["trained_layers"] == ["body.early", "body.late.0", "head"]
    assert chosen == {"", "body.early", "body.late.0", "body.late.1", "head"}  # all of it, what no layer owns included


def test_counts_an_attention_and_its_output_as_layers_where_they_run():
    trace, chosen = counted(Attending, Examples(torch.randn(9, 6), torch.arange(9) % 3), 3)
    assert trace.facts["trained_layers"] == ["attention", "attention.out_proj", "head"]
    assert chosen == {"attention", "attention.out_proj", "head"}
    assert trace.facts["weight_layers"] == 4


@pytest.mark.parametrize("config", [CFk(k=2, recipe=BRIEF), EUk(k=2, recipe=BRIEF)])
@pytest.mark.parametrize("name", ["convnet", "resnet", "backwards"])
def test_what_is_frozen_stays_bit_identical_and_the_rest_moves(name, config):
    model, given = built(name)
    before = state(model)
    after = unlearn(model, given, config, seed=1).model.state_dict()
    moving = {
        "convnet": ("head", "features.conv3", "features.norm3"),
        "resnet": ("head", "blocks.7.conv2", "blocks.7.norm2"),
        "backwards": ("head", "body.late"),
    }[name]
    for tensor, value in before.items():
        assert torch.equal(value, after[tensor]) == (not tensor.startswith(moving)), tensor


@pytest.mark.parametrize("config", [CFk(k=4, recipe=BRIEF), CFk(k=2, recipe=BRIEF)])
def test_all_layers_are_fine_tuning_bit_for_bit_and_fewer_are_not(config):
    model, given = built("convnet")
    tuned = unlearn(model, given, FineTune(recipe=BRIEF), seed=1)
    result = unlearn(model, given, config, seed=1)
    assert same(state(tuned.model), state(result.model)) == (config.k == 4)
    assert (tuned.trace.losses == result.trace.losses) == (config.k == 4)


def test_frozen_statistics_are_those_the_trained_layers_see():
    """With k = 1 the features are a fixed function in eval mode: logistic regression on them is the same."""
    model, given = built("convnet")
    result = unlearn(model, given, CFk(k=1, recipe=BRIEF), seed=1).model

    class OnFeatures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = copy.deepcopy(model.head)

        def forward(self, features: Tensor) -> Tensor:
            return self.head(features)

    model.eval()
    inputs, labels = given.retain.tensors
    features = Examples(model.features(inputs).mean((2, 3)).detach(), labels)
    blind = Blind(retain=features, loss_terms=cross_entropy, fresh=lambda _: OnFeatures())
    alone = unlearn(OnFeatures(), blind, FineTune(recipe=BRIEF), seed=1).model
    torch.testing.assert_close(alone.head.weight, result.head.weight)
    torch.testing.assert_close(alone.head.bias, result.head.bias)


@pytest.mark.parametrize("name", ["convnet", "resnet", "backwards"])
def test_eu_k_starts_the_last_layers_from_fresh_values(name):
    model, given = built(name)
    before, untrained = state(model), state(given.fresh_model(6, model))
    after = unlearn(model, given, EUk(k=2, recipe=NONE), seed=6).model.state_dict()
    reset = {tensor for tensor, value in after.items() if torch.equal(value, untrained[tensor])}
    kept = {tensor for tensor, value in after.items() if torch.equal(value, before[tensor])}
    expected = {
        "convnet": ("head", "features.conv3", "features.norm3"),
        "resnet": ("head", "blocks.7.conv2", "blocks.7.norm2"),
        "backwards": ("head", "body.late"),
    }[name]
    assert {tensor for tensor in after if tensor.startswith(expected)} <= reset
    assert {tensor for tensor in after if not tensor.startswith(expected)} <= kept
    assert {"head.weight", "head.bias"} & kept == set()  # fresh values are other values
    if name == "convnet":
        assert float(after["features.norm3.running_mean"].abs().sum()) == 0
        assert int(after["features.norm3.num_batches_tracked"]) == 0
        assert after["features.norm2.running_mean"].tolist() == pytest.approx([-0.3] * 4)


def test_cf_k_starts_from_the_trained_values():
    model, given = built("convnet")
    assert same(state(unlearn(model, given, CFk(k=3, recipe=NONE)).model), state(model))


def test_a_trainable_layer_that_the_user_froze_stays():
    model, given = built("convnet")
    model.head.weight.requires_grad_(False)
    for config in (CFk(k=1, recipe=BRIEF), EUk(k=1, recipe=BRIEF)):
        result = unlearn(model, given, config).model
        assert torch.equal(result.head.weight, model.head.weight)
        assert not torch.equal(result.head.bias, model.head.bias)
        assert [p.requires_grad for p in result.parameters()] == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize(("kind", "name"), [(CFk, "cf-k"), (EUk, "eu-k")])
def test_more_layers_than_there_are_is_refused(kind, name):
    with pytest.raises(ConfigError, match=rf"k=3: {name} trains the last k weight layers, and MLP has 2.*from 1 to 2"):
        unlearn(world().model, world().blind(), kind(k=3))
    with pytest.raises(ConfigError, match="k=0: at least 1"):
        kind(k=0)
    unlearn(world().model, world().blind(), kind(k=2, recipe=NONE))


def test_fresh_values_of_another_architecture_are_refused():
    model, given = built("convnet")
    other = Blind(retain=given.retain, loss_terms=cross_entropy, fresh=lambda _: ConvNet(1, 3, (4, 4, 5)))
    with pytest.raises(MismatchError, match="same architecture"):
        unlearn(model, other, EUk(k=1, recipe=BRIEF))
