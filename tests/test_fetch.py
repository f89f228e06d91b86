import errno
import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from expunge.cli import main
from expunge.data import cifar, fetch
from expunge.data.download import checksum, download
from expunge.data.sources import SOURCES, File, source
from expunge.errors import ConfigError, CorruptData, MissingData
from tests.tiny_images import write_cifar10

CONTENT = bytes(range(256)) * 3000


@dataclass
class Server:
    """A web server on this machine that can break off, forget Range, or answer with errors."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    break_after: list[int] = field(default_factory=list)  # bytes of each of the next answers
    answer: list[int] = field(default_factory=list)  # status of each of the next answers
    ranges: bool = True
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # path and Range of every request


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers["Range"]
            state.asked.append((self.path, wanted))
            content = state.files.get(self.path)
            status = state.answer.pop(0) if state.answer else 200
            if status != 200 or content is None:
                return self.send_error(404 if content is None else status)
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and state.ranges else 0
            if start and start >= len(content):
                return self.send_error(416)
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            stop = start + state.break_after.pop(0) if state.break_after else None
            self.wfile.write(content[start:stop])
            return None

        def log_message(self, *_):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{running.server_port}"
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    running.shutdown()
    thread.join()
    running.server_close()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def fetched(server: Server, path: Path, expected: bytes = CONTENT) -> None:
    download(f"{server.address}/file", path, md5(expected), pause=0.0)


def inside(folder: Path) -> list[str]:
    return sorted(each.relative_to(folder).as_posix() for each in folder.rglob("*"))


# Downloads


def test_a_download_arrives_whole_and_leaves_nothing_else(server, tmp_path):
    server.files["/file"] = CONTENT
    fetched(server, tmp_path / "deep" / "file")
    assert (tmp_path / "deep" / "file").read_bytes() == CONTENT
    assert inside(tmp_path) == ["deep", "deep/file"]
    assert server.asked == [("/file", None)]


def test_a_file_that_is_there_and_verifies_is_not_asked_for_again_and_another_is_replaced(server, tmp_path):
    server.files["/file"] = CONTENT
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    fetched(server, path)
    assert server.asked == []
    path.write_bytes(CONTENT[:-1])
    fetched(server, path)
    assert path.read_bytes() == CONTENT


def test_a_download_that_breaks_off_goes_on_from_there(server, tmp_path):
    server.files["/file"] = CONTENT
    server.break_after = [1000, 5000]
    fetched(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert [wanted for _, wanted in server.asked] == [None, "bytes=1000-", "bytes=6000-"]


def test_another_call_goes_on_where_an_interrupted_one_was(server, tmp_path):
    server.files["/file"] = CONTENT
    server.break_after = [7000]
    path = tmp_path / "file"
    path.with_name("file.part").write_bytes(CONTENT[:4000])  # what a killed process leaves
    fetched(server, path)
    assert path.read_bytes() == CONTENT
    assert [wanted for _, wanted in server.asked] == ["bytes=4000-", "bytes=11000-"]
    assert inside(tmp_path) == ["file"]


def test_from_a_server_that_cannot_continue_it_starts_anew(server, tmp_path):
    server.files["/file"], server.ranges = CONTENT, False
    server.break_after = [1000]
    fetched(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert [wanted for _, wanted in server.asked] == [None, "bytes=1000-"]


def test_a_part_that_is_whole_already_is_verified_and_taken(server, tmp_path):
    server.files["/file"] = CONTENT
    (tmp_path / "file.part").write_bytes(CONTENT)
    fetched(server, tmp_path / "file")
    assert inside(tmp_path) == ["file"]


def test_a_wrong_checksum_is_refused_and_deleted_and_the_old_file_stays(server, tmp_path):
    server.files["/file"] = b"<html>Please log in</html>"
    path = tmp_path / "file"
    path.write_bytes(b"old")
    message = f"gave 26 bytes with MD5 {md5(server.files['/file'])}, and the official file has {md5(CONTENT)}"
    with pytest.raises(CorruptData, match=message):
        fetched(server, path)
    assert path.read_bytes() == b"old"
    assert inside(tmp_path) == ["file"]
    server.files["/file"] = CONTENT
    fetched(server, path)
    assert path.read_bytes() == CONTENT


def test_a_file_that_the_server_does_not_have_is_not_asked_for_twice(server, tmp_path):
    with pytest.raises(MissingData, match=r"could not download http://127.*/file: the server answers 404 Not Found"):
        fetched(server, tmp_path / "file")
    assert len(server.asked) == 1


def test_a_server_that_is_busy_is_asked_again_and_one_that_stays_so_is_given_up(server, tmp_path):
    server.files["/file"], server.answer = CONTENT, [503, 500]
    fetched(server, tmp_path / "file")
    assert len(server.asked) == 3
    server.answer = [503] * 10
    with pytest.raises(MissingData, match=r"Service Unavailable.*bring the file to .*other by other means"):
        fetched(server, tmp_path / "other")


def test_what_has_arrived_is_kept_when_a_server_goes_away(server, tmp_path):
    server.files["/file"], server.break_after, server.answer = CONTENT, [3000], [200] + [500] * 3
    path = tmp_path / "file"
    with pytest.raises(MissingData, match="the same command goes on from there"):
        fetched(server, path)
    assert (tmp_path / "file.part").read_bytes() == CONTENT[:3000]
    assert not path.exists()
    fetched(server, path)
    assert path.read_bytes() == CONTENT
    assert server.asked[-1] == ("/file", "bytes=3000-")


def test_a_full_disk_is_said_at_once(server, tmp_path, monkeypatch):
    server.files["/file"] = CONTENT

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("expunge.data.download._continue", full)
    with pytest.raises(OSError, match="No space left on device") as raised:
        fetched(server, tmp_path / "file")
    assert not isinstance(raised.value, MissingData)


def test_no_server_at_all_is_said(tmp_path):
    with pytest.raises(MissingData, match=r"could not download http://127\.0\.0\.1:9/file: .*refused"):
        download("http://127.0.0.1:9/file", tmp_path / "file", md5(b""), pause=0.0)


# Datasets


def archive(folder: Path, *, extra: tarfile.TarInfo | None = None) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, arcname=path.name)
        if extra is not None:
            tar.addfile(extra, io.BytesIO(bytes(extra.size)))
    return packed.getvalue()


@pytest.fixture
def world(server, tmp_path, monkeypatch) -> Path:
    """A server with a tiny CIFAR-10 and a tiny SVHN, whose checksums are taken for the official ones."""
    for name in ("CIFAR10", "CIFAR100"):
        monkeypatch.setattr(
            cifar, name, tuple(replace(each, train_records=4, test_records=10) for each in getattr(cifar, name))
        )
    made = tmp_path / "made"
    made.mkdir()
    write_cifar10(made, "bin", test=10)
    packed = archive(made)
    server.files |= {"/cifar-10-binary.tar.gz": packed, "/train_32x32.mat": b"train", "/test_32x32.mat": b"test"}
    batches = File("cifar-10-binary.tar.gz", md5(packed), "cifar-10-batches-bin")
    small = {
        "cifar10": replace(SOURCES["cifar10"], files=(batches,)),
        "svhn": replace(
            SOURCES["svhn"], files=(File("train_32x32.mat", md5(b"train")), File("test_32x32.mat", md5(b"test")))
        ),
    }  # fmt: skip
    for name, each in small.items():
        monkeypatch.setitem(SOURCES, name, each)
    return tmp_path / "data"


def states(folder: Path) -> dict[str, str]:
    return {f"{each.dataset}: {each.path.relative_to(folder)}": each.state for each in fetch.check(folder)}


def test_an_archive_is_downloaded_unpacked_checked_and_removed(server, world):
    fetch.get("cifar10", world, base=server.address)
    assert [name for name in inside(world) if "/" not in name] == ["cifar-10-batches-bin"]
    assert len(cifar.read_cifar10(world).train) == 20
    assert states(world)["cifar10: cifar-10-batches-bin"] == "whole"
    fetch.get("cifar10", world, base=f"{server.address}/")
    assert len(server.asked) == 1


def test_check_sees_a_changed_and_a_missing_file_and_get_mends_both(server, world):
    fetch.get("cifar10", world, base=server.address)
    changed, gone = (world / "cifar-10-batches-bin" / f"data_batch_{number}.bin" for number in (2, 3))
    pixels = bytearray(changed.read_bytes())
    pixels[100] ^= 1
    changed.write_bytes(bytes(pixels))
    gone.unlink()
    found = states(world)
    assert found["cifar10: cifar-10-batches-bin/data_batch_2.bin"] == "damaged"
    assert found["cifar10: cifar-10-batches-bin/data_batch_3.bin"] == "missing"
    fetch.get("cifar10", world, base=server.address)
    assert states(world)["cifar10: cifar-10-batches-bin"] == "whole"


def test_the_checksums_of_unpacked_files_are_in_the_format_of_sha256sum(server, world):
    fetch.get("cifar10", world, base=server.address)
    folder = world / "cifar-10-batches-bin"
    lines = dict(reversed(line.split("  ")) for line in (folder / fetch.SUMS).read_text().splitlines())
    assert set(lines) == {path.name for path in folder.iterdir()} - {fetch.SUMS}
    for name, digest in lines.items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_files_that_are_no_archives_are_compared_with_their_official_checksums(server, world):
    fetch.get("svhn", world, base=server.address)
    assert {state for name, state in states(world).items() if name.startswith("svhn")} == {"whole"}
    (world / "svhn" / "test_32x32.mat").write_bytes(b"tests")
    (world / "svhn" / "train_32x32.mat").unlink()
    found = states(world)
    assert found["svhn: svhn/test_32x32.mat"] == "damaged"
    assert found["svhn: svhn/train_32x32.mat"] == "missing"


def test_what_somebody_else_unpacked_is_read(world, tmp_path):
    (tmp_path / "made" / "cifar-10-batches-bin").rename((world.mkdir(), world / "cifar-10-batches-bin")[1])
    found = next(each for each in fetch.check(world) if each.dataset == "cifar10")
    assert (found.state, "no official checksum" in found.how) == ("whole", True)
    path = world / "cifar-10-batches-bin" / "data_batch_1.bin"
    path.write_bytes(b"\x05" + path.read_bytes()[1:])  # one label, that is still a class
    found = next(each for each in fetch.check(world) if each.dataset == "cifar10")
    assert (found.state, found.how) == ("damaged", "training classes have 1 to 3 images; all should have as many")
    path.unlink()
    found = next(each for each in fetch.check(world) if each.dataset == "cifar10")
    assert (found.state, "has no data_batch_1.bin" in found.how) == ("damaged", True)


def test_an_empty_folder_has_one_entry_a_dataset_all_missing(tmp_path):
    found = fetch.check(tmp_path / "nowhere")
    assert [(each.dataset, each.state) for each in found] == [(name, "missing") for name in SOURCES]
    assert all(f"expunge data get {each.dataset}" in each.how for each in found)


@pytest.mark.parametrize("kind", ["parent", "absolute", "link", "device"])
def test_an_archive_that_would_write_elsewhere_is_refused_and_leaves_nothing(tmp_path, kind):
    made = tmp_path / "made"
    (made / "inside").mkdir(parents=True)
    extra = tarfile.TarInfo({"parent": "../../evil", "absolute": f"{tmp_path}/evil"}.get(kind, "inside/evil"))
    if kind == "link":
        extra.type, extra.linkname = tarfile.SYMTYPE, str(tmp_path / "evil")
    if kind == "device":
        extra.type = tarfile.CHRTYPE
    target = tmp_path / "data" / "x.tar.gz"
    target.parent.mkdir()
    target.write_bytes(archive(made, extra=extra))
    if kind == "absolute":  # the leading slash is taken off, so that it lands inside
        fetch.unpack(target, "inside")
    else:
        with pytest.raises(CorruptData, match=r"x\.tar\.gz cannot be unpacked"):
            fetch.unpack(target, "inside")
        assert inside(tmp_path / "data") == ["x.tar.gz"]
    assert not list(tmp_path.rglob("evil")) or kind == "absolute"
    assert not (tmp_path / "evil").exists()


def test_archives_without_the_folder_or_cut_short_are_refused_and_the_old_folder_stays(tmp_path, monkeypatch):
    made, target = tmp_path / "made", tmp_path / "x.tar.gz"
    (made / "other").mkdir(parents=True)
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "old").touch()
    target.write_bytes(archive(made))
    with pytest.raises(CorruptData, match="holds no folder inside"):
        fetch.unpack(target, "inside")
    (made / "inside").mkdir()
    (made / "inside" / "file").write_bytes(CONTENT)
    target.write_bytes(archive(made)[:-200])
    with pytest.raises(CorruptData, match=r"cannot be unpacked: .* Delete it and get it again"):
        fetch.unpack(target, "inside")
    assert (tmp_path / "inside" / "old").exists()
    monkeypatch.delattr(tarfile, "data_filter")
    with pytest.raises(ConfigError, match=r"safely; 3\.11\.4 and newer can"):
        fetch.unpack(target, "inside")


def test_names_and_addresses_that_are_none_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="dataset='imagenet': what can be downloaded are cifar10, cifar10-python"):
        source("imagenet")
    with pytest.raises(ConfigError, match="base='file:///tmp': an address begins with http"):
        fetch.get("mnist", tmp_path, base="file:///tmp")


def test_every_source_has_checksums_of_its_own_and_a_reader():
    sums = [file.md5 for each in SOURCES.values() for file in each.files]
    assert len(set(sums)) == len(sums) == 14
    assert all(len(digest) == 32 and set(digest) <= set("0123456789abcdef") for digest in sums)
    assert {each.dataset for each in SOURCES.values()} == set(fetch.READERS)
    for each in SOURCES.values():
        for file in each.files:
            layouts = [layout for layout in (*cifar.CIFAR10, *cifar.CIFAR100) if layout.folder == file.unpacks]
            assert [layout.dataset for layout in layouts] == ([each.dataset] if file.unpacks else [])


def test_a_checksum_is_that_of_hashlib(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    assert checksum(tmp_path / "file") == md5(CONTENT)
    assert checksum(tmp_path / "file", "sha256") == hashlib.sha256(CONTENT).hexdigest()


# Commands


def test_the_commands_get_a_dataset_and_say_that_it_is_whole(server, world, capsys):
    assert main(["data", "get", "cifar10", "--folder", str(world), "--base", server.address]) == 0
    assert "cifar10 is in" in capsys.readouterr().out
    assert main(["data", "check", str(world)]) == 0
    out = capsys.readouterr().out
    assert "whole" in out
    assert "expunge data get svhn" in out


def test_check_ends_with_exit_code_2_when_something_is_damaged(world, capsys):
    (world / "svhn").mkdir(parents=True)
    (world / "svhn" / "train_32x32.mat").write_bytes(b"x")
    assert main(["data", "check", str(world)]) == 2
    assert "train_32x32.mat. Delete them and get the dataset again" in capsys.readouterr().err


def test_get_takes_every_source_and_no_other_name(capsys):
    assert main(["data", "get", "imagenet"]) == 2
    capsys.readouterr()
    assert main(["data", "get", "--help"]) == 0
    shown = capsys.readouterr().out.replace("\n", "")
    assert "{" + ",".join(SOURCES) + "}" in shown
