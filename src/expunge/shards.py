"""Tensors in several safetensors files with an index, written whole or not at all.

The index follows the convention of Hugging Face (``NAME.index.json`` with a ``weight_map``). Every writing has file
names of its own and the index takes its name last: until then the old files are all there, from then on the new ones.
"""

import hashlib
import json
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from expunge import params
from expunge.errors import ConfigError, CorruptCache
from expunge.files import alone_in, save_tensors, write_text

_ENDING = ".index.json"


@dataclass(frozen=True)
class Index:
    """What an index says of its files."""

    path: Path
    fields: dict[str, str]  # header, as that of a single file
    fingerprints: dict[str, str]  # of the tensors of each file, by its name
    holds: dict[str, str]  # the file of each tensor

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some tensors, from files that are read and verified as a whole, one after the other.

        Raises:
            CorruptCache: A file that is missing, damaged or altered.
        """
        wanted = set(names)
        found: dict[str, Tensor] = {}
        for file in sorted({self.holds[name] for name in wanted}):
            here = self._verified(file)
            found |= {name: tensor for name, tensor in here.items() if name in wanted}
        return found

    def verify(self) -> None:
        """Read and verify every file.

        Raises:
            CorruptCache: As of `read`.
        """
        for file in sorted(self.fingerprints):
            self._verified(file)

    def _verified(self, file: str) -> dict[str, Tensor]:
        path = self.path.with_name(file)
        try:
            with safe_open(path, "pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except PermissionError:
            raise
        except (SafetensorError, OSError) as error:
            raise CorruptCache(
                f"{path}, which {self.path.name} names, cannot be read as safetensors ({error}): it is missing, "
                "truncated or damaged. Restore it from a copy; it cannot be computed again once records are deleted."
            ) from error
        mapped = {name for name, there in self.holds.items() if there == file}
        if params.fingerprint(tensors) != self.fingerprints[file] or set(tensors) != mapped:
            raise CorruptCache(
                f"{path} does not match its fingerprint {self.fingerprints[file][:12]}… in {self.path.name}: it was "
                "altered, or belongs to another cache. Restore it from a copy."
            )
        return tensors


def index_path(path: Path | str) -> Path:
    """Where the index of a file in parts is; an index stands for itself."""
    path = Path(path)
    return path if path.name.endswith(_ENDING) else path.with_name(f"{path.name}{_ENDING}")


def whole_name(index: Path) -> Path:
    """The name of the single file that an index stands for."""
    return index.with_name(index.name.removesuffix(_ENDING))


def files_of(index: Path) -> set[str]:
    """The files that an index names; none if it cannot be read, for nothing may then be deleted on its word."""
    try:
        return set(read_index(index).fingerprints)
    except (FileNotFoundError, CorruptCache):
        return set()


def whole_of(piece: Path | str) -> Path | None:
    """The name of the single file that a piece belongs to, if an index beside it says so."""
    piece = Path(piece)
    for index in sorted(piece.parent.glob(f"*{_ENDING}")):
        if piece.name in files_of(index):
            return whole_name(index)
    return None


def write(path: Path | str, blocks: Iterable[Mapping[str, Tensor]], fields: dict[str, str], limit: float) -> None:
    """Write tensors in files of at most so many bytes, and an index; what was there before is removed at the end.

    Args:
        path: The name of the single file that this stands for.
        blocks: Tensors by name. Each block begins a file, so that it can be read alone; a tensor is never divided.
        fields: The header.
        limit: Bytes of tensors a file; one tensor may have more.

    Raises:
        ConfigError: A limit below one byte.
        OSError: The disk is full, or the folder cannot be written. Nothing new is left then.
    """
    require_room(limit)
    path = Path(path)
    parts = [part for block in blocks for part in _filled(block, limit)]
    stem, ending, token = path.stem, path.suffix or ".safetensors", secrets.token_hex(4)
    files = [f"{stem}-{token}-{at:05d}-of-{len(parts):05d}{ending}" for at in range(1, len(parts) + 1)]
    try:
        fingerprints = {}
        for file, part in zip(files, parts, strict=True):
            save_tensors(path.with_name(file), part, {"format": "pt"})
            fingerprints[file] = params.fingerprint(part)
        index = {
            "metadata": {
                "total_size": sum(_bytes(tensor) for part in parts for tensor in part.values()),
                "header": {**fields, "checksum": _checksum(fields, fingerprints)},
                "fingerprints": fingerprints,
            },
            "weight_map": {name: file for file, part in zip(files, parts, strict=True) for name in part},
        }
        with alone_in(path.parent):
            before = files_of(index_path(path))
            write_text(index_path(path), json.dumps(index, indent=2) + "\n", private=True)
            for file in before:
                path.with_name(file).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
    except BaseException:
        if files_of(index_path(path)) != set(files):
            for file in files:
                path.with_name(file).unlink(missing_ok=True)
        raise


def require_room(limit: float) -> None:
    """Refuse files without room.

    Raises:
        ConfigError: A limit below one byte.
    """
    if not limit >= 1:
        raise ConfigError(f"max_shard_bytes={limit}: a file has room for at least one byte. The default is 5e9, 5 GB.")


def remove(path: Path | str) -> None:
    """Delete an index and the files it names, if there is one."""
    index = index_path(path)
    if not index.exists():
        return
    with alone_in(index.parent):
        files = files_of(index)
        index.unlink(missing_ok=True)
        for file in files:
            index.with_name(file).unlink(missing_ok=True)


def read_index(path: Path | str) -> Index:
    """Read an index and verify it; the files it names are verified when they are read.

    Args:
        path: Of the index, or the name of the single file that it stands for.

    Raises:
        CorruptCache: It is no index, or was altered.
    """
    path = index_path(path)
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        fields = {str(key): str(value) for key, value in content["metadata"]["header"].items()}
        fingerprints = {str(file): str(value) for file, value in content["metadata"]["fingerprints"].items()}
        holds = {str(name): str(file) for name, file in content["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCache(
            f"{path} cannot be read as the index of a cache ({type(error).__name__}: {error}): it is truncated, "
            "damaged, or that of a model. Restore it from a copy."
        ) from error
    checksum = fields.pop("checksum", "none")
    known = set(holds.values()) == set(fingerprints) and all(Path(file).name == file for file in fingerprints)
    if checksum != _checksum(fields, fingerprints) or not known:
        raise CorruptCache(
            f"{path} does not match its checksum {checksum[:12]}…: it was altered after it was written. Restore it "
            "from a copy; it cannot be computed again once records are deleted."
        )
    return Index(path, fields, fingerprints, holds)


def _filled(block: Mapping[str, Tensor], limit: float) -> Iterator[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    used = 0
    for name, tensor in block.items():
        if part and used + _bytes(tensor) > limit:
            yield part
            part, used = {}, 0
        part[name] = tensor
        used += _bytes(tensor)
    if part:
        yield part


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _checksum(fields: dict[str, str], fingerprints: dict[str, str]) -> str:
    lines = [f"{key}={fields[key]}\n" for key in sorted(fields)]
    lines += [f"{file}={fingerprints[file]}\n" for file in sorted(fingerprints)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
