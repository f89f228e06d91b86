"""Ascend where no class of what is left points, then fine-tune: blind, from one cached gradient.

Source: this library, docs/findings.md. Deviations from orthogonal ascent: the direction is orthogonal to the gradient
of every class of what is left, and not to their sum alone. That gradients of known data span what must not be moved is
the idea of orthogonal gradient descent (Farajtabar et al., "Orthogonal Gradient Descent for Continual Learning",
AISTATS 2020). The sum is in that span, so that g_D and g_D - g_new have the same part outside of it: the difference is
never taken, and records need no positions. As there, the step is a share of the norm of the weights; the cached
gradient is best one of margins (`logit_margin`); biases and the scales of normalisation stay.

Needs: classifiers; a cached gradient, best of margins, otherwise of the same loss.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from expunge import params
from expunge.access import Blind
from expunge.batches import Batches, micro_batches, to_device
from expunge.errors import MismatchError, NotFinite, NotInformative
from expunge.methods.classifier import in_eval_mode, inputs_and_labels
from expunge.methods.turns import in_turns, require_turns
from expunge.params import Params
from expunge.probe import checked_terms
from expunge.space import Range, Space
from expunge.trace import Trace
from expunge.training import Recipe

ROWS, WAITING = 128, 2048  # records of a class that go through the model at once, and of all that wait for more
PIECE = 2**18  # columns at a time that are float64


@dataclass(frozen=True, kw_only=True)
class ClassOrthogonalAscent:
    """Blind unlearning: ascend where no class of what is left points, and fine-tune, in turns.

    Raises:
        ConfigError: A value that cannot work.
    """

    step: float = 0.1  # length of each ascent, as a share of the norm of the weights that it moves
    rounds: int = 2  # ascents, each followed by its share of the epochs
    fine_tune: Recipe = Recipe(epochs=10, lr=0.03)  # how to train on what is left, all rounds together: your own recipe

    def __post_init__(self) -> None:
        require_turns(self.step, self.rounds, self.fine_tune)


SPACE: Space = {
    "step": Range(0.02, 0.3, log=True),
    "rounds": Range(1, 3),
    "fine_tune.lr": Range(0.003, 0.3, log=True),
}


def class_orthogonal_ascent(
    model: nn.Module, given: Blind, config: ClassOrthogonalAscent, *, seed: int, trace: Trace
) -> nn.Module:
    """Steps W ← W + step ‖W‖ d / ‖d‖ and train(θ, D_new), in turns; d is g_D less its projection on class gradients.

    W are the parameters of two or more dimensions (all, if there are none). The gradient of a class is that of its
    records in what is left, at the trained weights; memory for them is classes x W, in the type of W.

    ``trace.facts``: removed_count and cached_count (loss terms), classes, alone (‖d‖ as a share of ‖g_D‖), ascent
    (length of a step).

    Raises:
        NotInformative: g_D has nothing that the classes do not have.
        MismatchError: More records are left than there were.
        UnsupportedModule: Batches that are not (inputs, class numbers).
        NotFinite: A loss is NaN or infinite.
        ConfigError: There is no cached gradient.
    """
    full = given.cached()
    cached = params.named_parameters(model, full.total)
    weights = {name: p for name, p in cached.items() if p.ndim > 1} or cached
    assert full.noise is not None
    total, noise = ({name: each[name] for name in weights} for each in (full.total, full.noise))

    with trace.stage("class gradients", model):
        of_classes, count = class_gradients(model, weights, given, trace)
        if count > full.count:
            raise MismatchError(
                f"{count} records are left of {full.count} that were cached. Give what is left of the same data."
            )
        direction = outside(total, of_classes)
        length = params.norm(direction)
        # Rounded were both: the cached gradient, and those of the classes, which make up nearly as much.
        floor = 2 * params.norm(noise) + full.storage_roundoff * params.norm(total)
        classes = len(next(iter(of_classes.values())))
        if not length > floor:
            raise NotInformative(
                f"{length:.3g} of the cached gradient (norm {params.norm(total):.3g}) is not along the gradients of "
                f"the {classes} classes, no more than its rounding floor, {floor:.3g}: what was removed has nothing of "
                "its own there. Are records that are left copies of it? Otherwise delete more records at once, or take "
                "orthogonal-ascent, whose floor is lower where records keep their positions."
            )
        ascent = config.step * params.norm({name: p.detach() for name, p in weights.items()})
        trace.facts |= {
            "removed_count": full.count - count,
            "cached_count": full.count,
            "classes": classes,
            "alone": length / params.norm(total),
            "ascent": ascent,
        }
        step = {name: ascent / length * each for name, each in direction.items()}
        del of_classes, direction
    return in_turns(model, step, given, rounds=config.rounds, fine_tune=config.fine_tune, seed=seed, trace=trace)


def class_gradients(
    model: nn.Module, theta: dict[str, nn.Parameter], given: Blind, trace: Trace
) -> tuple[dict[str, Float[Tensor, "classes entries"]], int]:
    """The summed gradient of each class of what is left, and of how many terms all together."""
    device, count = next(iter(theta.values())).device, 0
    sums: dict[int, list[Tensor]] = {}
    with in_eval_mode(model), params.requiring_gradients(model, theta.values()):
        for label, batch in _by_class(given.retain, device):
            terms = checked_terms(given.cached_terms(model, batch))
            if not terms.isfinite().all():
                raise NotFinite(f"the loss of a record of class {label} is NaN or infinite. Look at what is left.")
            found = torch.autograd.grad(terms.sum(), list(theta.values()), materialize_grads=True)
            own = sums.setdefault(label, [torch.zeros_like(p) for p in found])
            torch._foreach_add_(own, list(found))
            count += terms.numel()
    trace.backwarded += count
    rows = [sums.pop(label) for label in sorted(sums)]
    return {name: torch.stack([row.pop().flatten() for row in rows]) for name in reversed(theta)}, count


@torch.no_grad()
def outside(total: Params, spans: dict[str, Float[Tensor, "classes entries"]]) -> Params:
    """The part of a vector that is orthogonal to all rows, float64.

    The weights of the rows are those of least squares, from the products of the rows with each other. Done twice, since
    the first time leaves what rounding those products cost.
    """
    left = {name: each.flatten().to(torch.float64, copy=True) for name, each in total.items()}

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        for name, rows in spans.items():
            for own, wide in zip(left[name].split(PIECE), rows.split(PIECE, dim=1), strict=True):
                yield own, wide.to(own)

    products = torch.stack([wide @ wide.T for _, wide in pieces()]).sum(0)
    scale = products.diagonal().clamp(min=torch.finfo(torch.float64).tiny).rsqrt()
    inverse = torch.linalg.pinv(products * scale[:, None] * scale, hermitian=True)
    for _ in range(2):
        shares = scale * (inverse @ (scale * torch.stack([wide @ own for own, wide in pieces()]).sum(0)))
        for own, wide in pieces():
            own.sub_(shares @ wide)
    return {name: each.view_as(total[name]) for name, each in left.items()}


def _by_class(data: Batches, device: torch.device) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """Batches of one class each: records wait until there are enough of their class, or too many of all."""
    waiting: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def gathered(label: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        inputs, labels = (torch.cat(parts) for parts in zip(*waiting.pop(label), strict=True))
        for batch in zip(inputs.split(ROWS), labels.split(ROWS), strict=True):
            yield label, to_device(batch, device)

    def rows(label: int) -> int:
        return sum(len(labels) for _, labels in waiting[label])

    for _, batch in micro_batches(data, ROWS)[1]:
        inputs, labels = inputs_and_labels(batch, "class-orthogonal-ascent")
        for label in labels.unique().tolist():
            waiting.setdefault(label, []).append((inputs[labels == label], labels[labels == label]))
            if rows(label) >= ROWS:
                yield from gathered(label)
        if sum(map(rows, waiting)) > WAITING:
            for label in list(waiting):
                yield from gathered(label)
    for label in list(waiting):
        yield from gathered(label)
