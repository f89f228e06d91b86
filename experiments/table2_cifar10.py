"""The scenario of Table 2 of the paper, 100 images of one class, on CIFAR-10 in place of SVHN.

Claim: none of the paper's, which has SVHN; its figures stand beside these for orientation.
Profiles and fairness: as in table1.py.
Cost: that of table1.py.
Expected: a wider gap than on SVHN.

    expunge bench run experiments/table2_cifar10.py --profile cpu --seeds 3 --jobs 2 --data DIR
"""

from expunge.bench.experiments import Experiment
from expunge.bench.tables import in_class


def experiment(profile: str) -> Experiment:
    """Everyone on the removal of 100 images of a class."""
    return in_class("table2_cifar10", profile, "cifar10")
