"""How large an experiment is: *cpu* for two cores and an hour or so, *paper* for a GPU and the paper's own sizes."""

from expunge.bench.stages import Effort
from expunge.bench.tasks import Scenario, Task
from expunge.errors import ConfigError
from expunge.training import Recipe

PROFILES = ("cpu", "paper")
SHARE = 0.12  # of the epochs of retraining: what unlearning may take
_CPU = Recipe(epochs=60, lr=0.1, batch_size=64)
_PAPER = Recipe(epochs=182, lr=0.1, batch_size=256, schedule="step", milestones=(91, 136))  # as in the released code


def task(profile: str, dataset: str, scenario: Scenario) -> Task:
    """A task of a table in a profile.

    Raises:
        ConfigError: No such profile.
    """
    _require(profile)
    if profile == "paper":
        return Task(dataset=dataset, model="resnet18", recipe=_PAPER, scenario=scenario, device="cuda")
    return Task(
        dataset=dataset,
        model="resnet18",
        settings=(("width", 8),),
        recipe=_CPU,
        scenario=scenario,
        train=3000,
        test=5000,
    )


def effort(profile: str) -> Effort:
    """What everyone may spend in a profile: epochs of training, and a number of trials.

    The epochs are 0.12 of those of retraining, less the two that the gradients of RELOAD take.

    Raises:
        ConfigError: No such profile.
    """
    _require(profile)
    recipe, trials = (_CPU, 8) if profile == "cpu" else (_PAPER, 25)
    epochs = int(SHARE * recipe.epochs) - 2
    return Effort(budget=Recipe(epochs=epochs, lr=0.1, batch_size=recipe.batch_size), trials=trials)


def _require(profile: str) -> None:
    if profile not in PROFILES:
        raise ConfigError(f"profile={profile!r}: choose from {', '.join(PROFILES)}.")
