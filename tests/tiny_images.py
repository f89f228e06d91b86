"""Random images, and CIFAR's files with few of them."""

import struct
from pathlib import Path

import numpy as np

from expunge.data.images import Images

TRAIN, TEST = 4, 3  # records a file, in place of 10,000 and more


def some(count: int, shape: tuple[int, ...] = (3, 32, 32), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def same(images: Images, pixels: np.ndarray, labels: list[int]) -> bool:
    return np.array_equal(images.pixels.numpy(), pixels) and images.labels.tolist() == labels


def python2_pickle(content: dict[str, object]) -> bytes:
    """A dictionary as Python 2 and NumPy 1 wrote it in protocol 2, put together by hand."""

    def text(value: str) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value.encode()

    def whole(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def item(value: object) -> bytes:
        if isinstance(value, str):
            return text(value)
        if isinstance(value, int):
            return whole(value)
        if isinstance(value, list):
            return b"](" + b"".join(map(item, value)) + b"e"
        assert isinstance(value, np.ndarray)
        assert value.dtype == np.uint8
        made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + whole(0) + b"\x85" + text("b") + b"\x87R"
        dtype = b"cnumpy\ndtype\n" + text("u1") + whole(0) + whole(1) + b"\x87R"
        dtype += b"(" + whole(3) + text("|") + b"NNN" + whole(-1) + whole(-1) + whole(0) + b"tb"
        shape = b"(" + b"".join(map(whole, value.shape)) + b"t"
        raw = b"T" + struct.pack("<i", value.nbytes) + value.tobytes()
        return made + b"(" + whole(1) + shape + dtype + b"\x89" + raw + b"tb"

    return b"\x80\x02}(" + b"".join(text(key) + item(value) for key, value in content.items()) + b"u."


def write_cifar10(folder: Path, version: str, test: int = TEST) -> tuple[np.ndarray, list[int]]:
    """All pixels and labels, those of testing last."""
    pixels, labels = some(5 * TRAIN + test), [number % 10 for number in range(5 * TRAIN + test)]
    names = [f"class{number}" for number in range(10)]
    base = folder / f"cifar-10-batches-{version}"
    base.mkdir()
    for number in range(6):
        rows = slice(number * TRAIN, (number + 1) * TRAIN if number < 5 else None)
        name = f"data_batch_{number + 1}" if number < 5 else "test_batch"
        if version == "bin":
            records = [bytes([label]) + each.tobytes() for label, each in zip(labels[rows], pixels[rows], strict=True)]
            (base / f"{name}.bin").write_bytes(b"".join(records))
        else:
            flat = pixels[rows].reshape(-1, 3072)
            content = {"batch_label": f"batch {number}", "labels": labels[rows], "data": flat, "filenames": ["a.png"]}
            (base / name).write_bytes(python2_pickle(content))
    if version == "bin":
        (base / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    else:
        (base / "batches.meta").write_bytes(python2_pickle({"num_vis": 3072, "label_names": names}))
    return pixels, labels
