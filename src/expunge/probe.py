"""The probe before a gradient pass: refuse losses and data under which a difference of passes would mean nothing."""

import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from expunge import sharding
from expunge.batches import (
    Batch,
    Batches,
    LossTerms,
    described,
    indexed,
    length_of,
    plain,
    rows_of,
    tensors_of,
    to_device,
)
from expunge.errors import ConfigError, ExpungeError, NonDeterministicLoss

EXAMPLES = 8  # of a batch
_BATCHES = 2


def checked_terms(terms: object) -> Tensor:
    """What a loss returned, if it is usable.

    Raises:
        ConfigError: Not one loss a term, or without a gradient where one is needed.
    """
    if not isinstance(terms, Tensor) or terms.ndim != 1 or not terms.is_floating_point():
        got = f"shape {tuple(terms.shape)}, {terms.dtype}" if isinstance(terms, Tensor) else type(terms).__name__
        raise ConfigError(
            f"loss_terms returned {got}; it must return one loss a term, shape (terms,). Use reduction='none': a "
            "mean weighs a micro-batch by its size, and the difference of two passes would be meaningless."
        )
    if torch.is_grad_enabled() and not terms.requires_grad:
        raise ConfigError(
            "loss_terms returned a loss without a gradient: it does not depend on the selected parameters. Look "
            "for .detach(), torch.no_grad(), or a wrong choice of parameters."
        )
    return terms


def probe(
    model: nn.Module, loss_terms: LossTerms, data: Batches, device: torch.device, examples: int = EXAMPLES
) -> None:
    """Try a few examples, so many at a time.

    Raises:
        NonDeterministicLoss: The data changes between readings, or a loss between calls or with its batch.
        ConfigError: The loss is reduced, or has no gradient.
        Exception: Whatever the loss raises, with a note of what its batch was.
    """
    firsts, agains = list(_few(data, examples)), list(_few(data, examples))
    a, b = tensors_of(firsts), tensors_of(agains)
    if len(firsts) != len(agains) or len(a) != len(b) or not all(map(_same, a, b)):
        raise NonDeterministicLoss(
            "reading the data twice gave two different first batches. Switch off random augmentation and "
            "shuffling for unlearning: every example once, always with the same preprocessing."
        )
    precision = max(torch.finfo(dtype).eps for dtype in sharding.computed_in(model))
    for number, batch in enumerate(to_device(firsts, device)):
        with torch.no_grad():
            terms, repeated = _terms(loss_terms, model, batch), _terms(loss_terms, model, batch)
            if not _same(terms, repeated, tolerance=0 if device.type == "cpu" else 1e-4):
                raise NonDeterministicLoss(
                    f"the same {length_of(batch) or 'few'} examples gave two different losses in eval mode (summed "
                    f"{float(terms.sum()):.7g}, then {float(repeated.sum()):.7g}). Look for dropout as a function "
                    "(pass training=self.training) or noise in forward()."
                )
            halves = _halves(batch) if number == 0 else None  # a property of the loss: once is enough
            if halves:
                first, second = (_terms(loss_terms, model, half) for half in halves)
                _require_additive(terms, first, second, tolerance=max(1e-3, 64 * precision))


def _terms(loss_terms: LossTerms, model: nn.Module, batch: Batch) -> Tensor:
    """The loss of a batch; what a loss raises over one that it does not know gets a note of what it was."""
    try:
        terms = loss_terms(model, batch)
    except ExpungeError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        note = f"The loss was called with a few examples, in the form of your data: {described(batch)}."
        if isinstance(batch, Mapping):
            note += f" To unpack it gives its keys: take batch[{next(iter(batch), '…')!r}]."
        error.add_note(note)
        raise
    return checked_terms(terms)


def _same(a: Tensor, b: Tensor, tolerance: float = 0) -> bool:
    return (
        a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, tolerance, 1e-4 * tolerance, equal_nan=True)
    )


def _few(data: Batches, examples: int) -> Iterator[Batch]:
    """The first few examples of the first few batches."""
    known = indexed(data)
    if known is not None:
        starts = range(0, min(len(known.positions), examples * _BATCHES), examples)
        yield from known.fetch([slice(start, start + examples) for start in starts])
        return
    for batch in itertools.islice(plain(data), _BATCHES):
        yield rows_of(batch, 0, examples) if length_of(batch) else batch


def _halves(batch: Batch) -> tuple[Batch, Batch] | None:
    length = length_of(batch)
    if length is None or length < 2:
        return None
    return rows_of(batch, 0, length // 2), rows_of(batch, length // 2, length)


def _require_additive(whole: Tensor, first: Tensor, second: Tensor, tolerance: float) -> None:
    if len(whole) != len(first) + len(second):
        raise ConfigError(
            f"loss_terms returned {len(whole)} terms for a few examples, and {len(first)} + {len(second)} for their "
            "two halves. It must return one loss an example (or a token), not a mean: use reduction='none'."
        )
    sums, parts = float(whole.double().sum()), float(first.double().sum() + second.double().sum())
    scale = float(whole.double().abs().sum())
    if abs(sums - parts) > tolerance * scale:
        raise NonDeterministicLoss(
            f"a few examples have a summed loss of {sums:.7g} together and {parts:.7g} in two halves: the loss of "
            "an example depends on its batch. Look for BatchNorm without running statistics, a mean over the "
            "batch, other examples of the batch used as negatives, or outputs (examples, 1) less targets (examples,), "
            "which compares each with all."
        )
