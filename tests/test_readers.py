import gzip
import os
import pickle
import struct
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from expunge import data as datasets
from expunge.data import cifar
from expunge.data.cifar import read_cifar10, read_cifar100
from expunge.data.folders import read_folder
from expunge.data.idx import read_idx, read_mnist
from expunge.data.images import ImageData, Images, Normalisation, from_arrays, normalisation, to_examples
from expunge.data.npz import read_npz
from expunge.data.svhn import read_svhn
from expunge.data.unpickler import read_arrays
from expunge.errors import ConfigError, CorruptData, MismatchError, MissingData, MissingExtra

TRAIN, TEST = 4, 3  # records a file, in place of 10,000 and more


def some(count: int, shape: tuple[int, ...] = (3, 32, 32), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def same(images: Images, pixels: np.ndarray, labels: list[int]) -> bool:
    return np.array_equal(images.pixels.numpy(), pixels) and images.labels.tolist() == labels


# CIFAR


@pytest.fixture
def few(monkeypatch):
    """The official layouts with few records a file."""
    for name in ("CIFAR10", "CIFAR100"):
        small = tuple(replace(each, train_records=TRAIN, test_records=TEST) for each in getattr(cifar, name))
        monkeypatch.setattr(cifar, name, small)


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


@pytest.mark.parametrize("version", ["bin", "py"])
def test_cifar10_is_read_in_the_official_order(few, tmp_path, version):
    pixels, labels = write_cifar10(tmp_path, version)
    for folder in (tmp_path, tmp_path / f"cifar-10-batches-{version}", str(tmp_path)):
        data = read_cifar10(folder)
        assert data.classes == tuple(f"class{number}" for number in range(10))
        assert same(data.train, pixels[:20], labels[:20])
        assert same(data.test, pixels[20:], labels[20:])


def test_the_binary_version_is_taken_first_and_needs_no_unpickler(few, tmp_path, monkeypatch):
    pixels, _ = write_cifar10(tmp_path, "bin")
    write_cifar10(tmp_path, "py")
    monkeypatch.setattr(cifar, "read_arrays", None)
    assert np.array_equal(read_cifar10(tmp_path).test.pixels.numpy(), pixels[20:])


def write_cifar100(folder: Path, version: str) -> tuple[np.ndarray, list[int], list[int]]:
    pixels, fine = some(TRAIN + TEST), [99, 0, 17, 50, 3, 4, 5]
    coarse = [label // 5 for label in fine]
    base = folder / f"cifar-100-{version}"
    base.mkdir()
    for name, rows in (("train", slice(TRAIN)), ("test", slice(TRAIN, None))):
        triples = list(zip(coarse[rows], fine[rows], pixels[rows], strict=True))
        if version == "binary":
            (base / f"{name}.bin").write_bytes(b"".join(bytes([c, f]) + each.tobytes() for c, f, each in triples))
        else:
            content = {"data": pixels[rows].reshape(-1, 3072), "coarse_labels": coarse[rows], "fine_labels": fine[rows]}
            (base / name).write_bytes(python2_pickle(content))
    names = {kind: [f"{kind}{number}" for number in range(n)] for kind, n in (("fine", 100), ("coarse", 20))}
    if version == "binary":
        for kind, listed in names.items():
            (base / f"{kind}_label_names.txt").write_text("\n".join(listed) + "\n")
    else:
        (base / "meta").write_bytes(python2_pickle({f"{kind}_label_names": listed for kind, listed in names.items()}))
    return pixels, fine, coarse


@pytest.mark.parametrize("version", ["binary", "python"])
def test_cifar100_has_fine_and_coarse_labels(few, tmp_path, version):
    pixels, fine, coarse = write_cifar100(tmp_path, version)
    for kind, labels, classes in (("fine", fine, 100), ("coarse", coarse, 20)):
        data = read_cifar100(tmp_path, labels=kind)
        assert data.classes == tuple(f"{kind}{number}" for number in range(classes))
        assert same(data.train, pixels[:TRAIN], labels[:TRAIN])
        assert same(data.test, pixels[TRAIN:], labels[TRAIN:])
    assert read_cifar100(tmp_path).train.labels.tolist() == fine[:TRAIN]


def test_cifar_that_is_not_there_is_said_with_where_to_get_it(few, tmp_path):
    with pytest.raises(
        MissingData, match=r"cifar10: .* has no cifar-10-batches-bin or cifar-10-batches-py\. Get it w.*"
    ):
        read_cifar10(tmp_path)
    write_cifar10(tmp_path, "bin")
    (tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin").unlink()
    with pytest.raises(
        MissingData, match=r"has no data_batch_3\.bin\. Get it with `expunge data get cifar10`, or unpack"
    ):
        read_cifar10(tmp_path)
    with pytest.raises(FileNotFoundError, match="expunge data get cifar100"):
        read_cifar100(tmp_path)


def test_damaged_cifar_is_said_with_what_it_should_be(few, tmp_path):
    write_cifar10(tmp_path, "bin")
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    message = (
        r"data_batch_2.bin is damaged: it has 12,291 bytes, and it should be 4 records of 3,073 bytes, 12,292 bytes"
    )
    with pytest.raises(CorruptData, match=message):
        read_cifar10(tmp_path)
    path.write_bytes(b"\x0a" + whole[1:])
    with pytest.raises(
        CorruptData, match=r"data_batch_2.bin is damaged: it has labels from \d to 10, and it should be 0 to 9"
    ):
        read_cifar10(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"data": np.zeros((TRAIN - 1, 3072), np.uint8)},
            r"its 'data' is uint8 \(3, 3072\), and it should be uint8 \(4",
        ),
        ({"data": "no array"}, "its 'data' is bytes"),
        ({"labels": [1, 2, 3]}, "it lacks 'labels', and it should be 4 class numbers"),
        ({"labels": ["1", "2", "3", "4"]}, "it lacks 'labels'"),
        ({"labels": [0, 1, 2, 10]}, "it has labels from 0 to 10, and it should be 0 to 9"),
    ],
)
def test_a_python_batch_of_other_content_is_refused(few, tmp_path, change, message):
    write_cifar10(tmp_path, "py")
    content = {"data": np.zeros((TRAIN, 3072), np.uint8), "labels": [0, 1, 2, 3], **change}
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(python2_pickle(content))
    with pytest.raises(CorruptData, match=message):
        read_cifar10(tmp_path)


def test_names_of_classes_that_are_missing_are_refused(few, tmp_path):
    write_cifar10(tmp_path, "py")
    (tmp_path / "cifar-10-batches-py" / "batches.meta").write_bytes(python2_pickle({"num_vis": 3072}))
    with pytest.raises(CorruptData, match="it lacks 'label_names', and it should be a list of names"):
        read_cifar10(tmp_path)


def test_other_labels_of_cifar100_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="labels='medium': CIFAR-100 has 'fine' and 'coarse' ones"):
        read_cifar100(tmp_path, labels="medium")


# The unpickler


def attacks(marker: Path) -> dict[str, bytes]:
    """Pickles that would leave a file at the marker, were they run."""
    command, name = f"touch {marker}".encode(), str(marker).encode()
    short = b"U" + bytes([len(command)]) + command
    python = f"open({str(marker)!r}, 'w')".encode()

    class Runs:
        def __reduce__(self):
            return os.system, (command.decode(),)

    return {
        "system": b"cos\nsystem\n" + short + b"\x85R.",
        "posix": b"\x80\x02cposix\nsystem\n" + short + b"\x85R.",
        "eval": b"c__builtin__\neval\nU" + bytes([len(python)]) + python + b"\x85R.",
        "inst": b"(" + short + b"ios\nsystem\n.",
        "newobj": b"\x80\x02csubprocess\nPopen\n](U\x05touchU" + bytes([len(name)]) + name + b"e\x85\x81.",
        "in an array": b"\x80\x02}U\x04datacos\nsystem\n" + short + b"\x85Rs.",
        "protocol 5": pickle.dumps({"data": Runs()}, protocol=5),
        "through numpy": b"\x80\x04\x8c\x05numpy\x8c\x0bf2py.os.sys\x93.",
        "an attribute of an admitted type": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
    }  # fmt: skip


@pytest.mark.parametrize("name", attacks(Path("x")))
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, name):
    marker, path = tmp_path / "marker", tmp_path / "data_batch_1"
    path.write_bytes(attacks(marker)[name])
    with pytest.raises(CorruptData, match=r"is not a file of arrays: it asks for .*, which data has no use for"):
        read_arrays(path)
    assert not marker.exists()


def test_the_attacks_of_this_test_would_work_on_an_ordinary_unpickler(tmp_path):
    marker = tmp_path / "marker"
    for name in ("posix", "eval", "protocol 5"):
        pickle.loads(attacks(marker)[name])
        assert marker.exists()
        marker.unlink()


def test_a_pickle_cannot_change_what_the_unpickler_admits(tmp_path):
    path = tmp_path / "batch"
    for admitted in (b"cnumpy\nndarray\n", b"cnumpy.core.multiarray\n_reconstruct\n"):
        path.write_bytes(b"\x80\x02" + admitted + b"N}U\x07__doc__U\x03bads\x86b.")  # BUILD with attributes
        with pytest.raises(CorruptData, match="is not a file of arrays"):
            read_arrays(path)
    assert np.ndarray.__doc__ != "bad"


@pytest.mark.parametrize("content", [b"", b"\x80\x02}", b"not a pickle", python2_pickle({"data": some(2)})[:-3000]])
def test_a_damaged_pickle_is_refused(tmp_path, content):
    path = tmp_path / "batch"
    path.write_bytes(content)
    with pytest.raises(CorruptData, match=r"batch is not a file of arrays: .+ Nothing in it was run"):
        read_arrays(path)


def test_a_pickle_of_something_else_is_refused(tmp_path):
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(CorruptData, match="batch holds a list; CIFAR's files hold dictionaries"):
        read_arrays(path)


def test_an_array_of_objects_whose_pointers_the_file_chooses_is_never_made(tmp_path):
    path = tmp_path / "batch"
    pointers = b"cnumpy\nndarray\n(K\x01\x85U\x01Oc__builtin__\nbytearray\nU\x08AAAAAAAA\x85RtR"
    path.write_bytes(b"\x80\x02}U\x04data" + pointers + b"s.")
    with pytest.raises(CorruptData, match="is not a file of arrays"):
        read_arrays(path)
    for array in (np.array([None, "x"]), np.arange(3.0), np.asfortranarray(some(2)[:, :4])):
        path.write_bytes(pickle.dumps({b"data": array}, protocol=3))
        with pytest.raises(CorruptData, match=r"not of bytes|not one of bytes"):
            read_arrays(path)


def test_arrays_of_a_recent_numpy_are_read_too(tmp_path):
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps({b"data": some(2)}, protocol=3))
    assert np.array_equal(read_arrays(path)[b"data"], some(2))


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
        (b"\0\0\x08\x02\0\0\0\x01", "is damaged"),
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
    Image.fromarray(some(1, (4, 4, 3))[0]).save(path)
    write_folder(tmp_path / "test", {"z": [("1.png", some(1, (4, 4, 3))[0])]})
    with pytest.raises(ConfigError, match="test has the class 'z', of which there are no training images"):
        read_folder(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtra, match=r"pip install 'expunge\[images\]'"):
        read_folder(tmp_path)


# One NumPy file, and arrays


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


def test_tensors_of_ones_own_are_images_too():
    images = from_arrays(torch.from_numpy(some(2, (4, 5))), torch.tensor([1, 0], dtype=torch.int32))
    assert (images.pixels.shape, images.labels.dtype, len(images)) == ((2, 1, 4, 5), torch.int64, 2)
    for pixels, labels, message in (
        (torch.rand(2, 4, 4), [0, 1], r"pixels float32 \(2, 4, 4\): give uint8"),
        (some(2, (4,)), [0, 1], r"pixels uint8 \(2, 4\)"),
        (some(2), [0.0, 1.0], r"labels float64 \(2,\): give one whole number an image"),
        (some(2), [[0, 1], [1, 0]], r"labels int64 \(2, 2\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_arrays(torch.as_tensor(pixels), torch.as_tensor(np.array(labels)))
    with pytest.raises(MismatchError, match="2 images and 3 labels"):
        from_arrays(some(2), np.arange(3))


# As a model wants them


def test_a_dataset_whose_parts_do_not_fit_is_refused():
    good = from_arrays(some(2), np.array([0, 1]))
    with pytest.raises(MismatchError, match="training labels of x go from 0 to 1, and there are 1 classes"):
        ImageData("x", ("a",), good)
    with pytest.raises(MismatchError, match=r"training images of \(3, 32, 32\) and test images of \(3, 4, 4\)"):
        ImageData("x", ("a", "b"), good, from_arrays(some(1, (3, 4, 4)), np.array([0])))
    with pytest.raises(ConfigError, match=r"pixels float32 \(2, 3, 4, 4\), labels int64 \(2,\): pixels are uint8"):
        Images(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64))


def test_normalisation_is_mean_and_deviation_of_each_channel_over_all_pixels():
    pixels = some(7, (3, 5, 6), seed=2)
    found = normalisation(from_arrays(pixels, np.zeros(7, np.int64)))
    shares = pixels / 255
    np.testing.assert_allclose(found.mean, shares.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(found.deviation, shares.std((0, 2, 3)), rtol=1e-12)
    with pytest.raises(ConfigError, match="channel 0 of 2 images has the same value everywhere"):
        normalisation(from_arrays(np.full((2, 3, 3), 7, np.uint8), np.zeros(2, np.int64)))


def test_examples_are_float32_in_the_unit_range_or_normalised_with_positions_from_0():
    pixels = some(7, (3, 5, 6), seed=2)
    images = from_arrays(pixels, np.arange(7))
    plain = to_examples(images)
    assert plain.tensors[0].dtype == torch.float32
    np.testing.assert_allclose(plain.tensors[0], pixels / 255, rtol=1e-6)
    assert plain.tensors[1].tolist() == plain.positions.tolist() == list(range(7))
    scale = Normalisation((0.5, 0.25, 0.0), (0.5, 2.0, 1.0))
    scaled = to_examples(images, scale).tensors[0]
    expected = (pixels / 255 - np.array([0.5, 0.25, 0])[:, None, None]) / np.array([0.5, 2, 1])[:, None, None]
    np.testing.assert_allclose(scaled, expected, atol=1e-6)
    assert torch.equal(images.pixels, torch.from_numpy(pixels))
    assert scale.black.flatten().tolist() == [-1.0, -0.125, 0.0]
    assert scale.white.flatten().tolist() == [1.0, 0.375, 1.0]
    with pytest.raises(MismatchError, match="the normalisation has 3 channels and the images 1"):
        to_examples(from_arrays(pixels[:, 0], np.arange(7)), scale)


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


# The real files, where there are some


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_the_real_files_have_as_many_images_of_every_class(name, classes):
    folder = os.environ.get("EXPUNGE_DATA")
    if folder is None:
        pytest.skip("EXPUNGE_DATA names no folder with datasets")
    try:
        data = datasets.read(name, folder)
    except MissingData as error:
        pytest.skip(str(error))
    assert len(data.classes) == classes
    assert torch.equal(data.train.labels.bincount(), torch.full((classes,), 50_000 // classes))
    assert torch.equal(data.test.labels.bincount(), torch.full((classes,), 10_000 // classes))
    assert 100 < float(data.train.pixels[:1000].float().mean()) < 140
    assert data.classes[0] == {"cifar10": "airplane", "cifar100": "apple"}[name]
