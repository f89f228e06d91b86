"""Few records or many: does one step suit all? Natural and class-orthogonal ascent on 1 to 25 % of the images.

Claim: a step that grows as what was removed (natural ascent: the share of the information; class-orthogonal ascent: of
the records) to the power of 2/3 suits small and large deletions better than the same step for all.
Ways: the default; and the same step for every share, that of a tenth. Nothing is tuned. RELOAD's defaults beside them.
Fairness: the power was found on the rehearsal's seed, 1001, with natural ascent, on the same shares of CIFAR-100 (of
3,000 images and of 1,000) and with four steps for each, and then looked at with the two other ascents; seeds 0 to 2
were not looked at for that. The information came later: natural_steps.py.
Setting: random 1, 3, 10 and 25 % of the images of table1.py, and 30 or 100 images of a class as in table2_cifar10.py.
Cost: on the cpu profile 24 trainings beside those of the tables, and 90 unlearnings: an hour on two cores.
Expected: with the same step for all, 30 removed images are known far less than unseen ones (ΔFE near 9 nats).

    expunge bench run experiments/amounts.py --profile cpu --seeds 3 --jobs 2 --data DIR
"""

from expunge.bench.experiments import Experiment
from expunge.bench.profiles import effort, task
from expunge.bench.stages import Contender
from expunge.bench.tables import REMOVAL
from expunge.bench.tasks import Scenario

SHARES, OF_A_CLASS = (0.01, 0.03, 0.1, 0.25), (30, 100)
METHODS = ("natural-ascent", "class-orthogonal-ascent")


def experiment(profile: str) -> Experiment:
    """Two methods with a step that follows what was removed and with one that does not, and RELOAD, on six removals."""
    removals = [
        *(("cifar100", Scenario(kind="random", amount=share)) for share in SHARES),
        *(("cifar10", Scenario(kind="in-class", amount=count)) for count in OF_A_CLASS),
    ]
    tasks = tuple(task(profile, dataset, scenario) for dataset, scenario in removals)
    contenders = (
        contender
        for method in METHODS
        for contender in (
            Contender(name=method, entry=method, tuned=False),
            Contender(name=f"{method} (same step)", entry=method, settings=(("growth", 0.0),), tuned=False),
        )
    )
    return Experiment(
        name="amounts",
        profile=profile,
        tasks=tasks,
        contenders=(*contenders, Contender(name="reload", entry="reload", tuned=False)),
        effort=effort(tasks[0], profile),
        shown=REMOVAL,
        leading="ΔFE",
    )
