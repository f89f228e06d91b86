"""Ascend in what only the removed records have, then fine-tune: blind, from one cached gradient.

Source: this library, docs/findings.md; the difference of gradients is that of RELOAD, "Blind Unlearning: Unlearning
Without a Forget Set". Deviations from RELOAD: nothing is re-initialised, and the ascent is another. Where a model fits
its data, g_D - g_new points largely where g_new points, so that fine-tuning on what is left undoes a step along it, for
the removed records as well. Therefore
  * the step is along the part of the difference that is orthogonal to g_new;
  * its length is a share of the norm of the weights: gradients shrink with the loss, and a learning rate that is right
    for one model does nothing to another;
  * the cached gradient is best one of margins (`logit_margin`), in which every record counts alike. In one of
    cross-entropy a record counts with its error, so that those known best have hardly a part in the difference;
  * biases and the scales of normalisation stay: few entries that move everything, known records and others.

Needs: any loss for training; a cached gradient, best of margins, otherwise of the same loss.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from expunge import params
from expunge.access import Blind
from expunge.errors import ConfigError, NotInformative
from expunge.methods.difference import difference
from expunge.methods.reinitialise import normal
from expunge.methods.turns import in_turns, moved_weights, require_turns, tenths
from expunge.params import Params
from expunge.space import Range, Space
from expunge.trace import Trace
from expunge.training import Recipe

Direction = Literal["orthogonal", "difference", "reversed", "random"]


@dataclass(frozen=True, kw_only=True)
class OrthogonalAscent:
    """Blind unlearning: ascend where only the removed records point, and fine-tune, in turns.

    Raises:
        ConfigError: A value that cannot work.
    """

    step: float = 0.2  # length of each ascent, as a share of the norm of the weights; where a tenth was removed
    growth: float = 2 / 3  # with which power of the share that was removed it grows; 0: the same step for all
    rounds: int = 2  # ascents, each followed by its share of the epochs
    direction: Direction = "orthogonal"  # or a control: "difference" as it is, "reversed", "random"
    fine_tune: Recipe = Recipe(epochs=10, lr=0.03)  # how to train on what is left, all rounds together: your own recipe

    def __post_init__(self) -> None:
        require_turns(self)
        if self.direction not in get_args(Direction):
            raise ConfigError(f"direction={self.direction!r}: choose from {', '.join(get_args(Direction))}.")


SPACE: Space = {
    "step": Range(0.05, 0.5, log=True),
    "rounds": Range(1, 3),
    "fine_tune.lr": Range(0.003, 0.3, log=True),
}


def orthogonal_ascent(
    model: nn.Module, given: Blind, config: OrthogonalAscent, *, seed: int, trace: Trace
) -> nn.Module:
    """Steps W ← W + s ‖W‖ d / ‖d‖ and train(θ, D_new), in turns; d is g_D - g_new less its part along g_new.

    W are the parameters of two or more dimensions (all, if there are none), and d is of the gradients in these. Of the
    share r that was removed s is step (10 r)^growth, and at most step.
    The controls step equally far along g_D - g_new, against d, or anywhere.

    ``trace.facts``: those of `difference`, alignment (cosine of the difference and g_new), ascent_share (s),
    ascent (its length).

    Raises:
        NotInformative: The difference shows nothing of what was removed, or nothing that g_new does not.
        MismatchError: A cache and a retain set that do not belong together.
        ConfigError: There is no cached gradient.
    """
    weights = moved_weights(model, given.cached().total)

    with trace.stage("difference", model):
        removed, retain = difference(model, given, trace)
        assert removed.noise is not None
        own, left, noise = (
            {name: each[name] for name in weights} for each in (removed.total, retain.total, removed.noise)
        )
        direction = _direction(own, left, params.norm(noise), config.direction, seed, trace)
    most = tenths(trace, widest=0.1)  # longer steps than after a tenth wrecked what was left
    return in_turns(model, direction, given, config, most, seed=seed, trace=trace)


def _direction(removed: Params, retain: Params, noise: float, which: Direction, seed: int, trace: Trace) -> Params:
    """The unit vector to ascend along: what the removed records have and what is left has not, or a control."""
    lengths = params.norm(removed), params.norm(retain)
    along = params.dot(removed, retain) / lengths[1] ** 2 if lengths[1] else 0.0
    alone = params.subtract(removed, {name: along * each for name, each in retain.items()})
    if params.norm(alone) <= noise:
        raise NotInformative(
            f"the gradient difference has norm {lengths[0]:.3g} in the weights, of which {params.norm(alone):.3g} is "
            f"not along the gradient of what is left, no more than its rounding floor, {noise:.3g}: the removed "
            "records have nothing of their own there. Are records that are left copies of them? Otherwise delete more "
            "records at once, or cache in float64."
        )
    trace.facts["alignment"] = along * lengths[1] / lengths[0]
    if which == "difference":
        alone = removed
    elif which == "random":
        alone = {name: normal(each, 1, seed, name, "direction") for name, each in removed.items()}
    scale = (-1 if which == "reversed" else 1) / params.norm(alone)
    return {name: scale * each for name, each in alone.items()}
