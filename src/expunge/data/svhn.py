"""SVHN, cropped digits, from its official MATLAB files.

Source: Netzer et al., "Reading Digits in Natural Images with Unsupervised Feature Learning" (2011);
http://ufldl.stanford.edu/housenumbers/.
"""

from pathlib import Path

import numpy as np

from expunge.data.images import ImageData, Images, from_arrays
from expunge.data.locate import damaged, first_existing
from expunge.errors import MissingExtra

_CURE = (
    "Get it with `expunge data get svhn`, or from http://ufldl.stanford.edu/housenumbers/ (format 2, cropped digits)."
)


def read_svhn(folder: Path | str, *, test: bool = True) -> ImageData:
    """Colour images of house numbers cut out around one digit, (3, 32, 32); class = digit.

    The official files have 73,257 training and 26,032 test images, and say 10 for the digit zero: here it is class 0.

    Args:
        folder: Holds ``train_32x32.mat`` and ``test_32x32.mat``, or a folder ``svhn`` with them.
        test: Whether to read the test images too.

    Raises:
        MissingExtra: SciPy is not installed.
        MissingData: A file is not there.
        CorruptData: A file is damaged or another one.
    """
    parts = [_part(folder, "train"), _part(folder, "test") if test else None]
    assert parts[0] is not None
    return ImageData("svhn", tuple("0123456789"), parts[0], parts[1])


def _part(folder: Path | str, part: str) -> Images:
    name = f"{part}_32x32.mat"
    path = first_existing(folder, [name, f"svhn/{name}"], what="svhn", cure=_CURE)
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise MissingExtra("SVHN comes in MATLAB files, which SciPy reads: pip install 'expunge[eval]'.") from error
    try:
        content = loadmat(path, variable_names=["X", "y"])
    except Exception as error:  # a damaged file can raise anything
        raise damaged(
            path, f"SciPy says {error or type(error).__name__}", "a MATLAB 5 file with X and y", _CURE
        ) from error
    pixels, labels = content.get("X"), content.get("y")
    right = (
        isinstance(pixels, np.ndarray)
        and isinstance(labels, np.ndarray)
        and (pixels.dtype, pixels.shape[:3], pixels.ndim) == (np.uint8, (32, 32, 3), 4)
        and labels.shape == (pixels.shape[3], 1)
        and bool(np.isin(labels, np.arange(1, 11)).all())
    )
    if not right:
        shapes = {name: (array.dtype, array.shape) for name, array in content.items() if name in ("X", "y")}
        raise damaged(path, f"it has {shapes or 'neither X nor y'}", "X uint8 (32, 32, 3, n), y (n, 1), 1 to 10", _CURE)
    assert pixels is not None
    assert labels is not None
    return from_arrays(pixels.transpose(3, 2, 0, 1), labels.astype(np.int64) % 10)
