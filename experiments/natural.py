"""Natural ascent on the removals of tables 1 and 2, and which of its two parts does what.

Claim: none is made in advance.
Ways: the loss whose gradient is cached, of cross-entropy or of margins; and the direction of the ascent, along the
difference divided by the curvature of what is left (natural) or orthogonal to the gradient of every class of it.
Natural ascent also with its defaults, and rehearsed blind as in rehearsed.py. RELOAD beside them.
Fairness: as in table1.py. The defaults of natural ascent were found on the rehearsal's seed, in about thirty single
unlearnings of both removals.
Cost: shares all trainings with the tables on the cpu profile; then five searches of 8 trials on each removal, and six
blind ones of 16 unlearnings each.
Expected: a gradient of cross-entropy weighs a record by what it put into the weights, one of margins weighs all alike.
Margins then take accuracy away, and leave losses that no retrained model has.

    expunge bench run experiments/natural.py --profile cpu --seeds 3 --jobs 2 --data DIR
"""

from dataclasses import replace

from expunge.bench.experiments import Experiment
from expunge.bench.profiles import effort, task
from expunge.bench.stages import Contender
from expunge.bench.tables import REMOVAL
from expunge.bench.tasks import Scenario

REMOVALS = {"cifar100": Scenario(kind="random", amount=0.1), "cifar10": Scenario(kind="in-class", amount=100)}
CONTENDERS = (
    Contender(name="natural-ascent", entry="natural-ascent"),
    Contender(name="natural-ascent (defaults)", entry="natural-ascent", tuned=False),
    Contender(name="natural-ascent, margins", entry="natural-ascent", cached_loss="logit_margin"),
    Contender(name="class-orthogonal-ascent", entry="class-orthogonal-ascent"),
    Contender(
        name="class-orthogonal-ascent, cross-entropy", entry="class-orthogonal-ascent", cached_loss="cross_entropy"
    ),
    Contender(name="reload", entry="reload"),
    Contender(name="natural-ascent (rehearsed blind)", entry="natural-ascent", tuned="blind"),
)


def experiment(profile: str) -> Experiment:
    """Natural and class-orthogonal ascent with either cached gradient, and RELOAD."""
    tasks = [task(profile, dataset, scenario) for dataset, scenario in REMOVALS.items()]
    tasks = [each if each.train else replace(each, train=45_000) for each in tasks]  # blind rehearsals take some others
    return Experiment(
        name="natural",
        profile=profile,
        tasks=tuple(tasks),
        contenders=CONTENDERS,
        effort=effort(tasks[0], profile),
        shown=REMOVAL,
    )
