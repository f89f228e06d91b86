"""Blind methods on the scenarios of all three tables: do orthogonal ascents hold up where they were not made?

Claim: `OrthogonalAscent` was found on one rehearsal of table1.py (CIFAR-100, seed 1001). It comes closer to retraining
than RELOAD there; this asks whether it also does for other seeds, images of one class, and a backdoor on CIFAR-10.
`ClassOrthogonalAscent` was found on the rehearsals of table1.py and table2_cifar10.py (seed 1001).
Controls: fine-tuning, training from scratch for as long, and RELOAD with random entries.
Profiles and fairness: as in table1.py; everyone is tuned for each scenario, with the same number of trials.
Cost: shares all stages with table1.py, table2_cifar10.py and table3.py; by itself about as long as one of these.
Expected: what is gained on CIFAR-100 need not carry over to a correction, where fine-tuning has the right images.

    expunge bench run experiments/blind.py --profile cpu --seeds 3 --jobs 2 --data DIR
"""

from expunge.bench.experiments import Experiment
from expunge.bench.profiles import effort, task
from expunge.bench.stages import Contender
from expunge.bench.tasks import Scenario

CONTENDERS = (
    "orthogonal-ascent",
    "class-orthogonal-ascent",
    "reload",
    "fine-tune",
    "control: short retraining",
    "control: random reset",
)
SITUATIONS = (
    ("cifar10", Scenario(kind="in-class", amount=100)),
    ("cifar10", Scenario(kind="cross-backdoor", classes=(0, 1))),
    ("cifar100", Scenario(kind="random", amount=0.1)),
)


def experiment(profile: str) -> Experiment:
    """Six contenders in three situations."""
    situations = tuple(task(profile, dataset, scenario) for dataset, scenario in SITUATIONS)
    return Experiment(
        name="blind",
        profile=profile,
        tasks=situations,
        contenders=tuple(Contender(name=name, entry=name) for name in CONTENDERS),
        effort=effort(situations[0], profile),
        shown=("NA", "TA", "ΔFA", "ΔFE", "ΔFMIA", "FSKL", "NSKL", "TA with trigger", "Acc_corr", "Cost", "Work"),
        leading="FSKL",
    )
