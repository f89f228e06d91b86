"""Are unlearned models a population of their own? Strong attacks on the demo's removal.

Claim: U-LiRA tells models that RELOAD or fine-tuning unlearned from retrained ones more often than chance, and less
often than models that unlearned nothing; two populations of retrained models it cannot tell apart.
Setting: the demo's network and its settings for RELOAD and fine-tuning. One training set of 100 digits, one forget
set of 10. 32 models of each kind, each with a seed of its own: original, unlearned from that original, retrained,
retrained again. LiRA and RMIA attack 16 models of each kind with 32 reference models, each trained on a random half of
200 digits; the unseen records have the classes of the removed ones.
Cost: about 3 minutes on one core.
Expected: U-LiRA's AUC near 1 for originals and fine-tuning, about 0.8 for RELOAD, 0.5 for the second retrained
population; KLOM in the same order. So fine-tuning does not meet the claim's second half.

    python experiments/digits_population.py
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from expunge import Examples, Retrain, Sighted, cross_entropy, gradient, seeded, train
from expunge.bench import digits_setup
from expunge.bench.entries import chosen, entries
from expunge.bench.situations import FULL, REMOVED, train_original
from expunge.data.digits import digits
from expunge.metrics.forgetting import signed_forgetting
from expunge.metrics.membership import loss_attack, matched_by_class
from expunge.metrics.outputs import Outputs, outputs
from expunge.metrics.population import klom, u_lira
from expunge.metrics.reference_attacks import lira, rmia
from expunge.metrics.roc import Attack
from expunge.metrics.stats import Interval, equivalence, floor_margin, t_interval
from expunge.rows import write_csv
from expunge.scenarios.removal import random_removal
from expunge.space import with_settings
from expunge.unlearn import unlearn

MODELS, ATTACKED, REFERENCES, SEED = 32, 16, 32, 0
RECIPE, TRAIN = FULL.recipe, FULL.train
RELOAD, FINE_TUNE = (
    with_settings(entries(FULL.budget)[name].start, chosen("removal", name)) for name in ("reload", "fine-tune")
)
KINDS = ("original", "fine-tune", "reload", "retrain again")


@dataclass(frozen=True)
class Line:
    """A number, where it comes from and how sure it is."""

    method: str
    metric: str
    value: float
    interval: Interval | None
    models: int
    records: int


@dataclass(frozen=True)
class References:
    """What the attacker knows: models of its own, and which was trained on which record of the pool."""

    outputs: list[Outputs]
    included: np.ndarray  # models, records
    population: list[Outputs]


def models_of(seed: int, data: Examples, removed: torch.Tensor) -> dict[str, nn.Module]:
    """One model of each kind."""
    original = train_original(data, seed)
    given = Sighted(
        retain=data.without(removed),
        forget=data.only(removed),
        loss_terms=cross_entropy,
        fresh=digits_setup.model,
        full=gradient(original, cross_entropy, data),
    )
    return {
        "original": original,
        "fine-tune": unlearn(original, given, FINE_TUNE, seed=seed).model,
        "reload": unlearn(original, given, RELOAD, seed=seed).model,
        "retrain": unlearn(original, given, Retrain(recipe=RECIPE), seed=1000 + seed).model,
        "retrain again": unlearn(original, given, Retrain(recipe=RECIPE), seed=2000 + seed).model,
    }


def references_on(pool: Examples, population: Examples) -> References:
    """Models trained on random halves of the pool; every record is in half of them."""
    generator = np.random.default_rng(SEED)
    included = np.zeros((REFERENCES, len(pool)), dtype=bool)
    for column in range(len(pool)):
        included[generator.permutation(REFERENCES)[: REFERENCES // 2], column] = True
    found, others = [], []
    for number, row in enumerate(included):
        with seeded(5000 + number, "original"):
            model = digits_setup.model(5000 + number)
        train(model, pool.only(torch.from_numpy(np.flatnonzero(row))), cross_entropy, RECIPE, seed=5000 + number)
        found.append(outputs(model, pool))
        others.append(outputs(model, population))
    return References(found, included, others)


def populations(on_forget: dict[str, list[Outputs]]) -> Iterator[Line]:
    """U-LiRA, KLOM and signed forgetting against the retrained models, and equivalence over seeds."""
    retrained = on_forget["retrain"]
    truth = np.stack([each.confidences for each in retrained])
    floor = [abs(a - b) for a, b in zip(*(_losses(on_forget[k]) for k in ("retrain", "retrain again")), strict=True)]
    margin = floor_margin(floor).delta
    for kind in KINDS:
        own = np.stack([each.confidences for each in on_forget[kind]])
        attack, apart = u_lira(own, truth), klom(own, truth)
        models, records = own.shape
        yield Line(kind, "U-LiRA AUC", attack.auc, attack.auc_interval, models, records)
        yield Line(kind, "U-LiRA accuracy", attack.accuracy, attack.accuracy_interval, models, records)
        yield Line(kind, "KLOM, mean", float(apart.mean()), None, models, records)
        yield Line(kind, "KLOM, 95th percentile", float(np.quantile(apart, 0.95)), None, models, records)
        signed = [signed_forgetting(a, [b]) for a, b in zip(on_forget[kind], retrained, strict=True)]
        for name, values in (
            ("Under-forgetting", [each.under for each in signed]),
            ("Over-forgetting", [each.over for each in signed]),
        ):
            yield Line(kind, name, float(np.mean(values)), t_interval(values), models, records)
        gaps = [a - b for a, b in zip(_losses(on_forget[kind]), _losses(retrained), strict=True)]
        tested = equivalence(gaps, margin)
        yield Line(kind, "FE minus retrained", float(np.mean(gaps)), tested.interval, models, records)
        yield Line(kind, f"p that this is ±{margin:.2f} nats or more", tested.p, None, models, records)


def attacks(
    on_pool: dict[str, list[Outputs]],
    on_population: dict[str, list[Outputs]],
    known: References,
    asked: np.ndarray,
    member: np.ndarray,
) -> Iterator[Line]:
    """The loss attack, LiRA and RMIA on single models; mean and t-interval over them."""
    confidences = np.stack([each.confidences[asked] for each in known.outputs])
    logs = np.stack([-each.losses[asked] for each in known.outputs])
    population = np.stack([-each.losses for each in known.population])
    included = known.included[:, asked]
    for kind in (*KINDS, "retrain"):
        found: dict[str, list[Attack]] = {}
        for own, others in zip(on_pool[kind][:ATTACKED], on_population[kind][:ATTACKED], strict=True):
            losses, target = own.losses[asked], own.confidences[asked]
            gains = partial(
                rmia,
                -losses,
                logs,
                included,
                member,
                population=-others.losses,
                population_references=population,
            )
            each = {
                "loss attack": loss_attack(losses[member], losses[~member]),
                "LiRA offline": lira(target, confidences, included, member, online=False),
                "LiRA online": lira(target, confidences, included, member),
                "RMIA offline": gains(online=False),
                "RMIA online": gains(online=True),
            }
            for name, attack in each.items():
                found.setdefault(name, []).append(attack)
        for name, many in found.items():
            areas = [attack.auc for attack in many]
            yield Line(kind, f"{name} AUC", float(np.mean(areas)), t_interval(areas), len(many), len(asked))


def _losses(models: list[Outputs]) -> list[float]:
    return [float(each.losses.mean()) for each in models]


def main() -> None:
    """Print a line a number and keep them in ``results/``."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    split = digits(TRAIN, seed=SEED)
    removed = random_removal(TRAIN, REMOVED, SEED)
    images, labels = (torch.cat([a, b[:TRAIN]]) for a, b in zip(split.train.tensors, split.test.tensors, strict=True))
    pool = Examples(images, labels)  # the training set, then as many unseen records
    population = Examples(*(each[TRAIN : TRAIN + 500] for each in split.test.tensors))
    known = references_on(pool, population)
    on_forget: dict[str, list[Outputs]] = {kind: [] for kind in (*KINDS, "retrain")}
    on_pool: dict[str, list[Outputs]] = {kind: [] for kind in on_forget}
    on_population: dict[str, list[Outputs]] = {kind: [] for kind in on_forget}
    for seed in range(MODELS):
        for kind, model in models_of(seed, split.train, removed).items():
            on_forget[kind].append(outputs(model, split.train.only(removed)))
            on_pool[kind].append(outputs(model, pool))
            on_population[kind].append(outputs(model, population))
    numbers = labels.numpy()
    matched = TRAIN + matched_by_class(numbers[removed.numpy()], numbers[TRAIN:], times=None, seed=SEED)
    asked = np.concatenate([removed.numpy(), matched])
    member = np.arange(len(asked)) < len(removed)
    lines = [*populations(on_forget), *attacks(on_pool, on_population, known, asked, member)]
    for line in lines:
        spread = f"[{line.interval.low:.3f}, {line.interval.high:.3f}]" if line.interval else ""
        print(f"{line.method:14} {line.metric:40} {line.value:8.4f} {spread}", flush=True)
    write_csv(
        Path(__file__).parent.parent / "results" / "digits_population.csv",
        ("method", "metric", "value", "low", "high", "models", "records"),
        [
            (
                line.method,
                line.metric,
                f"{line.value:.5g}",
                f"{line.interval.low:.5g}" if line.interval else "",
                f"{line.interval.high:.5g}" if line.interval else "",
                line.models,
                line.records,
            )
            for line in lines
        ],
    )
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
