"""`Params`: vectors over a model's parameters, keyed by name and never flattened.

Everything that has one number per weight (a gradient, a score, a mask) is such a dictionary: it is what
``state_dict`` and safetensors speak, and it keeps the layers visible.
"""

import fnmatch
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from expunge import distributed, sharding
from expunge.errors import ConfigError, MismatchError, NotFinite

Params = dict[str, Tensor]
Select = Iterable[str] | Callable[[str, nn.Parameter], bool]

WITHOUT_FLOAT64 = ("mps",)  # device types that cannot hold it
COMPILED = "_orig_mod."  # what torch.compile puts in front of a name
_PIECE = 1 << 18  # entries a streaming step looks at: small enough for a core's cache
_SAMPLE = 1 << 18  # entries whose ranks bracket the threshold


def plain(model: nn.Module) -> nn.Module:
    """The module inside a `torch.compile` wrapper; any other module as it is. The two share storage."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


@contextmanager
def restoring_modes(model: nn.Module) -> Iterator[None]:
    """Put the training flag of every module back behind the block."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def requiring_gradients(model: nn.Module, chosen: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let these parameters require gradients and no others; put all flags back behind the block."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    wanted = {id(p) for p in chosen}
    for p, _ in before:
        p.requires_grad_(id(p) in wanted)
    try:
        yield
    finally:
        for p, required in before:
            p.requires_grad_(required)


def named_parameters(model: nn.Module, select: Select | None = None) -> dict[str, nn.Parameter]:
    """The parameters that training moves, by name; a tied parameter once, under its first name.

    Args:
        model: Any module; names are the same whether it is compiled or not.
        select: Names, or a predicate of name and parameter. Without it, every parameter that requires a
            gradient.

    Raises:
        ConfigError: A name that does not exist, a complex parameter, nothing left to train, or a model inside
            DistributedDataParallel.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ConfigError(
            "the model is wrapped in DistributedDataParallel. Give the model itself, model.module: gradient passes and "
            "training deal their work out by themselves."
        )
    everything = {name.replace(COMPILED, ""): p for name, p in model.named_parameters()}
    if select is None:
        chosen = {name: p for name, p in everything.items() if p.requires_grad}
    elif callable(select):
        chosen = {name: p for name, p in everything.items() if select(name, p)}
    else:
        wanted = list(select)
        unknown = [name for name in wanted if name not in everything]
        if unknown:
            raise ConfigError(f"parameters={unknown!r}: the model has no such parameter. It has {listed(everything)}.")
        chosen = {name: everything[name] for name in everything if name in set(wanted)}
    if unreal := [name for name, p in chosen.items() if p.is_complex() and p.requires_grad]:
        raise ConfigError(
            f"parameters={unreal!r} are complex, of type {chosen[unreal[0]].dtype}: knowledge values and floors "
            "are those of real numbers. Keep real and imaginary parts in parameters of their own (torch.view_as_real)."
        )
    if not chosen:
        raise ConfigError(
            f"{type(plain(model)).__name__} has nothing trainable: {len(everything)} parameters, none of which "
            "requires a gradient and was selected. Call requires_grad_(True) on those that training moved."
        )
    return chosen


def named_without(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """The names of the parameters that training moves, but for those that match a pattern.

    Args:
        model: Any module.
        patterns: Names, or patterns of the shell: ``*`` for anything, ``?`` for one character.

    Raises:
        ConfigError: A pattern that matches none, or nothing that is left.
    """
    names = list(named_parameters(model))
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(f"{pattern!r} matches no trainable parameter. The model has {listed(names)}.")
    left = [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if not left:
        raise ConfigError(f"{listed(patterns)} leave out every parameter: nothing remains to be cached.")
    return left


def snapshot(parameters: Mapping[str, nn.Parameter]) -> Params:
    """A copy of the values, detached from the model."""
    return {name: p.detach().clone() for name, p in parameters.items()}


def state(model: nn.Module) -> Params:
    """Everything that a checkpoint keeps and that is a tensor: a module may have a state of its own besides."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def wide(device: torch.device) -> torch.dtype:
    """The type to add up in: float64, where a device has it."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def size(params: Mapping[str, Tensor]) -> int:
    """How many entries there are over all tensors."""
    return sum(tensor.numel() for tensor in params.values())


def norm(params: Mapping[str, Tensor]) -> float:
    """The Euclidean norm over all entries, accumulated in float64."""
    return math.sqrt(sum(_sum(tensor.double().square()) for tensor in params.values()))


def total(params: Mapping[str, Tensor]) -> float:
    """The sum of all entries, accumulated in float64."""
    return sum(map(_sum, params.values()))


def dot(a: Params, b: Params) -> float:
    """The inner product over the names of the first, accumulated in float64, on the device of the first."""
    return sum(_sum(tensor * b[name].to(tensor.device)) for name, tensor in a.items())


def _sum(tensor: Tensor) -> float:
    return float(sharding.whole(tensor.sum(dtype=torch.float64)))


def count(masks: Mapping[str, Bool[Tensor, "..."]]) -> int:
    """How many entries are marked."""
    return sum(int(sharding.whole(mask.count_nonzero())) for mask in masks.values())


def subtract(a: Params, b: Params) -> Params:
    """Entry by entry, a - b; both must have the same names and shapes."""
    require_same_names(a, b, "the first", "the second")
    return {name: a[name] - b[name].to(a[name].device) for name in a}


def require_same_names(a: Mapping[str, Tensor], b: Mapping[str, Tensor], a_is: str, b_is: str) -> None:
    """Refuse two vectors over different parameters.

    Raises:
        MismatchError: Names that only one of them has, or the first name whose shapes differ.
    """
    only_a, only_b = [n for n in a if n not in b], [n for n in b if n not in a]
    if only_a or only_b:
        raise MismatchError(
            f"{a_is} and {b_is} do not have the same parameters: only {a_is} has {listed(only_a)}; only {b_is} "
            f"has {listed(only_b)}. Use the model (and the subset of parameters) the first was made with."
        )
    for name in a:
        if a[name].shape != b[name].shape:
            raise MismatchError(
                f"parameter {name!r} has shape {tuple(a[name].shape)} in {a_is} and {tuple(b[name].shape)} in "
                f"{b_is}. Use the same architecture for both."
            )


def require_finite(params: Mapping[str, Tensor], what: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        NotFinite: Names the first tensor that holds one, and how many.
    """
    for name, tensor in params.items():
        if tensor.is_floating_point() and not bool(sharding.whole(torch.isfinite(tensor).all())):
            bad = count({name: ~torch.isfinite(tensor)})
            raise NotFinite(
                f"{what}: tensor {name!r} has {bad} of {tensor.numel()} entries that are NaN or infinite. "
                "Find the step that produced them; nothing computed from them would mean anything."
            )


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes; the order of the names does not matter.

    ``docs/cache-format.md`` specifies it, so that another program can compute it. Sharded tensors are put together,
    one at a time.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = sharding.whole(tensors[name].detach()).contiguous().cpu()
        digest.update(f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_fingerprint(model: nn.Module) -> str:
    """The fingerprint of all parameters, trainable or not."""
    return fingerprint({n.replace(COMPILED, ""): p for n, p in model.named_parameters()})


def buffers_fingerprint(model: nn.Module) -> str:
    """The fingerprint of the buffers that a checkpoint keeps (BatchNorm statistics and the like)."""
    kept = set(model.state_dict())
    return fingerprint({n.replace(COMPILED, ""): b for n, b in model.named_buffers() if n in kept})


def smallest(scores: Params, k: int) -> dict[str, Bool[Tensor, "..."]]:
    """Mark the k entries with the smallest scores over all tensors, exactly.

    Entries with equal scores are taken in order: by tensor, then by position inside it. A score of +infinity
    means "never": such entries are not marked, so fewer than k may be.

    A random sample brackets the k-th smallest score, one pass over the scores counts what lies below the
    bracket and keeps the few entries inside it, and the answer is selected among those: no sort, no copy of
    the scores, any size (``torch.quantile`` refuses more than 2^24 entries). The sample decides the speed,
    never the result.

    Args:
        scores: One real number per parameter entry.
        k: How many to mark, 0 or more.

    Returns:
        A mask per tensor, on the device of its scores.

    Raises:
        ConfigError: k is negative.
        NotFinite: A score is NaN.
    """
    if k < 0:
        raise ConfigError(f"k={k}: the number of entries to choose cannot be negative.")
    masks = {
        name: torch.zeros_like(score, dtype=torch.bool, memory_format=torch.contiguous_format)
        for name, score in scores.items()
    }
    k = min(k, size(scores))
    if k == 0:
        return masks
    if len({score.dtype for score in scores.values()}) > 1:
        scores = {name: score.double() for name, score in scores.items()}
    shared = any(map(sharding.is_piece, scores.values()))
    here = {name: sharding.here(score).contiguous() for name, score in scores.items()}
    marked = {name: sharding.here(mask) for name, mask in masks.items()}
    threshold = _kth_smallest(scores, here, k, shared)
    below_or_tied = 0
    for score, mask in zip(_pieces(here), _pieces(marked), strict=True):
        torch.le(score, threshold, out=mask) if threshold < math.inf else torch.lt(score, threshold, out=mask)
        below_or_tied += int(mask.count_nonzero())
    _unmark_ties(here, marked, threshold, _of_all(below_or_tied, shared) - k, shared)
    return masks


def _unmark_ties(here: Params, marked: Params, threshold: float, surplus: int, shared: bool) -> None:
    """Of the entries equal to the threshold, the last ones do not fit in: take them out again, from the end."""
    ties: dict[str, list[int]] = {}  # by process, whose pieces of a tensor follow each other
    if shared and surplus > 0:
        own = [int((score == threshold).count_nonzero()) for score in here.values()]
        ties = dict(zip(here, map(list, zip(*distributed.counts(own), strict=True)), strict=True))
    for name in reversed(here):
        if surplus <= 0:
            break
        elsewhere = ties[name][distributed.rank() + 1 :] if shared else []
        left = surplus - sum(elsewhere)
        for score, mask in zip(reversed([*_pieces({name: here[name]})]), reversed([*_pieces({name: marked[name]})]),
                               strict=True):  # fmt: skip
            if left <= 0:
                break
            tied = (score == threshold).nonzero().squeeze(1)[-left:]
            mask[tied] = False
            left -= len(tied)
        surplus = surplus - sum(ties[name]) if shared else left


def _of_all(number: int, shared: bool) -> int:
    """The sum over processes, of what each counted in its pieces."""
    return sum(each for (each,) in distributed.counts([number])) if shared else number


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    for tensor in tensors.values():
        if tensor.numel():
            yield from tensor.view(-1).split(_PIECE)


def _kth_smallest(scores: Params, here: Params, k: int, shared: bool) -> float:
    entries = size(scores)
    sample = _sample(scores, here, min(entries, _SAMPLE), shared).sort().values
    # A sampled rank is off by at most sqrt(sample) / 2 in standard deviation: eight of those on either side.
    middle, margin = k / entries * len(sample), 4 * math.sqrt(len(sample))

    def how_many(compare: Callable[[Tensor, float], Tensor], bound: float) -> int:
        return _of_all(sum(int(compare(piece, bound).count_nonzero()) for piece in _pieces(here)), shared)

    while True:
        low_rank, high_rank = math.floor(middle - margin), math.ceil(middle + margin)
        low = float(sample[low_rank]) if low_rank >= 0 else -math.inf
        high = float(sample[high_rank]) if high_rank < len(sample) else math.inf
        unranked, upto_low, inside = 0, 0, []
        for piece in _pieces(here):
            unranked += bool(piece.max().isnan())
            at_most_low = piece <= low
            upto_low += int(at_most_low.count_nonzero())
            if low < high:
                inside.append(piece[at_most_low ^ (piece < high)].to(sample.device))
        if _of_all(unranked, shared):
            name = next(n for n, score in scores.items() if bool(sharding.whole(score.isnan().any())))
            raise NotFinite(f"a score of {name!r} is NaN, so it has no rank. Check the selector.")
        kept = torch.cat(inside) if inside else sample[:0]
        kept, upto_low = distributed.joined(kept) if shared else kept, _of_all(upto_low, shared)
        if k > upto_low + len(kept):
            if high == math.inf or k <= how_many(torch.le, high):
                return high
        elif k > upto_low:
            return float(kept.kthvalue(k - upto_low).values)
        elif low == -math.inf or k > how_many(torch.lt, low):
            return low
        margin *= 8  # the bracket missed


def _sample(scores: Params, here: Params, count: int, shared: bool) -> Tensor:
    """Scores at random positions, with repetition; the same ones for the same shapes, on every process."""
    ends = torch.tensor([score.numel() for score in scores.values()]).cumsum(0)
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(int(ends[-1]), (count,), generator=generator).sort().values
    parts, start = [], 0
    for (name, score), end in zip(scores.items(), ends.tolist(), strict=True):
        first = start + sharding.first_entry(score)
        piece = here[name].view(-1)
        own = positions[(positions >= first) & (positions < first + len(piece))] - first
        parts.append(piece[own.to(piece.device)].cpu())
        start = end
    return distributed.joined(torch.cat(parts)) if shared else torch.cat(parts)


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first few names, for an error message."""
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:most]) or "none"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
