"""ResNet-18 for small images: 3 x 3 stem, no max-pooling, any width.

Source: He et al., "Deep Residual Learning for Image Recognition" (2016), with the stem that the unlearning
literature uses for CIFAR.
"""

from torch import Tensor, nn
from torch.nn import functional


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, images: Tensor) -> Tensor:
        """(batch, inputs, height, width) -> (batch, outputs, height / stride, width / stride)."""
        hidden = functional.relu(self.norm1(self.conv1(images)))
        return functional.relu(self.norm2(self.conv2(hidden)) + self.shortcut(images))


class ResNet18(nn.Module):
    """Four stages of two basic blocks.

    Args:
        classes: Number of logits.
        width: Channels of the first stage; 64 is the published network.
        channels: Of the input.

    Shapes: (batch, channels, height, width) -> (batch, classes).
    """

    def __init__(self, classes: int = 10, width: int = 64, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        blocks = []
        for stage in range(4):
            outputs = width * 2**stage
            blocks += [
                BasicBlock(outputs if stage == 0 else outputs // 2, outputs, 1 if stage == 0 else 2),
                BasicBlock(outputs, outputs, 1),
            ]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width * 8, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        features: Tensor = self.blocks(functional.relu(self.norm(self.conv(images))))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits
