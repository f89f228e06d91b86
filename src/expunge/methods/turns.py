"""Ascents along one direction and fine-tuning, in turns; for methods that differ in the direction."""

import math
from dataclasses import replace
from typing import Protocol

import torch
from torch import nn

from expunge import params
from expunge.access import Blind
from expunge.errors import ConfigError
from expunge.params import Params
from expunge.seeds import derive
from expunge.trace import Trace
from expunge.training import Recipe, train

GROWTH = 2 / 3  # of a step, as a power of the share that was removed


class Turns(Protocol):
    """The settings of a method that takes turns."""

    @property
    def step(self) -> float | None:
        """Length of each ascent, as a share of the norm of the weights that it moves; None: `usual_step`."""

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
    step, rounds, fine_tune = config.step, config.rounds, config.fine_tune
    if step is not None and not 0 < step < math.inf:
        raise ConfigError(
            f"step={step}: must be a positive share of the norm of the weights, or None for one that follows from how "
            "much was removed."
        )
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


def usual_step(at_a_tenth: float, at_most: float, trace: Trace) -> float:
    """A step for what was removed: longer where it was more, at_a_tenth (10 × its share)^⅔.

    A unit vector that is the sum of few gradients has more of each of them. Were they all at right angles, a step
    would have to grow as the root of their number; more of it is brought back by fine-tuning where more was removed.
    The power is measured: docs/findings.md. Of a correction the share is not known: it is taken for a tenth.
    """
    removed, cached = trace.facts["removed_count"], trace.facts["cached_count"]
    return min(at_a_tenth * (10 * removed / cached) ** GROWTH, at_most) if removed else at_a_tenth


def in_turns(
    model: nn.Module,
    direction: Params,
    given: Blind,
    config: Turns,
    *,
    at_a_tenth: float,
    at_most: float = math.inf,
    seed: int,
    trace: Trace,
) -> nn.Module:
    """Move parameters along a unit vector and train for a share of the epochs, so many times.

    Each move is a step times the norm that the parameters have now: that of the settings, or the `usual_step` of a
    method, which has found out removed_count and cached_count. ``trace.facts``: step, ascent (its length).
    """
    theta = params.named_parameters(model, direction)
    step = usual_step(at_a_tenth, at_most, trace) if config.step is None else config.step
    length = step * params.norm({name: p.detach() for name, p in theta.items()})
    trace.facts |= {"step": step, "ascent": length}
    rounds, fine_tune = config.rounds, config.fine_tune
    for number in range(rounds):
        with trace.stage("ascend", model), torch.no_grad():
            for name, part in direction.items():
                theta[name].add_((length * part).to(theta[name]))
        with trace.stage("fine-tune", model):
            ends = [fine_tune.epochs * each // rounds for each in (number, number + 1)]
            recipe = replace(fine_tune, epochs=ends[1] - ends[0])
            train(model, given.retain, given.loss_terms, recipe, seed=derive(seed, "round", number), trace=trace)
    trace.stopped = f"all {fine_tune.epochs} epochs done"
    return model
