"""Contact sheets: a few images side by side, to see what a scenario does."""

from io import BytesIO

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from expunge.errors import ConfigError, MissingExtra

Sheet = UInt8[np.ndarray, "down across 3"]


def contact_sheet(
    images: Float[Tensor, "images channels height width"],
    *,
    columns: int,
    low: float | Float[Tensor, "..."] = 0.0,
    high: float | Float[Tensor, "..."] = 1.0,
    enlarge: int = 1,
) -> Sheet:
    """Images in rows, from left to right, with a white line of ``enlarge`` pixels around each.

    To compare, put the clean images before the corrupted ones and give as many columns as there are of either.

    Args:
        images: Grey (one channel) or RGB (three).
        columns: Images a row; an incomplete last row ends white.
        low: The input that is black, a number or a tensor (channels, 1, 1).
        high: The input that is white, or the full colour. What is outside of low to high is clipped.
        enlarge: Pixels of the sheet for one of an image, in height and width.

    Raises:
        ConfigError: No image, another number of channels, or columns or enlarge below 1.
    """
    count, channels, height, width = images.shape
    if not count or channels not in (1, 3):
        raise ConfigError(f"images of shape {tuple(images.shape)}: give at least one, with 1 or 3 channels.")
    if columns < 1 or enlarge < 1:
        raise ConfigError(f"columns={columns}, enlarge={enlarge}: both must be at least 1.")
    shares = ((images.cpu() - low) / (torch.as_tensor(high) - low)).nan_to_num(0.0).clamp(0, 1)
    pixels = shares.mul(255).round().to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    rows = -(-count // columns)
    sheet = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, 3), 255, dtype=np.uint8)
    for number, image in enumerate(pixels):
        top, left = (number // columns) * (height + 1) + 1, (number % columns) * (width + 1) + 1
        sheet[top : top + height, left : left + width] = image
    return sheet.repeat(enlarge, 0).repeat(enlarge, 1)


def as_png(sheet: Sheet) -> bytes:
    """The sheet as a PNG file.

    Raises:
        MissingExtra: Matplotlib is not installed.
    """
    try:
        from matplotlib import image
    except ImportError as error:
        raise MissingExtra("pictures need Matplotlib: pip install 'expunge[report]'.") from error
    file = BytesIO()
    image.imsave(file, sheet, format="png")
    return file.getvalue()
