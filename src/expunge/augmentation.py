"""Random crops, flips and cutout for batches of images, on the device the images are on.

They are for training alone: a gradient pass and a measurement see every record as it is. Each transformation draws from
a stream of its own, so that switching one off leaves what the others draw.

Sources: crops and flips as in He et al., "Deep Residual Learning for Image Recognition" (2016), section 4.2; cutout as
in DeVries & Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout" (2017).
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor
from torch.nn import functional

from expunge.batches import Batch, map_tensors, tensors_of
from expunge.errors import ConfigError
from expunge.seeds import derive

Images = Shaped[Tensor, "images channels height width"]


def augmentation(
    *, crop: int, flip: bool, cutout: int, seed: int, epoch: int, device: torch.device
) -> Callable[[Batch], Batch] | None:
    """What augments the batches of an epoch, in order; None if nothing is wanted.

    Every tensor of four dimensions in a batch is taken for images. Zeros are black for bytes, and whatever 0 stands for
    in inputs of another type.

    Args:
        crop: Zeros put around every image, of which a window of the old size is kept. 0: no crop.
        flip: Mirror left and right with probability one half.
        cutout: Height and width of a square of zeros around a random pixel, cut off at the border. 0: none.
        seed: Names the streams "crop", "flip" and "cutout".
        epoch: Another number, other draws.
        device: Of the batches. Draws are the same for the same seed on a CPU; those of a GPU are its own.
    """
    if not (crop or flip or cutout):
        return None
    streams = {
        name: torch.Generator(device).manual_seed(derive(seed, name, epoch)) for name in ("crop", "flip", "cutout")
    }

    def draw(name: str, count: int, *sizes: int) -> list[Int[Tensor, " images"]]:
        return [torch.randint(size, (count,), generator=streams[name], device=device) for size in sizes]

    def augmented(images: Tensor) -> Tensor:
        if images.ndim != 4:
            return images
        count, height, width = len(images), *images.shape[2:]
        if crop or flip:
            down, right = draw("crop", count, 2 * crop + 1, 2 * crop + 1)
            mirrored = draw("flip", count, 2)[0] > 0 if flip else torch.zeros_like(down, dtype=torch.bool)
            images = cropped(images, crop, down, right, mirrored)
        if cutout:
            images = cut_out(images, cutout, *draw("cutout", count, height, width))
        return images

    def all_images(batch: Batch) -> Batch:
        dimensions = [tensor.ndim for tensor in tensors_of(batch)]
        _require_one_picture(batch)
        if 4 not in dimensions:
            raise ConfigError(
                f"crop={crop}, flip={flip}, cutout={cutout}: they are for images, (images, channels, height, width), "
                f"and a batch has tensors of {dimensions} dimensions. Switch them off for other data."
            )
        return map_tensors(batch, augmented)

    return all_images


def _require_one_picture(batch: Batch) -> None:
    """Refuse examples with a target that has a place for each pixel, which would have to move with them.

    Raises:
        ConfigError: Says which sizes there are.
    """
    if not isinstance(batch, Mapping | list | tuple):
        return
    parts = list(batch.values() if isinstance(batch, Mapping) else batch)
    pictures = [part for part in parts if isinstance(part, Tensor) and part.ndim > 2]
    sizes = [tuple(part.shape[-2:]) for part in pictures if part.ndim == 4]
    twice = [part for part in pictures if tuple(part.shape[-2:]) in sizes]
    if len(twice) > 1:
        raise ConfigError(
            f"crop, flip and cutout draw for every tensor of images by itself, and an example has {len(twice)} of "
            f"{sizes[0][0]} x {sizes[0][1]} pixels: inputs and targets would no longer fit together. Switch them off, "
            "and augment in the Dataset, which knows what belongs together."
        )
    for part in parts:  # pairs of what is left and what was removed are two examples
        _require_one_picture(part)


def cropped(
    images: Images,
    padding: int,
    down: Int[Tensor, " images"],
    right: Int[Tensor, " images"],
    mirrored: Bool[Tensor, " images"],
) -> Images:
    """A window of every image with zeros around it.

    Args:
        images: Of any type.
        padding: Zeros on every side.
        down: Where each window begins, from 0 to 2 · padding.
        right: The same for columns.
        mirrored: Which images are mirrored, left and right.
    """
    height, width = images.shape[2:]
    padded = functional.pad(images, (padding,) * 4) if padding else images
    rows = torch.arange(height, device=images.device) + down[:, None]
    columns = torch.arange(width, device=images.device)
    columns = torch.where(mirrored[:, None], columns.flip(0), columns) + right[:, None]
    each = torch.arange(len(images), device=images.device)
    found = padded.permute(0, 2, 3, 1)[each[:, None, None], rows[:, :, None], columns[:, None, :]]
    return found.permute(0, 3, 1, 2).contiguous()


def cut_out(images: Images, side: int, row: Int[Tensor, " images"], column: Int[Tensor, " images"]) -> Images:
    """The images with a square of zeros whose middle is at a pixel, cut off at the border.

    Args:
        images: Of any type.
        side: Height and width; of an even one, the middle is the first pixel behind it.
        row: Of the middle, an image each.
        column: The same.
    """
    height, width = images.shape[2:]
    offset = torch.arange(height, device=images.device) - row[:, None] + side // 2
    rows = (offset >= 0) & (offset < side)
    offset = torch.arange(width, device=images.device) - column[:, None] + side // 2
    columns = (offset >= 0) & (offset < side)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)
