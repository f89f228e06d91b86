import errno
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from expunge import cache
from expunge.errors import ConfigError
from expunge.files import replacing, require_writable, save_tensors, write_text
from expunge.gradient import gradient
from expunge.losses import cross_entropy
from tests.zoo import classification


@contextmanager
def no_file_larger_than(limit: int):
    """A full disk, as far as this process can tell."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    with replacing(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        assert temporary.parent == path.parent  # a rename does not cross file systems
    assert path.read_text() == "half"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError, ValueError])
def test_the_old_file_survives_whatever_goes_wrong(error, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail():
        with replacing(path) as temporary:
            temporary.write_bytes(b"ne")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_nothing_is_left_when_nothing_was_written(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "file"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_folder_is_not_replaced_by_a_file(tmp_path):
    (tmp_path / "taken" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="taken"):
        write_text(tmp_path / "taken", "text")
    assert os.listdir(tmp_path) == ["taken"]


def test_text_is_written_as_utf_8(tmp_path):
    write_text(tmp_path / "file", "η_p = 1·10⁻³")
    assert (tmp_path / "file").read_bytes() == "η_p = 1·10⁻³".encode()


def test_tensors_that_share_or_skip_memory_are_written_as_they_look(tmp_path):
    base = torch.arange(12.0)
    tensors = {"whole": base, "part": base[3:6], "turned": base.view(3, 4).t(), "grad": nn.Parameter(base[:2])}
    save_tensors(tmp_path / "file", tensors, {"key": "value"})
    loaded = load_file(tmp_path / "file")
    assert {name: tensor.tolist() for name, tensor in loaded.items()} == {n: t.tolist() for n, t in tensors.items()}


@pytest.mark.parametrize("limit", [0, 100, 4096, 20_000])
def test_a_full_disk_leaves_the_old_cache_and_no_debris(limit, tmp_path):
    path = tmp_path / "cache"
    model = nn.Sequential(nn.Linear(5, 400), nn.Linear(400, 3)).double()
    cache.save(path, gradient(model, cross_entropy, classification(8)))
    before = path.read_bytes()
    assert len(before) > 20_000
    again = gradient(model, cross_entropy, classification(9))
    with (
        pytest.raises(OSError, match=r"could not write .*cache: .*Free some space.* unchanged"),
        no_file_larger_than(limit),
    ):
        cache.save(path, again)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["cache"]
    assert cache.load(path, model, cross_entropy).count == 8


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_an_error_of_the_system(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OSError, match="file"):
            save_tensors(tmp_path / "file", {"a": torch.zeros(1)})
    finally:
        tmp_path.chmod(0o700)


def test_the_file_is_synced_before_it_takes_its_name_and_the_folder_after(tmp_path, monkeypatch):
    order = []
    sync, rename = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("sync"), sync(descriptor))[1])
    monkeypatch.setattr(Path, "replace", lambda self, target: (order.append("rename"), rename(self, target))[1])
    write_text(tmp_path / "file", "text")
    assert order == ["sync", "rename", "sync"]


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path):
    require_writable(tmp_path / "file")
    require_writable(tmp_path / "new" / "folder" / "file")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_refused_with_reason_and_cure(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    said = r"file/new cannot be written: .*file takes no new file \(Not a directory\). Give another folder"
    with pytest.raises(ConfigError, match=said):
        require_writable(tmp_path / "file" / "new")

    def read_only(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "write_bytes", read_only)
    said = r"new/file cannot be written: .* takes no new file \(Read-only file system\).*make this one writable"
    with pytest.raises(ConfigError, match=said):
        require_writable(tmp_path / "new" / "file")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_a_folder_without_permission_is_refused_with_reason_and_cure(mode, tmp_path):
    tmp_path.chmod(mode)
    try:
        with pytest.raises(ConfigError, match=r"takes no new file \(Permission denied\)"):
            require_writable(tmp_path / "folder" / "file")
    finally:
        tmp_path.chmod(0o700)
