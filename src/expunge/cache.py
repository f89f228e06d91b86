"""The gradient cache: a safetensors file, or several, with the gradient of all data and what it belongs to.

``docs/cache-format.md`` is the specification. The file is personal data until it is destroyed: from a deletion
of one record, cache and weights together can give that record back.
"""

import hashlib
import itertools
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from expunge import distributed, params, sharding, shards
from expunge.batches import LossTerms
from expunge.errors import ConfigError, CorruptCache, MismatchError
from expunge.files import save_tensors
from expunge.gradient import Gradient, Origin
from expunge.groups import Groups
from expunge.params import Params
from expunge.passes import MicroBatches

FORMAT, VERSION = "expunge-gradient", 1
_OF_GROUPS = ("starts", "examples", "contents")
_TOTALS = "groups/total/"
_GROUPED = ("numbers", "counts", "losses", "magnitudes")
_PREFIXES = ("total/", "noise/", "micro_batches/", "groups/")
_ROUNDOFF = {torch.float64: 0.0, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


@dataclass(frozen=True)
class Header:
    """What a cache file says of itself."""

    version: int
    count: int  # terms
    loss: float  # sum over terms, nats
    loss_terms: str
    weights: str  # fingerprints
    buffers: str
    roundoff: float
    micro_batch: int | None  # positions a micro-batch; None if the passes cannot be aligned
    expunge: str  # versions that wrote it
    torch: str
    created: str  # UTC, ISO 8601
    recomputed: str = ""  # names of modules whose activations are computed again in both passes, a line each
    parameters: int = 0  # tensors, and entries over all of them
    entries: int = 0
    groups: int = 0  # of which the gradient is kept besides
    files: int = 1


def save(
    path: Path | str, gradient: Gradient, *, dtype: torch.dtype = torch.float64, max_shard_bytes: float = 5e9
) -> None:
    """Write a gradient to a file, or to several with an index; whole or not at all.

    Of several processes all call this and the first one writes.

    Args:
        path: The file; one that exists is replaced once the new one is complete. Of a gradient in several files (one
            that is too large for one, or has groups) it is what their names begin with; `load` takes it all the same.
        gradient: As `gradient()` made it, of all data at the trained weights.
        dtype: The type of the totals. Less than float64 saves space and costs accuracy (float32: the difference
            is about ten times coarser); it protects no one.
        max_shard_bytes: Of one file; a tensor is never divided.

    Raises:
        ConfigError: What `require_storable` refuses, or a gradient without its rounding floor.
        NotFinite: NaN or infinity in the gradient, also after rounding to ``dtype``.
        OSError: The disk is full, or the folder cannot be written.
    """
    require_storable(path, dtype, len(gradient.groups.totals) if gradient.groups is not None else None, max_shard_bytes)
    if gradient.noise is None:
        raise ConfigError("this gradient has no rounding floor. Save what gradient() returned, unchanged.")
    if "<lambda>" in gradient.origin.loss_terms:
        warnings.warn(
            f"the loss is {gradient.origin.loss_terms}: a cache knows a loss by its name, and cannot tell this one "
            "from another lambda. Define it by def, with a name.",
            stacklevel=2,
        )
    tensors = {f"total/{name}": _to_write(tensor.to(dtype)) for name, tensor in gradient.total.items()}
    params.require_finite(tensors, f"saving the cache as {dtype}")
    tensors |= {f"noise/{name}": _to_write(tensor) for name, tensor in gradient.noise.items()}
    groups = gradient.micro_batches
    if groups is not None:
        tensors |= {f"micro_batches/{name}": getattr(groups, name) for name in _GROUPED}
    fields: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "count": gradient.count,
        "loss": gradient.loss,
        "loss_terms": gradient.origin.loss_terms,
        "weights": gradient.origin.weights,
        "buffers": gradient.origin.buffers,
        "roundoff": gradient.roundoff,
        "micro_batch": groups.size if groups is not None else None,
        "expunge": version("expunge"),
        "torch": torch.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if gradient.recomputed:
        fields["recomputed"] = "\n".join(gradient.recomputed)
    header = {key: json.dumps(value) for key, value in fields.items()}
    distributed.by_the_first(lambda: _write(path, gradient.groups, tensors, header, max_shard_bytes))


def require_storable(path: Path | str, dtype: torch.dtype, groups: int | None, max_shard_bytes: float) -> None:
    """Refuse what `save` would, before a gradient is computed for it.

    Raises:
        ConfigError: The name of an index, a type that is no floating type, one of less than float64 with groups, or
            files without room.
    """
    if _is_index(Path(path)):
        raise ConfigError(
            f"{path} is the name of an index, which a cache in several files gets by itself. Name the cache: "
            f"{shards.whole_name(Path(path))}."
        )
    if dtype not in _ROUNDOFF:
        raise ConfigError(f"dtype={dtype}: a cache is stored in one of {', '.join(map(str, _ROUNDOFF))}.")
    if groups is not None and dtype != torch.float64:
        raise ConfigError(
            f"dtype={dtype}: a cache with {groups} groups is stored in torch.float64, since the gradients of groups do "
            "not cancel as their sum does. Take fewer groups to save space."
        )
    shards.require_room(max_shard_bytes)


def _write(
    path: Path | str,
    parts: Groups | None,
    tensors: dict[str, Tensor],
    header: dict[str, str],
    max_shard_bytes: float,
) -> None:
    if parts is None and sum(t.numel() * t.element_size() for t in tensors.values()) <= max_shard_bytes:
        save_tensors(path, tensors, {**header, "checksum": _checksum(header, tensors)})
        shards.remove(path)
        return
    if parts is not None:
        tensors |= {f"groups/{name}": getattr(parts, name) for name in _OF_GROUPS}
    each = enumerate(parts.totals if parts is not None else [])
    blocks = ({f"{_TOTALS}{group}/{name}": tensor for name, tensor in total.items()} for group, total in each)
    shards.write(path, itertools.chain([tensors], blocks), header, max_shard_bytes)


def exists(path: Path | str) -> bool:
    """Whether there is a cache of this name, in one file or in several."""
    return file_of(path).exists()


def is_cache(path: Path | str) -> bool:
    """Whether a file is a cache or a piece of one, by the names in it; not whether it is undamaged."""
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError):
        return False
    return bool(names) and all(name.startswith(_PREFIXES) for name in names)


def file_of(path: Path | str) -> Path:
    """The file that speaks for a cache: the cache itself, or the index of one in several files."""
    path = Path(path)
    index = shards.index_path(path)
    return index if index.exists() and not path.exists() else path


def files_of(path: Path | str) -> list[Path]:
    """All files of a cache, its index first; just the one of a cache in one file."""
    file = file_of(path)
    return [file, *map(file.with_name, sorted(shards.files_of(file) if _is_index(file) else ()))]


def load(path: Path | str, model: nn.Module, loss_terms: LossTerms) -> Gradient:
    """Read a gradient and verify that it is undamaged and belongs to this model and loss.

    Args:
        path: A file that `save` wrote; of several the name they begin with, or their index.
        model: With the weights and buffers that the gradient was taken at.
        loss_terms: The loss it was taken of (compared by name).

    Returns:
        The gradient, on the CPU, in float64; for a model that is sharded, beside its parameters and in pieces. Those of
        groups are read, and verified, when they are needed.

    Raises:
        FileNotFoundError: No such file.
        CorruptCache: Truncated, altered, or not a gradient cache.
        MismatchError: Made for other parameters, shapes, weights, buffers, or another loss.
    """
    header, tensors, index = _read(path)
    total = _under("total/", tensors)
    noise = _under("noise/", tensors)
    owned = {n: p.detach() for n, p in params.named_parameters(model, lambda _, __: True).items()}
    unknown = [name for name in total if name not in owned]
    if unknown:
        missing = [name for name, p in params.named_parameters(model).items() if name not in total]
        raise MismatchError(
            f"{path} holds gradients of {params.listed(unknown)}, which the model does not have; the model has "
            f"{params.listed(missing)} instead. Build the architecture that was cached, with its parameter names."
        )
    params.require_same_names(total, {name: owned[name] for name in total}, "the cache", "the model")
    origin = Origin(header.weights, header.buffers, header.loss_terms)
    origin.require(Origin.of(model, loss_terms), f"the gradient in {path}")
    stored = next(iter(total.values())).dtype
    groups = None
    if header.micro_batch is not None:
        groups = MicroBatches(header.micro_batch, *(tensors[f"micro_batches/{name}"] for name in _GROUPED))
    parts = None
    if index is not None and header.groups:
        starts, examples, contents = (tensors[f"groups/{name}"] for name in _OF_GROUPS)
        parts = Groups(starts, examples, contents, _Stored(index, header.groups))
    return Gradient(
        total={name: total[name].double() for name in owned if name in total},  # in the model's order
        count=header.count,
        loss=header.loss,
        noise={name: noise[name] for name in owned if name in total},
        roundoff=header.roundoff,
        origin=origin,
        micro_batches=groups,
        storage_roundoff=_ROUNDOFF[stored],
        groups=parts,
        recomputed=tuple(header.recomputed.splitlines()),
    ).placed_like(model)


def _to_write(tensor: Tensor) -> Tensor:
    """Whole, on the CPU; sharded ones are put together one at a time, and kept only where they are written."""
    whole = sharding.whole(tensor)
    return whole.cpu() if distributed.rank() == 0 or whole is tensor else whole.new_empty(0)


def read_header(path: Path | str) -> Header:
    """What a cache says of itself, after verifying that it is undamaged.

    Raises:
        FileNotFoundError: No such file.
        CorruptCache: Truncated, altered, or not a gradient cache.
    """
    header, _, index = _read(path)
    if index is not None:
        index.verify()
    return header


def _read(path: Path | str) -> tuple[Header, dict[str, Tensor], shards.Index | None]:
    """The header, the tensors but for the gradients of groups, and the index if there is one."""
    file = file_of(path)
    if not file.exists():
        how = "with gradient() and cache.save(), or `expunge cache`: of all data, at its weights, before deletions"
        raise FileNotFoundError(f"{path}: no such cache. Make one {how}.")
    if _is_index(file):
        return _read_parts(file)
    try:
        with safe_open(path, "pt") as file:
            fields: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except PermissionError:
        raise
    except (SafetensorError, OSError) as error:
        raise CorruptCache(
            f"{path} cannot be read as safetensors ({error}): it is truncated, damaged, or another kind of file. If it "
            "is the cache, restore it from a copy: it cannot be computed again once records are deleted."
        ) from error
    if fields.get("format") == "pt" and tensors and all(name.startswith(_PREFIXES) for name in tensors):
        whole = shards.whole_of(path)
        raise CorruptCache(
            f"{path} is one piece of the cache {whole}, which is in several files. Give {whole}."
            if whole is not None
            else f"{path} is one piece of a cache in several files, and no index beside it names it. Restore the whole "
            "cache, with its .index.json, from a copy."
        )
    if "format" not in fields or fields["format"] != json.dumps(FORMAT):
        raise CorruptCache(
            f"{path} is a safetensors file but not a gradient cache (its header names the format "
            f"{fields.get('format', 'nowhere')}). Did you give the weights instead of the cache?"
        )
    checksum = fields.pop("checksum", "none")
    if checksum != _checksum(fields, tensors):
        raise CorruptCache(
            f"{path} does not match its checksum {checksum[:12]}…: it was altered after it was written. Restore it "
            "from a copy; it cannot be computed again once records are deleted."
        )
    return _checked_header(path, fields, tensors), tensors, None


def _read_parts(path: Path | str) -> tuple[Header, dict[str, Tensor], shards.Index]:
    index = shards.read_index(path)
    tensors = index.read(name for name in index.holds if not name.startswith(_TOTALS))
    header = _checked_header(index.path, dict(index.fields), tensors)
    meta = [tensors.get(f"groups/{name}", torch.empty(0, 0)) for name in _OF_GROUPS]
    count = len(meta[0])
    expected = {f"{_TOTALS}{group}/{name}" for group in range(count) for name in _under("total/", tensors)}
    found = {name for name in index.holds if name.startswith(_TOTALS)}
    if [len(each) for each in meta] != [count] * 3 or expected != found or (count and header.micro_batch is None):
        raise CorruptCache(
            f"{index.path}: its groups are incomplete. It was not written by cache.save(); make it again."
        )
    return replace(header, groups=count, files=len(index.fingerprints)), tensors, index


class _Stored(Sequence[Params]):
    """The gradients of groups on disk."""

    def __init__(self, index: shards.Index, count: int) -> None:
        self._index, self._count = index, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, group: int) -> Params:  # type: ignore[override]
        if not 0 <= group < self._count:
            raise IndexError(group)
        prefix = f"{_TOTALS}{group}/"
        return _under(prefix, self._index.read(name for name in self._index.holds if name.startswith(prefix)))


def _checked_header(path: Path | str, fields: dict[str, str], tensors: dict[str, Tensor]) -> Header:
    """The header, after comparing what it says with what the file holds."""

    def require(condition: bool, lie: str) -> None:
        if not condition:
            raise CorruptCache(f"{path}: {lie}. The file was not written by cache.save(); make it again.")

    try:
        values = {key: json.loads(value) for key, value in fields.items()}
    except ValueError as error:
        raise CorruptCache(f"{path}: its header cannot be read ({error}). Make the cache again.") from error
    require(
        values.get("version") == VERSION,
        f"format version {values.get('version')!r}, this library reads {VERSION}",
    )
    total = _under("total/", tensors)
    del values["format"]
    for name, value in values.items():
        kind = Header.__annotations__.get(name, object)
        require(isinstance(value, (int, float) if kind is float else kind), f"its header has {name} = {value!r}")
    try:
        header = Header(**values, parameters=len(total), entries=params.size(total))
    except TypeError as error:
        raise CorruptCache(f"{path}: its header is incomplete ({error}). Make the cache again.") from error
    noise = _under("noise/", tensors)
    require(bool(total), "it holds no gradient")
    kinds = {t.dtype for t in total.values()}
    require(len(kinds) == 1 and kinds <= set(_ROUNDOFF), f"its totals are of {sorted(map(str, kinds))}")
    require(
        {n: t.shape for n, t in total.items()} == {n: t.shape for n, t in noise.items()},
        "its totals and rounding floors have different names or shapes",
    )
    require(
        all(t.is_floating_point() and bool((t.isfinite() & (t >= 0)).all()) for t in noise.values()),
        "its rounding floors are not finite and at least zero",
    )
    require(header.count > 0, f"it counts {header.count} terms")
    require(0 < header.roundoff < 1, f"its roundoff is {header.roundoff}")
    require(math.isfinite(header.loss), f"its loss is {header.loss!r}")
    require(all(bool(t.isfinite().all()) for t in total.values()), "its gradient is not finite")
    if header.micro_batch is not None:
        grouped = [tensors.get(f"micro_batches/{name}", torch.empty(0)) for name in _GROUPED]
        numbers, counts, losses, magnitudes = grouped
        require(header.micro_batch > 0, f"its micro-batches have {header.micro_batch} positions")
        require(
            {tensor.shape for tensor in grouped} == {(counts.numel(),)} and bool((numbers.diff() > 0).all()),
            "its micro-batches are incomplete or out of order",
        )
        require(bool((magnitudes.isfinite() & (magnitudes >= 0)).all()), "its micro-batches have impossible magnitudes")
        require(
            int(counts.sum()) == header.count,
            f"it counts {header.count} terms, its micro-batches {counts.sum()}",
        )
        require(
            math.isclose(math.fsum(losses.tolist()), header.loss, rel_tol=1e-9),
            f"its loss is {header.loss}, that of its micro-batches {math.fsum(losses.tolist())}",
        )
    return header


def _is_index(path: Path) -> bool:
    return path == shards.index_path(path)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _checksum(header: dict[str, str], tensors: dict[str, Tensor]) -> str:
    lines = "".join(f"{key}={header[key]}\n" for key in sorted(header))
    return hashlib.sha256(f"{lines}{params.fingerprint(tensors)}\n".encode()).hexdigest()
