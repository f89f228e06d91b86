"""What do settings cost that were chosen without the forget set?

Claim: settings of RELOAD that were rehearsed on pseudo-forget sets, drawn from what is left, lose little against those
that were tuned with the true forget set.
Fairness: every way to choose gets the same number of trials over the same space, and each trial the same three
unlearnings: three pseudo-forget sets, or three seeds of the true one. All are judged on the true forget set by three
retrained models that nobody saw while tuning, with three seeds of unlearning that nobody tuned with.
Ways: the defaults (no tuning), on unseen records only (blind, nothing retrained), on retrained references of the
pseudo-forget sets (blind, two for each set), on the true forget set (not blind: two retrained models without it).
Score: mean of ΔFE and NSKL, each over the distance of two retrained models from each other (means over all seeds): 1 is
as close as another retrained model.
Cost: five CPU minutes on one core; goes on where it was interrupted.
Expected: after a random removal all ways near 2 and not told apart; after that of a class 5.1 for retrained
references, 4.1 with the true forget set, 5.9 for the defaults.

    python experiments/rehearsal_value.py [trials]
"""

import csv
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import nn

from expunge.access import Blind
from expunge.bench import pseudo_sets, rehearsal
from expunge.bench.closeness import Seen
from expunge.bench.rehearsal import Problem, Rehearsal
from expunge.bench.situations import FULL, Situation, situation_of
from expunge.bench.tuning import tune
from expunge.gradient import gradient
from expunge.methods import reload
from expunge.methods.reload import Reload
from expunge.methods.retrain import Retrain
from expunge.metrics.compare import divergence
from expunge.metrics.outputs import outputs
from expunge.rows import write_csv
from expunge.space import with_settings
from expunge.unlearn import unlearn

SEEDS, TRIALS, SETS = range(200, 206), 12, 3
START = Reload(fine_tune=FULL.budget)
COLUMNS = ("scenario", "seed", "way", "ΔFE", "NSKL", "floor ΔFE", "floor NSKL", "seconds", "settings")
RESULTS = Path(__file__).parent.parent / "results" / "rehearsal_value.csv"


def problem_of(situation: Situation, *, unseen: bool = False) -> Problem:
    """What is left on the day after: the gradient of what is left stands in for the cache."""
    given = situation.given
    left = gradient(situation.original, given.loss_terms, given.retain)
    blind = Blind(retain=given.retain, loss_terms=given.loss_terms, fresh=given.fresh, full=left)
    return Problem(model=situation.original, given=blind, unseen=situation.parts["test"] if unseen else None)


def truth(situation: Situation) -> list[Rehearsal]:
    """The true problem in the same form, with two retrained models, once for each of three seeds of unlearning."""
    given, problem = situation.given, problem_of(situation)
    blind = Blind(retain=given.retain, loss_terms=given.loss_terms, fresh=given.fresh, full=given.full)
    before = rehearsal.see(problem, situation.original, given.retain, given.forget)
    retrained = [
        rehearsal.see(problem, unlearn(situation.original, blind, Retrain(recipe=FULL.recipe), seed=5000 + k).model,
                      given.retain, given.forget)
        for k in range(2)
    ]  # fmt: skip
    return [Rehearsal(blind, given.forget, 100 + n, before, tuple(retrained)) for n in range(SETS)]


def ways(situation: Situation) -> Iterator[tuple[str, Problem, list[Rehearsal]]]:
    """How settings are chosen: on what, and judged by what."""
    problem, seed = problem_of(situation), situation.seed
    labels = outputs(situation.original, situation.given.retain).labels
    like: pseudo_sets.Like = "class" if situation.removed_classes else "random"
    sets = pseudo_sets.draw(labels, like, len(situation.parts["forget"]), SETS, seed)
    if like == "random":
        judging = problem_of(situation, unseen=True)
        yield "unseen records", judging, rehearsal.prepare(judging, sets, seed=seed)
    retrained = rehearsal.prepare(problem, sets, seed=seed, recipe=FULL.recipe, retrain=2)
    yield "retrained references", problem, retrained
    yield "true forget set", problem, truth(situation)


def choose(problem: Problem, rehearsals: Sequence[Rehearsal], trials: int, seed: int) -> dict[str, object]:
    """The settings with the lowest score."""
    with tempfile.TemporaryDirectory() as folder:
        found = tune(
            reload.SPACE,
            lambda s: (
                rehearsal.score(rehearsals, rehearsal.rehearse(problem, rehearsals, with_settings(START, s))).total
            ),
            trials=trials,
            seed=seed,
            journal=Path(folder) / "trials.jsonl",
        )
    return found[0].settings


def judged(situation: Situation, model: nn.Module) -> Seen:
    """Outputs on the true parts."""
    return Seen(outputs(model, situation.parts["retain"]), outputs(model, situation.parts["forget"]), None)


def distances(ones: Sequence[Seen], others: Sequence[Seen] | None = None) -> tuple[float, float]:
    """Mean ΔFE and NSKL, nats: of each to each, or within."""
    pairs = [(a, b) for a in ones for b in others] if others is not None else list(combinations(ones, 2))
    return (
        float(np.mean([abs(a.forget.losses.mean() - b.forget.losses.mean()) for a, b in pairs])),
        float(np.mean([divergence(a.left, b.left) for a, b in pairs])),
    )


def lines(scenario: str, seed: int, trials: int) -> Iterator[tuple[object, ...]]:
    """One line a way to choose."""
    situation = situation_of(scenario, seed)
    retrain = Retrain(recipe=FULL.recipe)
    references = [
        judged(situation, unlearn(situation.original, situation.given, retrain, seed=9000 + k).model) for k in range(3)
    ]
    floor = distances(references)

    def line(way: str, settings: dict[str, object], seconds: float) -> tuple[object, ...]:
        config = with_settings(START, settings)
        models = [unlearn(situation.original, situation.given, config, seed=700 + n).model for n in range(3)]
        found = distances([judged(situation, model) for model in models], references)
        return (scenario, seed, way, *found, *floor, round(seconds, 2), settings)

    yield (
        scenario,
        seed,
        "no unlearning",
        *distances([judged(situation, situation.original)], references),
        *floor,
        0.0,
        {},
    )
    yield line("defaults (no tuning)", {}, 0.0)
    start = time.perf_counter()
    for way, problem, rehearsals in ways(situation):
        settings = choose(problem, rehearsals, trials, seed)
        yield line(way, settings, time.perf_counter() - start)
        start = time.perf_counter()


def main(trials: tyro.conf.Positional[int] = TRIALS) -> None:
    """Keep all lines in ``results/``; seeds that are there already are not run again."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # that settings do nothing, or too much, is what their score says
    done: list[tuple[object, ...]] = []
    if RESULTS.exists():
        with RESULTS.open(newline="", encoding="utf-8") as file:
            done = [tuple(line) for line in list(csv.reader(file))[1:]]
    for scenario in ("removal", "class-removal"):
        for seed in SEEDS:
            if any((str(line[0]), str(line[1])) == (scenario, str(seed)) for line in done):
                continue
            start = time.process_time()
            done += lines(scenario, seed, trials)
            write_csv(RESULTS, COLUMNS, done)
            print(f"{scenario} {seed}: {time.process_time() - start:.0f} s of CPU", flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
