import numpy as np
import pytest
import torch
from torch import nn

from expunge import Blind, Examples, Recipe, Reload, Sighted, cross_entropy, gradient, train, unlearn
from expunge.data.images import Images, Normalisation, normalisation, to_examples
from expunge.errors import ConfigError, MismatchError
from expunge.methods.boundary_shrink import BoundaryShrink
from expunge.methods.unsir import Unsir
from expunge.metrics.outputs import outputs
from expunge.models.convnet import ConvNet
from expunge.models.from_bytes import FromBytes
from expunge.seeds import stream
from tests.contract import same, state

BRIEF = Recipe(epochs=2, lr=0.02, batch_size=16)


def images(count: int = 48) -> Images:
    labels = torch.arange(count) % 3
    noise = torch.randint(0, 120, (count, 2, 8, 8), generator=stream(0, "noise"))
    return Images((noise + 60 * labels[:, None, None, None]).to(torch.uint8), labels)


SCALE = normalisation(images())


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return FromBytes(ConvNet(channels=2, classes=3, widths=(4, 6)), SCALE.mean, SCALE.deviation)


def as_bytes() -> Examples:
    return Examples(images().pixels, images().labels)


def as_floats() -> Examples:
    return to_examples(images(), SCALE)


def test_bytes_are_normalised_channel_by_channel():
    model = FromBytes(nn.Identity(), (0.5, 0.25), (0.5, 2.0))
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3).expand(1, 2, 1, 3)
    expected = [[-1.0, -0.6, 1.0], [-0.125, -0.025, 0.375]]
    np.testing.assert_allclose(model(pixels)[0, :, 0].numpy(), expected, rtol=1e-6)
    assert model(pixels).dtype == torch.float32


def test_floating_point_inputs_pass_as_they_are():
    inputs = torch.randn(2, 2, 4, 4)
    assert FromBytes(nn.Identity(), (0.5, 0.25), (0.5, 2.0))(inputs) is inputs


def test_training_passes_and_metrics_have_the_bits_of_normalised_floats():
    models = [network(), network()]
    for model, data in zip(models, (as_bytes(), as_floats()), strict=True):
        train(model, data, cross_entropy, BRIEF, seed=1)
    assert same(state(models[0]), state(models[1]))
    slopes = [gradient(models[0], cross_entropy, data).total for data in (as_bytes(), as_floats())]
    assert same(slopes[0], slopes[1])
    ours, theirs = (outputs(models[0], data).logits for data in (as_bytes(), as_floats()))
    np.testing.assert_array_equal(ours, theirs)


def given(data: Examples, *, sighted: bool) -> Blind:
    first = torch.arange(0, 48, 3)  # a whole class
    blind = {"retain": data.without(first), "loss_terms": cross_entropy, "fresh": network}
    return Sighted(**blind, forget=data.only(first), original=data) if sighted else Blind(**blind)


@pytest.mark.parametrize(
    "config",
    [
        Reload(reset_fraction=0.2, fine_tune=BRIEF),
        BoundaryShrink(bound=0.1, recipe=BRIEF),
        Unsir(impair=BRIEF, repair=BRIEF, noise_steps=2),
    ],
    ids=lambda config: type(config).__name__,
)
def test_methods_have_the_bits_of_normalised_floats(config):
    model, found = network(), []
    train(model, as_bytes(), cross_entropy, BRIEF, seed=1)
    for data in (as_bytes(), as_floats()):
        access = given(data, sighted=not isinstance(config, Reload))
        if isinstance(config, Reload):
            access = Blind(
                retain=access.retain, loss_terms=cross_entropy, fresh=network, full=gradient(model, cross_entropy, data)
            )
        found.append(state(unlearn(model, access, config, seed=2).model))
    assert same(found[0], found[1])
    assert not same(found[0], state(model))


def test_bytes_with_other_channels_are_refused():
    with pytest.raises(MismatchError, match=r"images of shape \(4, 3, 8, 8\): the normalisation has 2 channels"):
        network()(torch.zeros(4, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (Normalisation((0.5,), (0.5, 1.0)), MismatchError, "1 means and 2 deviations: every channel needs one of each"),
        (Normalisation((0.5,), (0.0,)), ConfigError, r"deviation=\(0.0,\): inputs are divided by it"),
    ],
)
def test_a_normalisation_that_cannot_work_is_refused(scale, error, message):
    with pytest.raises(error, match=message):
        FromBytes(nn.Identity(), scale.mean, scale.deviation)
