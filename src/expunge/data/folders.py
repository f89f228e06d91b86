"""Images in folders, a folder a class."""

from pathlib import Path

import numpy as np

from expunge.data.images import ImageData, Images, from_arrays
from expunge.errors import ConfigError, CorruptData, MissingData, MissingExtra

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


def read_folder(folder: Path | str, *, channels: int = 3, size: tuple[int, int] | None = None) -> ImageData:
    """Images in ``folder/train/CLASS/`` and ``folder/test/CLASS/``, or in ``folder/CLASS/`` without a test set.

    Classes are folders and images are files, both in the order of their names, so that positions are the same
    everywhere. Folders and files that begin with a dot are left out, and files that do not end like images.

    Args:
        folder: The folder.
        channels: 3 for colour, 1 for grey; images are converted.
        size: (height, width) to resize to, bilinear; without it all images must have the same size.

    Raises:
        MissingExtra: Pillow is not installed.
        MissingData: There is no such folder, or no training image of a class.
        CorruptData: A file is not an image, or is damaged.
        ConfigError: Images of different sizes or of more than 8 bits, another number of channels, or a test class that
            has no training images.
    """
    folder = Path(folder)
    if channels not in (1, 3):
        raise ConfigError(f"channels={channels}: images have 3 for colour or 1 for grey.")
    base = folder / "train" if (folder / "train").is_dir() else folder
    classes = _inside(base, folders=True) if base.is_dir() else []
    if not classes:
        raise MissingData(f"{base} has no folders of images. It needs one for each class, with the images in it.")
    names = tuple(path.name for path in classes)
    train = _read(base, names, channels, size, all_of_them=True)
    tested = folder / "test"
    if base == folder or not tested.is_dir():
        return ImageData(folder.name, names, train)
    unknown = [path.name for path in _inside(tested, folders=True) if path.name not in names]
    if unknown:
        raise ConfigError(f"{tested} has the class {unknown[0]!r}, of which there are no training images.")
    return ImageData(folder.name, names, train, _read(tested, names, channels, size, all_of_them=False))


def _read(
    base: Path, classes: tuple[str, ...], channels: int, size: tuple[int, int] | None, *, all_of_them: bool
) -> Images:
    files = [(path, label) for label, name in enumerate(classes) for path in _inside(base / name, folders=False)]
    if not files:
        raise MissingData(f"no folder of {base} has an image in it; images end with {', '.join(_SUFFIXES)}.")
    empty = {*range(len(classes))} - {label for _, label in files}
    if empty and all_of_them:
        name = classes[min(empty)]
        raise MissingData(
            f"{base / name} has no image in it; images end with {', '.join(_SUFFIXES)}. Put some there, or take the "
            "folder away, which would be a class that nothing is of."
        )
    first = _pixels(files[0][0], channels, size)
    pixels = np.empty((len(files), *first.shape), dtype=np.uint8)
    for place, (path, _) in enumerate(files):
        each = _pixels(path, channels, size)
        if each.shape != first.shape:
            raise ConfigError(
                f"{path} has {each.shape[0]} x {each.shape[1]} pixels and {files[0][0]} {first.shape[0]} x "
                f"{first.shape[1]}: images must have one size. Give size=(height, width) to resize them."
            )
        pixels[place] = each
    return from_arrays(pixels, np.array([label for _, label in files]), channels_last=True)


def _pixels(path: Path, channels: int, size: tuple[int, int] | None) -> np.ndarray:
    """Bytes (height, width, channels)."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra("image files are read by Pillow: pip install 'expunge[images]'.") from error
    try:
        with Image.open(path) as image:
            mode, converted = image.mode, image.convert("RGB" if channels == 3 else "L")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise CorruptData(f"{path} cannot be read as an image: {error}. Replace it, or take it out.") from error
    if mode.startswith(("I", "F")):  # Pillow clips what is above 255
        raise ConfigError(
            f"{path} has pixels of more than 8 bits (Pillow's mode {mode}), and images are read as bytes. Scale them "
            "to 0 to 255 and save them with 8 bits."
        )
    if size is not None:
        converted = converted.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(converted).reshape(converted.height, converted.width, channels)


def _inside(folder: Path, *, folders: bool) -> list[Path]:
    """The folders, or the images, in the order of their names."""
    if not folder.is_dir():
        return []
    inside = [path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir() == folders]
    return sorted((path for path in inside if folders or path.suffix.lower() in _SUFFIXES), key=lambda path: path.name)
