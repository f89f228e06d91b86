"""Reconstructions side by side with the truth."""

import io

import numpy as np
from jaxtyping import Float
from torch import Tensor

from expunge.audit.finding import Finding
from expunge.errors import MissingExtra

MOST = 8  # pairs that are drawn


def is_picture(finding: Finding) -> bool:
    """Whether the records recovered are images: (height, width), or with 1 or 3 channels in front."""
    shape = finding.shape
    if shape is None or finding.recovered is None:
        return False
    return len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3))


def picture(finding: Finding) -> bytes:
    """A PNG: what was recovered, under the truth if it is known.

    Raises:
        MissingExtra: Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("pictures of an audit need Matplotlib: pip install 'expunge[report]'.") from error
    assert finding.recovered is not None
    assert finding.shape is not None
    rows = [("recovered", finding.recovered[:MOST])]
    if finding.truth is not None:
        rows.insert(0, ("removed record", finding.truth[:MOST]))
    low, high = (float(each) for each in (rows[0][1].min(), rows[0][1].max()))
    columns = len(finding.recovered[:MOST])
    figure = Figure(figsize=(1.1 * columns + 1.2, 1.15 * len(rows)), dpi=120)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, images) in zip(axes, rows, strict=True):
        for ax, flat in zip(line, images, strict=True):
            ax.imshow(_image(flat, finding.shape, low, high), cmap="gray", vmin=0, vmax=1)
            ax.set_xticks([])
            ax.set_yticks([])
        line[0].set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight", metadata={"Software": None})
    return file.getvalue()


def _image(flat: Tensor, shape: tuple[int, ...], low: float, high: float) -> Float[np.ndarray, "height width *colours"]:
    image = flat.reshape(shape).double().numpy()
    image = np.clip((image - low) / max(high - low, 1e-12), 0, 1)
    if image.ndim == 3:
        return image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)
    result: Float[np.ndarray, "height width"] = image
    return result
