"""Fisher forgetting: add noise to every weight, the more the less it matters for what is left. No training.

Source: Golatkar, Achille and Soatto, "Eternal Sunshine of the Spotless Net: Selective Forgetting in Deep Networks"
(CVPR 2020), with the diagonal Fisher information F = mean over what is left of Σ_y p_y (∇ CE(x, y))². The published
variance of the noise: v = α min(1 / (F + 1e-8), 1e3), 1e2 in the last layer, averaged over dimension 1 of weights,
times 10 in the last layer and for 1-D parameters. Of a removed class, the row of the last layer becomes noise of
variance 1e-4 around 0.

Deviations: noise after which the mean loss on what is left passes a bound is taken back.

Needs: classifiers whose logits come from a last linear layer.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expunge import params
from expunge.access import Blind
from expunge.batches import Batch, micro_batches, to_device
from expunge.errors import ConfigError
from expunge.methods.classifier import classifying_layer, in_eval_mode, inputs_and_labels, logits
from expunge.methods.guard import taking_back
from expunge.methods.per_example import examples_in, squared_gradients
from expunge.params import Params
from expunge.seeds import stream
from expunge.space import Range, Space
from expunge.trace import Trace
from expunge.training import mean_loss


@dataclass(frozen=True, kw_only=True)
class FisherForgetting:
    """Noise on every weight, scaled by the inverse Fisher information of what is left.

    Raises:
        ConfigError: A value that cannot work.
    """

    alpha: float = 1e-6  # α: scales the variance of the noise
    removed_classes: tuple[int, ...] = ()  # classes that were removed altogether, counted from 0
    limit: int | None = None  # examples of what is left, drawn at random, that the information is taken over; None: all
    chunk: int = 32  # examples at a time; it bounds the memory
    loss_bound: float = 5.0  # mean loss on what is left, nats a term, past which the noise is taken back

    def __post_init__(self) -> None:
        for name in ("alpha", "loss_bound"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)}: must be a positive number.")
        for name in ("limit", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: must be at least 1.")
        if any(each < 0 for each in self.removed_classes):
            raise ConfigError(f"removed_classes={self.removed_classes}: classes count from 0.")


SPACE: Space = {"alpha": Range(1e-9, 1e-4, log=True)}


def fisher(model: nn.Module, given: Blind, config: FisherForgetting, *, seed: int, trace: Trace) -> nn.Module:
    """The information, the variances, one draw of noise.

    ``trace.facts``: examples (that the information was taken over), noise_norm (Euclidean norm of the change),
    retain_loss (mean, nats a term, after the noise).

    Raises:
        UnsupportedModule: No classifier, or one that `torch.func.vmap` cannot take apart into examples.
        ConfigError: A removed class that the model does not have, or whose row is frozen.
    """
    theta = params.named_parameters(model)

    def loss_of(now: nn.Module) -> float:
        trace.facts["retain_loss"] = reached = mean_loss(now, given.retain, given.loss_terms, trace)
        return reached

    cure = "Nothing was unlearned. Lower alpha."
    check = taking_back(model, config.loss_bound, loss_of, trace=trace, what="the noise", cure=cure)

    with trace.stage("information", model):
        last = _last_layer(model, given, config, trace)
        count = examples_in(given.retain, config.limit)
        squares = squared_gradients(
            model, every_class, given.retain, chunk=config.chunk, limit=config.limit, seed=seed, trace=trace
        )
        information = {name: total / count for name, total in squares.items()}

    with trace.stage("noise", model):
        before = params.snapshot(theta)
        variances = noise_variances(information, last, config.alpha, config.removed_classes)
        add_noise_(theta, variances, last, config.removed_classes, seed)
        change = params.subtract(params.snapshot(theta), before)
        trace.facts |= {"examples": count, "noise_norm": params.norm(change)}
        trace.stopped = "noise added"

    with trace.stage("check", model):
        trace.stopped = check(model, math.nan) or trace.stopped
    return model


def every_class(model: nn.Module, batch: Batch) -> Tensor:
    """sqrt(p_y) CE(x, y) for every class y, p_y held fixed: its squared gradients add up to Σ_y p_y (∇ CE(x, y))²."""
    inputs, _ = inputs_and_labels(batch, "fisher")
    said = logits(model, inputs, "fisher")
    log_p = said.to(params.wide(said.device)).log_softmax(1)
    return (-(log_p.detach() / 2).exp() * log_p).flatten()


def noise_variances(
    information: Params, last: frozenset[str], alpha: float, removed_classes: tuple[int, ...] = ()
) -> Params:
    """The variance of the noise on every entry.

    Args:
        information: F, the mean over examples.
        last: Names of the parameters of the last layer, whose rows are classes.
        alpha: α.
        removed_classes: Rows of the last layer that get 1e-4.
    """
    variances = {}
    for name, own in information.items():
        v = alpha * (1 / (own + 1e-8)).clamp(max=1e2 if name in last else 1e3)
        if v.ndim > 1:
            v = v.mean(1, keepdim=True).expand_as(v).clone()
        if name in last or v.ndim == 1:
            v *= 10
        if name in last:
            v[list(removed_classes)] = 1e-4
        variances[name] = v
    return variances


@torch.no_grad()
def add_noise_(
    theta: dict[str, nn.Parameter], variances: Params, last: frozenset[str], removed_classes: tuple[int, ...], seed: int
) -> None:
    """θ ← θ + sqrt(v) N(0, 1); in the rows of removed classes 0 takes the place of θ."""
    for name, p in theta.items():
        noise = torch.randn(p.shape, dtype=torch.float64, generator=stream(seed, "noise", name))
        if name in last:
            p[list(removed_classes)] = 0
        p.add_((variances[name].sqrt() * noise.to(variances[name])).to(p))


def _last_layer(model: nn.Module, given: Blind, config: FisherForgetting, trace: Trace) -> frozenset[str]:
    """Names of the parameters of the last layer."""
    with in_eval_mode(model):
        _, batch = next(micro_batches(given.retain, 8)[1])
        inputs, _ = inputs_and_labels(to_device(batch, next(model.parameters()).device), "fisher")
    layer = classifying_layer(model, inputs, "fisher")
    trace.forwarded += len(inputs)
    if any(each >= layer.out_features for each in config.removed_classes):
        raise ConfigError(
            f"removed_classes={config.removed_classes}: the model has classes 0 to {layer.out_features - 1}."
        )
    own = {id(p) for p in layer.parameters()}
    last = frozenset(name for name, p in params.named_parameters(model).items() if id(p) in own)
    if config.removed_classes and not last:
        raise ConfigError(
            f"removed_classes={config.removed_classes}: the last layer is frozen, so that their rows cannot be "
            "changed. Let it be trained (requires_grad_), or leave removed_classes out."
        )
    return last
