"""Where the files of a dataset are, and what is said when one is missing or damaged."""

from collections.abc import Sequence
from pathlib import Path

from expunge.errors import CorruptData, MissingData


def first_existing(folder: Path | str, candidates: Sequence[str], *, what: str, cure: str) -> Path:
    """The first of these paths below the folder that exists.

    Raises:
        MissingData: None does.
    """
    for candidate in candidates:
        path = Path(folder) / candidate
        if path.exists():
            return path
    shown = " or ".join(candidates)
    raise MissingData(f"{what}: {Path(folder)} has no {shown}. {cure}")


def damaged(path: Path, found: str, expected: str, cure: str) -> CorruptData:
    """The error for a file that is not what it should be."""
    return CorruptData(f"{path} is damaged: {found}, and it should be {expected}. {cure}")


def require_size(path: Path, size: int, what: str, cure: str) -> None:
    """Refuse a file of another size.

    Raises:
        CorruptData: It has more or fewer bytes.
    """
    found = path.stat().st_size
    if found != size:
        raise damaged(path, f"it has {found:,} bytes", f"{what}, {size:,} bytes", cure)
