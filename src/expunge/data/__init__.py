"""Readers of real datasets, by name."""

from collections.abc import Callable
from pathlib import Path

from expunge.data.cifar import read_cifar10, read_cifar100
from expunge.data.idx import read_mnist
from expunge.data.images import ImageData
from expunge.data.svhn import read_svhn
from expunge.errors import ConfigError

READERS: dict[str, Callable[[Path], ImageData]] = {
    "cifar10": read_cifar10,
    "cifar100": read_cifar100,
    "svhn": read_svhn,
    "mnist": read_mnist,
    "fashion-mnist": lambda folder: read_mnist(folder, "fashion-mnist"),
}


def read(name: str, folder: Path | str) -> ImageData:
    """A dataset from its official files.

    Args:
        name: One of `READERS`.
        folder: Where ``expunge data get`` puts datasets, or where you unpacked the official files.

    Raises:
        ConfigError: No dataset of this name.
        MissingData: A file is not there.
        CorruptData: A file is damaged.
        MissingExtra: A library that the format needs is not installed.
    """
    if name not in READERS:
        raise ConfigError(
            f"dataset={name!r}: there are {', '.join(READERS)}. For others see read_folder, read_npz and from_arrays."
        )
    return READERS[name](Path(folder))
