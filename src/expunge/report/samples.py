"""What is removed or corrected, as pictures."""

from collections.abc import Mapping, Sequence

import numpy as np

from expunge.definitions import split_names
from expunge.report.figures import Drawing
from expunge.report.svg import Axes, Figure, draw


def samples(stored: Mapping[str, np.ndarray], scenario: str) -> Drawing | None:
    """The first removed records, or faulty ones above their corrections, with their class numbers."""
    parts = [part for part in ("forget", "corrected") if f"{scenario}/{part}" in stored]
    if not parts:
        return None
    rows = [(stored[f"{scenario}/{part}"], stored[f"{scenario}/{part} labels"]) for part in parts]

    def plot(figure: Figure) -> None:
        grid: Sequence[Sequence[Axes]] = figure.subplots(len(rows), len(rows[0][0]), squeeze=False).tolist()
        for axes, (images, labels) in zip(grid, rows, strict=True):
            for ax, image, label in zip(axes, images, labels, strict=True):
                picture = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
                ax.imshow(picture, cmap="gray", vmin=0, vmax=255)
                ax.set_title(f"class {label}", fontweight="normal")
                ax.set_xticks([])
                ax.set_yticks([])

    heading = f"Some of the {split_names(bool(rows[1:]))['forget']} records"
    how = ": above as the original was trained on them, below as they are after the correction" if rows[1:] else ""
    caption = f"The first of them in one seed, each with its class number{how}."
    return Drawing(heading, draw(f"samples-{scenario}", heading, (9.0, 1.35 * len(rows)), plot), "", caption)
