"""Images as every reader returns them: bytes and class numbers; and as a model wants them."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from expunge.batches import Examples
from expunge.errors import ConfigError, MismatchError


@dataclass(frozen=True)
class Images:
    """Images and their class numbers, in the order of the files.

    Raises:
        ConfigError: Tensors of another kind.
        MismatchError: Not one label an image.
    """

    pixels: Tensor  # uint8 (images, channels, height, width)
    labels: Tensor  # int64 (images,), counted from 0

    def __post_init__(self) -> None:
        pixels, labels = self.pixels, self.labels
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or labels.dtype != torch.int64 or labels.ndim != 1:
            raise ConfigError(
                f"pixels {_described(pixels)}, labels {_described(labels)}: pixels are uint8 (images, channels, "
                "height, width), labels int64 (images). `from_arrays` converts other layouts."
            )
        if len(pixels) != len(labels):
            raise MismatchError(f"{len(pixels)} images and {len(labels)} labels: every image needs one.")

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageData:
    """A dataset: training and test images, and the names of the classes."""

    name: str
    classes: tuple[str, ...]
    train: Images
    test: Images | None = None

    def __post_init__(self) -> None:
        for part, what in ((self.train, "training"), (self.test, "test")):
            if (
                part is not None
                and len(part)
                and not 0 <= int(part.labels.min()) <= int(part.labels.max()) < len(self.classes)
            ):
                raise MismatchError(
                    f"{what} labels of {self.name} go from {int(part.labels.min())} to {int(part.labels.max())}, and "
                    f"there are {len(self.classes)} classes: labels count from 0 to {len(self.classes) - 1}."
                )
        if self.test is not None and self.test.pixels.shape[1:] != self.train.pixels.shape[1:]:
            raise MismatchError(
                f"{self.name} has training images of {tuple(self.train.pixels.shape[1:])} and test images of "
                f"{tuple(self.test.pixels.shape[1:])}: (channels, height, width) must be the same."
            )


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of each channel, of pixels in [0, 1]; inputs are (pixel - mean) / deviation."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @property
    def black(self) -> Float[Tensor, "channels 1 1"]:
        """The input of pixels of 0."""
        return self._input(0.0)

    @property
    def white(self) -> Float[Tensor, "channels 1 1"]:
        """The input of pixels of 255."""
        return self._input(1.0)

    def _input(self, share: float) -> Tensor:
        mean, deviation = (torch.tensor(each)[:, None, None] for each in (self.mean, self.deviation))
        return (share - mean) / deviation


def normalisation(images: Images) -> Normalisation:
    """That of these images: count it on the training images, and use it for all.

    Raises:
        ConfigError: No image, or a channel that is the same everywhere.
    """
    mean, deviation = [], []
    for channel in range(images.pixels.shape[1]):
        counts = np.zeros(256)
        for part in images.pixels[:, channel].split(4096):  # bincount widens to int64
            counts += torch.bincount(part.flatten(), minlength=256).numpy()
        values, total = np.arange(256) / 255, counts.sum()
        mean.append(float(counts @ values / total) if total else 0.0)
        deviation.append(float(np.sqrt(counts @ (values - mean[-1]) ** 2 / total)) if total else 0.0)
        if not deviation[-1] > 0:
            raise ConfigError(
                f"channel {channel} of {len(images)} images has the same value everywhere: it has no deviation to "
                "divide by. Use no normalisation."
            )
    return Normalisation(tuple(mean), tuple(deviation))


def to_examples(images: Images, scale: Normalisation | None = None) -> Examples:
    """What a model trains on: float32 inputs (images, channels, height, width), labels, positions from 0.

    It takes four bytes a pixel, once; nothing larger is made on the way.

    Args:
        images: Bytes.
        scale: None leaves inputs in [0, 1].

    Raises:
        MismatchError: A normalisation with another number of channels.
    """
    channels = images.pixels.shape[1]
    if scale is not None and not len(scale.mean) == len(scale.deviation) == channels:
        raise MismatchError(f"the normalisation has {len(scale.mean)} channels and the images {channels}.")
    inputs = images.pixels.to(torch.float32).div_(255)
    if scale is not None:
        for channel, (mean, deviation) in enumerate(zip(scale.mean, scale.deviation, strict=True)):
            inputs[:, channel].sub_(mean).div_(deviation)
    return Examples(inputs, images.labels)


def from_arrays(pixels: "np.ndarray | Tensor", labels: "np.ndarray | Tensor", *, channels_last: bool = False) -> Images:
    """Images from arrays or tensors of one's own.

    Args:
        pixels: uint8, (images, height, width) or (images, channels, height, width).
        labels: Whole numbers, one an image; also (images, 1).
        channels_last: Whether four dimensions are (images, height, width, channels).

    Raises:
        ConfigError: Numbers of another kind, or another number of dimensions.
        MismatchError: Not one label an image.
    """
    pixels, labels = torch.as_tensor(pixels), torch.as_tensor(labels)
    if pixels.dtype != torch.uint8 or pixels.ndim not in (3, 4):
        raise ConfigError(
            f"pixels {_described(pixels)}: give uint8 from 0 to 255, (images, height, width) or with channels. Data of "
            "another kind needs no reader: Examples(inputs, labels)."
        )
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape[1:] not in ((), (1,)):
        raise ConfigError(f"labels {_described(labels)}: give one whole number an image.")
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif channels_last:
        pixels = pixels.permute(0, 3, 1, 2)
    return Images(pixels.contiguous(), labels.reshape(-1).to(torch.int64))


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
