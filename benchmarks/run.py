"""Speed and memory as ratios in one run: prints a table and writes benchmarks/results.md.

python benchmarks/run.py            everything, about six minutes on two cores
python benchmarks/run.py gradient   what starts with this name
"""

import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import gradients
import training
from expunge import (
    SSD,
    Blind,
    Examples,
    Recipe,
    Reload,
    SalUn,
    Sighted,
    cross_entropy,
    gradient,
    importance,
    seeded,
    stream,
    train,
    unlearn,
)
from expunge.batches import LossTerms
from expunge.files import write_text
from expunge.methods.fisher import every_class
from expunge.methods.per_example import squared_gradients
from expunge.metrics.compare import profile
from expunge.metrics.outputs import Outputs
from expunge.models.convnet import ConvNet
from expunge.models.resnet import ResNet18
from ratios import REPEATS, Result, at_least, at_most, fastest, for_comparison, images
from transformer import Storages


def reload_without_fine_tuning() -> Iterator[Result]:
    """Everything of RELOAD but step 5, in epochs of training."""
    data = images(2048, 3, 32)
    with seeded(0):
        model = ResNet18(width=16)
    recipe = Recipe(epochs=1, lr=0.01)
    full = gradient(model, cross_entropy, data)
    retain = data.without(torch.arange(0, 2048, 10))
    given = Blind(retain=retain, loss_terms=cross_entropy, fresh=lambda _: ResNet18(width=16), full=full)
    config = Reload(fine_tune=Recipe(epochs=0, lr=0.1))
    epoch, steps = fastest(
        lambda: train(ResNet18(width=16), retain, cross_entropy, recipe, seed=0),
        lambda: unlearn(model, given, config),
    )
    yield at_most("RELOAD without fine-tuning, ResNet-18 of width 16", "an epoch of training", steps / epoch, 2.0)


def reload_memory() -> Iterator[Result]:
    """Bytes that RELOAD's steps hold at their peak besides the model and the cache, which is mapped from its file."""
    width = 1024

    def fresh(seed: int) -> nn.Module:
        with seeded(seed):
            return nn.Sequential(*[nn.Linear(width, width) for _ in range(5)], nn.Linear(width, 10))

    model = fresh(0)
    data = Examples(torch.randn(512, width, generator=stream(0, "inputs")), torch.arange(512) % 10)
    full = gradient(model, cross_entropy, data)
    given = Blind(retain=data.without(torch.arange(20)), loss_terms=cross_entropy, fresh=fresh, full=full)
    counting = Storages(model)
    for tensor in (*full.total.values(), *(full.noise or {}).values()):
        counting.leave_out(tensor)
    with counting, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this model was never trained
        unlearn(model, given, Reload(fine_tune=Recipe(epochs=1, lr=0.01)))
    size = sum(p.nbytes for p in model.parameters())
    yield at_most(
        "RELOAD: bytes at the peak besides model and cache", "the model in float32", counting.peak / size - 1, 10
    )


def start_up() -> Iterator[Result]:
    """What `import expunge` adds to `import torch`, in seconds."""

    def seconds(statement: str) -> float:
        code = f"import time; s = time.perf_counter(); {statement}; print(time.perf_counter() - s)"
        run = [sys.executable, "-c", code]
        return min(
            float(subprocess.run(run, capture_output=True, text=True, check=True).stdout) for _ in range(REPEATS)
        )

    added = seconds("import torch; import expunge") - seconds("import torch")
    yield at_most("import expunge: seconds added", "import torch", added, 0.3)


def scoring() -> Iterator[Result]:
    """All single-model metrics of 1e6 stored outputs: 700,000 retained, 100,000 removed, 200,000 test records."""
    generator = np.random.default_rng(0)
    splits = {}
    for split, count in {"retain": 700_000, "forget": 100_000, "test": 200_000}.items():
        labels = generator.integers(10, size=count)
        logits = generator.normal(size=(count, 10))
        logits[np.arange(count), labels] += 2
        splits[split] = Outputs(logits, labels)
    start = time.process_time()
    found = profile(splits, full=True)
    spent = time.process_time() - start
    what = f"scoring 1e6 outputs of 10 classes, {len(found.values)} metrics: processor seconds"
    yield at_most(what, "one second", spent, 30)


def per_example() -> Iterator[Result]:
    """Squared gradients of every example, against a loop over single examples; what a diagonal Fisher is made of.

    Speed is examples a second: the loop, which takes each as long as the last, gets fewer of them.
    """
    for name, model, data, few in (
        ("the demo's network, images of 1 x 8 x 8", ConvNet(widths=(16, 32)), images(2048, 1, 8), 256),
        ("ResNet-18 of width 16, images of 3 x 32 x 32", ResNet18(width=16), images(256, 3, 32), 32),
    ):
        for terms, part, some in (
            (cross_entropy, data, data.only(torch.arange(few))),
            (every_class, data.only(torch.arange(len(data) // 4)), data.only(torch.arange(few // 4))),
        ):

            def one_by_one(model: nn.Module = model, terms: LossTerms = terms, some: Examples = some) -> None:
                model.eval()
                theta = list(model.parameters())
                total = [torch.zeros_like(p, dtype=torch.float64) for p in theta]
                for x, y in zip(*(tensor.split(1) for tensor in some.tensors), strict=True):
                    for term in terms(model, (x, y)):
                        for own, slope in zip(total, torch.autograd.grad(term, theta, retain_graph=True), strict=True):
                            own.add_(slope.double().square())

            def bare(model: nn.Module = model, part: Examples = part) -> None:
                for x, y in zip(*(tensor.split(128) for tensor in part.tensors), strict=True):
                    functional.cross_entropy(model(x), y, reduction="sum").backward()

            def ours(model: nn.Module = model, terms: LossTerms = terms, part: Examples = part) -> None:
                squared_gradients(model, terms, part)

            ours()
            loop, mine, least = fastest(one_by_one, ours, bare)
            loop *= len(part) / len(some)
            what = "of every class (Fisher)" if terms is every_class else "of one loss (SSD)"
            yield at_least(f"squared gradients {what}: speed, {name}", "a loop over examples", loop / mine, 5)
            if terms is cross_entropy:
                yield for_comparison(f"forward and backward alone: speed, {name}", "the loop", loop / least)
                yield for_comparison(f"squared gradients {what}: speed, {name}", "forward and backward", least / mine)


def masks() -> Iterator[Result]:
    """What SalUn and SSD need to choose weights, against what RELOAD needs: its gradient pass and its selection."""
    data = images(1024, 3, 32)
    with seeded(0):
        model = ResNet18(width=16)
    rows = torch.arange(0, 1024, 10)
    given = Sighted(
        retain=data.without(rows),
        forget=data.only(rows),
        loss_terms=cross_entropy,
        fresh=lambda _: ResNet18(width=16),
        full=gradient(model, cross_entropy, data),
    )
    records = replace(given, importance=importance(model, cross_entropy, data))
    means = replace(given, importance=importance(model, cross_entropy, data, squares="batch-means"))
    still = Recipe(epochs=0, lr=0.1)
    by_record, by_batch = (SSD(squares=squares, loss_bound=1e9) for squares in ("records", "batch-means"))
    ours = "SSD, the importance of all data kept as RELOAD's gradient is"
    spent: dict[str, list[float]] = {}
    for _ in range(REPEATS):
        for name, seen, config, stages in (
            ("RELOAD", given, Reload(fine_tune=still), ("difference", "select")),
            ("SalUn", given, SalUn(recipe=still), ("mask",)),
            (ours, records, by_record, ("importance",)),
            (f"{ours}, squares of batch means", means, by_batch, ("importance",)),
            ("SSD, nothing kept", given, by_record, ("importance",)),
            ("SSD, nothing kept, squares of batch means", given, by_batch, ("importance",)),
        ):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # this model was never trained
                seconds = unlearn(model, seen, config).trace.seconds
            spent.setdefault(name, []).append(sum(seconds[stage] for stage in stages))
    reload = min(spent.pop("RELOAD"))
    for name, times in spent.items():
        what, against = f"{name}: time to choose weights, ResNet-18 of width 16", "that of RELOAD"
        ratio = min(times) / reload
        yield for_comparison(what, against, ratio) if "nothing" in name else at_most(what, against, ratio, 1)


def two_processes() -> Iterator[Result]:
    """A gradient pass dealt out to two processes, with one thread each."""
    script = Path(__file__).with_name("two_processes.py")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    what = "gradient() in two processes of one thread: throughput, ResNet-18 of width 16, 1,024 images of 3 x 32 x 32"
    yield at_least(what, "in one", float(done.stdout), 1.8)


BENCHMARKS = {
    "gradients": gradients.rows,
    "two": two_processes,
    "training": training.rows,
    "reload": reload_without_fine_tuning,
    "memory": reload_memory,
    "import": start_up,
    "scoring": scoring,
    "per-example": per_example,
    "masks": masks,
}


def main(wanted: str) -> int:
    """Run, print, write; the exit code says whether everything required was met."""
    results: list[Result] = []
    for name, benchmark in BENCHMARKS.items():
        if name.startswith(wanted):
            for result in benchmark():
                print(f"{result.ratio:8.3f}  ({result.required})  {result.what} / {result.against}", flush=True)
                results.append(result)
    if not wanted:
        write_text(Path(__file__).with_name("results.md"), _markdown(results))
    return 0 if all(result.met for result in results) else 1


def _markdown(results: list[Result]) -> str:
    lines = [
        "# Benchmarks",
        "",
        f"`make bench` on {datetime.now(UTC).date()}: {_processor()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}. "
        f"Times are the shortest of {REPEATS} runs taken in turns; "
        "every ratio is of two times (or sizes) of the same run. "
        "Rows without a requirement are there for comparison.",
        "",
        "| what | against | ratio | required | met |",
        "|---|---|---|---|---|",
        *(f"| {r.what} | {r.against} | {r.ratio:.3f} | {r.required} | {_met(r)} |" for r in results),
    ]
    return "\n".join(lines) + "\n"


def _met(result: Result) -> str:
    if not result.required:
        return ""
    return "yes" if result.met else "**no**"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
