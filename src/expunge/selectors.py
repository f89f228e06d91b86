"""Scores that choose which entries are re-initialised: those with the smallest score.

Each takes what may be seen of the removed data, an `Evidence`, and returns one score an entry. ``docs/reload.md``
compares them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from expunge import params, sharding
from expunge.curvature import Curvature
from expunge.errors import ConfigError
from expunge.params import Params
from expunge.seeds import stream


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a selector may see, all at the trained weights and over the same names.

    Raises:
        ConfigError: An ε or a damping that is not positive.
        MismatchError: Vectors over different parameters.
        NotFinite: NaN or infinity in a gradient.
    """

    removed: Params  # g_F = g_D - g_new, the gradient of what was removed, a sum over terms
    full: Params  # g_D, the cached gradient
    eps: float  # ε: smooths ratios, unit of a summed gradient
    seed: int = 0  # names the stream of the random selector
    change: Params | None = None  # δ: re-initialised minus trained value; second order only
    curvature: Curvature | None = None  # Fisher information of what is left; second order only
    damping: float = 0.1  # of EK-FAC, share of the mean eigenvalue

    def __post_init__(self) -> None:
        for name in ("eps", "damping"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)}: must be positive and finite.")
        others = {"the cached gradient": self.full, "the change of values": self.change}
        for what, vector in others.items():
            if vector is not None:
                params.require_same_names(self.removed, vector, "the gradient of what was removed", what)
                params.require_finite(vector, what)
        params.require_finite(self.removed, "the gradient of what was removed")


Selector = Callable[[Evidence], Params]
Name = Literal["small-kv", "large-kv", "large-gradient", "large-ratio", "obs", "ekfac", "random"]
SECOND_ORDER: tuple[Name, ...] = ("obs", "ekfac")  # which need the curvature


def knowledge_values(removed: Params, full: Params, eps: float) -> Params:
    """(|g_F| + ε) / (|g_D| + ε), equation 8 of the RELOAD paper; small means: knows what was removed."""
    return {name: (removed[name].abs() + eps) / (full[name].abs() + eps) for name in removed}


def small_kv(evidence: Evidence) -> Params:
    """The smallest knowledge values first: the paper's choice."""
    return knowledge_values(evidence.removed, evidence.full, evidence.eps)


def large_kv(evidence: Evidence) -> Params:
    """The largest knowledge values first: the opposite, for ablation."""
    return {name: score.neg_() for name, score in small_kv(evidence).items()}


def large_gradient(evidence: Evidence) -> Params:
    """The largest |g_F| first: the saliency of SalUn (Fan et al., 2023), computed blind."""
    return {name: gradient.abs().neg_() for name, gradient in evidence.removed.items()}


def large_ratio(evidence: Evidence) -> Params:
    """The largest |g_F| / |g_new| first, each smoothed by ε."""
    removed, full, eps = evidence.removed, evidence.full, evidence.eps
    return {name: ((removed[name].abs() + eps) / ((full[name] - removed[name]).abs() + eps)).neg_() for name in removed}


def obs(evidence: Evidence) -> Params:
    """Those first whose new value is predicted to raise the loss on what is left the least (or to lower it the most).

    Optimal brain surgeon (Hassibi & Stork, 1993) predicts what moving one weight by δ costs from a quadratic of the
    loss at its minimum. Here the minimum is that of the loss on all data, so the gradient on what is left is -g_F;
    the curvature is the diagonal Fisher information F of what is left; δ leads to the re-initialised value, which
    for 0 is pruning. In nats, summed over what is left: ½ F δ² - g_F δ.

    Raises:
        ConfigError: No curvature, one in blocks, or no change.
    """
    curvature, change = evidence.curvature, evidence.change
    if curvature is None or change is None or curvature.blocks:
        raise ConfigError(
            f"curvature={_kind(curvature)}, change={'none' if change is None else 'given'}: obs needs a diagonal "
            "curvature and the change of values. See expunge.methods.kronecker.diagonal_fisher."
        )
    return {
        name: curvature.diagonal[name].to(g) * change[name].to(g).square() / 2 - g * change[name].to(g)
        for name, g in evidence.removed.items()
    }


def ekfac(evidence: Evidence) -> Params:
    """The largest |(F + λ)⁻¹ g_F| first: how far retraining is predicted to carry an entry, by one Newton step.

    F is the Fisher information of what is left in the Kronecker eigenbasis of each linear layer and convolution, with
    second moments of the gradients of single examples as eigenvalues (EK-FAC: George et al., 2018); other parameters
    have its diagonal. λ is a share, ``damping``, of the mean eigenvalue.

    Raises:
        ConfigError: No curvature.
        NotInformative: F is zero.
    """
    if evidence.curvature is None:
        raise ConfigError("curvature=none: ekfac needs one. See expunge.methods.kronecker.kronecker_fisher.")
    solved = evidence.curvature.solve(evidence.removed, evidence.damping)
    return {name: step.abs_().neg_() for name, step in solved.items()}


def random(evidence: Evidence) -> Params:
    """Uniformly random: the control without which no selector means anything."""
    scores = {}
    for name, like in evidence.removed.items():
        drawn = torch.rand(like.shape, dtype=torch.float64, generator=stream(evidence.seed, "selector", name))
        scores[name] = sharding.placed_like(drawn.to(like.device, like.dtype), like)
    return scores


def _kind(curvature: Curvature | None) -> str:
    return "none" if curvature is None else "in blocks" if curvature.blocks else "diagonal"


SELECTORS: dict[Name, Selector] = {
    "small-kv": small_kv,
    "large-kv": large_kv,
    "large-gradient": large_gradient,
    "large-ratio": large_ratio,
    "obs": obs,
    "ekfac": ekfac,
    "random": random,
}
