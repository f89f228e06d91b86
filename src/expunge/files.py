"""Files that are written whole or not at all."""

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from expunge.errors import ConfigError


@contextmanager
def replacing(path: Path | str, *, private: bool = False) -> Iterator[Path]:
    """Write to a temporary file beside ``path``; at the end sync it and rename it into place.

    Whatever goes wrong inside the block (a full disk, Ctrl-C, a killed process), the file that was there before
    is untouched.

    Args:
        path: Of the file.
        private: Whether only the owner may read it.

    Yields:
        The temporary path to write to.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if private:
            temporary.touch(0o600)
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait for others inside such a block, where folders can be locked. On Windows nobody waits: the last one wins."""
    if importlib.util.find_spec("fcntl") is None:
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def require_writable(path: Path | str) -> None:
    """Find out whether a file could be written, by writing one beside it, before hours go into what it shall hold.

    Folders that do not exist yet are not made; the nearest one that does is tried in their place.

    Raises:
        ConfigError: The folder cannot be written.
    """
    path = Path(path)
    folder = next(parent for parent in path.absolute().parents if os.access(parent, os.F_OK))
    probe = folder / f".{path.name}.{os.getpid()}.tmp"
    try:
        probe.write_bytes(b"expunge")
        probe.unlink()
    except OSError as error:
        with suppress(OSError):
            probe.unlink()
        raise ConfigError(
            f"{path} cannot be written: {folder} takes no new file ({error.strerror}). Give another folder, or make "
            "this one writable."
        ) from error


def write_text(path: Path | str, text: str, *, private: bool = False) -> None:
    """Write a text file whole."""
    with replacing(path, private=private) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_tensors(path: Path | str, tensors: Mapping[str, Tensor], header: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole; only its owner may read it.

    Raises:
        OSError: The disk is full, or the folder cannot be written.
    """
    apart = {name: _alone(tensor.detach().cpu().contiguous()) for name, tensor in tensors.items()}
    if len({tensor.untyped_storage().data_ptr() for tensor in apart.values() if tensor.numel()}) < len(apart):
        apart = {name: tensor.clone() for name, tensor in apart.items()}  # the format knows no shared memory
    try:
        with replacing(path, private=True) as temporary:
            save_file(apart, temporary, metadata=header)
    except SafetensorError as error:
        raise OSError(
            f"could not write {path}: {error}. Free some space or choose another folder; a file that was there "
            "before is unchanged."
        ) from error


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, copied if its memory holds more than it."""
    storage = tensor.untyped_storage()
    return tensor if storage.nbytes() == tensor.numel() * tensor.element_size() else tensor.clone()


def sync(path: Path) -> None:
    """Have a file, or the entries of a folder, on disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows syncs only what can be written
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
