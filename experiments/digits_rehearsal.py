"""Choose the settings of every method on the digits, on a rehearsal: other seeds than those that are reported.

Claim: none; this is where the settings of `expunge demo` and `expunge compare` come from.
Fairness: every method and every control gets the same number of random trials over the space that it declares, on the
same four rehearsal seeds, with draws of their own of images, removed records and classes and faulty labels. The digits
are 1,797 images, so that some are drawn by a reported seed, too. None trains for more than a fifth of the epochs of
retraining, all its phases together.
Score: ΔFE and NSKL to retrained models, each over the mean distance of two retrained models from each other, averaged:
1 is as close as another retrained model. Three retrained models a seed, so that no setting is chosen for being close to
the luck of one. Loss on what was removed and outputs on what is left are what a judge looks at first, and as ratios
they weigh the same in every scenario: after the removal of a class, ΔFE alone is many nats. After a correction FSKL
takes the place of ΔFE: retrained models fit the corrected records, so that their losses say next to nothing.
Cost: about 20 minutes on one core; goes on where it was interrupted.
Expected: doing nothing at 2.3 noise floors (removal), 10 (class removal) or far more (correction); RELOAD below it.

    python experiments/digits_rehearsal.py [trials]
"""

import ast
import csv
import json
import math
import random
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from statistics import fmean

import torch
import tyro
from torch import nn

from expunge.bench import entries as bench_entries
from expunge.bench.entries import Entry, entries
from expunge.bench.situations import FULL, LEADING, SCENARIOS, Situation, situation_of
from expunge.errors import NotFinite, NotInformative
from expunge.files import write_text
from expunge.methods.retrain import Retrain
from expunge.metrics.classification import cross_entropy, symmetric_kl
from expunge.metrics.outputs import Outputs, outputs
from expunge.rows import write_csv
from expunge.space import random_settings
from expunge.unlearn import unlearn

SEEDS, TRIALS = range(106, 110), 25
COLUMNS = ("scenario", "method", "score", "ΔFE or FSKL", "NSKL", "seconds", "settings")
RESULTS = Path(__file__).parent.parent / "results" / "digits_rehearsal.csv"
SETTINGS = Path(bench_entries.__file__).with_name(bench_entries.FILE)

Judged = tuple[Outputs, Outputs]  # on what is left, and on what was removed or corrected
Distances = tuple[float, float]  # on what was removed (ΔFE) or corrected (FSKL), and on what is left (NSKL); nats


@dataclass(frozen=True)
class Rehearsal:
    """One seed: what is given, and retrained models' outputs."""

    situation: Situation
    truths: Sequence[Judged]


@dataclass(frozen=True)
class Trial:
    """Some settings, and how close to retraining they came; a line of the results."""

    scenario: str
    method: str
    score: float
    distances: Distances
    seconds: float
    settings: dict[str, object]

    def line(self) -> tuple[object, ...]:
        """As it is stored."""
        return (self.scenario, self.method, self.score, *self.distances, round(self.seconds, 3), self.settings)


def prepare(scenario: str, seed: int) -> Rehearsal:
    """Train, delete or correct, retrain three times."""
    situation = situation_of(scenario, seed)
    retrain = Retrain(recipe=FULL.recipe)
    models = (unlearn(situation.original, situation.given, retrain, seed=1000 * n + seed) for n in range(1, 4))
    return Rehearsal(situation, [judged(each.model, situation) for each in models])


def judged(model: nn.Module, situation: Situation) -> Judged:
    """Outputs on what is left and on what was removed or corrected."""
    return outputs(model, situation.parts["retain"]), outputs(model, situation.parts["forget"])


def distances(scenario: str, one: Judged, other: Judged) -> Distances:
    """ΔFE or FSKL, and NSKL, nats."""
    leading = symmetric_kl(one[1], other[1])
    if LEADING[scenario] == "ΔFE":
        leading = abs(cross_entropy(one[1]) - cross_entropy(other[1]))
    return leading, symmetric_kl(one[0], other[0])


def mean_distances(models: Sequence[nn.Module], rehearsals: Sequence[Rehearsal]) -> Distances:
    """Means over seeds and retrained models."""
    found = [
        distances(rehearsal.situation.scenario, judged(model, rehearsal.situation), truth)
        for model, rehearsal in zip(models, rehearsals, strict=True)
        for truth in rehearsal.truths
    ]
    return fmean(each[0] for each in found), fmean(each[1] for each in found)


def floor_of(rehearsals: Sequence[Rehearsal]) -> Distances:
    """The same between two retrained models: the noise floor."""
    found = [distances(r.situation.scenario, *pair) for r in rehearsals for pair in combinations(r.truths, 2)]
    return fmean(each[0] for each in found), fmean(each[1] for each in found)


def score(found: Distances, floor: Distances) -> float:
    """Noise floors away from retraining: 1 is as close as another retrained model."""
    return fmean(own / least for own, least in zip(found, floor, strict=True))


def try_out(entry: Entry, scenario: str, rehearsals: Sequence[Rehearsal], floor: Distances, trials: int) -> list[Trial]:
    """Random settings, best first; a trial whose loss became NaN or infinite comes last."""
    draw = random.Random(f"{scenario} {entry.name}")
    situations = [each.situation for each in rehearsals]
    tried, givens = [], [each.given_with(entry.cached_loss) for each in situations]
    for _ in range(trials):
        settings = {name: _rounded(value) for name, value in random_settings(entry.space, draw).items()}
        start = time.perf_counter()
        try:
            models = [
                unlearn(each.original, given, entry.configured(settings, each.removed_classes), seed=seed).model
                for seed, each, given in zip(SEEDS, situations, givens, strict=True)
            ]
            found = mean_distances(models, rehearsals)
        except (NotFinite, NotInformative):
            found = (math.inf, math.inf)
        seconds = (time.perf_counter() - start) / len(SEEDS)
        tried.append(Trial(scenario, entry.name, score(found, floor), found, seconds, settings))
    return sorted(tried, key=lambda trial: trial.score)


def read(path: Path) -> list[Trial]:
    """Trials of an earlier call."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != list(COLUMNS):
            return []
        return [
            Trial(
                line["scenario"],
                line["method"],
                float(line["score"]),
                (float(line["ΔFE or FSKL"]), float(line["NSKL"])),
                float(line["seconds"]),
                ast.literal_eval(line["settings"]),
            )
            for line in reader
        ]


def best(trials: Sequence[Trial]) -> dict[str, dict[str, dict[str, object]]]:
    """The settings with the lowest score, by scenario and method."""
    found: dict[str, dict[str, dict[str, object]]] = {}
    for trial in trials:  # best first
        if trial.score < math.inf:
            found.setdefault(trial.scenario, {}).setdefault(trial.method, trial.settings)
    return found


def main(trials: tyro.conf.Positional[int] = TRIALS) -> None:
    """Keep all trials in ``results/``, and the best settings beside the code that uses them."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # that settings do nothing, or too much, is what their score says
    done = read(RESULTS)
    done = [t for t in done if sum((o.scenario, o.method) == (t.scenario, t.method) for o in done) == trials]
    reported = {(trial.scenario, trial.method) for trial in done}
    floors = {}
    for scenario in SCENARIOS:
        rehearsals = [prepare(scenario, seed) for seed in SEEDS]
        floor = floors[scenario] = floor_of(rehearsals)
        nothing = mean_distances([r.situation.original for r in rehearsals], rehearsals)
        print(f"{scenario}: floor {floor}, doing nothing scores {score(nothing, floor):.2f}", flush=True)
        for entry in entries(FULL.budget).values():
            if scenario in entry.unfit or (scenario, entry.name) in reported:
                continue
            start = time.perf_counter()
            tried = try_out(entry, scenario, rehearsals, floor, trials)
            done += tried
            write_csv(RESULTS, COLUMNS, [trial.line() for trial in done])
            spent = time.perf_counter() - start
            print(f"  {entry.name} {tried[0].score:.2f} {tried[0].settings} ({spent:.0f} s)", flush=True)
    provenance = {
        "made by": f"python experiments/digits_rehearsal.py {trials}",
        "trials a method and scenario": trials,
        "seeds": list(SEEDS),
        "score": "mean of ΔFE (of a correction: FSKL) and NSKL to retrained models, each over the noise floor",
        "noise floor (ΔFE or FSKL, and NSKL; nats)": floors,
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }
    text = json.dumps({"provenance": provenance, "settings": best(done)}, indent=2, ensure_ascii=False)
    write_text(SETTINGS, text + "\n")


def _rounded(value: object) -> object:
    return float(f"{value:.3g}") if isinstance(value, float) else value


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
