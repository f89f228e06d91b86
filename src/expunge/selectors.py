"""Scores that choose which entries are re-initialised: those with the smallest score.

Each takes the gradient of what was removed g_F = g_D - g_new, the cached gradient g_D, the smoothing constant ε
and a seed, all `Params` over the same names, and returns one score an entry.
"""

from collections.abc import Callable

import torch

from expunge.params import Params
from expunge.seeds import stream

Selector = Callable[[Params, Params, float, int], Params]


def knowledge_values(removed: Params, full: Params, eps: float) -> Params:
    """(|g_F| + ε) / (|g_D| + ε), equation 8 of the RELOAD paper; small means: knows what was removed."""
    return {name: (removed[name].abs() + eps) / (full[name].abs() + eps) for name in removed}


def small_kv(removed: Params, full: Params, eps: float, seed: int) -> Params:  # noqa: ARG001
    """The smallest knowledge values first: the paper's choice."""
    return knowledge_values(removed, full, eps)


def large_kv(removed: Params, full: Params, eps: float, seed: int) -> Params:  # noqa: ARG001
    """The largest knowledge values first: the opposite, for ablation."""
    return {name: score.neg_() for name, score in knowledge_values(removed, full, eps).items()}


def large_gradient(removed: Params, full: Params, eps: float, seed: int) -> Params:  # noqa: ARG001
    """The largest |g_F| first: the saliency of SalUn (Fan et al., 2023), computed blind."""
    return {name: removed[name].abs().neg_() for name in removed}


def large_ratio(removed: Params, full: Params, eps: float, seed: int) -> Params:  # noqa: ARG001
    """The largest |g_F| / |g_new| first, each smoothed by ε."""
    return {name: ((removed[name].abs() + eps) / ((full[name] - removed[name]).abs() + eps)).neg_() for name in removed}


def random(removed: Params, full: Params, eps: float, seed: int) -> Params:  # noqa: ARG001
    """Uniformly random: the control without which no selector means anything."""
    return {
        name: torch.rand(score.shape, dtype=torch.float64, generator=stream(seed, "selector", name)).to(score)
        for name, score in removed.items()
    }


SELECTORS: dict[str, Selector] = {
    "small-kv": small_kv,
    "large-kv": large_kv,
    "large-gradient": large_gradient,
    "large-ratio": large_ratio,
    "random": random,
}
