"""How much is there to forget: what models learned about their own records, and how much of it holds for others?

Claim: none is made in advance.
Setting: the originals of transfer.py (cpu profile), whose stages are shared; the losses that `expunge audit preflight`
looks at.
Cost: two minutes on one core where the originals are trained, half an hour more where not.
Expected: nearly all of it where images are known by heart, next to nothing on the digits.

    python experiments/to_forget.py --data DIR
"""

from pathlib import Path

import tyro

from expunge.audit.preflight import preflight
from expunge.bench import experiments, steps
from expunge.bench.stages import cache_of, original_of
from expunge.bench.store import Store
from expunge.losses import cross_entropy
from expunge.rows import write_csv

SEEDS = (0, 1, 2)
COLUMNS = ("task", "seed", "on_what_is_left", "on_unseen", "untrained", "share")


def main(data: Path, out: Path = Path("runs/bench"), results: Path = Path("results/to_forget.csv")) -> None:
    """Measure every model of every task and seed, and write a line for each."""
    store, lines = Store(out, data), []
    planned = experiments.load(Path(__file__).with_name("transfer.py"), "cpu", data)
    for stage in planned.evaluations(SEEDS):
        if stage.contender is None or stage.contender.entry != "reload":
            continue
        for need in (original_of(stage), cache_of(stage)):
            steps.do(need, store)
        situation = steps.Situation(stage, store)
        found = preflight(
            situation.original,
            cross_entropy,
            situation.records.retain,
            situation.given.cached(),
            unseen=situation.records.parts["test"],
            fresh=situation.given.fresh,
            reset_fraction=0,
        )
        (gap,) = (check for check in found.checks if check.name == "something to forget")
        left, unseen, start = gap.numbers.values()
        line = (stage.task.name, stage.seed, left, unseen, start, (unseen - left) / (start - left))
        lines.append(line)
        print(*line, gap.advice, sep="\t")
    write_csv(results, COLUMNS, lines)


if __name__ == "__main__":
    tyro.cli(main)
