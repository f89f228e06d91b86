"""Architectures for experiments, by name."""

from collections.abc import Callable

from torch import nn

from expunge.errors import ConfigError
from expunge.models.convnet import ConvNet
from expunge.models.mlp import MLP
from expunge.models.resnet import ResNet18, ResNet20, ResNet50
from expunge.models.vgg import VGG16
from expunge.models.vit import ViT
from expunge.seeds import seeded

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "convnet": ConvNet,
    "resnet18": ResNet18,
    "resnet20": ResNet20,
    "resnet50": ResNet50,
    "vgg16": VGG16,
    "vit": ViT,
}


def build(name: str, *, seed: int, **settings: object) -> nn.Module:
    """An untrained model, the same for the same seed; the global generators stay as they are.

    Args:
        name: One of `MODELS`.
        seed: Where the initial values come from.
        **settings: Those of the model, such as classes=100.

    Raises:
        ConfigError: No model of this name, or a setting that the model does not have.
    """
    if name not in MODELS:
        raise ConfigError(f"model={name!r}: there are {', '.join(MODELS)}.")
    with seeded(seed, "model", name):
        try:
            return MODELS[name](**settings)
        except TypeError as error:
            raise ConfigError(f"{name} does not take {settings}: {error}") from error
