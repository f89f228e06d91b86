"""Partially identified corruption: only a share gamma of the images with a backdoor is known, and removed.

Claim of the published version: with gamma = 0.1 RELOAD reaches Acc_corr of about 93 % where others are at 25 to 55 %.
Setting: the cross of table3.py; Acc_corr is the accuracy on clean test images of the two classes that had it. The
reference is retrained without the known images, and with those that are not known.
Profiles and fairness: as in table1.py; everyone is tuned for each gamma.
Cost: on the cpu profile five gammas share the original of a seed; about twice that of table1.py.
Expected: retraining itself loses accuracy as gamma falls, because unknown faults stay in its data.

    expunge bench run experiments/gamma.py --profile cpu --seeds 3 --jobs 2 --data DIR
"""

from expunge.bench.experiments import Experiment
from expunge.bench.profiles import effort, task
from expunge.bench.stages import Contender
from expunge.bench.tasks import Scenario

GAMMAS = (0.1, 0.25, 0.5, 0.75, 1.0)
METHODS = ("reload", "cf-k", "ssd", "scrub", "bad-teacher")


def experiment(profile: str) -> Experiment:
    """Five methods for each gamma."""
    scenarios = (Scenario(kind="cross-backdoor", classes=(0, 1), gamma=g, known_are="removed") for g in GAMMAS)
    situations = tuple(task(profile, "cifar10", scenario) for scenario in scenarios)
    return Experiment(
        name="gamma",
        profile=profile,
        tasks=situations,
        contenders=tuple(Contender(name=name, entry=name) for name in METHODS),
        effort=effort(situations[0], profile),
        shown=("Acc_corr", "TA", "TA with trigger", "NSKL", "Cost", "Work"),
    )
