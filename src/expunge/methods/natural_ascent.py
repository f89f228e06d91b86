"""Ascend along the difference of gradients in the geometry of what is left, then fine-tune: blind, from RELOAD's cache.

Source: this library, docs/findings.md. The difference of gradients is that of RELOAD, "Blind Unlearning: Unlearning
Without a Forget Set"; a gradient times an inverse Fisher matrix is the natural one (Amari, "Natural Gradient Works
Efficiently in Learning", 1998), here in an eigenbasis of Kronecker factors (EK-FAC, George et al., 2018), as Grosse et
al., "Studying Large Language Model Generalization with Influence Functions" (2023), solve for influence. Deviations
from RELOAD: nothing is re-initialised, and the ascent is another.
  * The gradient is best that of the loss of training, in which a record counts with the error that it still has. Where
    all count alike (margins, as in orthogonal ascent), an ascent makes all of them a little wrong, as no model is that
    never saw them: found by measuring, docs/findings.md.
  * A step along g_D - g_new itself moves what all records share, and fine-tuning undoes it. Divided by the curvature of
    what is left, it is along what few other records depend on.
  * The length is a share of the norm of the weights, and biases and the scales of normalisation stay, as in orthogonal
    ascent. It grows with what was removed as the curvature sees it, and not with how many records it was: a hundred of
    a class pull at the same weights. gᵀ(F + λ)⁻¹g is their influence on their own loss (Koh and Liang, "Understanding
    Black-box Predictions via Influence Functions", 2017), tr F(F + λ)⁻¹ that of all that is left on its own. Where a
    model gets a few records wrong, these have nearly all of it, and those known by heart get a short step: it is said.

Needs: any loss that comes in terms of single examples; a cached gradient of the loss of training.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from expunge import params
from expunge.access import Blind
from expunge.batches import Batches, indexed, only_rows
from expunge.errors import ConfigError, NotInformative
from expunge.losses import logit_margin, name_of
from expunge.methods.difference import difference
from expunge.methods.kronecker import kronecker_fisher
from expunge.methods.turns import in_turns, moved_weights, require_turns
from expunge.params import Params
from expunge.seeds import stream
from expunge.space import Range, Space
from expunge.trace import Trace
from expunge.training import Recipe

LEAST = 256  # records that a curvature is measured on, if there are so many
WIDEST = 0.25  # of the information, up to which a step grows: longer steps wrecked what was left
# Cosine of a correction's difference and -g_new beyond which faults have no part in it to speak of: 0.9999 and more
# where a backdoor stayed (docs/findings.md), 0.92 to 0.98 on the digits of the demo, whose labels it corrects well.
ALONG_LEFT = 0.99
# Information of what was removed, of that of as many records on average, below which a step is too short to trust: it
# was all of it or more where the step was found (results/natural_steps.csv), and next to nothing on a model that got a
# few of its records wrong.
HARDLY_SEEN = 0.25


@dataclass(frozen=True, kw_only=True)
class NaturalAscent:
    """Blind unlearning: ascend along the natural gradient of what was removed, and fine-tune, in turns.

    Raises:
        ConfigError: A value that cannot work.
    """

    step: float = 0.2  # length of each ascent, as a share of the norm of the weights; for a seventh of the information
    growth: float = 2 / 3  # with which power of what was removed, as the curvature sees it; 0: the same step for all
    rounds: int = 2  # ascents, each followed by its share of the epochs
    damping: float = 0.3  # of the curvature, as a share of its mean eigenvalue
    sample: float = 0.1  # of what is left, for the curvature: 256 records at least; all, if data has no positions
    fine_tune: Recipe = Recipe(epochs=10, lr=0.03)  # how to train on what is left, all rounds together: your own recipe

    def __post_init__(self) -> None:
        require_turns(self)
        if not 0 < self.damping < math.inf:
            raise ConfigError(f"damping={self.damping}: must be a positive number.")
        if not 0 < self.sample <= 1:
            raise ConfigError(f"sample={self.sample}: must be a share of what is left, above 0 and at most 1.")


SPACE: Space = {
    "step": Range(0.05, 0.5, log=True),
    "rounds": Range(1, 3),
    "fine_tune.lr": Range(0.003, 0.3, log=True),
}


def natural_ascent(model: nn.Module, given: Blind, config: NaturalAscent, *, seed: int, trace: Trace) -> nn.Module:
    """Steps W ← W + s ‖W‖ d / ‖d‖ and train(θ, D_new), in turns; d = (F + λ)⁻¹ (g_D - g_new).

    W are the parameters of two or more dimensions (all, if there are none). F is the sum of squared gradients of the
    cached loss over a sample of what is left, in blocks of one layer each, and λ a share of its mean eigenvalue. Of a
    removal s is step (7 e)^growth, e = (g_D - g_new)ᵀ d / tr F(F + λ)⁻¹ with F, in d as well, of all that is left: of
    records whose gradients have nothing in common e is next to their share. It is taken for at most `WIDEST`.

    ``trace.facts``: those of `difference`, kronecker_share (of the entries, in blocks), alignment (cosine of d and the
    difference), information_share (e), ascent_share (s), ascent (its length); of a correction along_left (cosine of
    g_new - g_D and g_new).

    Raises:
        NotInformative: The difference shows nothing of what was removed in W, or the curvature nothing at all.
        MismatchError: A cache and a retain set that do not belong together.
        UnsupportedModule: A model that cannot be taken apart into examples.
        ConfigError: There is no cached gradient.
    """
    weights = moved_weights(model, given.cached().total)
    with trace.stage("difference", model):
        removed, left = difference(model, given, trace)
        assert removed.noise is not None
        own, noise = ({name: each[name] for name in weights} for each in (removed.total, removed.noise))
        if params.norm(own) <= params.norm(noise):
            raise NotInformative(
                f"the gradient difference has norm {params.norm(own):.3g} in the weights, no more than its rounding "
                f"floor, {params.norm(noise):.3g}. Delete more records at once, or cache in float64."
            )
    if not removed.count:
        _warn_of_faults_without_gradient(own, {name: left.total[name] for name in weights}, given, trace)
    with trace.stage("curvature", model):
        direction = _direction(model, own, given, config, seed, trace)
    sevenths = 1.0
    if removed.count:
        share = trace.facts["information_share"]
        _warn_of_records_without_gradient(share / (removed.count / trace.facts["cached_count"]), given, trace)
        if share > WIDEST:
            trace.warn(
                f"{trace.method}: what was removed has {share:.2g} of the information. The step is that of {WIDEST:g}, "
                "as longer ones wrecked what is left. Whether it forgets, and does no harm, a rehearsal tells (expunge "
                "rehearse); or retrain, since so much is to be forgotten. If it cannot be so much, the model's code, "
                "the loss or the preprocessing are not those of the cache."
            )
        sevenths = 7 * min(share, WIDEST)
    return in_turns(model, direction, given, config, sevenths, seed=seed, trace=trace)


def _warn_of_faults_without_gradient(difference: Params, left: Params, given: Blind, trace: Trace) -> None:
    """The difference of a correction is the gradient of the faults less that of what they were corrected to."""
    lengths = params.norm(difference) * params.norm(left)
    along = -params.dot(difference, left) / max(lengths, torch.finfo(torch.float64).tiny)
    trace.facts["along_left"] = along
    if along > ALONG_LEFT and given.cached_terms is not logit_margin:
        trace.warn(
            f"{trace.method}: records were corrected, and the difference of gradients is nearly the negative gradient "
            f"of what is left (cosine {along:.4f}): faults that a model fits have next to no gradient of "
            f"{name_of(given.cached_terms)}. To ascend along it is what fine-tuning does anyway, and a trigger may go "
            "on working. For corrections of a classifier cache the gradient of expunge.logit_margin, in which faults "
            "count."
        )


def _warn_of_records_without_gradient(seen: float, given: Blind, trace: Trace) -> None:
    """A few records that a model gets wrong have nearly all of the information, and others next to none."""
    if seen < HARDLY_SEEN and given.cached_terms is not logit_margin:
        trace.warn(
            f"{trace.method}: what was removed has {seen:.2g} of the information that as many records have on average, "
            "so the step is short, and may not forget them. A model that knows them by heart and gets others wrong has "
            f"next to no gradient of {name_of(given.cached_terms)} for them. Of a classifier cache the gradient of "
            "margins (expunge.logit_margin) before the deletion, or rehearse the step (expunge rehearse)."
        )


def _direction(
    model: nn.Module, removed: Params, given: Blind, config: NaturalAscent, seed: int, trace: Trace
) -> Params:
    """The unit vector along the natural gradient."""
    some, share = _sample(given.retain, config.sample, seed)
    curvature = kronecker_fisher(model, given.cached_terms, some, removed, trace)
    solved = curvature.solve(removed, config.damping)
    length = params.norm(solved)
    product = params.dot(solved, removed)
    trace.facts |= {
        "kronecker_share": curvature.kronecker_share,
        "alignment": product / length / params.norm(removed),
        "information_share": share * product / curvature.effective_parameters(config.damping),
    }
    return {name: each / length for name, each in solved.items()}


def _sample(data: Batches, share: float, seed: int) -> tuple[Batches, float]:
    """Records at random, and which share they are; data without positions is taken whole."""
    known = indexed(data)
    if known is None:
        return data, 1.0
    count = min(max(round(share * len(known.positions)), LEAST), len(known.positions))
    rows = torch.randperm(len(known.positions), generator=stream(seed, "curvature"))[:count]
    return only_rows(data, rows.sort().values), count / len(known.positions)
