"""Residual networks for small images: ResNet-18, -20 and -50 with a 3 x 3 stem, without max-pooling, of any width.

Source: He et al., "Deep Residual Learning for Image Recognition" (2016): ResNet-20 is theirs for CIFAR (section 4.2);
ResNet-18 and -50 are theirs for ImageNet, with the stem that the unlearning literature uses for CIFAR.
"""

from collections.abc import Iterator, Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from expunge.errors import ConfigError


class Subsampled(nn.Module):
    """A shortcut without parameters (option A): every stride-th pixel, and zeros for the channels that are new."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.new = stride, outputs - inputs

    def forward(self, images: Tensor) -> Tensor:
        """(batch, inputs, height, width) -> (batch, outputs, height / stride, width / stride)."""
        kept = images[:, :, :: self.stride, :: self.stride]
        return functional.pad(kept, (0, 0, 0, 0, self.new // 2, self.new - self.new // 2))


def _shortcut(inputs: int, outputs: int, stride: int, option: str) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    if option == "A":
        return Subsampled(inputs, outputs, stride)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str = "B") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride, shortcut)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, inputs, height, width) -> (batch, outputs, height / stride, width / stride)."""
        hidden = functional.relu(self.norm1(self.conv1(images)))
        return functional.relu(self.norm2(self.conv2(hidden)) + self.shortcut(images))


class Bottleneck(nn.Module):
    """Convolutions of 1 x 1, 3 x 3 and 1 x 1 with BatchNorm around a shortcut; a quarter of the channels inside.

    The stride is in the 3 x 3 convolution, as in most implementations; the paper has it in the first.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inside = outputs // 4
        self.conv1 = nn.Conv2d(inputs, inside, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inside)
        self.conv2 = nn.Conv2d(inside, inside, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(inside)
        self.conv3 = nn.Conv2d(inside, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride, "B")

    def forward(self, images: Tensor) -> Tensor:
        """(batch, inputs, height, width) -> (batch, outputs, height / stride, width / stride)."""
        hidden = functional.relu(self.norm1(self.conv1(images)))
        hidden = functional.relu(self.norm2(self.conv2(hidden)))
        return functional.relu(self.norm3(self.conv3(hidden)) + self.shortcut(images))


class _ResNet(nn.Module):
    """Stem, blocks, mean over the image, one linear layer."""

    def __init__(self, classes: int, width: int, channels: int, blocks: Iterator[nn.Module], features: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(*blocks)  # made here and not before: the order of drawing is that of running
        self.head = nn.Linear(features, classes)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        features: Tensor = self.blocks(functional.relu(self.norm(self.conv(images))))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


class ResNet18(_ResNet):
    """Four stages of two basic blocks; 11.2 million parameters.

    Args:
        classes: Number of logits.
        width: Channels of the first stage; 64 is the published network.
        channels: Of the input.

    Shapes: (batch, channels, height, width) -> (batch, classes).
    """

    def __init__(self, classes: int = 10, width: int = 64, channels: int = 3) -> None:
        blocks = (BasicBlock(*sizes) for sizes in _plan(width, (2, 2, 2, 2), width))
        super().__init__(classes, width, channels, blocks, width * 8)


class ResNet20(_ResNet):
    """Three stages of three basic blocks; 0.27 million parameters.

    Args:
        classes: Number of logits.
        width: Channels of the first stage; 16 is the published network.
        channels: Of the input.
        shortcut: Where the size changes: A pads with zeros, as the published network for CIFAR does; B has a 1 x 1
            convolution.

    Shapes: (batch, channels, height, width) -> (batch, classes).

    Raises:
        ConfigError: Another shortcut.
    """

    def __init__(self, classes: int = 10, width: int = 16, channels: int = 3, shortcut: str = "A") -> None:
        if shortcut not in ("A", "B"):
            raise ConfigError(f"shortcut={shortcut!r}: A pads with zeros, B has a 1 x 1 convolution.")
        blocks = (BasicBlock(*sizes, shortcut) for sizes in _plan(width, (3, 3, 3), width))
        super().__init__(classes, width, channels, blocks, width * 4)


class ResNet50(_ResNet):
    """Stages of three, four, six and three bottlenecks; 23.5 million parameters.

    Args:
        classes: Number of logits.
        width: Channels of the stem, a quarter of those behind the first stage; 64 is the published network.
        channels: Of the input.

    Shapes: (batch, channels, height, width) -> (batch, classes).
    """

    def __init__(self, classes: int = 10, width: int = 64, channels: int = 3) -> None:
        blocks = (Bottleneck(*sizes) for sizes in _plan(width, (3, 4, 6, 3), width * 4))
        super().__init__(classes, width, channels, blocks, width * 32)


def _plan(inputs: int, depths: Sequence[int], outputs: int) -> Iterator[tuple[int, int, int]]:
    """Inputs, outputs and stride of each block; every stage but the first halves the image and doubles the channels."""
    for stage, depth in enumerate(depths):
        for block in range(depth):
            yield inputs, outputs, 2 if stage and not block else 1
            inputs = outputs
        outputs *= 2
