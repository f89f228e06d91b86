"""Squared gradients of single examples from one batched pass, for common layers: much faster than `torch.func.vmap`.

The gradient of a layer's weight on one example follows from what went into the layer and the gradient of what came out
(Goodfellow, "Efficient Per-Example Gradient Computations", 2015), and a batched backward pass has both for all of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from expunge.batches import Batch, LossTerms
from expunge.params import Params

Each = Float[Tensor, "examples ..."]  # the gradient of a parameter on every example
Prepare = Callable[[nn.Module, Tensor], Tensor]  # what is needed of a layer's input
Rule = Callable[[nn.Module, Tensor, Tensor], dict[str, Each]]  # with that and the gradient of the output


def layer_squares(
    model: nn.Module, loss_terms: LossTerms, theta: dict[str, nn.Parameter], batch: Batch, examples: int
) -> tuple[Params, Tensor] | None:
    """The squared gradient of every term, summed over the terms of a batch, and the terms.

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
    with _recorded(list(owners)) as calls:
        terms = loss_terms(model, batch)
    if len(terms) % examples or any(len(seen) > 1 for seen in calls.values()):
        return None
    ran = {layer: seen[0] for layer, seen in calls.items() if seen}
    if any(tensor.shape[:1] != (examples,) for pair in ran.values() for tensor in pair):
        return None
    with torch.no_grad():
        prepared = [RULES[type(layer)][0](layer, entered) for layer, (entered, _) in ran.items()]
    wide = torch.float32 if terms.device.type == "mps" else torch.float64
    total = {name: torch.zeros(p.shape, dtype=wide, device=p.device) for name, p in theta.items()}
    for term in terms.view(examples, -1).sum(0):
        outputs = [output for _, output in ran.values()]
        slopes = torch.autograd.grad(term, outputs, retain_graph=True, allow_unused=True)
        for layer, needed, slope in zip(ran, prepared, slopes, strict=True):
            if slope is not None:
                with torch.no_grad():
                    for own, square in _summed_squares(layer, needed, slope).items():
                        if own in owners[layer]:
                            total[owners[layer][own]] += square
    return total, terms.detach()


def _summed_squares(layer: nn.Module, needed: Tensor, slope: Tensor) -> Params:
    narrow = torch.promote_types(slope.dtype, torch.float32)
    if isinstance(layer, nn.Linear) and needed.ndim == 2:  # an outer product: its square is that of the squares
        a, g = needed.to(narrow).square(), slope.to(narrow).square()
        return {"weight": g.T @ a, "bias": g.sum(0)}
    each = RULES[type(layer)][1](layer, needed, slope)
    return {own: value.to(narrow).square_().sum(0) for own, value in each.items()}  # in float64: three times slower


def _as_it_is(_: nn.Module, entered: Tensor) -> Tensor:
    return entered


def _linear(_: nn.Module, entered: Tensor, slope: Tensor) -> dict[str, Each]:
    a, g = entered.flatten(1, -2), slope.flatten(1, -2)
    return {"weight": g.transpose(1, 2) @ a, "bias": g.sum(1)}


def _patches(layer: nn.Module, entered: Tensor) -> Float[Tensor, "examples groups places within"]:
    assert isinstance(layer, nn.Conv2d)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = functional.pad(entered, layer._reversed_padding_repeated_twice, mode)
    patches: Tensor = functional.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
    grouped: Tensor = patches.unflatten(1, (layer.groups, -1))
    return grouped.transpose(2, 3)


def _conv2d(layer: nn.Module, patches: Tensor, slope: Tensor) -> dict[str, Each]:
    assert isinstance(layer, nn.Conv2d)
    g = slope.flatten(2)
    weight = g.unflatten(1, (layer.groups, -1)) @ patches
    return {"weight": weight.reshape(len(g), *layer.weight.shape), "bias": g.sum(2)}


def _batch_normal(layer: nn.Module, entered: Tensor) -> Tensor:
    assert isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    return functional.batch_norm(entered, layer.running_mean, layer.running_var, eps=layer.eps)


def _group_normal(layer: nn.Module, entered: Tensor) -> Tensor:
    assert isinstance(layer, nn.GroupNorm)
    return functional.group_norm(entered, layer.num_groups, eps=layer.eps)


def _by_channel(_: nn.Module, normal: Tensor, slope: Tensor) -> dict[str, Each]:
    g = slope.reshape(*slope.shape[:2], -1)
    return {"weight": (g * normal.reshape(g.shape)).sum(2), "bias": g.sum(2)}


def _layer_normal(layer: nn.Module, entered: Tensor) -> Tensor:
    assert isinstance(layer, nn.LayerNorm)
    return functional.layer_norm(entered, layer.normalized_shape, eps=layer.eps)


def _by_entry(layer: nn.Module, normal: Tensor, slope: Tensor) -> dict[str, Each]:
    assert isinstance(layer, nn.LayerNorm)
    shape = (len(slope), -1, *layer.normalized_shape)
    return {"weight": (slope * normal).reshape(shape).sum(1), "bias": slope.reshape(shape).sum(1)}


RULES: dict[type[nn.Module], tuple[Prepare, Rule]] = {
    nn.Linear: (_as_it_is, _linear),
    nn.Conv2d: (_patches, _conv2d),
    nn.BatchNorm1d: (_batch_normal, _by_channel),
    nn.BatchNorm2d: (_batch_normal, _by_channel),
    nn.BatchNorm3d: (_batch_normal, _by_channel),
    nn.GroupNorm: (_group_normal, _by_channel),
    nn.LayerNorm: (_layer_normal, _by_entry),
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


@contextmanager
def _recorded(layers: list[nn.Module]) -> Iterator[dict[nn.Module, list[tuple[Tensor, Tensor]]]]:
    """What goes into and comes out of the layers while the block runs."""
    calls: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}

    def record(layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Tensor:
        calls[layer].append((next(iter((*inputs, *named.values()))).detach(), output))
        return output.clone()  # what comes behind may change it in place

    handles = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
