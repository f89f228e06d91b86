"""Quality against cost: RELOAD, its parts and its rivals at equal cost, on the removal of table1.py.

Claim: none is made in advance; the question is which parts of RELOAD earn their place.
Grid: epochs of training x share that is re-initialised x learning rate, nothing tuned, so that every point is as likely
as its neighbours to be the best one by luck. RELOAD, a random reset and no ascent have the same grid; training from
scratch and fine-tuning have no share.
Cost: shares originals and retrained models with table1.py; then 74 unlearnings a seed.
Expected: on the digits a random reset was as close to retraining as RELOAD's.

    expunge bench run experiments/frontier.py --profile cpu --seeds 3 --jobs 2 --data DIR
    expunge report RUN    # draws quality against cost with the noise floor
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

from expunge.bench.experiments import Experiment
from expunge.bench.profiles import effort, task
from expunge.bench.stages import Contender
from expunge.bench.tables import REMOVAL
from expunge.bench.tasks import Scenario

RATES, SHARES, PRIMING = (0.03, 0.1), (0.1, 0.3, 0.6), 1.0
WITH_SHARE: dict[str, tuple[str, dict[str, Any]]] = {
    "reload": ("reload", {"priming_lr": PRIMING}),
    "random reset": ("control: random reset", {"priming_lr": PRIMING}),
    "without ascent": ("control: without ascent", {}),
}
WITHOUT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "short retraining": ("control: short retraining", "recipe", {}),
    "fine-tune": ("fine-tune", "recipe", {}),
    "recipe alone": ("reload", "fine_tune", {"priming_lr": None, "reset_fraction": 0.0}),
}


def points(most: int) -> Iterator[Contender]:
    """Everyone at every point of the grid, up to so many epochs."""
    epochs = sorted({max(most // 5, 1), max(most // 2, 1), most})
    for (name, (entry, fixed)), count, share, lr in product(WITH_SHARE.items(), epochs, SHARES, RATES):
        settings = {**fixed, "reset_fraction": share, "fine_tune.epochs": count, "fine_tune.lr": lr}
        yield _point(f"{name}, {count} epochs, share {share:g}, lr {lr:g}", entry, settings)
    for (name, (entry, recipe, fixed)), count, lr in product(WITHOUT.items(), epochs, RATES):
        yield _point(
            f"{name}, {count} epochs, lr {lr:g}", entry, {**fixed, f"{recipe}.epochs": count, f"{recipe}.lr": lr}
        )
    yield _point("ascent alone", "control: ascent alone", {"priming_lr": PRIMING})
    yield _point("reset alone", "control: reset alone", {"reset_fraction": SHARES[0]})


def experiment(profile: str) -> Experiment:
    """The grid."""
    situation = task(profile, "cifar100", Scenario(kind="random", amount=0.1))
    spent = effort(situation, profile)
    return Experiment(
        name="frontier",
        profile=profile,
        tasks=(situation,),
        contenders=tuple(points(spent.budget.epochs)),
        effort=spent,
        shown=REMOVAL,
    )


def _point(name: str, entry: str, settings: dict[str, Any]) -> Contender:
    return Contender(name=name, entry=entry, settings=tuple(settings.items()), tuned=False)
