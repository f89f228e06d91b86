"""Ascend where no class of what is left points, then fine-tune: blind, from one cached gradient.

Source: this library, docs/findings.md. Deviations from orthogonal ascent: the direction is orthogonal to the gradient
of every class of what is left, and not to their sum alone. That gradients of known data span what must not be moved is
the idea of orthogonal gradient descent (Farajtabar et al., "Orthogonal Gradient Descent for Continual Learning",
AISTATS 2020). The sum is in that span, so that g_D and g_D - g_new have the same part outside of it: the difference is
never taken, and records need no positions. As there, the step is a share of the norm of the weights; the cached
gradient is best one of margins (`logit_margin`); biases and the scales of normalisation stay.

Needs: classifiers; a cached gradient, best of margins, otherwise of the same loss.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor, nn

from expunge import distributed, params, sharding
from expunge.access import Blind
from expunge.batches import Batches, micro_batches, to_device
from expunge.checkpointing import recomputing, repeated_modules
from expunge.errors import MismatchError, NotFinite, NotInformative
from expunge.gradient import spread
from expunge.methods.classifier import inputs_and_labels
from expunge.methods.turns import in_turns, moved_weights, require_turns, tenths
from expunge.params import Params
from expunge.passes import exact_kernels, only_gradients_of
from expunge.probe import checked_terms
from expunge.seeds import keeping_random_state
from expunge.space import Range, Space
from expunge.trace import Trace
from expunge.training import Recipe

ROWS = 128  # records of a class that go through the model at once
WAITING, FEW = 2048, 32  # records of all classes that wait for more of their own: so many, or so many a class
PIECE = 2**22  # entries of class gradients at a time that are float64


@dataclass(frozen=True, kw_only=True)
class ClassOrthogonalAscent:
    """Blind unlearning: ascend where no class of what is left points, and fine-tune, in turns.

    Raises:
        ConfigError: A value that cannot work.
    """

    step: float = 0.1  # length of each ascent, as a share of the norm of the weights; where a tenth was removed
    growth: float = 2 / 3  # with which power of the share that was removed it grows; 0: the same step for all
    rounds: int = 2  # ascents, each followed by its share of the epochs
    fine_tune: Recipe = Recipe(epochs=10, lr=0.03)  # how to train on what is left, all rounds together: your own recipe

    def __post_init__(self) -> None:
        require_turns(self)


SPACE: Space = {
    "step": Range(0.02, 0.3, log=True),
    "rounds": Range(1, 3),
    "fine_tune.lr": Range(0.003, 0.3, log=True),
}


def class_orthogonal_ascent(
    model: nn.Module, given: Blind, config: ClassOrthogonalAscent, *, seed: int, trace: Trace
) -> nn.Module:
    """Steps W ← W + s ‖W‖ d / ‖d‖ and train(θ, D_new), in turns; d is g_D less its projection on class gradients.

    W are the parameters of two or more dimensions (all, if there are none). The gradient of a class is that of its
    records in what is left, at the trained weights; memory for them is classes x W, 4 bytes an entry in float32. Of
    the share r that was removed s is step (10 r)^growth, r at most ¼.

    ``trace.facts``: removed_count and cached_count (loss terms), classes, alone (‖d‖ as a share of ‖g_D‖),
    ascent_share (s), ascent (its length).

    Raises:
        NotInformative: g_D has nothing that the classes do not have.
        MismatchError: More records are left than there were.
        UnsupportedModule: Batches that are not (inputs, class numbers).
        NotFinite: A loss is NaN or infinite.
        ConfigError: There is no cached gradient.
    """
    weights = moved_weights(model, given.cached().total)
    with trace.stage("class gradients", model):
        direction = _direction(model, weights, given, trace)
    return in_turns(model, direction, given, config, tenths(trace), seed=seed, trace=trace)


def _direction(model: nn.Module, weights: dict[str, nn.Parameter], given: Blind, trace: Trace) -> Params:
    """The unit vector along what the cached gradient has and no class of what is left has."""
    full = given.cached()
    assert full.noise is not None
    total = {name: full.total[name] for name in weights}
    of_classes, count = class_gradients(model, weights, given, trace)
    if count > full.count:
        raise MismatchError(
            f"{count} records are left of {full.count} that were cached. Give what is left of the same data."
        )
    alone = outside(total, of_classes)
    size, length = params.norm(total), params.norm(alone)
    # Rounded were both, the cached gradient and those of the classes, and in other batches, so that nothing cancels.
    # With nothing removed up to 4 times the norm of the spread floor was left, in convolutions with BatchNorm.
    rounded = params.norm({name: spread(full.noise[name]) for name in weights})
    floor = 8 * rounded + full.storage_roundoff * size
    classes = len(next(iter(of_classes.values())))
    if not length > floor:
        raise NotInformative(
            f"{length:.3g} of the cached gradient (norm {size:.3g}) is not along the gradients of the {classes} "
            f"classes, no more than its rounding floor, {floor:.3g}: what was removed has nothing of its own there. "
            "Are records that are left copies of it? Otherwise delete more records at once, or take orthogonal-ascent, "
            "whose floor is lower where records keep their positions."
        )
    trace.facts |= {
        "removed_count": full.count - count,
        "cached_count": full.count,
        "classes": classes,
        "alone": length / size,
    }
    return {name: each / length for name, each in alone.items()}


def class_gradients(
    model: nn.Module, theta: dict[str, nn.Parameter], given: Blind, trace: Trace
) -> tuple[dict[str, Float[Tensor, "classes entries"]], int]:
    """The summed gradient of each class of what is left, float32 or better, and of how many terms all together."""
    device, count = next(iter(theta.values())).device, 0.0
    in_pieces = any(map(sharding.is_piece, theta.values()))
    sums: dict[int, list[Tensor]] = {}
    again = recomputing(repeated_modules(model, given.cached().recomputed).values())
    with keeping_random_state(), exact_kernels(device), only_gradients_of(model, theta), again:
        for label, batch in _by_class(given.retain, device):
            rows = distributed.mine(len(batch[1]))
            part = 1 / distributed.world() if rows == slice(0, len(batch[1])) else 1.0  # if all go through all of it
            terms = checked_terms(given.cached_terms(model, (batch[0][rows], batch[1][rows])))
            if not terms.isfinite().all():
                raise NotFinite(f"the loss of a record of class {label} is NaN or infinite. Look at what is left.")
            found = _gradient(part * terms.sum(), theta, in_pieces)
            if label not in sums:
                sums[label] = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in found]
            for mine, more in zip(sums[label], found, strict=True):
                mine.add_(more)
            count += part * terms.numel()
    everyones = round(distributed.summed([count])[0])
    trace.backwarded += everyones
    of_class = [sums.pop(label) for label in sorted(sums)]
    stacked = {name: torch.stack([each.pop().flatten() for each in of_class]) for name in reversed(theta)}
    return stacked if in_pieces else {name: distributed.added(each) for name, each in stacked.items()}, everyones


def _gradient(loss: Tensor, theta: dict[str, nn.Parameter], in_pieces: bool) -> list[Tensor]:
    """The gradient of the own part of a loss; for a model in pieces that of all parts, and its pieces that are here."""
    if not in_pieces:
        return list(torch.autograd.grad(loss, list(theta.values()), materialize_grads=True))
    (distributed.world() * loss).backward()  # FSDP2 leaves the mean over processes
    found = []
    for p in theta.values():
        found.append(torch.zeros_like(sharding.here(p.detach())) if p.grad is None else sharding.here(p.grad))
        p.grad = None
    return found


@torch.no_grad()
def outside(total: Params, spans: dict[str, Float[Tensor, "classes entries"]]) -> Params:
    """The part of a vector that is orthogonal to all rows, float64.

    The weights of the rows are those of least squares, from the products of the rows with each other. Done twice, since
    the first time leaves what rounding those products cost.
    """
    left = {name: sharding.here(each).flatten().to(torch.float64, copy=True) for name, each in total.items()}
    in_pieces = any(map(sharding.is_piece, total.values()))
    columns = max(PIECE // len(next(iter(spans.values()))), 1)

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        for name, rows in spans.items():
            for own, wide in zip(left[name].split(columns), rows.split(columns, dim=1), strict=True):
                yield own, wide.to(own)

    def summed(parts: Iterator[Tensor]) -> Tensor:
        own = reduce(torch.add, parts)
        return distributed.added(own) if in_pieces else own

    products = summed(wide @ wide.T for _, wide in pieces())
    if not products.isfinite().all():
        raise NotFinite("the gradient of a class is NaN or infinite.")
    scale = products.diagonal().clamp(min=torch.finfo(torch.float64).tiny).rsqrt()
    inverse = torch.linalg.pinv(products * scale[:, None] * scale, hermitian=True)
    for _ in range(2):
        shares = scale * (inverse @ (scale * summed(wide @ own for own, wide in pieces())))
        for own, wide in pieces():
            own.sub_(shares @ wide)
    return {name: sharding.pieced(each, total[name]) for name, each in left.items()}


def _by_class(data: Batches, device: torch.device) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """Batches of one class each: records wait until there are enough of their class, or too many of all.

    Records of other shapes wait by themselves: texts may be padded to the length of their batch.
    """
    waiting: dict[tuple[int, torch.Size], list[tuple[Tensor, Tensor]]] = {}
    counts: Counter[tuple[int, torch.Size]] = Counter()
    classes: set[int] = set()

    def gathered(key: tuple[int, torch.Size]) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        del counts[key]
        inputs, labels = (torch.cat(parts) for parts in zip(*waiting.pop(key), strict=True))
        for batch in zip(inputs.split(ROWS), labels.split(ROWS), strict=True):
            yield key[0], to_device(batch, device)

    for _, batch in micro_batches(data, ROWS)[1]:
        inputs, labels = inputs_and_labels(batch, "class-orthogonal-ascent")
        for label in labels.unique().tolist():
            of_class, key = labels == label, (label, inputs.shape[1:])
            classes.add(label)
            waiting.setdefault(key, []).append((inputs[of_class.to(inputs.device)], labels[of_class]))
            counts[key] += int(of_class.sum())
            if counts[key] >= ROWS:
                yield from gathered(key)
        if counts.total() > max(WAITING, FEW * len(classes)):
            for key in list(waiting):
                yield from gathered(key)
    for key in list(waiting):
        yield from gathered(key)
