"""The Fisher information of what is left, for selectors that look at curvature: its diagonal, or EK-FAC.

Sources: George et al., "Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis" (2018); Martens
and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature" (2015); Grosse and Martens, "A
Kronecker-factored Approximate Fisher Matrix for Convolution Layers" (2016).

It is the *empirical* information: gradients of the loss terms themselves, with the true targets, so that any loss will
do. It is taken in eval mode, and of what is left only.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expunge import params
from expunge.batches import Batch, Batches, LossTerms, in_rows, map_tensors, tensors_of, to_device
from expunge.curvature import Block, Curvature, joined
from expunge.errors import NotFinite, UnsupportedModule
from expunge.methods.layer_squares import RULES, Call, patches, recorded
from expunge.methods.per_example import squared_gradients
from expunge.passes import layer_by_layer
from expunge.probe import probe
from expunge.seeds import keeping_random_state
from expunge.trace import Trace

CHUNK = 32  # examples a batch; it bounds the memory
LARGEST = 8192  # inputs or outputs of a layer: the eigenvectors of more take gigabytes, and hours


@dataclass(frozen=True)
class _Layer:
    module: nn.Linear | nn.Conv2d
    names: tuple[str, ...]  # of its weight and, where that takes part, its bias


Factors = tuple[_Layer, Tensor, Tensor]  # a layer, a: (examples, groups, places, within), g: (…, places, out)


def diagonal_fisher(
    model: nn.Module, loss_terms: LossTerms, data: Batches, names: Iterable[str], trace: Trace
) -> Curvature:
    """The diagonal Fisher information over some parameters: one pass.

    Raises:
        UnsupportedModule: The model cannot be taken apart into examples.
        NonDeterministicLoss: Dropout, noise, or a loss that depends on the batch.
        NotFinite: A loss or a gradient is NaN or infinite.
    """
    theta = params.named_parameters(model, names)
    with params.requiring_gradients(model, theta.values()):
        squares = squared_gradients(model, loss_terms, data, trace=trace)
    return Curvature({name: squares[name] for name in theta})


def kronecker_fisher(
    model: nn.Module, loss_terms: LossTerms, data: Batches, names: Iterable[str], trace: Trace
) -> Curvature:
    """EK-FAC over some parameters: two passes, and one more for the diagonal of those in no block.

    A block is the weight (and bias) of an `nn.Linear` or `nn.Conv2d` that runs once a pass, at most `LARGEST` wide,
    and is used nowhere else. Everything else has its diagonal.

    Raises:
        UnsupportedModule: The model cannot be taken apart into examples.
        NonDeterministicLoss: Dropout, noise, or a loss that depends on the batch.
        NotFinite: A loss or a gradient is NaN or infinite.
    """
    model = params.plain(model)
    theta = params.named_parameters(model, names)
    device = next(iter(theta.values())).device
    with (
        params.restoring_modes(model),
        keeping_random_state(),
        params.requiring_gradients(model, theta.values()),
        torch.enable_grad(),
        layer_by_layer(),
    ):
        model.eval()
        probe(model, loss_terms, data, device)
        first = to_device(next(in_rows(data, CHUNK)), device)
        layers = _usable_layers(model, loss_terms, theta, first)
        blocks = _blocks(model, loss_terms, data, layers, trace) if layers else ()
    inside = {name for block in blocks for name in block.names}
    rest = [name for name in theta if name not in inside]
    diagonal = diagonal_fisher(model, loss_terms, data, rest, trace).diagonal if rest else {}
    return Curvature(diagonal, blocks)


def _blocks(
    model: nn.Module, loss_terms: LossTerms, data: Batches, layers: list[_Layer], trace: Trace
) -> tuple[Block, ...]:
    """The eigenbases of E[a aᵀ] and E[g gᵀ] in one pass, the second moments of gradients in them in another."""
    sums: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
    for layer, a, g in _each(model, loss_terms, data, layers, trace):
        products = _summed_products(a, a), _summed_products(g, g)
        old = sums.get(layer.names)
        sums[layer.names] = products if old is None else (old[0] + products[0], old[1] + products[1])
    for names, pair in sums.items():
        params.require_finite(
            dict(zip(("inputs", "slopes"), pair, strict=True)), f"the Kronecker factors of {names[0]}"
        )
    bases = {
        names: (torch.linalg.eigh(inputs).eigenvectors, torch.linalg.eigh(outputs).eigenvectors)
        for names, (inputs, outputs) in sums.items()
    }
    moments: dict[tuple[str, ...], Tensor] = {}
    for layer, a, g in _each(model, loss_terms, data, layers, trace):
        inputs, outputs = bases[layer.names]
        rotated_a, rotated_g = a @ inputs.to(a), g @ outputs.to(g)
        if a.shape[2] == 1:  # an outer product: its square is that of the squares
            square = rotated_g[:, :, 0].square().permute(1, 2, 0) @ rotated_a[:, :, 0].square().transpose(0, 1)
        else:
            square = (rotated_g.mT @ rotated_a).square().sum(0)
        moments[layer.names] = moments.get(layer.names, 0) + square.to(inputs)
    return tuple(Block(names, *bases[names], moments[names]) for names in moments)


def _summed_products(x: Tensor, y: Tensor) -> Tensor:
    """Σ x yᵀ over examples and places, group by group."""
    return (x.transpose(0, 1).flatten(1, 2).mT @ y.transpose(0, 1).flatten(1, 2)).to(params.wide(x.device))


def _each(
    model: nn.Module, loss_terms: LossTerms, data: Batches, layers: list[_Layer], trace: Trace
) -> Iterator[Factors]:
    """What goes into each layer and the gradient of what comes out, for every batch and every term of an example."""
    device = next(model.parameters()).device
    for each in in_rows(data, CHUNK):
        with recorded([layer.module for layer in layers]) as calls:
            terms = loss_terms(model, to_device(each, device))
        examples = len(calls[layers[0].module][0].entered)
        if len(terms) % examples:
            raise UnsupportedModule(
                f"loss_terms gives {len(terms)} terms for {examples} examples, and gradients of single terms need as "
                "many for each. For terms without a target, return a loss of 0 instead of none."
            )
        if not bool(terms.isfinite().all()):
            bad = float(terms.detach()[~terms.isfinite()][0])
            raise NotFinite(f"the loss of an example is {bad}. Look at its inputs and its target.")
        trace.backwarded += len(terms)
        for term in terms.view(examples, -1).sum(0):
            yield from _factors(term, layers, calls)


def _factors(term: Tensor, layers: list[_Layer], calls: dict[nn.Module, list[Call]]) -> Iterator[Factors]:
    outputs = [calls[layer.module][0].output for layer in layers]
    slopes = torch.autograd.grad(term, outputs, retain_graph=True, allow_unused=True)
    for layer, slope in zip(layers, slopes, strict=True):
        if slope is not None:
            entered = calls[layer.module][0].entered
            module, examples = layer.module, len(entered)
            if isinstance(module, nn.Conv2d):
                a = patches(module, entered)
                g = slope.flatten(2).unflatten(1, (module.groups, -1)).mT
            else:
                a, g = (each.reshape(examples, 1, -1, each.shape[-1]) for each in (entered, slope))
            if len(layer.names) > 1:
                a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
            narrow = torch.promote_types(a.dtype, torch.float32)
            yield layer, a.to(narrow), g.to(narrow)


def _usable_layers(
    model: nn.Module, loss_terms: LossTerms, theta: dict[str, nn.Parameter], batch: Batch
) -> list[_Layer]:
    """The layers that can be a block, found out on a few examples: those whose gradient is Σ g aᵀ there.

    None on a single example: what runs once for all of them cannot be told there.
    """
    found = list(_candidates(model, theta))
    with recorded([layer.module for layer in found]) as calls:
        terms = loss_terms(model, batch)
    lengths = {len(tensor) if tensor.ndim else 0 for tensor in tensors_of(batch)}
    examples = lengths.pop() if len(lengths) == 1 else 0
    if examples < 2 or len(terms) % examples or not _in_a_row(model, loss_terms, batch, terms.view(examples, -1)):
        return []
    found = [
        layer
        for layer in found
        if [size for call in calls[layer.module] for size in (len(call.entered), call.shape[0])] == [examples] * 2
    ]
    if not found:
        return []
    tolerance = max(1e-2, *(8 * torch.finfo(p.dtype).eps for p in theta.values()))
    usable = []
    for layer, a, g in _factors(terms.sum(), found, calls):
        if max(a.shape[-1], g.shape[-1]) > LARGEST:
            continue
        ours = _summed_products(g, a)
        owned = [theta[name] for name in layer.names]
        truth = joined(list(torch.autograd.grad(terms.sum(), owned, retain_graph=True)), len(ours)).to(ours)
        if (ours - truth).norm() <= tolerance * truth.norm():
            usable.append(layer)
    return usable


def _in_a_row(model: nn.Module, loss_terms: LossTerms, batch: Batch, terms: Tensor) -> bool:
    """Whether the terms of an example are those it has alone, for the first few examples."""
    for row in range(min(3, len(terms))):
        alone = loss_terms(model, map_tensors(batch, lambda tensor, row=row: tensor[row : row + 1]))  # type: ignore[misc]
        if alone.shape != terms[row].shape or not torch.allclose(alone, terms[row], rtol=1e-2, atol=1e-4):
            return False
    return True


def _candidates(model: nn.Module, theta: dict[str, nn.Parameter]) -> Iterator[_Layer]:
    names = {id(p): name for name, p in theta.items()}
    owners = [id(p) for module in model.modules() for p in module.parameters(recurse=False)]
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and type(module) in RULES:
            own = [id(p) for p in (module.weight, module.bias) if p is not None and id(p) in names]
            if own and own[0] == id(module.weight) and all(owners.count(each) == 1 for each in own):
                yield _Layer(module, tuple(names[each] for each in own))
