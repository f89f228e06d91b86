"""Reconstructions side by side with the truth."""

import torch

from expunge.audit.finding import Finding
from expunge.scenarios.sheet import as_png, contact_sheet

MOST = 8  # records that are drawn
SIDE = 96  # pixels that an image has at least, if enlarging it does that


def is_picture(finding: Finding) -> bool:
    """Whether the records recovered are images: (height, width), or with 1 or 3 channels in front."""
    shape = finding.shape
    if shape is None or finding.recovered is None:
        return False
    return len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3))


def picture(finding: Finding) -> bytes:
    """A PNG: what was recovered, under the removed records if they are known.

    Raises:
        MissingExtra: Matplotlib is not installed.
    """
    assert finding.recovered is not None
    assert finding.shape is not None
    rows = [finding.recovered[:MOST]] if finding.truth is None else [finding.truth[:MOST], finding.recovered[:MOST]]
    shape = (1, *finding.shape) if len(finding.shape) == 2 else finding.shape
    images = torch.cat([row.reshape(-1, *shape).double().cpu() for row in rows])
    low, high = float(rows[0].min()), float(rows[0].max())
    enlarge = -(-SIDE // max(shape[1:]))
    return as_png(contact_sheet(images, columns=len(rows[-1]), low=low, high=high, enlarge=enlarge))
