"""Cache, delete and unlearn in one process or in several: the same script, the same reset weights.

python unlearn.py
torchrun --nproc-per-node 4 unlearn.py
torchrun --nproc-per-node 4 unlearn.py --shard      (FSDP2: no process holds the whole model)

It writes cache.safetensors and unlearned.safetensors into the current folder. Since it trains first, and training
agrees within rounding only, so do these files; docs/distributed.md shows how to compare caches of the
same weights.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

from expunge import Blind, Examples, Recipe, Reload, cache, cross_entropy, distributed, gradient, train, unlearn
from expunge.weights import save_weights


def network(seed: int) -> nn.Module:
    """An untrained network."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))


def shard(model: nn.Module) -> nn.Module:
    """Spread the parameters over all processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2], model):  # type: ignore[index]
        fully_shard(layer, mesh=mesh)
    return model


@record  # torchrun then shows the error of the process that failed first
def main() -> None:
    """Everything a deletion takes."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")  # "nccl" on GPUs
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2000, 16, generator=generator)
    data = Examples(inputs, (inputs[:, :4] + 0.5 * torch.randn(2000, 4, generator=generator)).argmax(1))

    model = network(0)
    if "--shard" in sys.argv:
        model = shard(model)
    train(model, data, cross_entropy, Recipe(epochs=5, lr=0.1), seed=0)
    cache.save("cache.safetensors", gradient(model, cross_entropy, data))

    retain = data.without(torch.arange(100, 140))  # the deletion
    given = Blind(
        retain=retain,
        loss_terms=cross_entropy,
        fresh=network,
        full=cache.load("cache.safetensors", model, cross_entropy),
    )
    result = unlearn(model, given, Reload(reset_fraction=0.1, fine_tune=Recipe(epochs=3, lr=0.05)), seed=0)
    save_weights("unlearned.safetensors", result.model)
    if distributed.rank() == 0:
        facts = result.trace.facts
        print(f"removed {facts['removed_count']} of {facts['cached_count']}, reset {facts['reset_count']} weights")
        print(f"ended because: {result.trace.stopped}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
