"""Readers of real datasets, by name."""

from collections.abc import Callable
from pathlib import Path

from expunge.data.cifar import read_cifar10, read_cifar100
from expunge.data.idx import read_mnist
from expunge.data.images import ImageData
from expunge.data.npz import read_npz
from expunge.data.svhn import read_svhn
from expunge.errors import ConfigError

READERS: dict[str, Callable[[Path], ImageData]] = {
    "cifar10": read_cifar10,
    "cifar100": read_cifar100,
    "svhn": read_svhn,
    "mnist": read_mnist,
    "fashion-mnist": lambda folder: read_mnist(folder, "fashion-mnist"),
}

OWN = ".npz"  # what names of files of one's own end in


def read(name: str, folder: Path | str) -> ImageData:
    """A dataset from its official files, or one's own from a NumPy file.

    Args:
        name: One of `READERS`, or the name of a file that ends in .npz (`read_npz`).
        folder: Where ``expunge data get`` puts datasets, or where you unpacked the official files, or put your own.

    Raises:
        ConfigError: No dataset of this name; or, of one's own, images that are not bytes.
        MissingData: A file is not there.
        CorruptData: A file is damaged.
        MismatchError: Of one's own, images and labels that do not belong together.
        MissingExtra: A library that the format needs is not installed.
    """
    if name.endswith(OWN):
        return read_npz(Path(folder) / name)
    if name not in READERS:
        raise ConfigError(
            f"dataset={name!r}: there are {', '.join(READERS)}, and files of your own that end in {OWN}. For other "
            "forms see read_folder and from_arrays."
        )
    return READERS[name](Path(folder))
