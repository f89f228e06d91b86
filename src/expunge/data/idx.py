"""MNIST and its family, from IDX files as they are published, compressed or not.

Sources: LeCun et al., "Gradient-based learning applied to document recognition" (1998); Xiao et al., "Fashion-MNIST"
(2017). An IDX file is two zero bytes, the type (8: bytes), the number of dimensions, each of them as a big-endian
32-bit number, then the entries.
"""

import gzip
import io
import math
import zlib
from pathlib import Path

import numpy as np

from expunge.data.images import ImageData, Images, from_arrays
from expunge.data.locate import damaged, first_existing

_CURE = "Get it with `expunge data get {}`, or see docs/data.md for its official place."
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
NAMES = {"mnist": tuple("0123456789"), "fashion-mnist": _FASHION}


def read_mnist(folder: Path | str, name: str = "mnist") -> ImageData:
    """Grey images, (1, 28, 28) in the official files: 60,000 for training and 10,000 for testing.

    Args:
        folder: Holds ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and two of ``t10k``, each also with
            ``.gz``; or a folder with the name of the dataset that does.
        name: mnist or fashion-mnist, which have files of the same names; for any other, classes are numbered.

    Raises:
        MissingData: A file is not there.
        CorruptData: A file is damaged or another one.
    """
    train, test = (_part(folder, name, part) for part in ("train", "t10k"))
    names = NAMES.get(name) or tuple(map(str, range(int(train.labels.max()) + 1)))
    return ImageData(name, names, train, test)


def read_idx(path: Path, cure: str = "") -> np.ndarray:
    """An array of bytes from an IDX file, compressed with gzip or not.

    Raises:
        CorruptData: Another kind of file, or one with too few or too many bytes.
    """
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if not packed:
                return _array(raw, path, cure)
            with gzip.open(raw) as unpacked:
                return _array(unpacked, path, cure)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise damaged(path, f"it cannot be decompressed ({error})", "a whole gzip file", cure) from error


def _array(file: io.BufferedIOBase, path: Path, cure: str) -> np.ndarray:
    magic = file.read(4)
    dimensions = magic[3] if len(magic) == 4 else 0
    if magic[:3] != b"\0\0\x08" or not dimensions:
        raise damaged(path, f"it begins with {magic.hex() or 'nothing'}", "an IDX file of bytes, 000008…", cure)
    sizes = file.read(4 * dimensions)
    if len(sizes) != 4 * dimensions:
        raise damaged(path, f"it has {len(sizes)} bytes of sizes", f"of {dimensions} dimensions, 4 bytes each", cure)
    shape = tuple(int(size) for size in np.frombuffer(sizes, dtype=">u4"))
    entries = math.prod(shape)
    content = file.read(entries + 1)
    if len(content) != entries:
        found = f"more than {entries:,}" if len(content) > entries else f"{len(content):,}"
        raise damaged(path, f"it has {found} entries", f"{shape}, {entries:,} entries", cure)
    return np.frombuffer(bytearray(content), dtype=np.uint8).reshape(shape)


def _part(folder: Path | str, name: str, part: str) -> Images:
    cure = _CURE.format(name)
    arrays = []
    for kind, dimensions in (("images-idx3", 3), ("labels-idx1", 1)):
        plain = f"{part}-{kind}-ubyte"
        names = [plain, f"{plain}.gz", f"{name}/{plain}", f"{name}/{plain}.gz"]
        path = first_existing(folder, names, what=name, cure=cure)
        arrays.append(read_idx(path, cure))
        if arrays[-1].ndim != dimensions:
            raise damaged(path, f"it has {arrays[-1].ndim} dimensions", f"{dimensions}", cure)
    images, labels = arrays
    if name in NAMES and labels.max(initial=0) >= len(NAMES[name]):
        raise damaged(path, f"it has the label {labels.max()}", f"0 to {len(NAMES[name]) - 1}", cure)
    if not len(images) == len(labels) > 0:
        raise damaged(path, f"it has {len(labels):,} labels", f"{max(1, len(images)):,}, as many as images", cure)
    return from_arrays(images, labels)
