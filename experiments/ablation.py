"""What do RELOAD's options change? One at a time, against its tuned setting, on the removal of table1.py.

Claim: none is made in advance.
Fairness: the share and the learning rates were tuned for the default on the rehearsal and nothing was for the others,
which therefore start at a disadvantage. Controls: re-initialising at random, nothing at all, no ascent.
Departures of the published code are tried one by one; "batch-means" is its sum of batch means in place of sums.
Cost: shares originals, retrained models and RELOAD's tuning with table1.py; then 26 unlearnings a seed.
Expected: on the digits (docs/reload.md) most differences were within two standard errors of zero.

    expunge bench run experiments/ablation.py --profile cpu --seeds 3 --jobs 2 --data DIR
"""

from typing import Any

from expunge.bench.experiments import RECIPE_ALONE, Experiment
from expunge.bench.profiles import effort, task
from expunge.bench.stages import Contender
from expunge.bench.tables import REMOVAL
from expunge.bench.tasks import Scenario
from expunge.methods.reload import PUBLISHED_CODE
from expunge.selectors import SELECTORS

OPTIONS: dict[str, tuple[Any, ...]] = {
    "selector": tuple(name for name in SELECTORS if name != "small-kv"),
    "reset_fraction": (0.05, 0.2, 0.4, 0.8),
    "priming_lr": (None, 63.0, 300.0, 1500.0),
    "eps": (1e-10,),
    "scope": ("layer",),
    "reset_untouched": (True,),
    "reset_1d": (False,),
    "reset_to": ("zero", "layer-mean", "normal"),
    "statistics": ("re-estimated",),
    "published_code": tuple((departure,) for departure in PUBLISHED_CODE),
}


def experiment(profile: str) -> Experiment:
    """RELOAD, and RELOAD with one option changed."""
    changed = (
        Contender(name=f"{option}={_shown(value)}", entry="reload", settings=((option, value),))
        for option, values in OPTIONS.items()
        for value in values
    )
    situation = task(profile, "cifar100", Scenario(kind="random", amount=0.1))
    return Experiment(
        name="ablation",
        profile=profile,
        tasks=(situation,),
        contenders=(Contender(name="reload", entry="reload"), *changed, RECIPE_ALONE),
        effort=effort(situation, profile),
        shown=REMOVAL,
    )


def _shown(value: object) -> str:
    return value[0] if isinstance(value, tuple) else str(value)
