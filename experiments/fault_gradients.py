"""What of the difference of gradients after a correction is of the faults, and what of their corrections?

Claim: of cross-entropy next to nothing is of the faults, which a model has learned by heart; of margins about half.
Setting: the originals of corrections.py (cpu profile), whose stages are shared; weights of two or more dimensions.
Cost: ten minutes on one core where the originals are trained, half an hour more where not.
Expected: with cross-entropy the difference is the negative gradient of all that is left, which fine-tuning follows.

    python experiments/fault_gradients.py --data DIR
"""

from functools import partial
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn

from expunge.allocator import keep_freed_memory
from expunge.batches import Examples, LossTerms
from expunge.bench import experiments, steps
from expunge.bench.records import records_of
from expunge.bench.stages import original_of
from expunge.bench.store import Store
from expunge.bench.tasks import untrained
from expunge.gradient import gradient
from expunge.losses import cross_entropy, logit_margin, name_of
from expunge.rows import write_csv
from expunge.weights import load_weights

SEEDS = (0, 1, 2)
COLUMNS = ("scenario", "seed", "loss", "of_faults", "of_corrections", "along_faults", "against_left")


def main(data: Path, out: Path = Path("runs/bench"), results: Path = Path("results/fault_gradients.csv")) -> None:
    """Look at every model with both losses, and write a line for each: two norms and two cosines of the difference."""
    keep_freed_memory()
    store, lines = Store(out, data), []
    planned = experiments.load(Path(__file__).with_name("corrections.py"), "cpu", data)
    for stage in planned.evaluations(SEEDS):
        if stage.contender is None or stage.contender.name != "reload":
            continue
        steps.do(original_of(stage), store)
        records = records_of(stage.task, stage.seed, data)
        model = untrained(stage.task, records.classes, records.before.tensors[0].shape[1], 0)
        load_weights(model, store.result(original_of(stage)) / steps.WEIGHTS)
        changed = differing(records.before, records.retain)
        for loss in (cross_entropy, logit_margin):
            of = partial(gradient_of_weights, model, loss)
            faults, corrections, left = (
                of(records.before.only(changed)),
                of(records.retain.only(changed)),
                of(records.retain),
            )
            removed = faults - corrections
            line = (
                stage.task.scenario.name,
                stage.seed,
                name_of(loss),
                float(faults.norm()),
                float(corrections.norm()),
            )
            lines.append((*line, cosine(removed, faults), -cosine(removed, left)))
            print(*lines[-1], sep="\t", flush=True)
    write_csv(results, COLUMNS, lines)


def differing(before: Examples, after: Examples) -> Tensor:
    """Positions of the records that were corrected."""
    pairs = zip(before.tensors, after.tensors, strict=True)
    unlike = torch.stack([(one != other).flatten(1).any(1) if one.ndim > 1 else one != other for one, other in pairs])
    return before.positions[unlike.any(0)]


def gradient_of_weights(model: nn.Module, loss: LossTerms, data: Examples) -> Tensor:
    """The summed gradient in the weights of two or more dimensions, as one vector."""
    weights = gradient(model, loss, data, parameters=lambda _, p: p.ndim > 1)
    return torch.cat([each.flatten() for each in weights.total.values()])


def cosine(one: Tensor, other: Tensor) -> float:
    """Of the angle between two vectors."""
    return float(one @ other / (one.norm() * other.norm()))


if __name__ == "__main__":
    tyro.cli(main)
