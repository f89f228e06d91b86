"""Ascents along one direction and fine-tuning, in turns; for methods that differ in the direction."""

from typing import Protocol

import torch
from torch import nn

from expunge import params
from expunge.access import Blind
from expunge.errors import ConfigError
from expunge.methods.further import train_further
from expunge.params import Params
from expunge.seeds import derive
from expunge.trace import Trace
from expunge.training import Recipe

WIDEST = 0.25  # share of the records, up to which it was measured that a step should grow


class Turns(Protocol):
    """The settings of a method that takes turns."""

    @property
    def step(self) -> float:
        """Length of each ascent, as a share of the norm of the weights that it moves."""

    @property
    def growth(self) -> float:
        """With which power of how much was removed a step grows."""

    @property
    def rounds(self) -> int:
        """Ascents, each followed by its share of the epochs."""

    @property
    def fine_tune(self) -> Recipe:
        """How to train on what is left, all rounds together."""


def require_turns(config: Turns) -> None:
    """Refuse settings that cannot work.

    Raises:
        ConfigError: A step of no length, or rounds that are not so many epochs.
    """
    step, growth, rounds, fine_tune = config.step, config.growth, config.rounds, config.fine_tune
    if not 0 < step < 1:
        raise ConfigError(f"step={step}: must be a share of the norm of the weights, above 0 and below 1.")
    if not 0 <= growth <= 1:
        raise ConfigError(f"growth={growth}: must be from 0, the same step whatever was removed, to 1.")
    if not isinstance(rounds, int) or rounds < 1:
        raise ConfigError(f"rounds={rounds}: must be a whole number, at least 1.")
    if fine_tune.epochs < rounds:
        raise ConfigError(
            f"fine_tune.epochs={fine_tune.epochs}, rounds={rounds}: an ascent without an epoch after it leaves a "
            "wreck. Take more epochs, or fewer rounds."
        )


def moved_weights(model: nn.Module, cached: Params) -> dict[str, nn.Parameter]:
    """The cached parameters of two or more dimensions; all, if there are none."""
    theta = params.named_parameters(model, cached)
    return {name: p for name, p in theta.items() if p.ndim > 1} or theta


def tenths(trace: Trace, widest: float = WIDEST) -> float:
    """How many tenths of the records were removed, up to a share; of a correction that is not known: 1."""
    removed, cached = trace.facts["removed_count"], trace.facts["cached_count"]
    return 10 * min(removed / cached, widest) if removed else 1.0


def in_turns(
    model: nn.Module,
    direction: Params,
    given: Blind,
    config: Turns,
    removed: float,
    *,
    seed: int,
    trace: Trace,
) -> nn.Module:
    """Move parameters along a unit vector and train for a share of the epochs, so many times.

    A unit vector that is the sum of few gradients has more of each of them. Were they all at right angles, a step
    would have to grow as the root of their number; and where more was removed, fine-tuning brings back more of each.
    Measured: docs/findings.md.

    Args:
        model: It is changed.
        direction: A unit vector over some of its parameters.
        given: What is left.
        config: Step, growth, rounds and training.
        removed: How much was removed, as a multiple of what the step is for. Each move is step × removed^growth
            times the norm that the parameters have now.
        seed: Of the training.
        trace: ``facts``: ascent_share (the step), ascent (its length).
    """
    theta = params.named_parameters(model, direction)
    share = config.step * removed**config.growth
    length = share * params.norm({name: p.detach() for name, p in theta.items()})
    trace.facts |= {"ascent_share": share, "ascent": length}
    rounds, fine_tune = config.rounds, config.fine_tune
    for number in range(rounds):
        with trace.stage("ascend", model), torch.no_grad():
            for name, part in direction.items():
                theta[name].add_((length * part).to(theta[name]))
        with trace.stage("fine-tune", model):
            ends = [fine_tune.epochs * each // rounds for each in (number, number + 1)]
            recipe = fine_tune.shortened(ends[1] - ends[0])
            train_further(model, given, recipe, seed=derive(seed, "round", number), trace=trace)
    if given.train_further is None:
        trace.stopped = f"all {fine_tune.epochs} epochs done"
    return model
