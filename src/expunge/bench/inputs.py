"""inputs.json of a run folder: hashes of the files and records that went in, and the salt, which stays outside."""

import json
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

from expunge import provenance
from expunge.batches import Batches
from expunge.errors import ConfigError, MismatchError
from expunge.files import replacing, write_text

Entry = dict[str, object]
NAME = "inputs.json"
REMOVED = "forget"  # the split whose records get a hash each
_SALT = re.compile("[0-9a-fA-F]{64}")  # 256 bits: a shorter one could be found by trying


def salt_path(folder: Path) -> Path:
    """Where the salt of a run goes: beside its folder, so that the folder can be handed on without it."""
    return folder.with_name(f"{folder.name}.salt")


def salt_of(folder: Path) -> str:
    """The salt of a run, drawn and written (readable by its owner alone) if there is none yet.

    Raises:
        ConfigError: The file holds something else.
    """
    path = salt_path(folder)
    if not path.exists():
        with replacing(path) as temporary:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(f"{secrets.token_hex(32)}\n")
    salt = path.read_text(encoding="utf-8").strip()
    if not _SALT.fullmatch(salt):
        raise ConfigError(
            f"{path} is no salt: it holds {len(salt)} characters, and a salt is one line of 64 hexadecimal digits. "
            "Restore it, or remove it together with the run."
        )
    return salt


def hashes_of(paths: Iterable[Path]) -> dict[Path, str]:
    """The SHA-256 of files; taken before they are read, so that `require_unchanged` can tell."""
    return {path: provenance.file_hash(path) for path in paths}


def require_unchanged(hashes: Mapping[Path, str]) -> None:
    """Refuse to state hashes of files that are no longer what they were.

    Raises:
        MismatchError: A file was changed or removed since.
    """
    for path, known in hashes.items():
        if not path.exists() or provenance.file_hash(path) != known:
            raise MismatchError(
                f"{path} was changed while this command was reading it, so nobody knows which content was used. Run "
                "the command again, and leave its files alone meanwhile."
            )


def file_entry(role: str, path: Path, folder: Path, sha256: str | None = None) -> Entry:
    """A file: what it is for, where it is seen from the run folder, its hash (if not known yet) and its size."""
    return {
        "role": role,
        "path": Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix(),
        "sha256": sha256 or provenance.file_hash(path),
        "bytes": path.stat().st_size,
    }


def split_entry(scenario: str, seed: int, split: str, data: Batches, salt: str) -> Entry:
    """A split: how many records it has and one salted hash of all; of the removed ones a hash each.

    Raises:
        ConfigError: Single records cannot be told apart.
    """
    hashes = provenance.record_hashes(data, salt)
    entry: Entry = {"scenario": scenario, "seed": seed, "split": split, "records": len(hashes)}
    entry["salted"] = provenance.together(hashes, salt)
    if split == REMOVED:
        entry |= {"salted_records": hashes, "salted_positions": provenance.position_hashes(data, salt)}
    return entry


def write_inputs(path: Path, files: Iterable[Entry], data: Iterable[Entry]) -> None:
    """Write inputs.json."""
    write_text(path, json.dumps({"files": list(files), "data": list(data)}, indent=2, ensure_ascii=False) + "\n")
