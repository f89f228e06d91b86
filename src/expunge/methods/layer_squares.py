"""Squared gradients of single examples from one batched pass, for common layers: much faster than `torch.func.vmap`.

The gradient of a layer's weight on one example follows from what went into the layer and the gradient of what came out
(Goodfellow, "Efficient Per-Example Gradient Computations", 2015), and a batched backward pass has both for all of them.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional

from expunge import params
from expunge.batches import Batch, LossTerms
from expunge.params import Params

Slopes = Float[Tensor, "examples terms ..."]  # the gradients of an output, for some terms of every example
Rule = Callable[[nn.Module, Tensor, Slopes], Params]  # with a layer's input: squared gradients, summed over both
PIECE = 2**21  # numbers held at a time while the gradients of a layer are squared: what fits into a processor's cache
SLOPES = 2**26  # and while the gradients of outputs are held


def layer_squares(
    model: nn.Module, loss_terms: LossTerms, theta: dict[str, nn.Parameter], batch: Batch, examples: int
) -> tuple[Params, Tensor, int] | None:
    """The squared gradient of every term, summed over the terms of a batch, the terms, and how many numbers they need.

    Whoever calls it compares its answer with the definition on a few examples: parameters used outside their layer, or
    a loss with its terms in another order, are not seen here.

    Args:
        model: In eval mode.
        loss_terms: As many terms for each example, those of an example in a row.
        theta: Parameters that take part.
        batch: The examples.
        examples: How many they are.

    Returns:
        None where a parameter belongs to a layer without a rule, or to one that ran more than once.
    """
    owners = _owners(model, theta)
    if owners is None:
        return None
    with recorded(list(owners)) as calls:
        terms = loss_terms(model, batch)
    if len(terms) % examples or any(len(seen) > 1 for seen in calls.values()):
        return None
    ran = {layer: seen[0] for layer, seen in calls.items() if seen}
    if any(shape[:1] != (examples,) for call in ran.values() for shape in (call.entered.shape, call.shape)):
        return None
    total = {name: torch.zeros(p.shape, dtype=params.wide(p.device), device=p.device) for name, p in theta.items()}
    outputs = [call.output for call in ran.values()]
    numbers = max(sum(call.shape.numel() for call in ran.values()), 1)
    at_once = max(1, SLOPES // numbers)
    for group in terms.view(examples, -1).sum(0).split(at_once):
        found = [torch.autograd.grad(term, outputs, retain_graph=True, allow_unused=True) for term in group]
        with torch.no_grad():
            for (layer, call), slopes in zip(ran.items(), zip(*found, strict=True), strict=True):
                known = [slope for slope in slopes if slope is not None]
                if known:
                    _add_squares_(total, owners[layer], layer, call.entered, _stacked(known))
    return total, terms.detach(), numbers


def _stacked(slopes: list[Tensor]) -> Slopes:
    return torch.stack(slopes, 1) if len(slopes) > 1 else slopes[0].unsqueeze(1)  # one of them is not copied


def _add_squares_(total: Params, names: dict[str, str], layer: nn.Module, entered: Tensor, slopes: Slopes) -> None:
    """Add the squares of a layer to the total, a few examples at a time."""
    weight = next(layer.parameters(recurse=False))
    numbers = slopes.shape[1] * weight.numel() + slopes[0].numel()
    numbers += entered[0].numel() * (math.prod(layer.kernel_size) if isinstance(layer, nn.Conv2d) else 1)
    narrow = torch.promote_types(slopes.dtype, torch.float32)
    size = len(entered) if _is_flat(layer, entered) else max(1, PIECE // numbers)
    for a, g in zip(entered.split(size), slopes.split(size), strict=True):
        for own, squares in RULES[type(layer)](layer, a.to(narrow), g.to(narrow)).items():
            if own in names:
                total[names[own]] += squares


def _is_flat(layer: nn.Module, entered: Tensor) -> bool:
    return isinstance(layer, nn.Linear) and entered.ndim == 2


def _linear(layer: nn.Module, entered: Tensor, slopes: Slopes) -> Params:
    if _is_flat(layer, entered):  # an outer product: its square is that of the squares
        g = slopes.square().sum(1)
        return {"weight": g.T @ entered.square(), "bias": g.sum(0)}
    g = slopes.flatten(2, -2)
    return {"weight": _products(g.transpose(2, 3), entered.flatten(1, -2)), "bias": _squared(g.sum(2))}


def patches(layer: nn.Conv2d, entered: Tensor) -> Float[Tensor, "examples groups places within"]:
    """What each output of a convolution is the product of the weight with, group by group."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = functional.pad(entered, layer._reversed_padding_repeated_twice, mode)
    down, right = padded.stride()[2:]
    size = zip(padded.shape[2:], layer.kernel_size, layer.dilation, layer.stride, strict=True)
    grid = [(length - dilation * (kernel - 1) - 1) // stride + 1 for length, kernel, dilation, stride in size]
    found = padded.as_strided(  # twice as fast as unfold
        (*padded.shape[:2], *layer.kernel_size, *grid),
        (
            *padded.stride()[:2],
            down * layer.dilation[0],
            right * layer.dilation[1],
            down * layer.stride[0],
            right * layer.stride[1],
        ),
    )
    return found.reshape(len(padded), layer.groups, -1, math.prod(grid)).transpose(2, 3)


def _conv2d(layer: nn.Module, entered: Tensor, slopes: Slopes) -> Params:
    assert isinstance(layer, nn.Conv2d)
    g = slopes.flatten(3)
    parts = zip(g.chunk(layer.groups, 2), patches(layer, entered).unbind(1), strict=True)
    weight = torch.cat([_products(own, each) for own, each in parts])
    return {"weight": weight.view_as(layer.weight), "bias": _squared(g.sum(3))}


def _products(
    g: Float[Tensor, "examples terms rows places"], a: Float[Tensor, "examples places columns"]
) -> Float[Tensor, "rows columns"]:
    """The squares of g @ a, summed over terms and examples."""
    rows = g.shape[2]
    products = g.flatten(1, 2) @ a
    summed: Tensor = products.square_().sum(0)
    return summed.unflatten(0, (-1, rows)).sum(0)  # type: ignore[no-any-return]


def _squared(each: Float[Tensor, "examples terms entries"]) -> Float[Tensor, " entries"]:
    return each.square().sum((0, 1))


def _batch_norm(layer: nn.Module, entered: Tensor, slopes: Slopes) -> Params:
    assert isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    mean, variance = layer.running_mean.to(entered), layer.running_var.to(entered)  # which may be wider
    normal = functional.batch_norm(entered, mean, variance, eps=layer.eps)
    return _by_channel(normal, slopes)


def _group_norm(layer: nn.Module, entered: Tensor, slopes: Slopes) -> Params:
    assert isinstance(layer, nn.GroupNorm)
    return _by_channel(functional.group_norm(entered, layer.num_groups, eps=layer.eps), slopes)


def _by_channel(normal: Tensor, slopes: Slopes) -> Params:
    g = slopes.reshape(*slopes.shape[:3], -1)
    return {"weight": _squared((g * normal.reshape(g[:, :1].shape)).sum(3)), "bias": _squared(g.sum(3))}


def _layer_norm(layer: nn.Module, entered: Tensor, slopes: Slopes) -> Params:
    assert isinstance(layer, nn.LayerNorm)
    normal = functional.layer_norm(entered, layer.normalized_shape, eps=layer.eps)
    shape = (*slopes.shape[:2], -1, *layer.normalized_shape)
    weight, bias = (slopes * normal.unsqueeze(1)).reshape(shape).sum(2), slopes.reshape(shape).sum(2)
    return {"weight": weight.square().sum((0, 1)), "bias": bias.square().sum((0, 1))}


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
}


def _owners(model: nn.Module, theta: dict[str, nn.Parameter]) -> dict[nn.Module, dict[str, str]] | None:
    """The layers that own the parameters, with the full name of each by its own; None where there is no rule."""
    names = {id(p): name for name, p in theta.items()}
    owners: dict[nn.Module, dict[str, str]] = {}
    for module in model.modules():
        owned = {own: names[id(p)] for own, p in module.named_parameters(recurse=False) if id(p) in names}
        if owned and type(module) not in RULES:
            return None
        if owned:
            owners[module] = owned
    once = [name for owned in owners.values() for name in owned.values()]
    return owners if len(set(once)) == len(once) else None


@dataclass(frozen=True)
class Call:
    """What went into a layer, and where the gradient of what came out is to be had."""

    entered: Tensor
    output: GradientEdge  # not the tensor: what comes behind may change that in place, and a copy takes time
    shape: torch.Size  # of what came out


@contextmanager
def recorded(layers: list[nn.Module]) -> Iterator[dict[nn.Module, list[Call]]]:
    """What goes into and comes out of the layers while the block runs; calls without a gradient are left out."""
    calls: dict[nn.Module, list[Call]] = {layer: [] for layer in layers}

    def record(layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
        if output.requires_grad:
            entered = next(iter((*inputs, *named.values()))).detach()
            calls[layer].append(Call(entered, get_gradient_edge(output), output.shape))

    handles = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
