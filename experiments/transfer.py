"""Do defaults that were found on one network and on CIFAR suit others?

Claim: none is made in advance.
Setting: a random tenth is removed. The defaults of the three ascents were found with a ResNet-18 of width 8 on 3,000
images of CIFAR, which knows them by heart and is right on 11 to 48 % of others; the unit of natural ascent's step with
the ConvNet on CIFAR-10 as well (natural_steps.py, other seeds). Here the network is another, and then the data is as
well: 1,000 of scikit-learn's digits, of which models are right on nearly all that they never saw, so that little is to
forget in accuracy, and some in loss. The MLP has no convolutions and no BatchNorm.
Fairness: nothing is tuned, all have their defaults and the same budget of epochs.
Cost: on the cpu profile 36 trainings, of which 18 are of digits: 40 minutes on two cores.
Expected: a step is a share of the weights' norm, which means another thing in a network without BatchNorm.

    expunge bench run experiments/transfer.py --profile cpu --seeds 3 --jobs 2 --data DIR
"""

from dataclasses import replace

from expunge.bench.experiments import Experiment
from expunge.bench.profiles import effort, task
from expunge.bench.stages import Contender
from expunge.bench.tables import REMOVAL
from expunge.bench.tasks import Scenario, Task

TENTH = Scenario(kind="random", amount=0.1)
METHODS = ("reload", "natural-ascent", "class-orthogonal-ascent", "orthogonal-ascent", "fine-tune")


def experiment(profile: str) -> Experiment:
    """Five blind methods with their defaults on four networks."""
    plain = task(profile, "cifar10", TENTH)
    plain = replace(plain, recipe=replace(plain.recipe, crop=0, flip=False))  # one budget for all: digits stand neither
    width = (("width", 8),) if plain.train else ()
    resnet = replace(plain, called="CIFAR-10, ResNet-20", model="resnet20", settings=width)
    widths = (("widths", (16, 32, 64)),)
    convnet = replace(plain, called="CIFAR-10, ConvNet", model="convnet", settings=widths, train=2 * plain.train)
    digits = Task(
        dataset="digits",
        called="digits, ConvNet",
        model="convnet",
        settings=(("widths", (16, 32)),),
        recipe=plain.recipe,
        scenario=TENTH,
        train=1000,
        device=plain.device,
    )
    mlp = replace(digits, called="digits, MLP", model="mlp", settings=(("widths", (64, 64, 10)),))
    return Experiment(
        name="transfer",
        profile=profile,
        tasks=(resnet, convnet, digits, mlp),
        contenders=tuple(Contender(name=name, entry=name, tuned=False) for name in METHODS),
        effort=effort(plain, profile),
        shown=REMOVAL,
        leading="ΔFE",
    )
