"""How large an experiment is: *cpu* for two cores and an hour or so, *paper* for a GPU and the paper's own sizes."""

from dataclasses import replace
from typing import Any

from expunge.bench.stages import Effort
from expunge.bench.tasks import Scenario, Task
from expunge.data.digits import COUNT
from expunge.errors import ConfigError
from expunge.training import Recipe

PROFILES = ("cpu", "paper")
SHARE = 0.12  # of the epochs of retraining: what unlearning may take
_AUGMENTED: dict[str, dict[str, Any]] = {
    name: {"crop": 4, "flip": True} for name in ("cifar10", "cifar100")
}  # SVHN: none
_CPU = Recipe(epochs=60, lr=0.1, batch_size=64, channels_last=True)
_PAPER = Recipe(  # as in the released code
    epochs=182, lr=0.1, batch_size=256, schedule="step", milestones=(91, 136), channels_last=True
)


def task(profile: str, dataset: str, scenario: Scenario) -> Task:
    """A task of a table in a profile.

    Raises:
        ConfigError: No such profile, or the digits, which are fewer than a profile takes.
    """
    _require(profile)
    if dataset == "digits":
        raise ConfigError(
            f"dataset='digits': they are {COUNT} images, and a profile takes more. Write a Task of your own, as in "
            "docs/experiments.md, or take cifar10."
        )
    if profile == "paper":
        recipe = replace(_PAPER, **_AUGMENTED.get(dataset, {}))
        return Task(dataset=dataset, model="resnet18", recipe=recipe, scenario=scenario, device="cuda")
    return Task(
        dataset=dataset,
        model="resnet18",
        settings=(("width", 8),),
        recipe=_CPU,
        scenario=scenario,
        train=3000,
        test=5000,
    )


def effort(task: Task, profile: str) -> Effort:
    """What everyone may spend on a task in a profile: epochs of training, and a number of trials.

    The epochs are 0.12 of those of retraining, less the two that the cached gradient and the second pass take.

    Raises:
        ConfigError: No such profile, or a training too short for that.
    """
    _require(profile)
    epochs = int(SHARE * task.recipe.epochs) - 2
    if epochs < 2:
        raise ConfigError(
            f"recipe.epochs={task.recipe.epochs}: {SHARE} of these less two leaves {epochs} for unlearning. Train for "
            "34 or more, or write an Effort of your own."
        )
    budget = replace(task.recipe, epochs=epochs, schedule="cosine", milestones=())
    return Effort(budget=budget, trials=8 if profile == "cpu" else 25)


def _require(profile: str) -> None:
    if profile not in PROFILES:
        raise ConfigError(f"profile={profile!r}: choose from {', '.join(PROFILES)}.")
