"""What re-initialised entries become, and BatchNorm statistics that never saw what was removed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import init

from expunge import params, sharding
from expunge.access import Blind
from expunge.batches import positioned, to_device
from expunge.params import Params
from expunge.seeds import keeping_random_state, stream
from expunge.trace import Trace
from expunge.training import in_train_mode, is_frozen_normalisation

ResetTo = Literal[
    "fresh", "zero", "layer-mean", "kaiming-normal", "kaiming-uniform", "xavier-normal", "xavier-uniform", "normal"
]
Statistics = Literal["kept", "re-estimated"]

_BY_FAN: dict[str, Callable[[Tensor, torch.Generator], Any]] = {
    "kaiming-normal": lambda empty, draw: init.kaiming_normal_(empty, nonlinearity="relu", generator=draw),
    "kaiming-uniform": lambda empty, draw: init.kaiming_uniform_(empty, nonlinearity="relu", generator=draw),
    "xavier-normal": lambda empty, draw: init.xavier_normal_(empty, generator=draw),
    "xavier-uniform": lambda empty, draw: init.xavier_uniform_(empty, generator=draw),
}


@torch.no_grad()
def new_values(
    model: nn.Module,
    theta: dict[str, nn.Parameter],
    given: Blind,
    reset_to: ResetTo,
    *,
    std: float | None = None,
    seed: int,
) -> Params:
    """A value for every entry, whether or not it will be re-initialised.

    * "fresh": that of an untrained model from ``given.fresh``.
    * "zero"; "layer-mean": the mean of the tensor.
    * "kaiming-…": variance 2 / fan-in (He et al., 2015, for ReLU); "xavier-…": 2 / (fan-in + fan-out) (Glorot & Bengio,
      2010). Normal or uniform, mean 0. Tensors of one dimension have no fan: they get fresh values.
    * "normal": mean 0, and a standard deviation of ``std`` or else that of the tensor around its mean.

    Raises:
        ConfigError: ``fresh`` builds no module.
        MismatchError: ``fresh`` builds another architecture.
    """
    if reset_to == "fresh":
        return given.fresh_values(seed, model, theta)
    if reset_to == "zero":
        return {name: torch.zeros_like(p) for name, p in theta.items()}
    if reset_to == "layer-mean":
        return {name: p.mean().expand_as(p).clone() for name, p in theta.items()}
    if reset_to == "normal":
        return {n: normal(p, float(p.std(correction=0)) if std is None else std, seed, n) for n, p in theta.items()}
    without_fan = [name for name, p in theta.items() if p.ndim < 2]
    values = given.fresh_values(seed, model, without_fan) if without_fan else {}
    for name, p in theta.items():
        if p.ndim > 1:
            drawn = _BY_FAN[reset_to](_empty(p), stream(seed, "re-initialise", name))
            values[name] = sharding.placed_like(drawn.to(p.device, p.dtype), p)
    return {name: values[name] for name in theta}


def normal(like: Tensor, std: float, seed: int, name: str, purpose: str = "re-initialise") -> Tensor:
    """Independent N(0, std²)."""
    drawn = _empty(like).normal_(0, std, generator=stream(seed, purpose, name))
    return sharding.placed_like(drawn.to(like.device, like.dtype), like)


@torch.no_grad()
def reinitialise_(theta: dict[str, nn.Parameter], values: Params, chosen: dict[str, Tensor]) -> None:
    """Put the given values into the chosen entries."""
    for name, p in theta.items():
        p.copy_(torch.where(chosen[name].to(p.device), sharding.placed_like(values[name], p), p))


@torch.no_grad()
def re_estimate_statistics_(model: nn.Module, given: Blind, batch_size: int, *, seed: int, trace: Trace) -> int:
    """Reset the running statistics of normalisations and estimate them anew, in one pass over what is left.

    Frozen normalisations keep theirs, as in training.

    Each becomes the plain average over batches: of their means, and of their unbiased variances. Batches are drawn at
    random; those of data without positions are its own. Nothing else is in train mode, so dropout is off.

    Returns:
        How many layers have running statistics; without any there is no pass.
    """
    layers = [
        module
        for module in model.modules()
        if getattr(module, "track_running_stats", False)
        and module.running_mean is not None
        and not is_frozen_normalisation(module)
    ]
    if not layers:
        return 0
    device = next(model.parameters()).device
    with params.restoring_modes(model), keeping_random_state(), _cumulative(layers):
        model.eval()
        for layer in layers:
            layer.train()
        for _, batch in positioned(given.retain, batch_size, stream(seed, "statistics"))[1]:
            trace.forwarded += len(in_train_mode(model, given.loss_terms, to_device(batch, device)))
    return len(layers)


@contextmanager
def _cumulative(layers: list[Any]) -> Iterator[None]:
    """Statistics from nothing, every batch with the same weight."""
    before = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
    try:
        yield
    finally:
        for layer, momentum in zip(layers, before, strict=True):
            layer.momentum = momentum


def _empty(like: Tensor) -> Tensor:
    """Room for random numbers, on the CPU, where streams are."""
    return torch.empty(like.shape, dtype=torch.float32)
