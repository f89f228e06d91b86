"""The gradient pass, selection, and the cache: speed and memory, as ratios in one run."""

import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from expunge import Examples, cross_entropy, gradient, stream
from expunge.models.convnet import ConvNet
from expunge.models.resnet import ResNet18
from expunge.params import smallest
from expunge.second_pass import second_pass
from ratios import Result, at_least, at_most, fastest, images


def rows() -> Iterator[Result]:
    yield from passes()
    yield from selection()
    yield from pieces()
    yield from groups()
    yield from memory()


class Augmented(Dataset[tuple[torch.Tensor, int]]):
    """Images as bytes, cropped and mirrored at random one by one, as an image pipeline does."""

    def __init__(self, data: Examples) -> None:
        self.images = (data.tensors[0] * 255).to(torch.uint8)
        self.labels = data.tensors[1].tolist()
        self.padding = self.images.shape[-1] // 8

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.images[index].float() / 255
        padded = functional.pad(image, [self.padding] * 4)
        top, left = torch.randint(2 * self.padding + 1, (2,)).tolist()
        image = padded[:, top : top + image.shape[1], left : left + image.shape[2]]
        if torch.rand(()) < 0.5:
            image = image.flip(2)
        return (image - 0.5) / 0.25, self.labels[index]


def passes() -> Iterator[Result]:
    """`gradient()` against forward and backward and nothing else, and against a loop as commonly written.

    The common loop takes the mean loss of shuffled batches of augmented images from a DataLoader, and adds every
    gradient to a dictionary. It is in eval mode here, like ours.
    """
    for name, model, data in (
        ("ResNet-18 of width 16, 4,096 images of 3 x 32 x 32", ResNet18(width=16), images(4096, 3, 32)),
        ("the demo's network, 16,384 images of 1 x 8 x 8", ConvNet(widths=(16, 32)), images(16384, 1, 8)),
    ):
        inputs, labels = data.tensors
        loader = DataLoader(Augmented(data), batch_size=128, shuffle=True)

        def bare(model: nn.Module = model, inputs: torch.Tensor = inputs, labels: torch.Tensor = labels) -> None:
            model.eval()
            for x, y in zip(inputs.split(128), labels.split(128), strict=True):
                model.zero_grad()
                functional.cross_entropy(model(x), y, reduction="sum").backward()

        def common(model: nn.Module = model, loader: DataLoader[tuple[torch.Tensor, int]] = loader) -> None:
            model.eval()
            total: dict[str, torch.Tensor] = {}
            for x, y in loader:
                model.zero_grad()
                functional.cross_entropy(model(x), y).backward()
                for name, p in model.named_parameters():
                    assert p.grad is not None
                    total[name] = total[name] + p.grad if name in total else p.grad.clone()

        def ours(model: nn.Module = model, data: Examples = data) -> None:
            gradient(model, cross_entropy, data)

        def streamed(model: nn.Module = model, data: Examples = data) -> None:
            gradient(model, cross_entropy, data, accumulate_on="cpu")

        ours()
        theirs, mine, away, often = fastest(bare, ours, streamed, common)
        yield at_least(f"gradient(): throughput, {name}", "bare forward and backward", theirs / mine, 0.95)
        yield at_least(f"the same, accumulate_on='cpu', {name}", "bare forward and backward", theirs / away, 0.5)
        yield at_least(f"gradient(): throughput, {name}", "a loop as commonly written", often / mine, 2)


def selection() -> Iterator[Result]:
    """The smallest 10 % of 1e8 scores, in time and in memory."""
    count = 10**8
    scores = torch.rand(count, dtype=torch.float64, generator=stream(0, "scores"))
    array = scores.numpy()
    mine, partition = fastest(
        lambda: smallest({"weight": scores}, count // 10), lambda: np.partition(array, count // 10)
    )
    start = time.perf_counter()
    _ = scores.argsort().argsort() < count // 10
    double = time.perf_counter() - start
    yield at_least("selection of 10 % of 1e8: speed", "double argsort", double / mine, 20)
    yield at_most("selection of 10 % of 1e8: time", "numpy.partition", mine / partition, 1.2)
    prepare = "scores = torch.rand(10**8, dtype=torch.float64)"
    ours = peak_growth(prepare, "smallest({'weight': scores}, 10**7)")
    argsort = peak_growth(prepare, "scores.argsort().argsort() < 10**7")
    yield at_most("selection of 10 % of 1e8: extra memory", "double argsort", ours / argsort, 1 / 3)


def pieces() -> Iterator[Result]:
    """1e9 scores in ten tensors: does it work, and at what memory?"""
    growth = peak_growth(
        "scores = {str(i): torch.rand(10**8) for i in range(10)}",
        "assert sum(int(mask.count_nonzero()) for mask in smallest(scores, 10**8).values()) == 10**8",
    )
    yield at_most(
        "selection of 10 % of 1e9 float32: extra memory (the masks are 0.25)", "the scores", growth / 4e9, 0.5
    )


def groups() -> Iterator[Result]:
    """1 % of the examples deleted from one of 50 groups: the second pass by groups, against the whole one."""
    for name, model, data in (
        ("ResNet-18 of width 16, 1,600 images", ResNet18(width=16), images(1600, 3, 32)),
        ("the demo's network, 64,000 images", ConvNet(widths=(16, 32)), images(64000, 1, 8)),
    ):
        full = gradient(model, cross_entropy, data, micro_batch=len(data) // 50, groups=50)
        left = data.without(torch.arange(len(data) // 100))
        computed = second_pass(full, model, cross_entropy, left)[1]

        start = time.perf_counter()
        gradient(model, cross_entropy, left, micro_batch=len(data) // 50)
        whole = time.perf_counter() - start
        (part,) = fastest(partial(second_pass, full, model, cross_entropy, left))
        yield at_least(f"1 % deleted from one of 50 groups: examples, {name}", "all", len(left) / computed, 20)
        yield at_least(f"1 % deleted from one of 50 groups: speed, {name}", "the whole pass", whole / part, 20)


def memory() -> Iterator[Result]:
    """A transformer of 350 million parameters, see `transformer.py`."""
    script = Path(__file__).with_name("transformer.py")
    command = [sys.executable, str(script), "cpu"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peaks = {name: float(number) for name, number in (line.split() for line in found.splitlines())}
    what = f"gradient(accumulate_on='cpu') and cache.save(), a transformer of {peaks['entries'] / 1e6:.0f} M parameters"
    of_both = peaks["cpu"] / (2 * 4 * peaks["entries"])
    yield at_most(f"{what}: bytes on the device's side at the peak", "model + gradients", of_both, 1.2)


def peak_growth(prepare: str, work: str) -> float:
    """By how many bytes the peak memory grows during the work, in a process of its own (Linux)."""
    code = f"""
import torch
from expunge.params import smallest
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
{prepare}
before = peak()
{work}
print(peak() - before)
"""
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
