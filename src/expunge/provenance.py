"""Where results come from: hashes of code, files and records, and the machine."""

import hashlib
import hmac
import os
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from expunge.batches import Batches, indexed, micro_batches, tensors_of
from expunge.errors import ConfigError

_PIECE = 512  # positions read at a time


def sources() -> str:
    """A hash of the library's code: other code gives other results."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """The machine, the versions and the date (UTC), for the reader of a result."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "expunge": version("expunge"),
        "date": datetime.now(UTC).date().isoformat(),
    }


def file_hash(path: Path | str) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_hashes(data: Batches, salt: str) -> list[str]:
    """A salted hash of every record, in the order of the data.

    HMAC-SHA-256, with the salt as its key, of the type, shape and bytes of the record's tensors. Without the salt
    nobody can find out by trying whether a guessed record is among them; with it the controller can show it.

    Raises:
        ConfigError: A batch whose tensors do not have one row a record.
    """
    return [_keyed(salt, b"record", *map(_described, parts)) for parts in _records(data)]


def position_hashes(data: Batches, salt: str) -> list[str]:
    """A salted hash of the position of every record; none for data without positions."""
    known = indexed(data)
    positions: Int[Tensor, " _"] | list[int] = [] if known is None else known.positions
    return [_keyed(salt, b"position", str(int(position)).encode()) for position in positions]


def together(hashes: list[str], salt: str) -> str:
    """One salted hash of many, whatever their order."""
    return _keyed(salt, b"split", *(each.encode() for each in sorted(hashes)))


def _records(data: Batches) -> Iterator[list[Tensor]]:
    for _, batch in micro_batches(data, _PIECE)[1]:
        tensors = [tensor.detach().cpu() for tensor in tensors_of(batch)]
        lengths = {len(tensor) if tensor.ndim else 0 for tensor in tensors}
        if len(lengths) != 1 or 0 in lengths:
            raise ConfigError(
                f"a batch holds tensors with {sorted(lengths)} rows, so single records cannot be told apart for their "
                "hashes. Give batches whose tensors have one row a record."
            )
        yield from (list(parts) for parts in zip(*tensors, strict=True))


def _described(part: Tensor) -> bytes:
    raw = part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{part.dtype} {tuple(part.shape)} ".encode() + raw


def _keyed(salt: str, *parts: bytes) -> str:
    digest = hmac.new(bytes.fromhex(salt), digestmod=hashlib.sha256)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()
