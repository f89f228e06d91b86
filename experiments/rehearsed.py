"""What do settings lose that were chosen without the forget set, on the removal of table1.py?

Claim: none is made in advance.
Ways: tuned on the rehearsal of table1.py, with forget sets and retrained models of another seed; rehearsed blind, on
two pseudo-forget sets drawn from what is left of the very seed, as `expunge rehearse` does, with nothing retrained; and
the methods' defaults.
Fairness: the same number of trials over the same space. A blind rehearsal unlearns twice a trial and once for a tuned
setting, but needs no other data, forget sets or retrained models. It judges by training images that were not drawn; so
that there are some, the paper profile trains on 45,000 here.
Cost: shares all but the blind rehearsals with table1.py on the cpu profile; these are 16 unlearnings a method and seed.
Expected: on the digits (docs/rehearse.md) nothing was lost after a random removal.

    expunge bench run experiments/rehearsed.py --profile cpu --seeds 3 --jobs 2 --data DIR
"""

from dataclasses import replace

from expunge.bench.experiments import Experiment
from expunge.bench.profiles import effort, task
from expunge.bench.stages import Contender
from expunge.bench.tables import REMOVAL
from expunge.bench.tasks import Scenario

METHODS = ("orthogonal-ascent", "class-orthogonal-ascent", "reload")


def experiment(profile: str) -> Experiment:
    """Three methods, three ways to their settings."""
    situation = task(profile, "cifar100", Scenario(kind="random", amount=0.1))
    situation = situation if situation.train else replace(situation, train=45_000)
    contenders = (
        way
        for method in METHODS
        for way in (
            Contender(name=method, entry=method),
            Contender(name=f"{method} (rehearsed blind)", entry=method, tuned="blind"),
            Contender(name=f"{method} (defaults)", entry=method, tuned=False),
        )
    )
    return Experiment(
        name="rehearsed",
        profile=profile,
        tasks=(situation,),
        contenders=tuple(contenders),
        effort=effort(situation, profile),
        shown=REMOVAL,
    )
