"""Images in one NumPy file (.npz), as several collections and tutorials have them."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from expunge.data.images import ImageData, Images, from_arrays
from expunge.errors import CorruptData, MissingData

_KEYS = {
    "train": (("train_images", "train_labels"), ("x_train", "y_train"), ("images", "labels")),
    "test": (("test_images", "test_labels"), ("x_test", "y_test")),
}


def read_npz(path: Path | str, *, channels_last: bool = True) -> ImageData:
    """Arrays ``train_images`` and ``train_labels``, or ``x_train`` and ``y_train``; the same with test, if any.

    Without a test set also ``images`` and ``labels``. ``classes`` may hold names; otherwise classes are numbered.
    Arrays of Python objects are refused: they would be pickles.

    Args:
        path: The file.
        channels_last: Whether four dimensions are (images, height, width, channels).

    Raises:
        MissingData: There is no such file.
        CorruptData: It is damaged, holds objects, lacks these arrays, or has no image to train on.
        ConfigError: Images that are not bytes, or labels that are not whole numbers.
        MismatchError: Images and labels that do not belong together.
    """
    path = Path(path)
    arrays = _arrays(path)
    train, test = (_part(arrays, part, path, channels_last) for part in _KEYS)
    if train is None:
        raise CorruptData(f"{path} has none of {', '.join(images for images, _ in _KEYS['train'])} with their labels.")
    if not len(train):
        raise CorruptData(f"{path} holds no training image. Write it with numpy.savez(path, train_images=…, …).")
    most = max(int(part.labels.max()) for part in (train, test) if part is not None and len(part))
    classes = (
        tuple(map(str, np.atleast_1d(arrays["classes"]))) if "classes" in arrays else tuple(map(str, range(most + 1)))
    )
    return ImageData(path.stem, classes, train, test)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise MissingData(f"there is no file {path}. Give the path of an .npz file with images and labels.")
    known = {"classes", *(name for pairs in _KEYS.values() for pair in pairs for name in pair)}
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise ValueError("it holds a single array without a name")
        with loaded as file:
            return {name: file[name] for name in file.files if name in known}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise CorruptData(
            f"{path} cannot be read as arrays: {error}. Write it with numpy.savez(path, train_images=…, "
            "train_labels=…); objects are not admitted."
        ) from error


def _part(arrays: dict[str, np.ndarray], part: str, path: Path, channels_last: bool) -> Images | None:
    for images, labels in _KEYS[part]:
        if (images in arrays) != (labels in arrays):
            raise CorruptData(f"{path} has only one of {images} and {labels}; both are needed.")
        if images in arrays:
            return from_arrays(arrays[images], arrays[labels], channels_last=channels_last)
    return None
