"""Ten deletions in a row, the gradient cached anew after each: does quality drift?

Claim: none is made in advance.
Setting: each time 2 % of the first training set of table1.py; after each deletion everything removed so far is judged
against a model retrained without it. Settings are those tuned for the first deletion.
Controls: fine-tuning, and a random reset in place of RELOAD's choice. RELOAD takes part again with an ascent that is
the same share of the weights every time, that of its first deletion (the fact `priming_length`, 0.080 and 0.082
for seeds 0 and 1), and natural ascent with the gradient of tempered margins, which was found on seed 1001.
Cost: ten times two retrained models a seed; on the cpu profile about twice that of table1.py.
Expected: what was removed first is forgotten further with every deletion, by methods that train.

    expunge bench run experiments/sequential.py --profile cpu --seeds 3 --jobs 2 --data DIR
"""

from expunge.bench.experiments import Experiment
from expunge.bench.profiles import effort, task
from expunge.bench.stages import Contender
from expunge.bench.tables import REMOVAL
from expunge.bench.tasks import Scenario

DELETIONS, SHARE = 10, 0.02
METHODS = ("reload", "class-orthogonal-ascent", "natural-ascent", "fine-tune", "control: random reset")
RELATIVE = Contender(name="reload (relative ascent)", entry="reload", settings=(("priming_length", 0.08),))
TEMPERED = Contender(name="natural-ascent, tempered", entry="natural-ascent", cached_loss="tempered_margin")


def experiment(profile: str) -> Experiment:
    """Seven contenders, deletion after deletion."""
    scenarios = (Scenario(kind="sequence", amount=SHARE, round=number) for number in range(1, DELETIONS + 1))
    situations = tuple(task(profile, "cifar100", scenario) for scenario in scenarios)
    return Experiment(
        name="sequential",
        profile=profile,
        tasks=situations,
        contenders=(*(Contender(name=name, entry=name) for name in METHODS), RELATIVE, TEMPERED),
        effort=effort(situations[0], profile),
        shown=REMOVAL,
        leading="ΔFE",
    )
