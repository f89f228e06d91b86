"""Does a cached gradient tell of which classes the removed records were?

Claim: on real images and a network that knows them by heart it does, for removals of a few records or many, whichever
loss the gradient is of; and it shows when all of a class went, of which nothing is left to compare with.
Setting: the originals of tables 1 and 2 (cpu profile), whose stages are shared; the audit's fit to the head's gradient.
Cost: a quarter of an hour on one core where the originals are trained, three minutes more for each of six where not.
Expected: 0.85 or more of the removed records are put into the right class where a class lost many (it came out so on
CIFAR-10, and not with the 30 images a class of CIFAR-100); "unexplained" is near 1 only if a class went whole.

    python experiments/removed_classes.py --data DIR
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn

from expunge import Examples, gradient, stream
from expunge.audit.finding import Evidence, Truth
from expunge.audit.labels import labels
from expunge.audit.layers import linear_layers
from expunge.bench import steps, tasks
from expunge.bench.profiles import task
from expunge.bench.records import records_of
from expunge.bench.stages import LOSSES, Stage
from expunge.bench.store import Store
from expunge.bench.tasks import Scenario
from expunge.rows import write_csv
from expunge.weights import load_weights

SEEDS = (0, 1, 2)
WHOLE = 10**6  # records: all of a class
REMOVALS: Mapping[str, Mapping[int, int] | int] = {  # records of each class, or so many at random
    "5 of a class": {2: 5},
    "15 of a class": {2: 15},
    "20, 10 and 5 of three": {1: 20, 3: 10, 7: 5},
    "20 at random": 20,
    "300 at random": 300,
    "all of a class": {0: WHOLE},
    "all of a class, 20 of another": {0: WHOLE, 1: 20},
}


@dataclass(frozen=True)
class Line:
    """What one removal showed."""

    dataset: str
    seed: int
    loss: str
    removal: str
    removed: int
    placed: float  # share of the removed records in the right class
    by_chance: float  # the same by the shares of what is left
    unexplained: float  # share of the gradient's norm


def chosen(labels: Tensor, removal: Mapping[int, int] | int, seed: int) -> Tensor:
    """Which rows a removal takes."""
    order = torch.randperm(len(labels), generator=stream(seed, "removed"))
    if isinstance(removal, int):
        return order[:removal]
    return torch.cat([order[labels[order] == label][:count] for label, count in removal.items()])


def measured(
    model: nn.Module, data: Examples, loss: str, removal: Mapping[int, int] | int, seed: int
) -> tuple[int, list[float]]:
    """How many were removed; placed, by chance and unexplained, as the audit says."""
    gone = data.positions[chosen(data.tensors[1], removal, seed)]
    left, terms = data.without(gone), LOSSES[loss]
    removed = gradient(model, terms, data) - gradient(model, terms, left)
    evidence = Evidence(model=model, loss_terms=terms, retain=left, removed=removed)
    found = labels(evidence, linear_layers(evidence)[-1], Truth(forget=data.only(gone)))
    said = ("labels placed", "placed by the kept data's shares", "unexplained")
    return len(gone), [round(found.numbers[each], 4) for each in said]


def main(data: Path, out: Path = Path("runs/bench")) -> None:
    """Measure all, and write results/removed_classes.csv.

    Args:
        data: Folder of the datasets.
        out: Where `expunge bench run` keeps the results of stages.
    """
    torch.set_num_threads(1)
    store, lines = Store(out, data), []
    for dataset in ("cifar10", "cifar100"):
        plan = tasks.located(task("cpu", dataset, Scenario(kind="random", amount=0.1)), data)
        for seed in SEEDS:
            stage = Stage(step="original", task=plan, seed=seed)
            steps.do(stage, store)
            records = records_of(plan, seed, data)
            model = tasks.untrained(plan, records.classes, 3, 0)
            load_weights(model, store.result(stage) / steps.WEIGHTS)
            for loss in LOSSES:
                for name, removal in REMOVALS.items():
                    count, shares = measured(model, records.before, loss, removal, seed)
                    lines.append(Line(dataset, seed, loss, name, count, *shares))
                    print(lines[-1])
    write_csv(Path("results/removed_classes.csv"), [each.name for each in fields(Line)], map(astuple, lines))


if __name__ == "__main__":
    tyro.cli(main)
