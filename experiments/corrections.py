"""Faults of six kinds are corrected, with gradients of two losses cached: patterns in images, wrong labels, noise.

Claim: after a correction the difference of gradients of cross-entropy is next to nothing but the negative gradient of
the corrected records, since faulty ones that are known by heart have none left; to ascend along it is what fine-tuning
does anyway. Margins count the faulty records as well, and the same ascent with the same settings takes a pattern away.
Ways: natural ascent and RELOAD with a cached gradient of either loss, the two ascents that cache margins by default,
and fine-tuning. Nothing is tuned.
Setting: CIFAR-10 as in table3.py. The three patterns of the paper's grid, each in two classes of its own; labels as in
labels.py; noise on a fifth of the images.
Fairness: margins were looked at for this on the rehearsal's seed, 1001, and the cross, and on label faults in the
digits; seeds 0 to 2 and the other faults were not.
Cost: on the cpu profile 24 trainings, since all faults share the retrained models, and 126 unlearnings: 45 minutes on
two cores.
Expected: with the pattern on every test image a retrained model is as right as without it. That nobody comes to.

    expunge bench run experiments/corrections.py --profile cpu --seeds 3 --jobs 2 --data DIR
"""

from expunge.bench.experiments import Experiment
from expunge.bench.profiles import effort, task
from expunge.bench.stages import Contender
from expunge.bench.tasks import Scenario
from expunge.scenarios.labels import CIFAR10_PAIRS

FAULTS = (
    Scenario(kind="cross-backdoor", classes=(0, 1)),
    Scenario(kind="distributed-backdoor", classes=(2, 4)),
    Scenario(kind="feature-backdoor", classes=(5, 7)),
    Scenario(kind="random-labels", amount=0.2),
    Scenario(kind="flipped-labels", amount=0.2, pairs=CIFAR10_PAIRS),
    Scenario(kind="noise", amount=0.2),
)
METHODS = ("natural-ascent", "class-orthogonal-ascent", "orthogonal-ascent", "reload", "fine-tune")


def experiment(profile: str) -> Experiment:
    """Seven contenders with their defaults, on six kinds of faults."""
    tasks = tuple(task(profile, "cifar10", fault) for fault in FAULTS)
    margins = (
        Contender(name=f"{name}, margins", entry=name, tuned=False, cached_loss="logit_margin")
        for name in ("natural-ascent", "reload")
    )
    return Experiment(
        name="corrections",
        profile=profile,
        tasks=tasks,
        contenders=(*margins, *(Contender(name=name, entry=name, tuned=False) for name in METHODS)),
        effort=effort(tasks[0], profile),
        shown=("NA", "TA", "TA with trigger", "TA with noise", "Acc_corr", "FSKL", "NSKL", "Cost", "Work"),
    )
