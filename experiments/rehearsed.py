"""What do settings lose that were chosen without the forget set, on the removals of tables 1 and 2?

Claim: none is made in advance.
Ways: tuned on the rehearsal of the tables, with forget sets and retrained models of another seed; rehearsed blind, as
`expunge rehearse --like removed` does, on two pseudo-forget sets drawn from what is left of the very seed, in the
classes that the cached gradient tells were removed, with nothing retrained; and the methods' defaults.
Fairness: the same number of trials over the same space. A blind rehearsal unlearns twice a trial and once for a tuned
setting, but needs no other data, forget sets or retrained models. It judges by training images that were not drawn; so
that there are some, the paper profile trains on 45,000 here.
Cost: shares all but the blind rehearsals with the tables on the cpu profile: 16 unlearnings a method, seed and removal.
Expected: on the digits (docs/rehearse.md) nothing was lost after a random removal.

    expunge bench run experiments/rehearsed.py --profile cpu --seeds 3 --jobs 2 --data DIR
"""

from dataclasses import replace

from expunge.bench.experiments import Experiment
from expunge.bench.profiles import effort, task
from expunge.bench.stages import Contender
from expunge.bench.tables import REMOVAL
from expunge.bench.tasks import Scenario

METHODS = ("natural-ascent", "class-orthogonal-ascent", "reload")
REMOVALS = {"cifar100": Scenario(kind="random", amount=0.1), "cifar10": Scenario(kind="in-class", amount=100)}


def experiment(profile: str) -> Experiment:
    """Three methods, three ways to their settings, two removals."""
    tasks = [task(profile, dataset, scenario) for dataset, scenario in REMOVALS.items()]
    tasks = [each if each.train else replace(each, train=45_000) for each in tasks]
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
        tasks=tuple(tasks),
        contenders=tuple(contenders),
        effort=effort(tasks[0], profile),
        shown=REMOVAL,
    )
