"""A small convolutional network for small images."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn


class ConvNet(nn.Module):
    """Blocks of convolution, BatchNorm and ReLU with pooling in between, then one linear layer.

    Args:
        channels: Of the input, 1 or 3.
        classes: Number of logits.
        widths: Output channels of each block; every block but the first halves the image.
        batch_norm: Whether blocks have BatchNorm.

    Shapes: (batch, channels, height, width) -> (batch, classes), any height and width of at least 2^(blocks - 1).
    """

    def __init__(
        self, channels: int = 1, classes: int = 10, widths: Sequence[int] = (32, 64, 64), batch_norm: bool = True
    ) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number, width in enumerate(widths, 1):
            if number > 1:
                layers[f"pool{number}"] = nn.MaxPool2d(2)
            layers[f"conv{number}"] = nn.Conv2d(channels, width, 3, padding=1, bias=not batch_norm)
            if batch_norm:
                layers[f"norm{number}"] = nn.BatchNorm2d(width)
            layers[f"relu{number}"] = nn.ReLU()
            channels = width
        self.features = nn.Sequential(layers)
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        features: Tensor = self.features(images)
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits
