"""Datasets from their official places, and whether those that are here are whole."""

import tarfile
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from expunge.data import READERS
from expunge.data.download import checksum, download
from expunge.data.images import ImageData
from expunge.data.sources import SOURCES, File, source
from expunge.errors import ConfigError, CorruptData, MissingData
from expunge.files import write_text

SUMS = "checksums.sha256"  # in an unpacked folder; `sha256sum -c` reads it too
State = Literal["whole", "damaged", "missing"]


@dataclass(frozen=True)
class Found:
    """What is known of one file or folder of a dataset."""

    dataset: str  # as in SOURCES
    path: Path
    state: State
    how: str  # how that was found out, or what is wrong


def get(name: str, folder: Path | str, *, base: str = "") -> None:
    """Download a dataset, verify it, and unpack it into folders with the official names.

    Files that are there and whole are not downloaded again.

    Args:
        name: One of `SOURCES`.
        folder: Of all datasets.
        base: Another address to get the files from, such as that of a mirror; checksums stay the official ones.

    Raises:
        ConfigError: No dataset of this name, or an address that is none.
        MissingData: It could not be downloaded.
        CorruptData: It is not the official file, or holds something else than it should.
    """
    wanted, folder = source(name), Path(folder)
    address = base or wanted.base
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"base={base!r}: an address begins with http:// or https://.")
    for file in wanted.files:
        if file.unpacks and all(each.state == "whole" for each in _unpacked(name, folder / file.unpacks)):
            continue
        path = folder / wanted.folder / file.name
        download(f"{address.rstrip('/')}/{file.name}", path, file.md5)
        if file.unpacks:
            unpack(path, file.unpacks)
            path.unlink()


def check(folder: Path | str) -> list[Found]:
    """Whether the datasets that are in the folder are whole; one that is not there at all has one entry, missing.

    Downloaded files are compared with their official checksums. What `get` unpacked is compared with the checksums that
    it wrote; what others unpacked is read, and its classes are counted, which does not see every change of a pixel.
    """
    folder, found = Path(folder), []
    for name, wanted in SOURCES.items():
        own = []
        for file in wanted.files:
            path = folder / wanted.folder / file.name
            if file.unpacks and (folder / file.unpacks).exists():
                own += _unpacked(name, folder / file.unpacks)
            elif path.exists() or not file.unpacks:
                own.append(_downloaded(name, path, file))
            else:
                own.append(Found(name, folder / file.unpacks, "missing", f"`expunge data get {name}`"))
        if len(own) > 1 and all(each.state == "missing" for each in own):
            own = [Found(name, folder / wanted.folder, "missing", f"`expunge data get {name}`")]
        found += own
    return found


def unpack(archive: Path, inside: str) -> None:
    """Unpack the folder that is in an archive beside it, whole or not at all, with the checksums of its files.

    Raises:
        CorruptData: The archive is damaged, would write elsewhere, or does not hold the folder.
        ConfigError: A Python that cannot unpack safely.
    """
    if not hasattr(tarfile, "data_filter"):
        raise ConfigError(
            f"this Python cannot unpack {archive} safely; 3.11.4 and newer can. Update it, or unpack it yourself."
        )
    target = archive.parent / inside
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=f".{inside}.") as made:
        aside = Path(made)
        try:
            with tarfile.open(archive) as packed:
                packed.extractall(
                    aside / "new", filter="data"
                )  # refuses devices, and paths and links that lead elsewhere
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise CorruptData(f"{archive} cannot be unpacked: {error}. Delete it and get it again.") from error
        new = aside / "new" / inside
        if not new.is_dir():
            raise CorruptData(f"{archive} holds no folder {inside}. Delete it and get it from the official page.")
        files = sorted(path for path in new.rglob("*") if path.is_file())
        lines = [f"{checksum(path, 'sha256')}  {path.relative_to(new).as_posix()}\n" for path in files]
        write_text(new / SUMS, "".join(lines))
        if target.exists():
            target.replace(aside / "old")
        new.replace(target)


def _unpacked(name: str, folder: Path) -> list[Found]:
    sums = folder / SUMS
    if not folder.is_dir():
        return [Found(name, folder, "missing", "")]
    if not sums.is_file():
        return [_readable(name, folder)]
    found = []
    for line in sums.read_text(encoding="utf-8").splitlines():
        digest, _, inside = line.partition("  ")
        path = folder / inside
        if not path.is_file():
            found.append(Found(name, path, "missing", "it was in the archive"))
        elif checksum(path, "sha256") != digest:
            found.append(Found(name, path, "damaged", "not as it was in the archive"))
    return found or [Found(name, folder, "whole", "as in the verified archive")]


def _readable(name: str, folder: Path) -> Found:
    try:
        data = READERS[source(name).dataset](folder)
    except (CorruptData, MissingData) as error:
        return Found(name, folder, "damaged", str(error))
    odd = _uneven(data)
    if odd:
        return Found(name, folder, "damaged", odd)
    return Found(name, folder, "whole", "sizes and classes are right; no official checksum of these files")


def _uneven(data: ImageData) -> str:
    """CIFAR has equally many images of every class."""
    for part, images in (("training", data.train), ("test", data.test)):
        counts = images.labels.bincount(minlength=len(data.classes)) if images is not None else None
        if counts is not None and int(counts.min()) != int(counts.max()):
            return f"{part} classes have {int(counts.min())} to {int(counts.max())} images; all should have as many"
    return ""


def _downloaded(name: str, path: Path, file: File) -> Found:
    if not path.exists():
        return Found(name, path, "missing", f"from {source(name).page}")
    found = checksum(path)
    if found == file.md5:
        return Found(name, path, "whole", f"MD5 {found}")
    return Found(name, path, "damaged", f"MD5 {found}, officially {file.md5}")
