"""Removals of the paper's grid that no table has: a class, a quarter and half of one, and 5 % neighbours, of CIFAR-10.

Claim: none is made in advance.
Setting: as table2_cifar10.py. *Class*: all images of a class, another for each seed; what is judged besides are the
classes that are left. *In-class*: a share of a class, at random. *Neighbours*: a random image and those nearest to it
in the pixels that the model sees.
Fairness: nothing is tuned, all have their defaults.
Cost: on the cpu profile 24 trainings beside those of the tables, and 48 unlearnings: 50 minutes on two cores.
Expected: a retrained model is never right on a removed class; fine-tuning alone hardly forgets either removal.

    expunge bench run experiments/grid.py --profile cpu --seeds 3 --jobs 2 --data DIR
"""

from expunge.bench.experiments import Experiment
from expunge.bench.profiles import effort, task
from expunge.bench.stages import Contender
from expunge.bench.tables import REMOVAL
from expunge.bench.tasks import Scenario

REMOVALS = (
    Scenario(kind="class"),
    Scenario(kind="in-class", amount=0.25),
    Scenario(kind="in-class", amount=0.5),
    Scenario(kind="neighbours", amount=0.05),
)
METHODS = ("reload", "natural-ascent", "class-orthogonal-ascent", "fine-tune")


def experiment(profile: str) -> Experiment:
    """Four blind methods with their defaults on four removals."""
    tasks = tuple(task(profile, "cifar10", removal) for removal in REMOVALS)
    return Experiment(
        name="grid",
        profile=profile,
        tasks=tasks,
        contenders=tuple(Contender(name=name, entry=name, tuned=False) for name in METHODS),
        effort=effort(tasks[0], profile),
        shown=REMOVAL,
    )
