"""Weights in and out: safetensors, and foreign checkpoints that hold nothing but tensors."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from expunge import distributed, params, sharding
from expunge.cache import is_cache
from expunge.errors import ConfigError, MismatchError
from expunge.files import save_tensors


def save_weights(path: Path | str, model: nn.Module, header: dict[str, str] | None = None) -> None:
    """Write all parameters and buffers of a model as safetensors, whole or not at all.

    Of several processes all call this and the first one writes; what FSDP2 has sharded is put together.

    Raises:
        OSError: The disk is full, or the folder cannot be written.
    """
    sharding.settle(model)
    tensors = sharding.gathered(params.plain(model).state_dict())
    distributed.by_the_first(lambda: save_tensors(path, tensors, header))


def unlearned_with(path: Path) -> str:
    """The method that weights say made them; "" where they say nothing, as those of other programs."""
    if path.suffix != ".safetensors" or not path.is_file():
        return ""
    try:
        with safe_open(path, "pt") as file:
            return str(json.loads((file.metadata() or {}).get("unlearned", "{}")).get("method", ""))
    except (SafetensorError, ValueError, AttributeError):
        return ""  # whoever reads the weights says what is wrong with them


def load_weights(model: nn.Module, path: Path | str) -> nn.Module:
    """Put stored weights and buffers into a model, bit for bit, and return it.

    Args:
        model: Changed in place. Of the types of the stored tensors: a cast would round them, or give a model that does
            not take the data that it was built for.
        path: Safetensors, or a ``.pt`` / ``.pth`` file that holds a dictionary of tensors and nothing else.

    Raises:
        FileNotFoundError: No such file.
        ConfigError: The file cannot be read, or holds more than tensors.
        MismatchError: Names, shapes or floating types of another architecture.
    """
    stored = _read(Path(path))
    inner = params.plain(model)
    state = inner.state_dict()
    params.require_same_names(stored, state, f"{path}", "the model")
    _require_same_types(stored, state, path)
    inner.load_state_dict(stored)  # without assign=True, which would untie tied weights
    return model


def _require_same_types(stored: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path | str) -> None:
    others = [
        name
        for name, tensor in state.items()
        if tensor.dtype != stored[name].dtype and (tensor.is_floating_point() or stored[name].is_floating_point())
    ]
    if others:
        there, here = stored[others[0]].dtype, state[others[0]].dtype
        alike = [name for name in others if (stored[name].dtype, state[name].dtype) == (there, here)]
        raise MismatchError(
            f"{path} has {params.listed(alike)} as {there}, and the model as {here}. Build the model in the types of "
            f"its weights: in model(seed) cast it, or the modules of these, with .to({there}). Or save the weights as "
            f"{here}."
        )


def _read(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such weights. Save them with safetensors.torch.save_file(model.state_dict(), …) at the end of "
            "training, and give the path of that file."
        )
    if is_cache(path):
        raise ConfigError(
            f"{path} is a gradient cache, not weights. Give the trained weights that it was made at, and the cache as "
            "--cache, in Python to cache.load()."
        )
    try:
        if path.suffix in (".pt", ".pth", ".bin"):
            stored = torch.load(path, map_location="cpu", weights_only=True)
        else:
            stored = load_file(path)
    except Exception as error:  # a foreign file can fail in many ways, and all have one cure
        raise ConfigError(
            f"{path} cannot be read as weights ({type(error).__name__}). Save them with "
            "safetensors.torch.save_file(model.state_dict(), …); files that could run code are not opened."
        ) from error
    if not isinstance(stored, Mapping) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise ConfigError(f"{path} holds more than a dictionary of tensors. Save model.state_dict() alone.")
    return dict(stored)
