"""Which step suits natural ascent, and does the information that was removed tell it? On seeds that no table reports.

Claim: the step that ends at retraining's loss on what was removed grows as the share of the information that was
removed, to the power of 2/3, whether the records are few or many, at random or of one class.
Setting: five removals of amounts.py and one of transfer.py (cpu profile), seeds 1001 and 1002; for each three steps
around the default. This is where the default's step and the unit of its growth come from.
Fairness: no line is of seeds 0 to 2, on which amounts.py, natural.py and transfer.py judge the defaults. But that a
step by number was too short for images of a class was seen there, and so were the steps of another unit.
Cost: forty minutes on two cores, a quarter of that where its models are trained.
Expected: the number of records alone asks for the same step for 100 images of a class as for 100 at random.

    python experiments/natural_steps.py --data DIR
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import tyro

from expunge.allocator import keep_freed_memory
from expunge.bench import experiments, steps
from expunge.bench.stages import Stage, cache_of, closure
from expunge.bench.store import Store
from expunge.methods.natural_ascent import NaturalAscent
from expunge.metrics.classification import accuracy
from expunge.metrics.classification import cross_entropy as mean_loss
from expunge.metrics.outputs import outputs
from expunge.rows import write_csv

SEEDS = (1001, 1002)
TIMES = (0.8, 1.1, 1.5)  # the default step
COLUMNS = (
    "scenario", "seed", "information_share", "ascent_share", "NA", "FA", "FE", "FA of retrained", "FE of retrained",
)  # fmt: skip
REMOVALS = {
    "amounts": ("random 1 %", "random 3 %", "random 10 %", "in-class 30", "in-class 100"),
    "transfer": ("CIFAR-10, ConvNet",),
}
Line = tuple[str | int | float, ...]


def main(data: Path, out: Path = Path("runs/bench"), results: Path = Path("results/natural_steps.csv")) -> None:
    """Unlearn each removal with each step, and write a line for each."""
    wanted = [
        replace(stage, seed=seed)
        for name, tasks in REMOVALS.items()
        for stage in experiments.load(Path(__file__).with_name(f"{name}.py"), "cpu", data).evaluations((0,))
        if stage.contender is not None and stage.contender.name == "natural-ascent" and stage.task.name in tasks
        for seed in SEEDS
    ]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        tried = pool.map(partial(lines, store=Store(out, data)), wanted)
        write_csv(results, COLUMNS, [line for found in tried for line in found])


def lines(stage: Stage, store: Store) -> list[Line]:
    """What each step leaves of one removal, beside a retrained model."""
    torch.set_num_threads(1)
    keep_freed_memory()
    for need in closure((cache_of(stage), stage.of("outputs")), store.done).values():
        steps.do(need, store)
    situation = steps.Situation(stage, store)
    records, entry = situation.records, steps.entry_of(stage, situation.records)
    truth = steps.read_outputs(records, store.result(stage.of("outputs")))["forget"]
    found: list[Line] = []
    for times in TIMES:
        model, trace = situation.unlearned(entry, {"step": times * NaturalAscent().step}, stage.seed)
        left, removed = (outputs(model, each) for each in (records.retain, records.forget))
        found.append((
            stage.task.name, stage.seed, trace.facts["information_share"], trace.facts["ascent_share"],
            accuracy(left), accuracy(removed), mean_loss(removed), accuracy(truth), mean_loss(truth),
        ))  # fmt: skip
        print(*found[-1], sep="\t", flush=True)
    return found


if __name__ == "__main__":
    tyro.cli(main)
