"""Labels were wrong and are corrected: a fifth of CIFAR-10 at random, or within three pairs of classes.

Claim of the paper: the same call that removes records corrects them, at the same cost; its text shows no table of
labels, which its grid of experiments has.
Setting: CIFAR-10 as in table3.py; every fault is known. *Random*: a fifth of the images had a wrong label drawn
uniformly. *Flipped*: a fifth of the images of airplanes and birds, cats and dogs, automobiles and trucks had the label
of the other.
Fairness: as in table1.py. Methods that teach faulty records something else than their corrected labels take no part.
Controls: RELOAD with random entries, and fine-tuning.
Cost: on the cpu profile 16 trainings, as both kinds of faults share their retrained models, and ten searches of 8
trials: 45 minutes on two cores.
Expected: on the digits (docs/compare.md) plain fine-tuning is closest to retraining, since corrected labels are data to
learn from.

    expunge bench run experiments/labels.py --profile cpu --seeds 3 --jobs 2 --data DIR
"""

from expunge.bench.experiments import Experiment
from expunge.bench.profiles import effort, task
from expunge.bench.stages import Contender
from expunge.bench.tasks import Scenario
from expunge.scenarios.labels import CIFAR10_PAIRS

FAULTS = (
    Scenario(kind="random-labels", amount=0.2),
    Scenario(kind="flipped-labels", amount=0.2, pairs=CIFAR10_PAIRS),
)
METHODS = ("reload", "control: random reset", "fine-tune", "natural-ascent", "class-orthogonal-ascent")


def experiment(profile: str) -> Experiment:
    """Blind methods on two kinds of wrong labels."""
    tasks = tuple(task(profile, "cifar10", fault) for fault in FAULTS)
    return Experiment(
        name="labels",
        profile=profile,
        tasks=tasks,
        contenders=tuple(Contender(name=name, entry=name) for name in METHODS),
        effort=effort(tasks[0], profile),
        shown=("NA", "TA", "Acc_corr", "Accuracy on corrected", "FSKL", "NSKL", "Cost", "Work"),
    )
