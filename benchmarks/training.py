"""The speed of training against a plain PyTorch loop, and whether both end at the same accuracy.

python benchmarks/run.py training   throughput, in the table of benchmarks
python benchmarks/training.py       accuracy on digits, twenty seeds, five minutes; writes results/training_accuracy.csv
python benchmarks/training.py 16    where the time of a step goes, in a ResNet-18 of this width
"""

import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from expunge import Examples, Recipe, Trace, cross_entropy, seeded, stream, train
from expunge.data.digits import digits
from expunge.data.images import Images, Normalisation, normalisation
from expunge.execution import Precision
from expunge.metrics.outputs import outputs
from expunge.models.from_bytes import FromBytes
from expunge.models.resnet import ResNet18
from expunge.rows import write_csv
from ratios import Result, at_least, fastest, for_comparison

BATCH = 128
SCALE = Normalisation((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
LOOPS: dict[str, Precision | None] = {"a plain loop": None, "train()": "float32", "train(), bfloat16": "bfloat16"}
FAST: dict[str, object] = {"crop": 4, "flip": True, "channels_last": True}


class PerImage(Dataset[tuple[Tensor, Tensor]]):
    """What most scripts have: crop, flip, scale and normalise image by image."""

    def __init__(self, images: Images, scale: Normalisation, padding: int = 4, flip: bool = True) -> None:
        self.images, self.padding, self.flip = images, padding, flip
        self.mean = torch.tensor(scale.mean)[:, None, None]
        self.deviation = torch.tensor(scale.deviation)[:, None, None]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        height, width = self.images.pixels.shape[2:]
        image = functional.pad(self.images.pixels[index], (self.padding,) * 4)
        down, right = torch.randint(2 * self.padding + 1, (2,)).tolist()
        image = image[:, down : down + height, right : right + width]
        if self.flip and torch.rand(()) < 0.5:
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


def network(width: int, device: str) -> nn.Module:
    with seeded(0, "network"):
        return ResNet18(width=width).to(device)


def rows() -> Iterator[Result]:
    """Throughput on the CPU, and on a GPU where there is one."""
    for width, count in ((16, 512), (64, 128)):
        yield from _on_cpu(width, count)
    yield _keeping_memory()
    if torch.cuda.is_available():
        yield from _on_gpu()


def _on_cpu(width: int, count: int) -> Iterator[Result]:
    """Against a plain loop in float32: in float32 too, and in the number format that is faster on this processor."""
    ours, plain = _ours("cpu", width, count, FAST), _plain("cpu", width, count)
    found = Trace("training", seed=0)
    _ours("cpu", width, 6 * BATCH, FAST | {"precision": "fastest"}, found)()  # six steps, and it knows
    chosen = _ours("cpu", width, count, FAST | {"precision": "fastest"}, found)
    loops = [ours, chosen, plain(0), plain(2)]
    for loop in loops:
        loop()  # starts workers
    float32, fastest_format, *others = fastest(*loops)
    what = f"training ResNet-18 of width {width} on cpu"
    yield at_least(f'{what}, precision="fastest" ({found.facts["precision"]}), {count / fastest_format:,.0f} images/s',
                   "a plain loop in float32", min(others) / fastest_format, 1.6)  # fmt: skip
    yield for_comparison(f"{what}, in float32, {count / float32:,.0f} images/s", "a plain loop in float32",
                         min(others) / float32)  # fmt: skip
    ours_alone, theirs_alone = fastest(ours, plain(0), clock=time.process_time)
    yield for_comparison("the same in processor seconds", "a plain loop without workers", theirs_alone / ours_alone)
    yield for_comparison("its convolutions alone: processor seconds", "a training step in float32",
                         _convolutions(network(width, "cpu")) / (ours_alone * BATCH / count))  # fmt: skip


def _on_gpu() -> Iterator[Result]:
    width, count = 64, 256 * BATCH
    ours, plain = (
        _ours("cuda", width, count, FAST | {"precision": "bfloat16", "compile": True}),
        _plain("cuda", width, count),
    )
    loops = [ours, plain(0), plain(2)]
    for loop in loops:
        loop()  # starts workers, compiles
    mine, *others = fastest(*loops)
    yield at_least(f"training ResNet-18 of width {width} on cuda, {count / mine:,.0f} images/s", "a plain loop",
                   min(others) / mine, 4)  # fmt: skip
    yield at_least(f"the same: throughput on {torch.cuda.get_device_name()}", "30,000 images/s", count / mine / 3e4, 1)
    yield for_comparison("the same: arithmetic of its layers", "products of large matrices in bfloat16",
                         count * _operations(network(width, "cuda")) / mine / _matrix_peak())  # fmt: skip


def _ours(
    device: str, width: int, count: int, settings: dict[str, object], trace: Trace | None = None
) -> Callable[[], object]:
    """An epoch of ``train()``."""
    data = noise(count)
    records = Examples(data.pixels, data.labels).to(device)
    model = FromBytes(network(width, device), SCALE.mean, SCALE.deviation).to(device)
    recipe = Recipe(epochs=1, lr=0.01, batch_size=BATCH, **settings)  # type: ignore[arg-type]
    return lambda: train(model, records, cross_entropy, recipe, seed=0, trace=trace)


def _plain(device: str, width: int, count: int) -> Callable[[int], Callable[[], object]]:
    """An epoch of the plain loop, with this many workers."""
    data, model = PerImage(noise(count), SCALE), network(width, device)

    def loop(workers: int) -> Callable[[], object]:
        loader = DataLoader(
            data, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0, pin_memory=device == "cuda"
        )
        return lambda: plain_loop(model, loader, 1, 0.01)

    return loop


def _keeping_memory() -> Result:
    """Processor seconds of an evaluation of 512 images in a process of its own, as usual and with freed memory kept."""
    code = """
import sys, time, torch
from expunge import Examples
from expunge.allocator import keep_freed_memory
from expunge.metrics.outputs import outputs
from expunge.models.resnet import ResNet18
if sys.argv[1] == "kept":
    keep_freed_memory()
model, data = ResNet18(width=16), Examples(torch.rand(512, 3, 32, 32), torch.zeros(512, dtype=torch.int64))
times = []
for _ in range(4):
    start = time.process_time()
    outputs(model, data)
    times.append(time.process_time() - start)
print(min(times))
"""
    usual, kept = (
        float(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True).stdout)
        for how in ("usual", "kept")
    )
    return at_least("keep_freed_memory(): speed of evaluating 512 images, ResNet-18 of width 16", "the usual allocator",
                    usual / kept, 1)  # fmt: skip


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


def _convolutions(model: nn.Module) -> float:
    """Seconds of all convolutions of a step, forward and backward, each alone: no loop around them can be faster."""
    calls: list[tuple[nn.Conv2d, Tensor]] = []
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    handles = [
        layer.register_forward_hook(lambda own, inputs, _: calls.append((own, inputs[0].detach()))) for layer in layers
    ]
    with torch.no_grad():
        model(torch.rand(BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last))
    for handle in handles:
        handle.remove()
    total = 0.0
    for number, (layer, inputs) in enumerate(calls):
        inputs.requires_grad_(number > 0)
        slope = torch.ones_like(layer(inputs))

        def both_ways(layer: nn.Conv2d = layer, inputs: Tensor = inputs, slope: Tensor = slope) -> None:
            layer(inputs).backward(slope)

        total += fastest(both_ways, clock=time.process_time)[0]
    return total


def accuracy() -> None:
    """ResNet-18 of width 16 on 600 digits for 15 epochs, measured on the other 1,197."""
    torch.set_num_threads(1)
    found: list[tuple[str, int, str]] = []
    for seed in range(20):
        split = digits(600, seed=seed)
        parts = [(255 * part.tensors[0]).round().to(torch.uint8) for part in (split.train, split.test)]
        data, test = Images(parts[0], split.train.tensors[1]), Examples(parts[1], split.test.tensors[1])
        scale = normalisation(data)
        for name, precision in LOOPS.items():
            with seeded(seed, "network"):
                model = FromBytes(ResNet18(width=16, channels=1), scale.mean, scale.deviation)
            if precision:
                recipe = Recipe(epochs=15, lr=0.05, batch_size=50, crop=1, channels_last=True, precision=precision)
                train(model, Examples(data.pixels, data.labels), cross_entropy, recipe, seed=seed)
            else:
                with seeded(seed, "plain"):
                    plain_loop(model, DataLoader(PerImage(data, scale, 1, False), 50, shuffle=True), 15, 0.05)
            found.append((name, seed, f"{outputs(model, test).correct.mean():.4f}"))
            print(*found[-1], flush=True)
    write_csv(Path(__file__).parents[1] / "results" / "training_accuracy.csv", ["loop", "seed", "accuracy"], found)
    by_loop = {name: [100 * float(value) for loop, _, value in found if loop == name] for name in LOOPS}
    for name, values in by_loop.items():
        print(f"{name}: {statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} %, n = {len(values)}")
    for one, other in itertools.combinations(LOOPS, 2):  # in pairs: a seed is a split and initial weights
        apart = [a - b for a, b in zip(by_loop[one], by_loop[other], strict=True)]
        error = statistics.stdev(apart) / len(apart) ** 0.5
        print(f"{one} above {other}: {statistics.mean(apart):.2f} ± {statistics.stdev(apart):.2f}, "
              f"t = {statistics.mean(apart) / error:.1f}")  # fmt: skip


def where_the_time_goes(width: int) -> None:
    """Processor seconds of a step of 128 images on one thread, of both loops, and shares by kind of operation."""
    torch.set_num_threads(1)
    data = noise(BATCH)
    theirs, inner = network(width, "cpu"), network(width, "cpu")
    ours = FromBytes(inner, SCALE.mean, SCALE.deviation)
    records = Examples(data.pixels, data.labels)
    recipe = Recipe(epochs=1, lr=0.01, batch_size=BATCH, **FAST)  # type: ignore[arg-type]
    loops: dict[str, Callable[[], object]] = {
        "a plain loop": lambda: plain_loop(theirs, DataLoader(PerImage(data, SCALE), BATCH), 1, 0.01),
        "train()": lambda: train(ours, records, cross_entropy, recipe, seed=0),
        "train(), bfloat16": lambda: train(ours, records, cross_entropy, replace(recipe, precision="bfloat16"), seed=0),
        "train(), compiled": lambda: train(ours, records, cross_entropy, replace(recipe, compile=True), seed=0),
    }
    for name, loop in loops.items():
        loop()
        seconds = []
        for _ in range(3):
            start = time.process_time()
            loop()
            seconds.append(time.process_time() - start)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
            loop()
        spent = dict.fromkeys((*_KINDS, "the rest, data included"), 0.0)
        for event in profiled.key_averages():
            kind = next((kind for kind, parts in _KINDS.items() if any(part in event.key for part in parts)), None)
            spent[kind or "the rest, data included"] += event.self_cpu_time_total
        shares = ", ".join(f"{kind} {time_ / sum(spent.values()):.0%}" for kind, time_ in spent.items())
        print(f"{name}: {min(seconds):.2f} s a step ({BATCH / min(seconds):.0f} images/s); {shares}", flush=True)


_KINDS = {
    "convolutions": ("convolution",),
    "BatchNorm": ("batch_norm",),
    "ReLU and sums": ("clamp_min", "threshold", "aten::add", "aten::relu"),
    "optimiser": ("sgd", "SGD", "_foreach"),
}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        where_the_time_goes(int(sys.argv[1]))
    else:
        accuracy()
