"""Natural ascent on the scenarios of tables 1 to 3, and which of its two parts does what.

Claim: none is made in advance.
Ways: the loss whose gradient is cached, and whose curvature is measured, cross-entropy or margins; and the direction of
the ascent, along the difference divided by the curvature of what is left (natural) or orthogonal to the gradient of
every class of it. Natural ascent also with its defaults, and class-orthogonal ascent with the same step, rounds (2) and
learning rate (0.03); its step grows with the number of records. RELOAD beside them.
Fairness: as in table1.py. The defaults of natural ascent were found on the rehearsal's seed, in about thirty single
unlearnings of the two removals.
Cost: shares all trainings with the tables on the cpu profile; then five searches of 8 trials on each scenario.
Expected: in a gradient of cross-entropy a record counts with its error, in one of margins all count alike, and an
ascent makes all of them a little wrong. No retrained model is: its losses on them spread.

    expunge bench run experiments/natural.py --profile cpu --seeds 3 --jobs 2 --data DIR
"""

from expunge.bench.experiments import Experiment
from expunge.bench.profiles import effort, task
from expunge.bench.stages import Contender
from expunge.bench.tables import REMOVAL
from expunge.bench.tasks import Scenario

SITUATIONS = (
    ("cifar100", Scenario(kind="random", amount=0.1)),
    ("cifar10", Scenario(kind="in-class", amount=100)),
    ("cifar10", Scenario(kind="cross-backdoor", classes=(0, 1))),
)
CONTENDERS = (
    Contender(name="natural-ascent", entry="natural-ascent"),
    Contender(name="natural-ascent (defaults)", entry="natural-ascent", tuned=False),
    Contender(name="natural-ascent, margins", entry="natural-ascent", cached_loss="logit_margin"),
    Contender(name="class-orthogonal-ascent", entry="class-orthogonal-ascent"),
    Contender(
        name="class-orthogonal-ascent, cross-entropy", entry="class-orthogonal-ascent", cached_loss="cross_entropy"
    ),
    Contender(
        name="class-orthogonal-ascent, cross-entropy (step 0.2)",
        entry="class-orthogonal-ascent",
        settings=(("step", 0.2),),
        tuned=False,
        cached_loss="cross_entropy",
    ),
    Contender(name="reload", entry="reload"),
)


def experiment(profile: str) -> Experiment:
    """Natural and class-orthogonal ascent with either cached gradient, and RELOAD."""
    tasks = tuple(task(profile, dataset, scenario) for dataset, scenario in SITUATIONS)
    return Experiment(
        name="natural",
        profile=profile,
        tasks=tasks,
        contenders=CONTENDERS,
        effort=effort(tasks[0], profile),
        shown=(*REMOVAL, "TA with trigger", "Acc_corr"),
    )
