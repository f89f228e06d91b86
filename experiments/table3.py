"""Table 3 of the paper: a cross in the corner of all images of two classes of CIFAR-10 is taken away again.

Claim of the paper: RELOAD comes to an accuracy of 90.81 % (90.51 % with the cross on every test image) where the
original has 82.68 % (19.81 %) and retraining 92.48 % (91.90 %), at 0.08 of its cost.
Setting: classes 0 and 1 (airplane, automobile), since the paper names none; their training images all have the cross.
Profiles and fairness: as in table1.py; the rehearsal scores accuracies on what was corrected and on all
of the data, with and without the cross.
Cost: that of table1.py.
Expected: fine-tuning is a strong contender, because the corrected images are there to learn from.

    expunge bench run experiments/table3.py --profile cpu --seeds 3 --jobs 2 --data DIR
"""

from expunge.bench.experiments import Experiment
from expunge.bench.tables import everyone_on
from expunge.bench.tasks import Scenario


def experiment(profile: str) -> Experiment:
    """Everyone on the correction of a backdoor."""
    shown = ("TA", "TA with trigger", "Acc_corr", "NSKL", "FSKL", "Cost", "Work")
    scenario = Scenario(kind="cross-backdoor", classes=(0, 1))
    return everyone_on(scenario, "cifar10", name="table3", profile=profile, shown=shown)
