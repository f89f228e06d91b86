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
  * "To convergence" ends when the loss on what is left is down to the original model's own, which a cached
    gradient of the same loss says, on a plateau, or after the epochs of ``fine_tune``.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import nn

from expunge import params, sharding
from expunge.access import Blind
from expunge.curvature import Curvature
from expunge.errors import ConfigError, UnsupportedModule
from expunge.gradient import Gradient
from expunge.methods.choice import Masks, Scope, at_most, choose, decimal, smallest_share
from expunge.methods.difference import difference
from expunge.methods.further import train_further
from expunge.methods.kronecker import diagonal_fisher, kronecker_fisher
from expunge.methods.reinitialise import (
    ResetTo,
    Statistics,
    new_values,
    normal,
    re_estimate_statistics_,
    reinitialise_,
)
from expunge.params import Params
from expunge.selectors import SECOND_ORDER, SELECTORS, Evidence, Name
from expunge.space import Choice, Range, Space
from expunge.trace import Trace
from expunge.training import Recipe, until_converged

Departure = Literal["absolute-direction", "batch-means", "normal-1d", "scaled-fraction"]
PUBLISHED_CODE: tuple[Departure, ...] = get_args(Departure)


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
    priming_length: float | None = None  # in place of priming_lr: length of the ascent, as a share of the weights' norm
    reset_fraction: float = 0.1  # α: share of all entries that is re-initialised, in [0, 1)
    threshold: float | None = None  # instead of a share: every entry with a knowledge value of at most this
    scope: Scope = "global"  # is the share one of all entries together, or of each layer's?
    eps: float | Literal["auto"] = "auto"  # ε: smooths the knowledge values, unit of a summed gradient
    selector: Name = "small-kv"  # which entries are re-initialised first
    damping: float = 0.1  # of the selector ekfac: added to the curvature, as a share of its mean eigenvalue
    reset_untouched: bool = False  # may entries below the rounding floor be re-initialised?
    reset_1d: bool = True  # may biases and normalisation scales be? If not, they do not count in the share either
    reset_to: ResetTo = "fresh"  # what re-initialised entries become
    reset_std: float | None = None  # standard deviation of reset_to="normal"; None: that of the tensor
    statistics: Statistics = "kept"  # of BatchNorm: those of the trained model, or of what is left
    tolerance: float = 0.05  # of the stop rule: share of the original's loss
    patience: int = 10  # epochs without a lower training loss that end fine-tuning; 0: never
    published_code: tuple[Departure, ...] = ()  # departures of the released code to follow
    fine_tune: Recipe = Recipe(epochs=35, lr=0.1, batch_size=256)  # how to train on what is left

    def __post_init__(self) -> None:
        if self.priming_lr is not None and not 0 < self.priming_lr < math.inf:
            raise ConfigError(f"priming_lr={self.priming_lr}: must be positive, or None for no ascent.")
        if not 0 <= self.reset_fraction < 1:
            raise ConfigError(
                f"reset_fraction={self.reset_fraction}: must be in [0, 1). To start from nothing, use retrain."
            )
        if not 0 < self.damping < math.inf:
            raise ConfigError(f"damping={self.damping}: must be positive.")
        for name, other in (("eps", "auto"), ("threshold", None), ("reset_std", None)):
            value = getattr(self, name)
            if value != other and not 0 < value < math.inf:
                raise ConfigError(f"{name}={value}: must be positive, or {other!r}.")
        if not 0 <= self.tolerance < math.inf or self.patience < 0:
            raise ConfigError(f"tolerance={self.tolerance}, patience={self.patience}: must be 0 or more.")
        for name, kind in (("selector", Name), ("scope", Scope), ("reset_to", ResetTo), ("statistics", Statistics)):
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(f"{name}={getattr(self, name)!r}: choose from {', '.join(get_args(kind))}.")
        unknown = set(self.published_code) - set(PUBLISHED_CODE)
        if unknown:
            raise ConfigError(f"published_code={sorted(unknown)}: choose from {', '.join(PUBLISHED_CODE)}.")
        self._require_agreement()

    def _require_agreement(self) -> None:
        """Refuse a length that is none, and settings that another one makes meaningless."""
        if self.priming_length is not None and not 0 < self.priming_length < 1:
            raise ConfigError(
                f"priming_length={self.priming_length}: must be in (0, 1), a share of the weights. Steps that forget "
                "and can be repaired are 0.05 to 0.2."
            )
        if self.priming_length is not None and "batch-means" in self.published_code:
            raise ConfigError(
                f"priming_length={self.priming_length}: 'batch-means' scales priming_lr. Leave one of them out."
            )
        if self.threshold is not None and self.selector != "small-kv":
            raise ConfigError(
                f"threshold={self.threshold}, selector={self.selector!r}: a threshold is one of knowledge values. Take "
                "selector='small-kv', or a reset_fraction."
            )
        if self.threshold is not None and "scaled-fraction" in self.published_code:
            raise ConfigError(f"threshold={self.threshold}: 'scaled-fraction' scales a share. Leave one of them out.")
        if self.reset_std is not None and self.reset_to != "normal":
            raise ConfigError(f"reset_std={self.reset_std}: only reset_to='normal' has one, not {self.reset_to!r}.")


SPACE: Space = {
    # The published η_p of 0.325, on a sum of batch means, is 63 in this unit; where a model fits its data, gradients
    # are so small that 1000 moves the weights by a tenth.
    "priming_lr": Range(0.01, 3000.0, log=True),
    "reset_fraction": Range(0.05, 0.8),
    "fine_tune.lr": Range(0.003, 0.3, log=True),
    "fine_tune.schedule": Choice(("cosine", "one-cycle")),
}


def reload(model: nn.Module, given: Blind, config: Reload, *, seed: int, trace: Trace) -> nn.Module:
    """Algorithm 1 of the paper.

    ``trace.facts``: those of `difference`, eps, reset_count, requested_count, untouched_in_paper_choice and
    overlap_with_paper_choice (how the choice differs from the one that takes untouched entries, too), target_loss; of
    an ascent its length as a share of the norm of the weights (priming_length), which can be given to another; of
    a selector of second order kronecker_share (of entries whose curvature is in blocks); with ``statistics``
    re-estimated, statistics_layers (how many have some).

    Raises:
        NotInformative: The difference shows nothing of what was removed, or the curvature nothing at all.
        MismatchError: A cache, retain set or ``fresh`` that do not belong together.
        UnsupportedModule: A selector of second order, and a model that cannot be taken apart into examples.
    """
    full = given.cached()
    if config.selector in SECOND_ORDER and sharding.is_sharded(model):
        raise UnsupportedModule(
            f"selector={config.selector!r} takes a model apart into examples, which cannot be done with one that FSDP2 "
            "has sharded. Take small-kv, or give every process the whole model."
        )
    _reset_(model, given, config, seed=seed, trace=trace)

    if config.statistics == "re-estimated":
        with trace.stage("statistics", model):
            layers = re_estimate_statistics_(model, given, config.fine_tune.batch_size, seed=seed, trace=trace)
            trace.facts["statistics_layers"] = layers

    # The mean of another loss is no aim for this one, and that on corrected data is what the faults did to it.
    target = full.mean_loss if given.cached_terms == given.loss_terms else None
    trace.facts["target_loss"] = target
    with trace.stage("fine-tune", model):
        stop = until_converged(
            given.retain,
            given.loss_terms,
            target=target,
            tolerance=config.tolerance,
            patience=config.patience,
            trace=trace,
        )
        train_further(model, given, config.fine_tune, seed=seed, trace=trace, stop=stop)
    return model


def _reset_(model: nn.Module, given: Blind, config: Reload, *, seed: int, trace: Trace) -> None:
    """Ascend and re-initialise; the vectors that this takes are gone before fine-tuning needs its own."""
    full = given.cached()
    theta = params.named_parameters(model, full.total)

    with trace.stage("difference", model):
        removed = difference(model, given, trace)[0]
        values = new_values(model, theta, given, config.reset_to, std=config.reset_std, seed=seed)
        if "normal-1d" in config.published_code:
            one_d = [name for name, value in values.items() if value.ndim == 1]
            values |= {name: normal(values[name], 2, seed, name, "normal-1d") for name in one_d}
        trace.facts["eps"] = eps = _eps(removed, config)

    change, curvature = None, None
    if config.selector in SECOND_ORDER:
        with trace.stage("curvature", model):
            change = {name: values[name] - p.detach() for name, p in theta.items()}
            curvature = _curvature(model, given, config, theta, trace)

    with trace.stage("ascend", model):
        if config.priming_lr is not None or config.priming_length is not None:
            trace.facts["priming_length"] = ascend_(theta, removed.total, config, full.count)

    with trace.stage("select", model):
        evidence = Evidence(
            removed=removed.total,
            full=full.total,
            eps=eps,
            seed=seed,
            change=change,
            curvature=curvature,
            damping=config.damping,
        )
        chosen = _choose(SELECTORS[config.selector](evidence), removed, full, config, trace)

    with trace.stage("re-initialise", model):
        reinitialise_(theta, values, chosen)


@torch.no_grad()
def ascend_(theta: dict[str, nn.Parameter], removed: Params, config: Reload, terms: int) -> float:
    """θ ← θ + priming_lr (g_D - g_new) / n_D: one step up the mean loss over D, in what was removed.

    With a ``priming_length`` θ ← θ + priming_length ‖θ‖ (g_D - g_new) / ‖g_D - g_new‖.

    Returns:
        The length of the step, as a share of ‖θ‖.
    """
    weights, length = params.norm({name: p.detach() for name, p in theta.items()}), params.norm(removed)
    if config.priming_length is not None:
        step = config.priming_length * weights / length
    else:
        assert config.priming_lr is not None
        step = config.priming_lr / (config.fine_tune.batch_size if "batch-means" in config.published_code else terms)
    for name, p in theta.items():
        direction = removed[name].abs() if "absolute-direction" in config.published_code else removed[name]
        p.add_((step * direction).to(p))
    return step * length / weights if weights else math.inf


def _eps(removed: Gradient, config: Reload) -> float:
    if "scaled-fraction" in config.published_code:
        return 1e-10
    return automatic_eps(removed) if config.eps == "auto" else config.eps


def automatic_eps(removed: Gradient) -> float:
    """The ε of ``eps="auto"``: the mean rounding floor of a gradient, in its unit."""
    assert removed.noise is not None
    mean = params.total(removed.noise) / params.size(removed.noise)
    return max(mean, torch.finfo(torch.float64).tiny)


def _curvature(
    model: nn.Module, given: Blind, config: Reload, theta: dict[str, nn.Parameter], trace: Trace
) -> Curvature:
    """Of what is left, at the trained weights."""
    measure = kronecker_fisher if config.selector == "ekfac" else diagonal_fisher
    curvature = measure(model, given.loss_terms, given.retain, theta, trace)
    trace.facts["kronecker_share"] = curvature.kronecker_share
    return curvature


def _choose(scores: Params, removed: Gradient, full: Gradient, config: Reload, trace: Trace) -> Masks:
    """Mark the entries to re-initialise, and record where they are."""
    fraction = decimal(config.reset_fraction)
    if "scaled-fraction" in config.published_code:
        fraction = max(min(fraction * removed.count / full.count, Fraction(1)), Fraction(1, 20))

    def pick(among: Params) -> tuple[Masks, int]:
        if config.threshold is not None:
            return at_most(among, config.threshold)
        return smallest_share(among, fraction, config.scope)

    asked = "reset_fraction" if config.threshold is None else "threshold"
    return choose(
        scores,
        pick,
        removed.informative(),
        asked=f"{asked}={getattr(config, asked)}",
        reset_untouched=config.reset_untouched,
        reset_1d=config.reset_1d,
        trace=trace,
    )
