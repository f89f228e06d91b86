"""`unlearn()`: the front door to every method."""

import copy
import importlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from expunge import distributed, params, sharding
from expunge.access import Blind
from expunge.errors import ConfigError, ForgetSetAccessed, MismatchError, UnsupportedModule
from expunge.gradient import Origin
from expunge.methods import Method, method_of
from expunge.methods.guard import note_what_was_lost
from expunge.trace import Trace, Watch
from expunge.training import Recipe, require_trainable

SHARDED = ("reload", "orthogonal-ascent", "class-orthogonal-ascent", "fine-tune", "retrain")  # models by FSDP2


@dataclass(frozen=True)
class Unlearned:
    """The result of an unlearning."""

    model: nn.Module
    trace: Trace


def unlearn(model: nn.Module, given: Blind, config: object, *, seed: int = 0, watch: Watch | None = None) -> Unlearned:
    """Remove the influence of deleted records, or of faults that were corrected in the retain data.

    Args:
        model: The trained model; it is copied, not changed. A compiled model comes back uncompiled. One that FSDP2 has
            sharded cannot be copied: it is changed, and what comes back is the same object.
        given: What the method may see. A method that is blind gets no more than a `Blind`, whatever is given.
        config: A method's settings, for example ``Reload(reset_fraction=0.2)``; its type names the method.
        seed: Names the streams of randomness; the same seed gives the same bits on a CPU.
        watch: Called with a name and the model after every stage and epoch, off the clock.

    Returns:
        The unlearned model and the trace of what was done. It has a warning if a tenth or more of what training
        had gained on what is left is lost.

    Raises:
        ForgetSetAccessed: The method needs the removed records and was given none.
        MismatchError: The cached gradient was not taken at this model's weights and buffers, or the method returned
            another architecture.
        NotFinite: NaN or infinity in the model, or in what came out.
        UnsupportedModule: Sparse gradients; a sharded model, and a method that is not for them.
        ProcessFailed: Another process of the same job failed or died.
        ConfigError: Settings that belong to no method, data that is not in a `Blind`, and whatever the method refuses.
    """
    method = method_of(config)
    if not isinstance(given, method.access):
        raise _wrongly_given(method, given)
    if method.blind and type(given) is not Blind:
        given = given.blinded()
    inner = params.plain(model)
    sharding.settle(inner)
    recipes = [value for value in vars(config).values() if isinstance(value, Recipe)]
    require_trainable(inner, *recipes)  # now, rather than after a gradient pass
    sharded = sharding.is_sharded(inner)
    if sharded and method.name not in SHARDED:
        raise UnsupportedModule(
            f"{method.name} does not work on a model that FSDP2 has sharded; {', '.join(SHARDED)} do. Give every "
            "process the whole model: its gradient passes and fine-tuning are dealt out all the same."
        )
    infinite = {name for name, buffer in inner.named_buffers() if bool(buffer.isinf().any())}  # masks, on purpose
    params.require_finite(_tensors(inner, infinite), "the model to unlearn from")
    if given.full is not None:
        given.full.origin.require(Origin.of(inner, given.cached_terms), "the cached gradient")
        if sharded:
            given = replace(given, full=given.full.placed_like(inner))
    # torch imports its compiler at the first optimiser step, a second that belongs to no method: do it off the clock.
    importlib.import_module("torch._dynamo")
    trace = Trace(method.name, seed, watch=watch)
    with distributed.failing_together(), trace.measuring_memory(next(inner.parameters()).device):
        own = inner if sharded else copy.deepcopy(inner)  # torch cannot copy what it has sharded
        unlearned = method.run(own, given, config, seed=seed, trace=trace)
    if not isinstance(unlearned, nn.Module):
        raise ConfigError(f"{method.name} returned {type(unlearned).__name__}, and not the model. Return it.")
    if stray := sorted({name for name, _ in _shapes(inner) ^ _shapes(unlearned)}):
        raise MismatchError(
            f"{method.name} returned a model of another architecture, whose tensors are not those that it was given "
            f"({', '.join(stray[:3])}{', …' if len(stray) > 3 else ''}): nobody could load its weights. Take "
            "apart what was wrapped or added before it is returned."
        )
    sharding.settle(unlearned)
    unlearned.zero_grad(set_to_none=True)
    params.require_finite(_tensors(unlearned, infinite), f"the result of {method.name}")
    if given.train_further is not None and trace.losses and method.name != "retrain":
        trace.warn(
            f"{method.name}: it trained by its own recipe, at least in part, and not with train_further: its loss is "
            "another than that of training, or it trains some layers alone. fine-tune, reload and the ascents leave "
            "all training to a loop of one's own."
        )
    if not sharded:
        note_what_was_lost(inner, unlearned, given, trace)
    return Unlearned(unlearned, trace)


def _wrongly_given(method: Method, given: object) -> ConfigError | ForgetSetAccessed:
    if isinstance(given, Blind):
        return ForgetSetAccessed(
            f"{method.name} needs the removed records and was given {type(given).__name__}. Give "
            "Sighted(forget=…), or take a blind method: their records are gone by design."
        )
    more = "" if method.blind else "forget=…, "
    return ConfigError(
        f"{method.name} was given {type(given).__name__}, and takes data together with its loss and model. Wrap it: "
        f"{method.access.__name__}(retain=…, {more}loss_terms=…, fresh=…, full=…)."
    )


def _shapes(model: nn.Module) -> set[tuple[str, torch.Size]]:
    return {(name, tensor.shape) for name, tensor in params.state(model).items()}


def _tensors(model: nn.Module, infinite: set[str]) -> dict[str, Tensor]:
    """All parameters and buffers; buffers that may be infinite with zeros in place of infinities."""
    buffers = {n: b.nan_to_num(math.nan, 0, 0) if n in infinite else b for n, b in model.named_buffers()}
    return dict(model.named_parameters()) | buffers
