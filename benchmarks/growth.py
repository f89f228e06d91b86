"""How time and memory grow with parameters, examples, the number chosen, and groups: growth.csv and growth.svg.

python benchmarks/growth.py        about a minute on an idle core, 7 GB of memory at most

Seconds are of processor time on one thread, the least of three runs (of one for 1e9 entries); bytes are by how much the
resident memory of the process grows at the peak, as the trace of an unlearning records it, and for groups those of the
cache on disk.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import nn

from expunge import Examples, cache, cross_entropy, gradient, stream
from expunge.files import replacing
from expunge.models.convnet import ConvNet
from expunge.params import smallest
from expunge.rows import write_csv
from expunge.second_pass import second_pass
from expunge.trace import Trace
from ratios import images


@dataclass(frozen=True)
class Point:
    """One measurement."""

    what: str
    by: str  # what is varied
    value: int
    seconds: float
    bytes: int


def measured(what: str, by: str, value: int, work: Callable[[], object], repeats: int = 3) -> Point:
    times, trace = [], Trace("growth", 0)
    for number in range(repeats):
        with trace.measuring_memory(torch.device("cpu")) if number == 0 else nullcontext():
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
    return Point(what, by, value, min(times), trace.peak_memory or 0)


def points() -> Iterator[Point]:
    yield from by_parameters()
    yield from by_examples()
    yield from by_choice()
    yield from by_groups()
    yield from by_entries()


def by_parameters() -> Iterator[Point]:
    gradient(nn.Linear(64, 10), lambda m, b: cross_entropy(m, (b[0].flatten(1), b[1])), images(64, 1, 8))  # warms up
    data = Examples(torch.rand(64, 100, generator=stream(0, "x")), torch.randint(10, (64,), generator=stream(0, "y")))
    for width in (100, 320, 1000, 3200):
        layers = [nn.Linear(100, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
        model = nn.Sequential(*layers)
        entries = sum(p.numel() for p in model.parameters())
        yield measured("gradient(), 64 examples", "parameters", entries, partial(gradient, model, cross_entropy, data))
        away = partial(gradient, model, cross_entropy, data, accumulate_on="cpu")
        yield measured('the same, accumulate_on="cpu"', "parameters", entries, away)


def by_examples() -> Iterator[Point]:
    model = ConvNet(widths=(16, 32))
    for count in (128, 1280, 12800):
        yield measured("gradient()", "examples", count, partial(gradient, model, cross_entropy, images(count, 1, 8)))


def by_entries() -> Iterator[Point]:
    for count in (10**6, 10**7, 10**8, 10**9):
        piece = min(count, 10**8)
        scores = {str(k): torch.rand(piece, generator=stream(0, "scores", k)) for k in range(count // piece)}
        repeats = 3 if count < 10**9 else 1
        yield measured(
            "smallest(), 10 % of float32", "parameters", count, partial(smallest, scores, count // 10), repeats
        )


def by_choice() -> Iterator[Point]:
    scores = {"weight": torch.rand(10**7, generator=stream(0, "scores"))}
    for k in (1, 10**2, 10**4, 10**6, 5 * 10**6, 10**7 - 1):
        yield measured("smallest() of 1e7", "k", k, partial(smallest, scores, k))


def by_groups() -> Iterator[Point]:
    model, data = ConvNet(widths=(16, 32)), images(12800, 1, 8)
    left = data.without(torch.arange(0, 128))
    for count in (1, 5, 10, 25, 50, 100):
        full = gradient(model, cross_entropy, data, groups=count)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache.safetensors"
            cache.save(path, full)
            size = sum(file.stat().st_size for file in Path(folder).iterdir())
            full = cache.load(path, model, cross_entropy)
            again = partial(second_pass, full, model, cross_entropy, left)
            point = measured("second_pass(), 1 % of 12,800 deleted, neighbours", "groups", count, again)
        yield Point(point.what, point.by, point.value, point.seconds, size)


def draw(found: list[Point], path: Path) -> None:
    """Two rows of panels: seconds above, bytes below, one column for each thing that is varied."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "growth", "svg.fonttype": "none"}
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(point.by for point in found))
    figure, axes = pyplot.subplots(2, len(kinds), figsize=(3.6 * len(kinds), 6), layout="constrained")
    for column, by in enumerate(kinds):
        for row, unit in enumerate(("seconds", "bytes")):
            panel = axes[row][column]
            for what in dict.fromkeys(point.what for point in found if point.by == by):
                mine = [point for point in found if (point.by, point.what) == (by, what)]
                panel.plot([p.value for p in mine], [getattr(p, unit) for p in mine], marker="o", label=what)
            panel.set(xscale="log", yscale="log", xlabel=by, ylabel="processor seconds" if row == 0 else "bytes")
            panel.set_ylim(top=10 * panel.get_ylim()[1])  # room for the legend
            panel.grid(alpha=0.3)
        axes[0][column].legend(fontsize=7, loc="upper left")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def main() -> int:
    """Measure, write, draw."""
    torch.set_num_threads(1)
    found = []
    for point in points():
        print(f"{point.by:>10} = {point.value:<11} {point.seconds:9.4f} s {point.bytes / 1e6:9.1f} MB  {point.what}")
        found.append(point)
    here = Path(__file__).parent
    write_csv(here / "growth.csv", [field.name for field in fields(Point)], map(astuple, found))
    draw(found, here / "growth.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
