"""Checkpoints by shard and slice that know what they were trained on, in memory or in a folder."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from expunge.errors import MismatchError
from expunge.files import save_tensors
from expunge.params import Params


class Checkpoints:
    """States behind each slice; files are written whole or not at all.

    Args:
        folder: Where to keep them, as safetensors; None for memory.
    """

    def __init__(self, folder: Path | str | None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._kept: dict[tuple[int, int], tuple[dict[str, str], Params]] = {}

    def usable(self, shard: int, root: str, keys: list[str]) -> int:
        """How many slices of a shard, from the first, have a checkpoint of exactly this data; later ones are deleted.

        Args:
            shard: Which.
            root: What it must be of besides the data.
            keys: For each slice, what it must have been trained on.

        Raises:
            MismatchError: A checkpoint of another root.
        """
        headers = [self._header(shard, number) for number in range(len(keys))]
        if any(header is not None and header.get("root") != root for header in headers):
            raise MismatchError(
                f"{self._folder} holds checkpoints of another architecture, loss, seed or configuration. Give another "
                "folder, or the call they came from."
            )
        fits = [header is not None and header["key"] == key for header, key in zip(headers, keys, strict=True)]
        usable = [*fits, False].index(False)
        for number in range(usable, len(keys)):
            self._kept.pop((shard, number), None)
            if self._folder is not None:
                self._path(shard, number).unlink(missing_ok=True)
        return usable

    def put(self, shard: int, number: int, state: Params, header: dict[str, str]) -> None:
        """Keep a copy of a state; the header says its ``root`` and ``key``."""
        if self._folder is None:
            self._kept[shard, number] = (
                header,
                {name: tensor.detach().cpu().clone() for name, tensor in state.items()},
            )
        else:
            save_tensors(self._path(shard, number), state, header)

    def state(self, shard: int, number: int) -> Params:
        """The state behind a slice."""
        return self._kept[shard, number][1] if self._folder is None else load_file(self._path(shard, number))

    def _header(self, shard: int, number: int) -> dict[str, str] | None:
        if self._folder is None:
            return self._kept[shard, number][0] if (shard, number) in self._kept else None
        if not self._path(shard, number).exists():
            return None
        try:
            with safe_open(self._path(shard, number), framework="pt") as file:
                return dict(file.metadata() or {})
        except SafetensorError:  # damaged: as good as none, since it can be trained again
            return None

    def _path(self, shard: int, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"shard-{shard:03}-slice-{number:03}.safetensors"
