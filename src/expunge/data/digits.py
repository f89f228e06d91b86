"""Handwritten digits that scikit-learn brings along: 1,797 grey images of 8 x 8, ten classes, no download.

Source: the test part of the UCI "Optical Recognition of Handwritten Digits" data (Alpaydin & Kaynak, 1998).
"""

from dataclasses import dataclass

import torch

from expunge.batches import Examples
from expunge.errors import ConfigError, MissingExtra
from expunge.seeds import stream

COUNT, CLASSES, SIDE = 1797, 10, 8


@dataclass(frozen=True)
class Split:
    """Training and test examples, disjoint; positions count within each."""

    train: Examples
    test: Examples


def digits(train: int, *, seed: int) -> Split:
    """Draw a training set; everything else is for testing.

    Args:
        train: Training images, 1 to 1,796.
        seed: Which ones.

    Returns:
        Images as float32 (n, 1, 8, 8) in [0, 1], labels as int64 (n,).

    Raises:
        MissingExtra: scikit-learn is not installed.
        ConfigError: A size that leaves one of the two empty.
    """
    if not 0 < train < COUNT:
        raise ConfigError(f"train={train}: the digits are {COUNT} images, and both parts need some.")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra("the digits come with scikit-learn: pip install 'expunge[eval]'.") from error
    bundle = load_digits()
    images = torch.from_numpy(bundle.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(bundle.target).long()
    order = torch.randperm(COUNT, generator=stream(seed, "digits"))
    parts = [Examples(images[rows], labels[rows]) for rows in (order[:train], order[train:])]
    return Split(*parts)
