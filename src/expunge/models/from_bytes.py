"""Bytes as they are stored go in; the network behind sees normalised floating-point numbers."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from expunge.errors import ConfigError, MismatchError


class FromBytes(nn.Module):
    """A network that takes bytes: they are normalised on the device, batch by batch.

    Data then stays at a byte a pixel, a quarter of its size as float32, and passes, methods and metrics see batches
    like any others: ``Examples(images.pixels, images.labels)``. Floating-point inputs are taken as normalised already
    and go to the network as they are, so that ``to_examples(images, scale)`` gives the same logits, bit for bit.

    Args:
        network: What sees the normalised inputs.
        mean: Of each channel, of pixels in [0, 1], for example ``normalisation(images).mean``.
        deviation: Standard deviation of each channel.

    Shapes: (batch, channels, height, width) -> what the network returns.

    Raises:
        MismatchError: Not one mean and one deviation a channel.
        ConfigError: A deviation that is not positive.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], deviation: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(deviation):
            raise MismatchError(f"{len(mean)} means and {len(deviation)} deviations: every channel needs one of each.")
        if not all(value > 0 for value in deviation):
            raise ConfigError(f"deviation={tuple(deviation)}: inputs are divided by it, so each must be positive.")
        self.network = network
        for name, values in (("mean", mean), ("deviation", deviation)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32)[:, None, None])

    def normalised(self, images: Tensor) -> Tensor:
        """What the network sees: bytes as normalised float32, anything else as it is.

        Raises:
            MismatchError: Bytes with another number of channels.
        """
        if images.dtype != torch.uint8:
            return images
        if images.ndim != 4 or images.shape[1] != len(self.mean):
            raise MismatchError(
                f"images of shape {tuple(images.shape)}: the normalisation has {len(self.mean)} channels, so bytes are "
                f"(images, {len(self.mean)}, height, width)."
            )
        return (images.to(torch.float32) / 255 - self.mean) / self.deviation

    def forward(self, images: Tensor) -> Tensor:
        """The network's outputs, logits as a rule."""
        outputs: Tensor = self.network(self.normalised(images))
        return outputs
