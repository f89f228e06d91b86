"""VGG-16 with BatchNorm for small images: thirteen 3 x 3 convolutions and one linear layer.

Source: Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (2015), configuration
D. As usual for CIFAR, each convolution has a BatchNorm, and one linear layer takes the place of three.
"""

from collections import OrderedDict

from jaxtyping import Float
from torch import Tensor, nn

from expunge.errors import ConfigError

_STAGES = ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8))  # in multiples of the width; pooling behind each stage


class VGG16(nn.Module):
    """Five stages of convolutions, pooling behind each, then one linear layer; 14.7 million parameters.

    Convolutions have no bias: the BatchNorm behind them takes it out again, and its gradient is rounding alone.

    Args:
        classes: Number of logits.
        width: Channels of the first stage; 64 is the published network.
        channels: Of the input.

    Shapes: (batch, channels, height, width) -> (batch, classes), height and width at least 32.
    """

    def __init__(self, classes: int = 10, width: int = 64, channels: int = 3) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        number = 0
        for stage, multiples in enumerate(_STAGES, 1):
            for multiple in multiples:
                number += 1
                layers[f"conv{number}"] = nn.Conv2d(channels, width * multiple, 3, padding=1, bias=False)
                layers[f"norm{number}"] = nn.BatchNorm2d(width * multiple)
                layers[f"relu{number}"] = nn.ReLU()
                channels = width * multiple
            layers[f"pool{stage}"] = nn.MaxPool2d(2)
        self.features = nn.Sequential(layers)
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits.

        Raises:
            ConfigError: Images that five halvings make vanish.
        """
        if min(images.shape[2:]) < 32:
            raise ConfigError(
                f"images of {images.shape[2]} x {images.shape[3]}: VGG-16 halves them five times and needs 32 x 32. "
                "Pad them, or take ConvNet or a residual network."
            )
        logits: Tensor = self.head(self.features(images).mean((2, 3)))
        return logits
