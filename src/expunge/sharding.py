"""Models in pieces on several processes, as FSDP2 (`torch.distributed.fsdp.fully_shard`) leaves them.

Their parameters are `DTensor`, and so is all that has one number an entry: most operations work on the pieces. What
brings numbers together has to say so (`whole`): torch gives the part of a sum that is here without a word.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from expunge.distributed import rank, world
from expunge.errors import UnsupportedModule


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters lie in pieces on several processes, as FSDP2 leaves them.

    Raises:
        UnsupportedModule: Only some do, or not in the way of FSDP2 over all processes.
    """
    if not dist.is_available() or not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor, Shard

    sharded = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
    for name, p in sharded.items():
        if p.placements != (Shard(0),) or p.device_mesh.size() != world():
            raise UnsupportedModule(
                f"parameter {name!r} is placed as {p.placements} over {p.device_mesh.size()} of {world()} processes. "
                "Shard over all of them along the first dimension: fully_shard(module, mesh=init_device_mesh(…, "
                "(world_size,)))."
            )
    if sharded and len(sharded) != len(list(model.parameters())):
        name = next(name for name, _ in model.named_parameters() if name not in sharded)
        raise UnsupportedModule(
            f"parameter {name!r} is whole while {len(sharded)} others are sharded. Call fully_shard on the root, too."
        )
    return bool(sharded)


def settle(model: nn.Module) -> None:
    """Shard what FSDP2 left whole after a forward pass without a backward pass, so that parameters are pieces again."""
    for module in fsdp_modules(model):
        module.reshard()


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called on."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def computed_in(model: nn.Module) -> set[torch.dtype]:
    """The floating types that a model computes in: of its parameters, or what FSDP2 casts them to."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    for module in fsdp_modules(model):
        policy = module._get_fsdp_state()._mp_policy
        found |= {dtype for dtype in (policy.param_dtype, policy.reduce_dtype) if dtype is not None}
    return found


def replicated(model: nn.Module) -> nn.Module:
    """What a training step calls: the model, in `DistributedDataParallel` where it is whole on several processes.

    Back-propagating through it leaves the average of all processes' gradients, as FSDP2 does by itself. BatchNorm
    sees the rows of its own process; `same_buffers` makes the running statistics one again.
    """
    if world() == 1 or is_sharded(model):
        return model
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # the new name is not in torch 2.11
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def is_piece(tensor: Tensor) -> bool:
    """Whether a tensor is sharded."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together on every process, which all must call; any other as it is."""
    return tensor.full_tensor() if is_piece(tensor) else tensor  # type: ignore[attr-defined]


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sharded tensors put together one by one, in the memory of the first process; all must call.

    Returns:
        What was sharded on the CPU, others as they are; nothing on other processes.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = whole(tensor)  # on every process, hence one at a time
        if rank() == 0:
            found[name] = full.cpu() if is_piece(tensor) else full
    return found


def here(tensor: Tensor) -> Tensor:
    """The piece of a sharded tensor that is here; any other as it is. Shares memory."""
    return tensor.to_local() if is_piece(tensor) else tensor  # type: ignore[attr-defined]


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor in the way another one is placed: the own piece of it, or all of it."""
    if not is_piece(like):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    if isinstance(tensor, DTensor):
        return tensor.redistribute(placements=like.placements)
    # Every process has the values: none is sent.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def pieced(piece: Tensor, like: Tensor) -> Tensor:
    """What is here of a tensor that is placed as another one; of one that is whole all of it, in its shape."""
    if not is_piece(like):
        return piece.view_as(like)
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    own = piece.view_as(like.to_local())
    return DTensor.from_local(own, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def first_entry(tensor: Tensor) -> int:
    """Where the own piece of a sharded tensor begins in it, row-major; 0 for a tensor that is whole."""
    if not is_piece(tensor):
        return 0
    rows = -(-len(tensor) // world())  # of a piece, the last ones may be shorter or empty
    return min(rank() * rows, len(tensor)) * (tensor.numel() // max(len(tensor), 1))
