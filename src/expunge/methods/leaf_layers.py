"""The last k weight layers of a network, counted as they run: what CF-k and EU-k train, the rest being frozen."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import is_parametrized

from expunge import params
from expunge.access import Blind
from expunge.batches import Batch, LossTerms, micro_batches, to_device
from expunge.errors import ConfigError
from expunge.seeds import keeping_random_state
from expunge.trace import Trace

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)


def last_layers(model: nn.Module, given: Blind, k: int, method: str, trace: Trace) -> list[nn.Module]:
    """The modules that belong to the last k weight layers.

    A weight layer is a module without children that owns a matrix or a kernel (linear, convolution, embedding,
    recurrent, …), or an attention, however deep in nested blocks it sits. Normalisations, scales and other small
    parameters belong to the weight layer before them, and those before the first weight layer to the first. The order
    is that in which modules first run, seen on a few examples in eval mode; a module that never runs by itself counts
    at the place of the block around it. ``trace.facts``: weight_layers (how many there are), trained_layers (names of
    the k).

    Raises:
        ConfigError: There are fewer than k weight layers.
    """
    owners = _in_order(model, given, trace)
    starts = [place for place, (_, module) in enumerate(owners) if _is_weight_layer(module)]
    if not 1 <= k <= len(starts):
        raise ConfigError(
            f"k={k}: {method} trains the last k weight layers, and {type(model).__name__} has {len(starts)}. Choose k "
            f"from 1 to {len(starts)}."
        )
    first = 0 if k == len(starts) else starts[-k]
    trace.facts |= {"weight_layers": len(starts), "trained_layers": [owners[place][0] for place in starts[-k:]]}
    return [part for _, module in owners[first:] for part in _parts(module)]


@contextmanager
def only_training(model: nn.Module, layers: list[nn.Module], loss_terms: LossTerms) -> Iterator[LossTerms]:
    """Freeze everything but the layers: parameters, and the running statistics of normalisations.

    Yields:
        The loss to train with, which keeps the frozen normalisations in eval mode.
    """
    moving = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in moving]
    trained = set(layers)
    still = [m for m in model.modules() if m not in trained and getattr(m, "track_running_stats", False)]

    def terms(model: nn.Module, batch: Batch) -> Tensor:
        for module in still:
            module.eval()
        return loss_terms(model, batch)

    try:
        for p in frozen:
            p.requires_grad_(False)
        yield terms
    finally:
        for p in frozen:
            p.requires_grad_(True)


def _is_weight_layer(module: nn.Module) -> bool:
    if isinstance(module, _NORMS):
        return False
    children = [child for child in module.children() if child is not getattr(module, "parametrizations", None)]
    return (isinstance(module, nn.MultiheadAttention) or not children) and any(p.ndim > 1 for p in _owned(module))


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """A module without its children, and those that its weights are computed by (weight_norm and the like)."""
    yield module
    if is_parametrized(module):
        yield from module.parametrizations.modules()  # type: ignore[union-attr]


def _owned(module: nn.Module) -> Iterator[nn.Parameter]:
    return (p for part in _parts(module) for p in part.parameters(recurse=False))


@torch.no_grad()
def _in_order(model: nn.Module, given: Blind, trace: Trace) -> list[tuple[str, nn.Module]]:
    """All modules that own parameters or buffers, with their names, in the order in which they first run."""
    everything = dict(model.named_modules())
    ran: list[nn.Module] = []
    handles = [m.register_forward_pre_hook(lambda own, _: ran.append(own)) for m in everything.values()]
    try:
        with params.restoring_modes(model), keeping_random_state():
            model.eval()
            _, batch = next(micro_batches(given.retain, 8)[1])
            trace.forwarded += len(given.loss_terms(model, to_device(batch, next(model.parameters()).device)))
    finally:
        for handle in handles:
            handle.remove()
    places = {module: place for place, module in reversed(list(enumerate(ran)))}

    def place(name: str) -> int:
        """Of its first run, or of that of the nearest block around it."""
        while everything[name] not in places and name:
            name = name.rpartition(".")[0]
        return places.get(everything[name], -1)

    owners = [
        (name, module)
        for name, module in everything.items()
        if "parametrizations" not in name.split(".")
        and (any(True for _ in _owned(module)) or any(True for _ in module.buffers(recurse=False)))
    ]
    return sorted(owners, key=lambda owner: place(owner[0]))
