"""Which entries are re-initialised: those with the smallest scores, as a share or below a threshold.

Counts are exact. A share of P entries is floor(α P), α taken by its decimal digits; of equal scores the first ones, by
tensor and then by position. A threshold takes every entry whose score is at most that.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from expunge import params
from expunge.errors import NotFinite
from expunge.params import Params
from expunge.trace import Trace

Scope = Literal["global", "layer"]
Masks = dict[str, Bool[Tensor, "..."]]


def smallest_share(scores: Params, fraction: Fraction, scope: Scope) -> tuple[Masks, int]:
    """Mark the smallest scores: floor(fraction x entries) over all tensors, or in each layer.

    A layer is the tensors that one module owns: a weight and its bias. +infinity is never marked.

    Returns:
        The masks, and how many were wanted.
    """
    chosen: Masks = {}
    wanted = 0
    for group in _layers(scores) if scope == "layer" else [scores]:
        count = math.floor(fraction * params.size(group))
        chosen |= params.smallest(group, count)
        wanted += count
    return {name: chosen[name] for name in scores}, wanted


def at_most(scores: Params, threshold: float) -> tuple[Masks, int]:
    """Mark every score of at most the threshold.

    Returns:
        The masks, and how many are marked.

    Raises:
        NotFinite: A score is NaN.
    """
    for name, score in scores.items():
        if params.count({name: score.isnan()}):
            raise NotFinite(f"a score of {name!r} is NaN, so it is on no side of a threshold. Check the selector.")
    chosen = {name: score <= threshold for name, score in scores.items()}
    return chosen, params.count(chosen)


def decimal(fraction: float) -> Fraction:
    """A fraction by its decimal digits: as floats, 0.29 x 100 is below 29."""
    return Fraction(repr(float(fraction)))


def choose(
    scores: Params,
    pick: Callable[[Params], tuple[Masks, int]],
    touched: Masks,
    *,
    asked: str,
    reset_untouched: bool,
    reset_1d: bool,
    trace: Trace,
) -> Masks:
    """Mark what is re-initialised, record where it is, and warn if it is less than was asked for.

    Args:
        scores: One a tensor entry; changed in place.
        pick: Marks some of the scores it is given, and says how many it wanted.
        touched: The entries that what was removed can be seen in.
        asked: The setting that says how many, for the warning.
        reset_untouched: Whether the others may be chosen.
        reset_1d: Whether tensors of less than two dimensions may be.
        trace: ``trace.facts`` and ``trace.reset`` of `reload`.
    """
    eligible = {name: score for name, score in scores.items() if reset_1d or score.ndim > 1}
    to_the_letter, wanted = pick(eligible)
    chosen = to_the_letter
    if not reset_untouched:
        for name, score in eligible.items():
            score.masked_fill_(~touched[name].to(score.device), math.inf)
        chosen, _ = pick(eligible)
    chosen = {n: chosen.get(n, torch.zeros_like(score, dtype=torch.bool)) for n, score in scores.items()}
    count = params.count(chosen)
    if count < wanted:
        trace.warn(
            f"only {count} of the {wanted} entries that {asked} asks for stand above the rounding floor; the others "
            "were never touched by what was removed and keep their values (reset_untouched=True would reset them)."
        )
    both = params.count({name: chosen[name] & mask for name, mask in to_the_letter.items()})
    untouched = params.count({name: mask & ~touched[name].to(mask.device) for name, mask in to_the_letter.items()})
    trace.facts |= {
        "reset_count": count,
        "requested_count": wanted,
        "untouched_in_paper_choice": untouched / max(wanted, 1),
        "overlap_with_paper_choice": both / max(count + wanted - both, 1),
    }
    trace.reset = {name: params.count({name: mask}) / max(mask.numel(), 1) for name, mask in chosen.items()}
    return chosen


def _layers(scores: Params) -> list[Params]:
    groups: dict[str, Params] = {}
    for name, score in scores.items():
        groups.setdefault(name.rpartition(".")[0], {})[name] = score
    return list(groups.values())
