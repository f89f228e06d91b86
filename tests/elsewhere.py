"""A device that is none: its tensors compute on the CPU, and do not mix with those that say they are there.

What moves data to a device and forgets a part of it fails on a GPU alone, and no GPU takes part in these tests. Torch
raises there what is raised here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

PLACE = torch.device("ipu:0")  # a type that torch can name and nothing implements
_aten = torch.ops.aten
_MOVING = (_aten._to_copy.default, _aten.copy_.default)
_INDEXING = (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default)


class Elsewhere(Tensor):
    """A tensor on that device. To C++ it is one without data ("meta"), whose every operation comes here."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Elsewhere":
        empty = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device="meta")
        self: Elsewhere = torch.Tensor._make_subclass(cls, empty, held.requires_grad)
        self.held = held
        return self

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return PLACE

    def to(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """C++ would compare with "meta", and copy what is there already."""
        if args and isinstance(args[0], Tensor):
            device, dtype = args[0].device, args[0].dtype
        else:
            device, dtype, *_ = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
        stays = (device is None or _is_there(device)) and dtype in (None, self.dtype) and not kwargs.get("copy")
        return self if stays else super().to(*args, **kwargs)

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {PLACE} device type tensor to numpy. Use Tensor.cpu() first.")

    def __repr__(self, **_: Any) -> str:
        return f"{self.held!r} on {PLACE}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Sees operations without a tensor of that device, such as zeros on it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _is_there(device: Any) -> bool:
    return torch.device(device).type in (PLACE.type, "meta")  # autograd makes zeros where C++ thinks they belong


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    here = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.ndim]  # numbers go anywhere
    if func in _INDEXING and isinstance(args[0], Elsewhere):  # positions may be on the CPU
        here = []
    if there and here and func not in _MOVING:
        sizes = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors)
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} of {sizes}")
    goes_there = _is_there(kwargs["device"]) if kwargs.get("device") is not None else bool(there)
    if kwargs.get("device") is not None:
        if goes_there and kwargs.get("generator") is not None:
            raise RuntimeError(f"Expected a '{PLACE.type}' device type for generator but found 'cpu'")
        kwargs = kwargs | {"device": torch.device("cpu")}
    known = {id(tensor.held): tensor for tensor in there}
    args, kwargs = pytree.tree_map_only(Elsewhere, lambda tensor: tensor.held, (args, kwargs))
    found = func(*args, **kwargs)
    if not goes_there:
        return found

    def there_again(tensor: Tensor) -> Tensor:
        return known[id(tensor)] if id(tensor) in known else Elsewhere(tensor)

    return pytree.tree_map_only(Tensor, there_again, found)


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """Make the device known: models and data go there by `.to`, and come back by `.cpu`."""

    def moved(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            result = make(*args, **kwargs)  # C++ fills in the data without asking anyone
            return result if device is None else result.to(device)

        return made

    optimizer = import_module("torch.optim.optimizer")
    fused = optimizer._get_fused_kernels_supported_devices
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch, _Factories():
        patch.setattr(optimizer, fused.__name__, lambda: [*fused(), PLACE.type])
        for make in (torch.tensor, torch.as_tensor):
            patch.setattr(torch, make.__name__, moved(make))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            yield PLACE
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
