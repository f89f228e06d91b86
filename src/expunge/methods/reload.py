"""RELOAD: blind unlearning from a cached gradient.

Source: "Blind Unlearning: Unlearning Without a Forget Set", Algorithm 1. The removed data is never needed: the
gradient of all data was cached at the trained weights, that of what is left is computed now, and their
difference is the gradient of what was removed.

Deviations from the paper, each with a way back:
  * The ascent step is a full-batch step on the *mean* loss: ``priming_lr`` x (g_D - g_new) / n_D. The paper
    multiplies the sum: its η_p is ``priming_lr`` / n_D.
  * Entries whose difference is below its rounding floor are not re-initialised: what was removed never touched
    them, so resetting them cannot unlearn it. ``reset_untouched=True`` is the paper to the letter.
  * ε is not a constant: "auto" takes the mean rounding floor of the difference, below which a ratio is noise.
  * "To convergence" ends when the loss on what is left is down to the original model's own, on a plateau, or
    after the epochs of ``fine_tune``.
"""

import math
import warnings
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor, nn

from expunge import params
from expunge.access import Blind
from expunge.errors import ConfigError, NotInformative
from expunge.gradient import MICRO_BATCH, Gradient, gradient
from expunge.params import Params
from expunge.seeds import stream
from expunge.selectors import SELECTORS
from expunge.space import Choice, Range, Space
from expunge.trace import Trace
from expunge.training import Recipe, train, until_converged

Departure = Literal["absolute-direction", "batch-means", "normal-1d", "scaled-fraction"]
PUBLISHED_CODE: tuple[Departure, ...] = ("absolute-direction", "batch-means", "normal-1d", "scaled-fraction")


@dataclass(frozen=True, kw_only=True)
class Reload:
    """Blind unlearning: ascend along the gradient difference, re-initialise, fine-tune.

    ``published_code`` turns on departures of the authors' released code from their paper, one by one:
    "absolute-direction" ascends along ``|g_D - g_new|``; "batch-means" scales the step as a sum of batch means
    (batches of ``fine_tune.batch_size``) instead of one mean; "normal-1d" draws re-initialised 1-D parameters
    from a normal distribution of standard deviation 2; "scaled-fraction" resets
    max(min(α n_forget / n, 1), 0.05) with ε = 1e-10. Its other departures (augmented passes, forget data in
    train mode, g_D computed at unlearning time) need data that a blind method does not get.

    Raises:
        ConfigError: A value that cannot work.
    """

    priming_lr: float | None = 1.0  # η_p n_D: step of the ascent on the mean loss over D; None: no ascent
    reset_fraction: float = 0.1  # α: share of all parameters that is re-initialised, in [0, 1)
    eps: float | Literal["auto"] = "auto"  # ε: smooths the knowledge values, unit of a summed gradient
    selector: Literal["small-kv", "large-kv", "large-gradient", "large-ratio", "random"] = (
        "small-kv"  # which entries are re-initialised first
    )
    reset_untouched: bool = False  # may entries below the rounding floor be re-initialised?
    tolerance: float = 0.05  # of the stop rule: share of the original's loss
    patience: int = 10  # epochs without a lower training loss that end fine-tuning; 0: never
    published_code: tuple[Departure, ...] = ()  # departures of the released code to follow
    fine_tune: Recipe = Recipe(epochs=35, lr=0.1, batch_size=256)

    def __post_init__(self) -> None:
        if self.priming_lr is not None and not 0 < self.priming_lr < math.inf:
            raise ConfigError(f"priming_lr={self.priming_lr}: must be positive, or None for no ascent.")
        if not 0 <= self.reset_fraction < 1:
            raise ConfigError(
                f"reset_fraction={self.reset_fraction}: must be in [0, 1). To start from nothing, use retrain."
            )
        if self.eps != "auto" and not 0 < self.eps < math.inf:
            raise ConfigError(f"eps={self.eps}: must be positive, or 'auto'.")
        if not 0 <= self.tolerance < math.inf or self.patience < 0:
            raise ConfigError(f"tolerance={self.tolerance}, patience={self.patience}: must be 0 or more.")
        if self.selector not in SELECTORS:
            raise ConfigError(f"selector={self.selector!r}: choose from {', '.join(SELECTORS)}.")
        unknown = set(self.published_code) - set(PUBLISHED_CODE)
        if unknown:
            raise ConfigError(f"published_code={sorted(unknown)}: choose from {', '.join(PUBLISHED_CODE)}.")


SPACE: Space = {
    "priming_lr": Range(0.01, 10.0, log=True),
    "reset_fraction": Range(0.05, 0.8),
    "fine_tune.lr": Range(0.003, 0.3, log=True),
    "fine_tune.schedule": Choice(("cosine", "one-cycle")),
}


def reload(model: nn.Module, given: Blind, config: Reload, *, seed: int, trace: Trace) -> nn.Module:
    """Algorithm 1 of the paper.

    ``trace.facts``: removed_count and cached_count (loss terms), eps, relative_noise (predicted relative error of the
    difference, an upper estimate), informative_share, reset_count, requested_count, untouched_in_paper_choice and
    overlap_with_paper_choice (how the choice differs from the paper's to the letter), target_loss.

    Raises:
        NotInformative: The difference shows nothing of what was removed.
        MismatchError: A cache, retain set or ``fresh`` that do not belong together.
    """
    full = given.cached()
    theta = params.named_parameters(model, full.total)

    with trace.stage("difference", model):
        size = full.micro_batches.size if full.micro_batches else MICRO_BATCH
        retain = gradient(model, given.loss_terms, given.retain, parameters=full.total, micro_batch=size)
        removed = full - retain  # g_D - g_new
        trace.backwarded += retain.count
        trace.facts |= {"removed_count": removed.count, "cached_count": full.count}
        _require_informative(removed, trace)

    with trace.stage("ascend", model):
        if config.priming_lr is not None:
            ascend_(theta, removed.total, config, full.count)

    with trace.stage("select", model):
        eps = _eps(removed, config)
        chosen = _choose(removed, full, eps, config, seed, trace)

    with trace.stage("re-initialise", model):
        values = given.fresh_values(seed, model, theta)
        if "normal-1d" in config.published_code:
            one_d = [name for name, value in values.items() if value.ndim == 1]
            values.update({n: _normal(values[n], stream(seed, "normal-1d", n)) for n in one_d})
        reinitialise_(theta, values, chosen)

    with trace.stage("fine-tune", model):
        stop = until_converged(
            given.retain,
            given.loss_terms,
            target=full.mean_loss,
            tolerance=config.tolerance,
            patience=config.patience,
            trace=trace,
        )
        train(model, given.retain, given.loss_terms, config.fine_tune, seed=seed, trace=trace, stop=stop)
    trace.facts |= {"eps": eps, "target_loss": full.mean_loss}
    return model


@torch.no_grad()
def ascend_(theta: dict[str, nn.Parameter], removed: Params, config: Reload, terms: int) -> None:
    """θ ← θ + priming_lr (g_D - g_new) / n_D: one step up the mean loss over D, in what was removed."""
    assert config.priming_lr is not None
    step = config.priming_lr / (config.fine_tune.batch_size if "batch-means" in config.published_code else terms)
    for name, p in theta.items():
        direction = removed[name].abs() if "absolute-direction" in config.published_code else removed[name]
        p.add_((step * direction).to(p))


@torch.no_grad()
def reinitialise_(theta: dict[str, nn.Parameter], values: Params, chosen: dict[str, Tensor]) -> None:
    """Put the given values into the chosen entries."""
    for name, p in theta.items():
        p.copy_(torch.where(chosen[name].to(p.device), values[name], p))


def _require_informative(removed: Gradient, trace: Trace) -> None:
    marked = removed.informative()
    share = sum(int(mask.sum()) for mask in marked.values()) / params.size(marked)
    trace.facts |= {"informative_share": share, "relative_noise": removed.relative_noise()}
    if share == 0:
        raise NotInformative(
            f"the gradient difference of {removed.count} removed terms is below its rounding floor in every entry "
            f"(norm {params.norm(removed.total):.3g}). Either nothing was removed or corrected, or too little to be "
            "seen at this precision: delete more records at once, cache in float64, keep positions with the data."
        )


def _eps(removed: Gradient, config: Reload) -> float:
    if "scaled-fraction" in config.published_code:
        return 1e-10
    if config.eps != "auto":
        return config.eps
    assert removed.noise is not None
    mean = sum(float(floor.double().sum()) for floor in removed.noise.values()) / params.size(removed.noise)
    return max(mean, torch.finfo(torch.float64).tiny)


def _choose(
    removed: Gradient, full: Gradient, eps: float, config: Reload, seed: int, trace: Trace
) -> dict[str, Tensor]:
    """Mark the entries to re-initialise, and record where they are."""
    fraction = Fraction(repr(float(config.reset_fraction)))  # its decimal digits: as floats, 0.29 x 100 is below 29
    if "scaled-fraction" in config.published_code:
        fraction = max(min(fraction * removed.count / full.count, Fraction(1)), Fraction(1, 20))
    wanted = math.floor(fraction * params.size(removed.total))
    scores = SELECTORS[config.selector](removed.total, full.total, eps, seed)
    to_the_letter = params.smallest(scores, wanted)
    touched = removed.informative()
    if config.reset_untouched:
        chosen = to_the_letter
    else:
        for name, score in scores.items():
            score[~touched[name].to(score.device)] = math.inf
        chosen = params.smallest(scores, wanted)
    count = _count(chosen)
    if count < wanted:
        message = (
            f"only {count} of the {wanted} entries that reset_fraction={config.reset_fraction} asks for stand above "
            "the rounding floor; the others were never touched by what was removed and keep their values "
            "(reset_untouched=True would reset them)."
        )
        warnings.warn(message, stacklevel=2)
        trace.warnings.append(message)
    both = _count({name: chosen[name] & to_the_letter[name] for name in chosen})
    trace.facts |= {
        "reset_count": count,
        "requested_count": wanted,
        "untouched_in_paper_choice": _count({n: to_the_letter[n] & ~touched[n] for n in touched}) / max(wanted, 1),
        "overlap_with_paper_choice": both / max(count + wanted - both, 1),
    }
    trace.reset = {name: float(mask.double().mean()) if mask.numel() else 0.0 for name, mask in chosen.items()}
    return chosen


def _count(masks: dict[str, Tensor]) -> int:
    return sum(int(mask.count_nonzero()) for mask in masks.values())


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.empty(like.shape).normal_(0, 2, generator=generator).to(like)
