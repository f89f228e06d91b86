"""Table 1 of the paper: a random tenth of CIFAR-100 is removed.

Claim of the paper: RELOAD, which never sees what was removed, comes closer to retraining (ΔFA 0.30 points, ΔFMIA 0.01)
than methods that do, at 0.12 of its cost.
Profiles: *cpu* is a ResNet-18 of width 8 on 3,000 of the training images, without augmentation; *paper* is all data,
ResNet-18 and 182 epochs on a GPU.
Fairness: everyone gets the same number of trials on a rehearsal (other images, other removed records, retrained models
of its own) and may train for 0.12 of the epochs of retraining less two, which is what RELOAD's gradients take.

    expunge bench run experiments/table1.py --profile cpu --seeds 3 --jobs 2 --data DIR
"""

from expunge.bench.experiments import Experiment
from expunge.bench.tables import everyone_on
from expunge.bench.tasks import Scenario


def experiment(profile: str) -> Experiment:
    """Everyone on a random removal."""
    return everyone_on(Scenario(kind="random", amount=0.1), "cifar100", name="table1", profile=profile)
