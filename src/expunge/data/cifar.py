"""CIFAR-10 and CIFAR-100 from their official files: the binary version, or the Python version.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009); the formats are described at
https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expunge.data.images import ImageData, Images
from expunge.data.locate import damaged, first_existing, require_size
from expunge.data.unpickler import read_arrays
from expunge.errors import ConfigError

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """The files of one dataset in one version."""

    dataset: str
    folder: str
    train: tuple[str, ...]
    test: str
    names: str  # file with the names of the classes
    train_records: int  # a file
    test_records: int
    labels: tuple[str, ...]  # label bytes of a record in order, or keys of a dictionary
    named: tuple[str, ...] = ()  # keys of the names, in the Python version

    @property
    def cure(self) -> str:
        """What to do when a file is missing or damaged."""
        return (
            f"Get it with `expunge data get {self.dataset}`, or unpack the archive of "
            "https://www.cs.toronto.edu/~kriz/cifar.html there."
        )


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
CIFAR10 = (
    Layout(
        "cifar10", "cifar-10-batches-bin", tuple(f"{batch}.bin" for batch in _BATCHES), "test_batch.bin",
        "batches.meta.txt", 10_000, 10_000, ("labels",),
    ),
    Layout(
        "cifar10", "cifar-10-batches-py", _BATCHES, "test_batch", "batches.meta", 10_000, 10_000, ("labels",),
        ("label_names",),
    ),
)  # fmt: skip
CIFAR100 = (
    Layout(
        "cifar100", "cifar-100-binary", ("train.bin",), "test.bin", "{}_label_names.txt", 50_000, 10_000,
        ("coarse", "fine"),
    ),
    Layout(
        "cifar100", "cifar-100-python", ("train",), "test", "meta", 50_000, 10_000, ("coarse_labels", "fine_labels"),
        ("coarse_label_names", "fine_label_names"),
    ),
)  # fmt: skip


def read_cifar10(folder: Path | str) -> ImageData:
    """50,000 training and 10,000 test images of ten classes, (3, 32, 32), in the official order.

    Args:
        folder: Holds ``cifar-10-batches-bin`` (taken first) or ``cifar-10-batches-py``, or is one of them.

    Raises:
        MissingData: A file is not there.
        CorruptData: A file has another size or content.
    """
    return read(folder, CIFAR10, 0)


def read_cifar100(folder: Path | str, *, labels: str = "fine") -> ImageData:
    """50,000 training and 10,000 test images of a hundred classes, (3, 32, 32), in the official order.

    Args:
        folder: Holds ``cifar-100-binary`` (taken first) or ``cifar-100-python``, or is one of them.
        labels: Fine: a hundred classes. Coarse: the twenty superclasses.

    Raises:
        MissingData: A file is not there.
        CorruptData: A file has another size or content.
        ConfigError: Other labels.
    """
    if labels not in ("fine", "coarse"):
        raise ConfigError(f"labels={labels!r}: CIFAR-100 has 'fine' and 'coarse' ones.")
    return read(folder, CIFAR100, ("coarse", "fine").index(labels))


def read(folder: Path | str, layouts: tuple[Layout, ...], column: int) -> ImageData:
    """The dataset in the first version that is there, with the labels of this column."""
    folder = Path(folder).resolve()  # "." has no name
    own = [layout for layout in layouts if layout.folder == folder.name]
    if own and folder.is_dir():
        folder, layouts = folder.parent, tuple(own)
    found = first_existing(folder, [each.folder for each in layouts], what=layouts[0].dataset, cure=layouts[0].cure)
    layout = next(each for each in layouts if each.folder == found.name)
    if layout.named:
        names, load = _names_of_python(found, layout, column), _python
    else:
        names, load = _names_of_binary(found, layout, column), _binary
    parts = [load(_file(found, name, layout), layout, layout.train_records, column) for name in layout.train]
    parts.append(load(_file(found, layout.test, layout), layout, layout.test_records, column))
    for (_, labels), name in zip(parts, (*layout.train, layout.test), strict=True):
        if labels.min() < 0 or labels.max() >= len(names):
            expected = f"0 to {len(names) - 1}, one of the {len(names)} classes of {found / layout.names}"
            raise damaged(found / name, f"it has labels from {labels.min()} to {labels.max()}", expected, layout.cure)
    return ImageData(layout.dataset, names, _joined(parts[:-1]), _joined(parts[-1:]))


def _file(folder: Path, name: str, layout: Layout) -> Path:
    return first_existing(folder, [name], what=layout.dataset, cure=layout.cure)


def _binary(path: Path, layout: Layout, records: int, column: int) -> tuple[np.ndarray, np.ndarray]:
    width = len(layout.labels) + _PIXELS
    require_size(path, records * width, f"{records:,} records of {width:,} bytes", layout.cure)
    table = np.fromfile(path, dtype=np.uint8).reshape(records, width)
    return table[:, len(layout.labels) :], table[:, column]


def _python(path: Path, layout: Layout, records: int, column: int) -> tuple[np.ndarray, np.ndarray]:
    content = read_arrays(path)
    pixels, labels = content.get(b"data"), content.get(layout.labels[column].encode())
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != (records, _PIXELS):
        found = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise damaged(path, f"its 'data' is {found}", f"uint8 ({records}, {_PIXELS})", layout.cure)
    whole = isinstance(labels, list) and len(labels) == records and all(type(label) is int for label in labels)
    if not whole:
        raise damaged(path, f"it lacks {layout.labels[column]!r}", f"{records:,} class numbers", layout.cure)
    return pixels, np.array(labels)


def _names_of_binary(folder: Path, layout: Layout, column: int) -> tuple[str, ...]:
    path = _file(folder, layout.names.format(layout.labels[column]), layout)
    return tuple(path.read_text(encoding="ascii", errors="replace").split())


def _names_of_python(folder: Path, layout: Layout, column: int) -> tuple[str, ...]:
    path = _file(folder, layout.names, layout)
    names: Any = read_arrays(path).get(layout.named[column].encode())
    if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
        raise damaged(path, f"it lacks {layout.named[column]!r}", "a list of names", layout.cure)
    return tuple(name.decode("ascii", errors="replace") for name in names)


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> Images:
    pixels = np.empty((sum(len(part) for part, _ in parts), 3, 32, 32), dtype=np.uint8)
    start = 0
    for part, _ in parts:
        pixels[start : start + len(part)] = part.reshape(-1, 3, 32, 32)
        start += len(part)
    labels = np.concatenate([labels for _, labels in parts]).astype(np.int64)
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels))
