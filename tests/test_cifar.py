"""CIFAR's binary and Python versions, and an unpickler that runs nothing of what it reads."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from expunge import data as datasets
from expunge.data import cifar
from expunge.data.cifar import read_cifar10, read_cifar100
from expunge.data.unpickler import read_arrays
from expunge.errors import ConfigError, CorruptData, MissingData
from tests.tiny_images import TEST, TRAIN, python2_pickle, same, some, write_cifar10

# CIFAR


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
