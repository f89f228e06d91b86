"""A small vision transformer for small images.

Sources: Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), in the size that Hassani et al., "Escaping the Big
Data Paradigm with Compact Transformers" (2021), call ViT-Lite-7/4. Deviation: no dropout and no stochastic depth, so
that a loss in training mode is that of the weights alone.

Attention is written out with linear layers. They are then weight layers like any others for CF-k and EU-k, and
gradients of single examples can be taken.
"""

from collections import OrderedDict

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from expunge.errors import ConfigError, MismatchError


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """Every token mixes the values of all."""
        query, key, value = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(2, 3) / query.shape[3] ** 0.5).softmax(3)
        mixed: Tensor = self.out((weights @ value).transpose(1, 2).flatten(2))
        return mixed


class Block(nn.Module):
    """Attention and a perceptron, each behind a LayerNorm and around a shortcut."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)

    def forward(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """The shape stays."""
        tokens = tokens + self.attention(self.norm1(tokens))
        hidden: Tensor = self.linear2(functional.gelu(self.linear1(self.norm2(tokens))))
        return tokens + hidden


class ViT(nn.Module):
    """Patches become tokens; a class token collects what the last layer reads. 3.7 million parameters.

    Args:
        classes: Number of logits.
        size: Height and width of the images.
        channels: Of the input.
        patch: Height and width of a patch.
        width: Numbers a token.
        depth: Blocks.
        heads: Of the attention.

    Shapes: (batch, channels, size, size) -> (batch, classes).

    Raises:
        ConfigError: Patches that do not fill the image, heads that do not share the width, or no block.
    """

    def __init__(
        self,
        classes: int = 10,
        size: int = 32,
        channels: int = 3,
        patch: int = 4,
        width: int = 256,
        depth: int = 7,
        heads: int = 4,
    ) -> None:
        super().__init__()
        if patch < 1 or size % patch:
            raise ConfigError(f"patch={patch}: images of size={size} must be a whole number of patches wide.")
        if heads < 1 or width % heads:
            raise ConfigError(f"heads={heads}: they must share width={width} evenly.")
        if depth < 1:
            raise ConfigError(f"depth={depth}: must be at least 1.")
        self.size = size
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, width))
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        for number in range(1, depth + 1):
            blocks[f"block{number}"] = Block(width, heads, 2 * width)
        self.blocks = nn.Sequential(blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits.

        Raises:
            MismatchError: Images of another size.
        """
        if images.shape[2:] != (self.size, self.size):
            raise MismatchError(
                f"images of {images.shape[2]} x {images.shape[3]}: this ViT has places for {self.size} x {self.size}. "
                "Build it with the size of your images."
            )
        tokens: Tensor = self.patches(images).flatten(2).transpose(1, 2)
        first = self.class_token.expand(len(tokens), -1, -1)
        tokens = self.blocks(torch.cat([first, tokens], 1) + self.places)
        logits: Tensor = self.head(self.norm(tokens[:, 0]))
        return logits
