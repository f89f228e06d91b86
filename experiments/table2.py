"""Table 2 of the paper: 100 images of one class of SVHN are removed, which class depends on the seed.

Claim of the paper: RELOAD's ΔFA is 0.25 points and its ΔFMIA 0.00 at 0.12 of the cost of retraining; only Fisher
forgetting, at twice the cost of retraining, is closer in ΔFA.
Profiles and fairness: as in table1.py. Where the files of SVHN are absent, run table2_cifar10.py.
Cost: that of table1.py.
Expected: a low gap, since SVHN is learned well: what was removed is classified right without it.

    expunge bench run experiments/table2.py --profile cpu --seeds 3 --jobs 2 --data DIR
"""

from expunge.bench.experiments import Experiment
from expunge.bench.tables import in_class


def experiment(profile: str) -> Experiment:
    """Everyone on the removal of 100 images of a class."""
    return in_class("table2", profile, "svhn")
