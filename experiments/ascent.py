"""What makes an ascent forget: its direction, its length, or the loss whose gradient was cached?

Claim: steps of the same length forget very differently. Along the difference of gradients, fine-tuning on what is left
brings the removed records back with the rest; along its part that is orthogonal to the gradient of what is left it
does not, and least along that of margins. Against that direction, and anywhere else, little is forgotten.
Setting: the removal of table1.py; nothing is tuned, so that no direction has an advantage.
Controls: against the direction, at random, and no ascent at all ("fine-tune").
Cost: shares originals and retrained models with table1.py; then 15 unlearnings a seed.
Expected: ΔFA near 10 along the orthogonal part of margins, near 85 against it.

    expunge bench run experiments/ascent.py --profile cpu --seeds 3 --jobs 2 --data DIR
"""

from collections.abc import Iterator

from expunge.bench.experiments import Experiment
from expunge.bench.profiles import effort, task
from expunge.bench.stages import LOSSES, Contender
from expunge.bench.tables import REMOVAL
from expunge.bench.tasks import Scenario

LR, ROUNDS, STEPS = 0.03, 2, (0.1, 0.2)


def contenders() -> Iterator[Contender]:
    """Every direction for each loss and length; a random one has no loss."""
    for loss in LOSSES:
        for direction in ("orthogonal", "difference", "reversed"):
            for step in STEPS:
                yield _ascent(f"{direction} {step} ({loss})", direction, step, loss)
    for step in STEPS:
        yield _ascent(f"random {step}", "random", step, "cross_entropy")
    yield Contender(name="fine-tune", entry="fine-tune", settings=(("recipe.lr", LR),), tuned=False)


def experiment(profile: str) -> Experiment:
    """Steps in all directions."""
    situation = task(profile, "cifar100", Scenario(kind="random", amount=0.1))
    return Experiment(
        name="ascent",
        profile=profile,
        tasks=(situation,),
        contenders=tuple(contenders()),
        effort=effort(situation, profile),
        shown=REMOVAL,
    )


def _ascent(name: str, direction: str, step: float, loss: str) -> Contender:
    settings = {"direction": direction, "step": step, "rounds": ROUNDS, "fine_tune.lr": LR}
    return Contender(
        name=name, entry="orthogonal-ascent", settings=tuple(settings.items()), tuned=False, cached_loss=loss
    )
