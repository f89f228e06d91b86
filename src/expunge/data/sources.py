"""Where the official files are, and their official checksums.

A checksum belongs to the file that is downloaded; where that is an archive, to the archive and not to what is in it.
MD5 is what the official pages give: it finds damage, not malice.
"""

from dataclasses import dataclass

from expunge.errors import ConfigError


@dataclass(frozen=True)
class File:
    """A file as it is downloaded."""

    name: str
    md5: str
    unpacks: str = ""  # the folder that is in it, if it is an archive


@dataclass(frozen=True)
class Source:
    """A dataset, or one of its versions."""

    dataset: str
    page: str  # what a person reads
    base: str  # address in front of the names of the files
    files: tuple[File, ...]
    folder: str = ""  # below the folder of all datasets


_TORONTO = ("https://www.cs.toronto.edu/~kriz/cifar.html", "https://www.cs.toronto.edu/~kriz/")
SOURCES: dict[str, Source] = {
    "cifar10": Source(
        "cifar10", *_TORONTO,
        (File("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", "cifar-10-batches-bin"),),
    ),
    "cifar10-python": Source(
        "cifar10", *_TORONTO,
        (File("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", "cifar-10-batches-py"),),
    ),
    "cifar100": Source(
        "cifar100", *_TORONTO,
        (File("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", "cifar-100-binary"),),
    ),
    "cifar100-python": Source(
        "cifar100", *_TORONTO,
        (File("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", "cifar-100-python"),),
    ),
    "svhn": Source(
        "svhn", "http://ufldl.stanford.edu/housenumbers/", "http://ufldl.stanford.edu/housenumbers/",
        (
            File("train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
            File("test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
        ),
        "svhn",
    ),
    "mnist": Source(
        "mnist", "http://yann.lecun.com/exdb/mnist/", "https://ossci-datasets.s3.amazonaws.com/mnist/",
        (
            File("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
            File("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
            File("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
            File("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
        ),
        "mnist",
    ),
    "fashion-mnist": Source(
        "fashion-mnist", "https://github.com/zalandoresearch/fashion-mnist",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        (
            File("train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
            File("train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"),
            File("t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
            File("t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310"),
        ),
        "fashion-mnist",
    ),
}  # fmt: skip


def source(name: str) -> Source:
    """The source of this name.

    Raises:
        ConfigError: There is none.
    """
    if name not in SOURCES:
        raise ConfigError(f"dataset={name!r}: what can be downloaded are {', '.join(SOURCES)}.")
    return SOURCES[name]
