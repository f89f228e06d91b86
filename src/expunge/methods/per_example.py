"""Squares of the gradient of every loss term on its own: what a diagonal Fisher information is made of.

The square of a batch's mean gradient is something else; here every term has a gradient of its own. Models of common
layers take one batched pass (``layer_squares.py``), once its answer on a few examples is that of the definition; all
others `torch.func.vmap`, and what that cannot take apart (recurrent layers, branches on values) one example at a time.
"""

import math
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from expunge import params, progress
from expunge.batches import Batch, Batches, LossTerms, indexed, map_tensors, plain, tensors_of, to_device
from expunge.errors import ConfigError, NotFinite, UnsupportedModule
from expunge.methods.layer_squares import layer_squares
from expunge.params import Params
from expunge.passes import layer_by_layer
from expunge.probe import probe
from expunge.seeds import keeping_random_state, stream
from expunge.trace import Trace

CACHED = 2**23  # numbers that come out of the layers in a batched pass on a processor: more of them wait for its memory


def squared_gradients(
    model: nn.Module,
    loss_terms: LossTerms,
    data: Batches,
    *,
    chunk: int = 32,
    limit: int | None = None,
    seed: int = 0,
    trace: Trace | None = None,
) -> Params:
    """The SUM over terms of the squared gradient of each term, Σ_n (∇ℓ_n)², entry by entry, in eval mode.

    Divide by `examples_in` for the mean over examples. The model is left as it was found.

    Args:
        model: Any module; the parameters that require a gradient take part.
        loss_terms: One or more terms an example, as many for every one.
        data: Any; batches whose tensors all have an example a row.
        chunk: Gradients that vmap holds at a time; it bounds the memory. A batched pass takes up to four times
            as many examples, and squares the gradients of a few at a time.
        limit: Only so many examples, drawn at random.
        seed: Names the stream they are drawn from.
        trace: Where to count the terms, as ``backwarded``.

    Returns:
        Sums on the model's device, in float64 (float32 on devices without it); those over the examples of a chunk are
        in the precision of the gradients.

    Raises:
        UnsupportedModule: The batches cannot be taken apart into examples, or `torch.func.vmap` cannot take the model
            apart and the loss gives several terms an example.
        NonDeterministicLoss: Dropout, noise, or a loss that depends on the batch.
        NotFinite: A loss or a gradient is NaN or infinite.
        ConfigError: A chunk or a limit below 1, or a loss that gives no terms.
    """
    _require_positive("chunk", chunk)
    _require_positive("limit", limit)
    model = params.plain(model)
    theta = params.named_parameters(model)
    device = next(iter(theta.values())).device
    total = {n: torch.zeros(p.shape, dtype=params.wide(device), device=device) for n, p in theta.items()}
    with params.restoring_modes(model), keeping_random_state(), torch.enable_grad(), layer_by_layer():
        model.eval()
        probe(model, loss_terms, data, device)
        few = to_device(next(_in_batches(data, 3, None, 0)), device)
        numbers, terms_an_example = _try_layers(model, loss_terms, theta, few)
        most = CACHED // numbers if numbers and device.type == "cpu" else 4 * chunk
        size = min(4 * chunk, max(chunk, most)) if numbers else max(1, chunk // terms_an_example)
        by_vmap = partial(_squares_by_vmap, model, loss_terms, theta, chunk, terms_an_example)
        with progress.task("per-example gradients", None) as advance:
            for each in _in_batches(data, size, limit, seed):
                batch = to_device(each, device)
                found = layer_squares(model, loss_terms, theta, batch, _length(batch)) if numbers else None
                squares, terms = found[:2] if found else by_vmap(batch)
                if not bool(terms.isfinite().all()):
                    bad = float(terms[~terms.isfinite()][0])
                    raise NotFinite(f"the loss of an example is {bad}. Look at its inputs and its target.")
                for name, square in squares.items():
                    total[name] += square
                if trace is not None:
                    trace.backwarded += terms.numel()
                advance()
    params.require_finite(total, "the squared gradients")
    return total


def examples_in(data: Batches, limit: int | None = None) -> int:
    """How many examples `squared_gradients` goes through; data without positions is read once to know.

    Raises:
        UnsupportedModule: The tensors of a batch do not all have an example a row.
    """
    known = indexed(data)
    with keeping_random_state():
        count = len(known.positions) if known is not None else sum(_length(batch) for batch in plain(data))
    return count if limit is None else min(count, limit)


class _Loss(nn.Module):
    """A loss as a module, so that its model can be called with other weights."""

    def __init__(self, model: nn.Module, loss_terms: LossTerms) -> None:
        super().__init__()
        self.model, self.loss_terms = model, loss_terms

    def forward(self, batch: Batch) -> Tensor:
        return self.loss_terms(self.model, batch)


def _squares_by_vmap(
    model: nn.Module,
    loss_terms: LossTerms,
    theta: dict[str, nn.Parameter],
    chunk: int,
    terms_an_example: int,
    batch: Batch,
) -> tuple[Params, Tensor]:
    """The squared gradient of every term, summed over the terms of a batch, and the terms."""
    loss = _Loss(model, loss_terms)
    values = {f"model.{name}": p.detach() for name, p in theta.items()}

    def of_one(*example: Tensor) -> tuple[Params, Tensor]:
        tensors = iter(example)
        alone = map_tensors(batch, lambda _: next(tensors).unsqueeze(0))
        pulled: Any = vjp(lambda now: functional_call(loss, now, (alone,)), values)
        terms, pull = pulled
        squares = {name: torch.zeros_like(p, dtype=params.wide(p.device)) for name, p in theta.items()}
        for directions in torch.eye(len(terms), dtype=terms.dtype, device=terms.device).split(chunk):
            (gradients,) = vmap(pull)(directions)
            squares = {n: own + gradients[f"model.{n}"].to(own.dtype).square().sum(0) for n, own in squares.items()}
        return squares, terms

    try:
        with warnings.catch_warnings():
            # Of attention, which asks for issues at torch.
            warnings.filterwarnings("ignore", "There is a performance drop")
            squares, terms = vmap(of_one)(*tensors_of(batch))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if terms_an_example == 1:
            return _squares_one_by_one(model, loss_terms, theta, batch)
        raise UnsupportedModule(
            f"{type(model).__name__} and its loss cannot be taken apart into examples by torch.func.vmap: "
            f"{str(error).splitlines()[0]} Look for .item(), if on a tensor, boolean indexing, or in-place changes of "
            "buffers in forward() or the loss (of documents take causal_lm_documents in place of causal_lm: where an "
            "example has one term nothing is taken apart); or take a method without a Fisher information."
        ) from error
    return {name: square.sum(0) for name, square in squares.items()}, terms


def _squares_one_by_one(
    model: nn.Module, loss_terms: LossTerms, theta: dict[str, nn.Parameter], batch: Batch
) -> tuple[Params, Tensor]:
    """The same by the definition: a backward pass for every term of every example.

    Raises:
        UnsupportedModule: Examples have no terms, or not all as many.
    """
    length, values = _length(batch), list(theta.values())
    squares = {name: torch.zeros(p.shape, dtype=params.wide(p.device), device=p.device) for name, p in theta.items()}
    every = []
    for row in range(length):
        terms = loss_terms(model, _rows(batch, torch.tensor([row])))
        for term in terms:
            slopes = torch.autograd.grad(term, values, retain_graph=True, materialize_grads=True)
            for own, slope in zip(squares.values(), slopes, strict=True):
                own.add_(slope.to(own.dtype).square())
        every.append(terms.detach())
    counts = {len(terms) for terms in every}
    if len(counts) != 1 or 0 in counts:
        raise UnsupportedModule(
            f"loss_terms gives {sorted(counts)} terms for the first {length} examples of a batch, and squares of them "
            "need as many for each, at least one. For terms without a target, return a loss of 0 instead of none."
        )
    return squares, torch.cat(every)


def _try_layers(model: nn.Module, loss_terms: LossTerms, theta: dict[str, nn.Parameter], few: Batch) -> tuple[int, int]:
    """How many numbers an example needs in `layer_squares`, and how many terms it has.

    The first is 0 where `layer_squares` does not give what the definition says for a few examples.
    """
    length = _length(few)
    truth, terms = _squares_one_by_one(model, loss_terms, theta, few)
    terms_an_example = len(terms) // length
    found = layer_squares(model, loss_terms, theta, few, length)
    if found is None:
        return 0, terms_an_example
    values = list(theta.values())
    tolerance = 64 * max(torch.finfo(p.dtype).eps for p in values)
    if values[0].device.type != "cpu":  # where kernels may round float32 to fewer bits
        tolerance = max(tolerance, 1e-2)
    errors = [(found[0][name] - own).norm() / own.norm() for name, own in truth.items() if own.any()]
    errors += [found[0][name].norm() for name, own in truth.items() if not own.any()]
    right = all(float(error) <= tolerance for error in errors)
    return math.ceil(found[2] / length) if right else 0, terms_an_example


def _in_batches(data: Batches, size: int, limit: int | None, seed: int) -> Iterator[Batch]:
    """The data, or a random part of it, in batches of at most this size."""
    known = indexed(data)
    if known is None:
        kept = None if limit is None else _drawn(examples_in(data), limit, seed)
        start = 0
        for batch in plain(data):
            rows = torch.arange(_length(batch))
            if kept is not None:
                rows = rows[torch.isin(rows + start, kept)]
            start += _length(batch)
            for part in rows.split(size) if len(rows) else ():
                yield _rows(batch, part)
    else:
        count = len(known.positions)
        kept = torch.arange(count) if limit is None else _drawn(count, limit, seed)
        yield from known.fetch(kept.split(size))


def _rows(batch: Batch, rows: Int[Tensor, " _"]) -> Batch:
    return map_tensors(batch, lambda tensor: tensor[rows.to(tensor.device)])


def _drawn(count: int, limit: int, seed: int) -> Int[Tensor, " _"]:
    """The rows of so many examples, in ascending order."""
    return torch.randperm(count, generator=stream(seed, "per-example"))[:limit].sort().values


def _length(batch: Batch) -> int:
    """The number of examples in a batch."""
    lengths = {len(tensor) if tensor.ndim else 0 for tensor in tensors_of(batch)}
    if len(lengths) != 1 or 0 in lengths:
        raise UnsupportedModule(
            f"the tensors of a batch have {sorted(lengths)} rows: for gradients of single examples each needs one row "
            "an example. Give Examples(x, y), a Dataset, or batches of such tensors."
        )
    return lengths.pop()


def _require_positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ConfigError(f"{name}={value}: must be at least 1.")
