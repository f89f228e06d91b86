"""Gradient checkpointing: modules whose activations are forgotten, and computed again in the backward pass.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016. About one forward pass more, and the same bits.
"""

import fnmatch
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from expunge import params
from expunge.batches import tensors_of
from expunge.errors import ConfigError


def repeated_modules(model: nn.Module, choice: bool | Iterable[str]) -> dict[str, nn.Module]:
    """The modules to be computed again.

    Args:
        model: Any.
        choice: Names or patterns of the shell (``*``, ``?``). True: the direct children of the longest
            ``Sequential`` or ``ModuleList``, which in most networks are its blocks. False: none.

    Raises:
        ConfigError: A pattern that matches no module, or True for a model without such a list.
    """
    inner = params.plain(model)
    named = {name: module for name, module in inner.named_modules() if name}
    if choice is False:
        return {}
    if choice is True:
        lists = [pair for pair in inner.named_modules() if isinstance(pair[1], nn.Sequential | nn.ModuleList)]
        if not lists:
            raise ConfigError(
                f"checkpoint=True: {type(inner).__name__} has no Sequential or ModuleList whose parts could be "
                f"computed again. Name some modules; it has {params.listed(named)}."
            )
        prefix, blocks = max(lists, key=lambda pair: len(list(pair[1].children())))
        return {f"{prefix}.{name}".lstrip("."): block for name, block in blocks.named_children()}
    patterns = list(choice)
    for pattern in patterns:
        if not fnmatch.filter(named, pattern):
            raise ConfigError(f"checkpoint: {pattern!r} matches no module. The model has {params.listed(named)}.")
    matching = [name for name in named if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    return {name: named[name] for name in matching if not any(name.startswith(f"{other}.") for other in matching)}


@contextmanager
def recomputing(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Forget what these modules compute inside, until their backward pass needs it; as they were behind the block.

    Raises:
        ConfigError: Inside the block, a module that changes its inputs.
    """
    with ExitStack() as stack:
        for module in modules:
            own = module.__dict__.get("forward")
            module.forward = _again(module, module.forward)
            stack.callback(_put_back, module, own)
        yield


def _again(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def forgetful(*arguments: Any, **named: Any) -> Any:
        given = [(tensor, tensor._version) for tensor in tensors_of((arguments, named))]
        found = checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **named)
        if any(tensor._version != before for tensor, before in given):
            raise ConfigError(
                f"checkpoint: {type(module).__name__} changes what goes into it in place, so that it cannot be "
                "computed again. Build it with inplace=False, or name blocks that begin with another layer."
            )
        return found

    return forgetful


def _put_back(module: nn.Module, own: Callable[..., Any] | None) -> None:
    if own is None:
        del module.__dict__["forward"]
    else:
        module.forward = own
