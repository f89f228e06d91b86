"""A gradient pass in one process and in two, with one thread each: prints the ratio of their times.

torchrun --nproc-per-node 2 benchmarks/two_processes.py
"""

import os
import time

import torch
import torch.distributed as dist

from expunge import Examples, cross_entropy, gradient, seeded
from expunge.models.resnet import ResNet18

IMAGES, REPEATS = 1024, 5


def shortest_pass() -> float:
    with seeded(0, "model"):
        model = ResNet18(width=16)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, 3, 32, 32, generator=generator)
    data = Examples(images, torch.randint(10, (IMAGES,), generator=generator))
    times = []
    for _ in range(REPEATS):
        if dist.is_initialized():
            dist.barrier()
        start = time.perf_counter()
        gradient(model, cross_entropy, data)
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    torch.set_num_threads(1)
    first = os.environ["RANK"] == "0"
    alone = shortest_pass() if first else 0.0  # the other one waits without work until the first joins
    dist.init_process_group("gloo")
    together = shortest_pass()
    if first:
        print(alone / together)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
