"""SVHN, the MNIST family, folders of images and NumPy files are read as they were written, and damaged ones refused."""

import gzip
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from expunge import data as datasets
from expunge.data.folders import read_folder
from expunge.data.idx import read_idx, read_mnist
from expunge.data.npz import read_npz
from expunge.data.svhn import read_svhn
from expunge.errors import ConfigError, CorruptData, MissingData, MissingExtra
from tests.tiny_images import same, some, write_cifar10

# SVHN


def write_svhn(folder: Path, part: str, pixels: np.ndarray, labels: list[int]) -> None:
    official = np.array([label or 10 for label in labels], dtype=np.uint8)[:, None]
    savemat(folder / f"{part}_32x32.mat", {"X": pixels.transpose(2, 3, 1, 0), "y": official}, do_compression=True)


def test_svhn_is_read_with_class_0_for_the_digit_zero(tmp_path):
    (tmp_path / "svhn").mkdir()
    write_svhn(tmp_path / "svhn", "train", some(5), [0, 1, 9, 0, 5])
    write_svhn(tmp_path / "svhn", "test", some(2, seed=1), [3, 0])
    for folder in (tmp_path, tmp_path / "svhn"):
        data = read_svhn(folder)
        assert same(data.train, some(5), [0, 1, 9, 0, 5])
        assert same(data.test, some(2, seed=1), [3, 0])
        assert data.classes == tuple("0123456789")


def test_svhn_without_its_test_images_is_read_only_when_that_is_meant(tmp_path):
    write_svhn(tmp_path, "train", some(2), [1, 2])
    assert read_svhn(tmp_path, test=False).test is None
    with pytest.raises(
        MissingData, match=r"has no test_32x32.mat or svhn/test_32x32.mat\. Get it with `expunge data get"
    ):
        read_svhn(tmp_path)


def test_damaged_svhn_is_refused(tmp_path):
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(b"MATLAB 5.0" + bytes(500))
    with pytest.raises(CorruptData, match=r"train_32x32.mat is damaged: SciPy says .* a MATLAB 5 file with X and y"):
        read_svhn(tmp_path, test=False)
    for wrong in ({"X": np.zeros((32, 32, 3, 2), np.uint8)}, {"X": np.zeros((2, 3), np.uint8), "y": [[1], [2]]}):
        savemat(path, wrong)
        with pytest.raises(
            CorruptData, match=r"train_32x32.mat is damaged: it has \{'X'.* should be X uint8 \(32, 32, 3"
        ):
            read_svhn(tmp_path, test=False)
    savemat(path, {"X": np.zeros((32, 32, 3, 1), np.uint8), "y": [[0]]})
    with pytest.raises(CorruptData, match="1 to 10"):
        read_svhn(tmp_path, test=False)


def test_without_scipy_the_cure_is_named(tmp_path, monkeypatch):
    write_svhn(tmp_path, "train", some(2), [1, 2])
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(MissingExtra, match=r"pip install 'expunge\[eval\]'"):
        read_svhn(tmp_path, test=False)


# The MNIST family


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder: Path, packed: bool = True) -> None:
    folder.mkdir(exist_ok=True)
    for part, count in (("train", 6), ("t10k", 3)):
        for kind, array in (("images-idx3", some(count, (28, 28))), ("labels-idx1", np.arange(count, dtype=np.uint8))):
            content = idx(array)
            path = folder / f"{part}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("inside", ["", "fashion-mnist"])
def test_the_mnist_family_is_read_packed_or_not(tmp_path, packed, inside):
    write_mnist(tmp_path / inside, packed)
    data = read_mnist(tmp_path, "fashion-mnist")
    assert same(data.train, some(6, (28, 28))[:, None], list(range(6)))
    assert same(data.test, some(3, (28, 28))[:, None], list(range(3)))
    assert data.classes[9] == "Ankle boot"
    if not inside:
        assert read_mnist(tmp_path).classes == tuple("0123456789")
        assert read_mnist(tmp_path, "kuzushiji").classes == tuple("012345")


def test_an_idx_file_may_have_any_number_of_dimensions(tmp_path):
    path = tmp_path / "array"
    for shape in ((3,), (2, 3), (2, 3, 4, 5)):
        path.write_bytes(idx(some(1, shape)[0]))
        assert np.array_equal(read_idx(path), some(1, shape)[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it begins with nothing"),
        (b"<html>", "it begins with 3c68746d"),
        (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", r"it begins with 00000d01, and it should be an IDX file of bytes"),
        (idx(some(2, (2,)))[:-1], r"it has 3 entries, and it should be \(2, 2\), 4 entries"),
        (idx(some(2, (2,))) + b"!", "it has more than 4 entries"),
        (b"\0\0\x08\x02\0\0\0\x01", "it has 4 bytes of sizes, and it should be of 2 dimensions"),
        (b"\0\0\x08\x02\0\0\0\x01\0\0", "it has 6 bytes of sizes"),
        (gzip.compress(idx(some(2, (2,))), mtime=0)[:-9], "it cannot be decompressed"),
        (gzip.compress(idx(some(2, (2,))), mtime=0)[:-8] + b"12345678", "it cannot be decompressed"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path, content, message):
    path = tmp_path / "array"
    path.write_bytes(content)
    with pytest.raises(CorruptData, match=message):
        read_idx(path)


def test_mnist_files_that_do_not_belong_together_are_refused(tmp_path):
    write_mnist(tmp_path, packed=False)
    path = tmp_path / "train-labels-idx1-ubyte"
    for labels, message in (
        (np.arange(5, dtype=np.uint8), "it has 5 labels, and it should be 6, as many as images"),
        (np.full(6, 10, np.uint8), "it has the label 10, and it should be 0 to 9"),
        (some(6, (1,)), "it has 2 dimensions, and it should be 1"),
    ):
        path.write_bytes(idx(labels))
        with pytest.raises(CorruptData, match=message):
            read_mnist(tmp_path)
    path.unlink()
    with pytest.raises(MissingData, match=r"has no train-labels-idx1-ubyte or .* Get it with `expunge data get mnist`"):
        read_mnist(tmp_path)


# Folders of images


def write_folder(base: Path, classes: dict[str, list[tuple[str, np.ndarray]]]) -> None:
    for name, files in classes.items():
        (base / name).mkdir(parents=True)
        for file, pixels in files:
            Image.fromarray(pixels).save(base / name / file)


def test_folders_are_classes_and_files_are_in_the_order_of_their_names(tmp_path):
    a, b, c, d = some(4, (5, 6, 3))
    write_folder(tmp_path / "train", {"dog": [("2.png", b), ("10.png", a)], "cat": [("x.bmp", c)]})
    write_folder(tmp_path / "test", {"dog": [("y.PNG", d)]})
    (tmp_path / "train" / "dog" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "dog" / ".hidden.png").write_text("no image")
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "fox").mkdir()
    with pytest.raises(MissingData, match=r"fox has no image in it.* or take the folder away"):
        read_folder(tmp_path)
    (tmp_path / "train" / "fox").rmdir()
    data = read_folder(tmp_path)
    assert data.classes == ("cat", "dog")
    assert same(data.train, np.stack([c, a, b]).transpose(0, 3, 1, 2), [0, 1, 1])
    assert same(data.test, d[None].transpose(0, 3, 1, 2), [1])


def test_a_folder_without_parts_is_all_training(tmp_path):
    grey = some(2, (4, 4))
    write_folder(tmp_path, {"a": [("1.png", grey[0])], "b": [("1.png", grey[1])]})
    data = read_folder(tmp_path, channels=1)
    assert data.test is None
    assert same(data.train, grey[:, None], [0, 1])
    assert read_folder(tmp_path).train.pixels.shape == (2, 3, 4, 4)


def test_images_are_resized_only_when_that_is_asked_for(tmp_path):
    write_folder(tmp_path, {"a": [("1.png", some(1, (4, 6, 3))[0]), ("2.png", some(1, (8, 8, 3))[0])]})
    with pytest.raises(ConfigError, match=r"2.png has 8 x 8 pixels and .*1.png 4 x 6: .* Give size=\(height, width\)"):
        read_folder(tmp_path)
    assert read_folder(tmp_path, size=(3, 5)).train.pixels.shape == (2, 3, 3, 5)


def test_folders_that_are_no_dataset_are_refused(tmp_path, monkeypatch):
    with pytest.raises(MissingData, match="nowhere has no folders of images"):
        read_folder(tmp_path / "nowhere")
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(MissingData, match=r"no folder of .*train has an image in it"):
        read_folder(tmp_path)
    with pytest.raises(ConfigError, match="channels=2"):
        read_folder(tmp_path, channels=2)
    path = tmp_path / "train" / "a" / "1.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(30))
    with pytest.raises(CorruptData, match=r"1\.png cannot be read as an image"):
        read_folder(tmp_path)
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(path)
    with pytest.raises(ConfigError, match=r"1\.png has pixels of more than 8 bits .*I;16.* Scale them to 0 to 255"):
        read_folder(tmp_path)
    Image.fromarray(some(1, (4, 4, 3))[0]).save(path)
    write_folder(tmp_path / "test", {"z": [("1.png", some(1, (4, 4, 3))[0])]})
    with pytest.raises(ConfigError, match="test has the class 'z', of which there are no training images"):
        read_folder(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtra, match=r"pip install 'expunge\[images\]'"):
        read_folder(tmp_path)


# One NumPy file


@pytest.mark.parametrize(
    "keys", [("train_images", "train_labels", "test_images", "test_labels"), ("x_train", "y_train", "x_test", "y_test")]
)
def test_an_npz_file_is_read_by_the_usual_names(tmp_path, keys):
    pixels, labels = some(5, (4, 6, 3)), np.array([[0], [1], [2], [2], [1]], dtype=np.uint8)
    arrays = dict(zip(keys, (pixels[:3], labels[:3], pixels[3:], labels[3:]), strict=True))
    np.savez_compressed(tmp_path / "own.npz", **arrays, other=np.zeros(3))
    data = read_npz(tmp_path / "own.npz")
    assert (data.name, data.classes) == ("own", ("0", "1", "2"))
    assert same(data.train, pixels[:3].transpose(0, 3, 1, 2), [0, 1, 2])
    assert same(data.test, pixels[3:].transpose(0, 3, 1, 2), [2, 1])


def test_an_npz_file_may_be_grey_channels_first_named_and_without_a_test(tmp_path):
    np.savez(tmp_path / "a.npz", images=some(2, (4, 4)), labels=[0, 1], classes=["no", "yes"])
    data = read_npz(tmp_path / "a.npz")
    assert (data.train.pixels.shape, data.classes, data.test) == ((2, 1, 4, 4), ("no", "yes"), None)
    np.savez(tmp_path / "b.npz", images=some(2, (3, 4, 5)), labels=[0, 1])
    assert read_npz(tmp_path / "b.npz", channels_last=False).train.pixels.shape == (2, 3, 4, 5)


def test_npz_files_with_objects_or_without_images_are_refused(tmp_path):
    path = tmp_path / "bad.npz"
    with pytest.raises(MissingData, match=r"there is no file .*bad\.npz"):
        read_npz(path)
    np.savez(path, images=np.array([{}], dtype=object), labels=[0])
    with pytest.raises(CorruptData, match=r"cannot be read as arrays: .*objects are not admitted"):
        read_npz(path)
    np.savez(path, images=some(2))
    with pytest.raises(CorruptData, match="has only one of images and labels"):
        read_npz(path)
    np.savez(path, train_images=some(0, (4, 4)), train_labels=np.zeros(0, int))
    with pytest.raises(CorruptData, match=r"bad\.npz holds no training image"):
        read_npz(path)
    np.savez(path, images=some(2, (4, 4)), labels=[0, 0], classes="only")
    assert read_npz(path).classes == ("only",)
    np.savez(path, pictures=some(2))
    with pytest.raises(CorruptData, match="has none of train_images, x_train, images with their labels"):
        read_npz(path)
    with path.open("wb") as file:
        np.save(file, some(2))
    with pytest.raises(CorruptData, match="it holds a single array without a name"):
        read_npz(path)
    path.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(CorruptData, match="cannot be read as arrays"):
        read_npz(path)


# By name


def test_datasets_are_read_by_name(few, tmp_path):
    write_cifar10(tmp_path, "bin")
    write_mnist(tmp_path / "mnist")
    write_mnist(tmp_path / "fashion-mnist")
    assert datasets.read("cifar10", tmp_path).name == "cifar10"
    assert datasets.read("mnist", str(tmp_path)).classes[0] == "0"
    assert datasets.read("fashion-mnist", tmp_path).classes[0] == "T-shirt/top"
    with pytest.raises(
        ConfigError, match="dataset='imagenet': there are cifar10, cifar100, svhn, mnist, fashion-mnist"
    ):
        datasets.read("imagenet", tmp_path)
