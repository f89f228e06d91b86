"""The speed of training against a plain PyTorch loop, and whether both end at the same accuracy.

python benchmarks/run.py training        throughput, in the table of benchmarks
python benchmarks/training.py FOLDER     accuracy on CIFAR-10 (its official files are in the folder): 3 seeds, about a
                                         quarter of an hour on two cores; writes results/training_accuracy.csv
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from expunge import Examples, Recipe, cross_entropy, seeded, stream, train
from expunge.data import read
from expunge.data.images import Images, Normalisation, normalisation
from expunge.metrics.outputs import outputs
from expunge.models.from_bytes import FromBytes
from expunge.models.resnet import ResNet18
from expunge.rows import write_csv
from ratios import Result, at_least, fastest

BATCH = 128
SCALE = Normalisation((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
FAST: dict[str, object] = {"crop": 4, "flip": True, "channels_last": True}


class PerImage(Dataset[tuple[Tensor, Tensor]]):
    """What most scripts have: crop, flip, scale and normalise image by image."""

    def __init__(self, images: Images, scale: Normalisation) -> None:
        self.images = images
        self.mean = torch.tensor(scale.mean)[:, None, None]
        self.deviation = torch.tensor(scale.deviation)[:, None, None]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = functional.pad(self.images.pixels[index], (4, 4, 4, 4))
        down, right = torch.randint(9, (2,)).tolist()
        image = image[:, down : down + 32, right : right + 32]
        if torch.rand(()) < 0.5:
            image = image.flip(2)
        return (image.float() / 255 - self.mean) / self.deviation, self.images.labels[index]


def plain_loop(model: nn.Module, loader: DataLoader[tuple[Tensor, Tensor]], epochs: int, lr: float) -> float:
    """As in a tutorial: SGD, a scheduler a step, the loss read at every step."""
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    model.train()
    running = 0.0
    for _ in range(epochs):
        for inputs, labels in loader:
            x, y = inputs.to(device), labels.to(device)
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            scheduler.step()
            running += loss.item()
    return running


def noise(count: int) -> Images:
    pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=stream(0, "pixels"))
    return Images(pixels, torch.randint(10, (count,), generator=stream(0, "labels")))


def network(width: int, device: str, seed: int = 0) -> nn.Module:
    with seeded(seed, "network"):
        return ResNet18(width=width).to(device)


def rows() -> Iterator[Result]:
    """Throughput on the CPU, and on a GPU where there is one."""
    yield from _on("cpu", 16, 512, FAST, 1.6)
    yield from _on("cpu", 64, 128, FAST, 1.6)
    if torch.cuda.is_available():
        yield from _on("cuda", 64, 256 * BATCH, FAST | {"precision": "bfloat16", "compile": True}, 4)


def _on(device: str, width: int, count: int, settings: dict[str, object], required: float) -> Iterator[Result]:
    data = noise(count)
    records = Examples(data.pixels, data.labels).to(device)
    theirs = network(width, device)
    ours = FromBytes(network(width, device), SCALE.mean, SCALE.deviation).to(device)
    recipe = Recipe(epochs=1, lr=0.01, batch_size=BATCH, **settings)  # type: ignore[arg-type]

    def plain(workers: int) -> Callable[[], object]:
        loader = DataLoader(
            PerImage(data, SCALE), BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0,
            pin_memory=device == "cuda",
        )  # fmt: skip
        return lambda: plain_loop(theirs, loader, 1, 0.01)

    contestants = [lambda: train(ours, records, cross_entropy, recipe, seed=0), plain(0), plain(2)]
    for contestant in contestants:
        contestant()  # starts workers, compiles
    mine, *others = fastest(*contestants)
    what = f"training ResNet-18 of width {width} on {device}, {count / mine:,.0f} images/s"
    yield at_least(what, "a plain loop", min(others) / mine, required)
    if device == "cuda":
        yield at_least(
            f"the same: throughput on {torch.cuda.get_device_name()}", "30,000 images/s", count / mine / 3e4, 1
        )
        yield at_least("the same: arithmetic of its layers", "products of large matrices in bfloat16",
                       count * _operations(ours) / mine / _matrix_peak(), 0)  # fmt: skip
    else:
        share = _convolutions(ours, records) / (mine * BATCH / count)
        yield at_least("for comparison, its convolutions alone: share of the time", "a training step", share, 0)


def _operations(model: nn.Module) -> float:
    """Floating-point operations of a forward and backward pass, an image."""
    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(8, 3, 32, 32, device=device)).sum().backward()
    return float(counter.get_total_flops()) / 8


def _matrix_peak() -> float:
    """Floating-point operations a second of large products in bfloat16."""
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)

    def products() -> None:
        for _ in range(20):
            torch.mm(matrix, matrix)
        torch.cuda.synchronize()

    products()
    return 20 * 2 * 8192**3 / fastest(products)[0]


def _convolutions(model: nn.Module, records: Examples) -> float:
    """Seconds of all convolutions of a step, forward and backward, each alone: no loop around them can be faster."""
    calls: list[tuple[nn.Conv2d, Tensor]] = []
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    handles = [
        layer.register_forward_hook(lambda own, inputs, _: calls.append((own, inputs[0].detach()))) for layer in layers
    ]
    with torch.no_grad():
        model(records.tensors[0][:BATCH].contiguous(memory_format=torch.channels_last))
    for handle in handles:
        handle.remove()
    total = 0.0
    for number, (layer, inputs) in enumerate(calls):
        inputs.requires_grad_(number > 0)
        slope = torch.ones_like(layer(inputs))

        def both_ways(layer: nn.Conv2d = layer, inputs: Tensor = inputs, slope: Tensor = slope) -> None:
            layer(inputs).backward(slope)

        total += fastest(both_ways)[0]
    return total


def accuracy(folder: str) -> None:
    """Both loops on 3,000 images of CIFAR-10 for five epochs, accuracy on 2,000 test images, three seeds."""
    data = read("cifar10", folder)
    assert data.test is not None
    part = Images(data.train.pixels[:3000], data.train.labels[:3000])
    test = Examples(data.test.pixels[:2000], data.test.labels[:2000])
    scale, found = normalisation(part), []
    for seed in range(3):
        recipe = Recipe(epochs=5, lr=0.05, batch_size=BATCH, **FAST)  # type: ignore[arg-type]
        for name in ("plain loop", "train()"):
            model = FromBytes(network(16, "cpu", seed), scale.mean, scale.deviation)
            start = time.perf_counter()
            if name == "train()":
                train(model, Examples(part.pixels, part.labels), cross_entropy, recipe, seed=seed)
            else:
                with seeded(seed):
                    plain_loop(model, DataLoader(PerImage(part, scale), BATCH, shuffle=True), 5, 0.05)
            seconds = time.perf_counter() - start
            right = float(outputs(model, test).correct.mean())
            found.append((name, seed, f"{right:.4f}", f"{seconds:.1f}"))
            print(*found[-1], flush=True)
    write_csv(
        Path(__file__).parents[1] / "results" / "training_accuracy.csv", ["loop", "seed", "accuracy", "seconds"], found
    )
    for name in ("plain loop", "train()"):
        values = [100 * float(value) for loop, _, value, _ in found if loop == name]
        print(f"{name}: {statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} %, n = {len(values)}")


if __name__ == "__main__":
    accuracy(sys.argv[1])
