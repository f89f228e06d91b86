"""UNSIR: damage what the model knows of a class with noise it finds hardest, then repair the others.

Source: Tarun et al., "Fast Yet Effective Machine Unlearning" (IEEE TNNLS, 2023). Deviations: all of what is left takes
part in both epochs, not a sample of each class; Adam is AdamW without weight decay, at a learning rate of 1e-4 where
the paper has 0.02 and 0.01; rows of noise are drawn anew for every batch from those learned for the forgotten classes.
BatchNorm statistics stay as they are until the repair, which is too short to wash out those of noise. If the loss on
what is left is past a bound after the repair, the original model is given back.

Needs: classifiers with floating-point inputs. Of the removed records only the labels are looked at.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expunge.access import Sighted
from expunge.batches import Batch, LossTerms
from expunge.errors import ConfigError, UnsupportedModule
from expunge.methods.classifier import floating, in_eval_mode, inputs_and_labels, labelled, require_whole_classes
from expunge.methods.further import train_further
from expunge.methods.guard import taking_back
from expunge.seeds import derive, stream
from expunge.space import Range, Space
from expunge.trace import Trace
from expunge.training import Recipe, mean_loss, train


@dataclass(frozen=True, kw_only=True)
class Unsir:
    """Learn noise that a forgotten class fits worst, train on it under that label, then repair.

    Raises:
        ConfigError: A value that cannot work.
    """

    noise_examples: int = 256  # learned a class
    noise_steps: int = 25  # of Adam on the noise
    noise_lr: float = 0.1  # its learning rate
    noise_decay: float = 0.1  # weight of the summed squares of an example of noise, nats a unit of the inputs squared
    noise_share: float = 0.5  # rows of noise for every kept example of an impair batch
    impair: Recipe = Recipe(epochs=1, lr=1e-4, batch_size=256, optimizer="adamw", weight_decay=0.0, schedule="constant")
    repair: Recipe = Recipe(epochs=1, lr=1e-4, batch_size=256, optimizer="adamw", weight_decay=0.0, schedule="constant")
    any_forget_set: bool = False  # go on although classes of removed records are also in what is left
    loss_bound: float = 5.0  # mean loss on what is left after the repair, nats a term, at which all is taken back

    def __post_init__(self) -> None:
        for name in ("noise_lr", "noise_share", "loss_bound"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)}: must be a positive number.")
        if self.noise_examples < 1 or self.noise_steps < 0:
            raise ConfigError(
                f"noise_examples={self.noise_examples}, noise_steps={self.noise_steps}: must be at least 1 and 0."
            )
        if not 0 <= self.noise_decay < math.inf:
            raise ConfigError(f"noise_decay={self.noise_decay}: must be 0 or more.")


SPACE: Space = {
    "impair.lr": Range(1e-5, 0.03, log=True),
    "repair.lr": Range(1e-5, 0.03, log=True),
    "noise_share": Range(0.1, 1.0),
}


def unsir(model: nn.Module, given: Sighted, config: Unsir, *, seed: int, trace: Trace) -> nn.Module:
    """Noise, impair, repair.

    ``trace.facts``: classes (those forgotten), noise_loss (of each class's noise under its label before and after it
    is learned, mean nats).

    Raises:
        ConfigError: Classes of the removed records are also in what is left.
        UnsupportedModule: No classifier, or inputs that are not floating-point numbers.
    """
    device = next(model.parameters()).device

    with trace.stage("noise", model):
        classes = require_whole_classes(given, "unsir", config.any_forget_set)
        with in_eval_mode(model):
            like = floating(model, next(labelled(given.retain, device, "unsir"))[0])
            learned, losses = [], {}
            for each in classes:
                start = _normal(config.noise_examples, like, stream(seed, "noise", each))
                noise, before, after = error_maximising(model, start, each, given.loss_terms, config)
                learned.append(noise)
                losses[str(each)] = (before, after)
                trace.backwarded += config.noise_steps * len(noise)
                trace.forwarded += len(noise)
        noises = torch.cat(learned)
        owners = torch.tensor(classes, device=device).repeat_interleave(config.noise_examples)
        trace.facts |= {"classes": list(classes), "noise_loss": losses}

    draw = stream(seed, "impair")

    def with_noise(model: nn.Module, batch: Batch) -> Tensor:
        inputs, labels = inputs_and_labels(batch, "unsir")
        rows = torch.randint(len(noises), (math.ceil(config.noise_share * len(labels)),), generator=draw).to(device)
        mixed = torch.cat([floating(model, inputs), noises[rows]]), torch.cat([labels, owners[rows].to(labels)])
        return given.loss_terms(model, mixed)

    original = taking_back(
        model,
        config.loss_bound,
        lambda now: mean_loss(now, given.retain, given.loss_terms, trace),
        trace=trace,
        what="everything",
    )
    with trace.stage("impair", model):
        apart, recipe = derive(seed, "impair"), config.impair
        train(model, given.retain, with_noise, recipe, seed=apart, trace=trace, freeze_statistics=True)
    with trace.stage("repair", model):
        train_further(model, given, config.repair, seed=derive(seed, "repair"), trace=trace)
        trace.stopped = original(model, math.nan) or trace.stopped
    return model


def error_maximising(
    model: nn.Module, noise: Tensor, label: int, loss_terms: LossTerms, config: Unsir
) -> tuple[Tensor, float, float]:
    """Adam on -mean loss + decay · mean Σx² over the noise, in the mode the model is in; no gradients are left behind.

    Args:
        model: What the noise is to be hard for.
        noise: Where it starts, (examples, …).
        label: The class.
        loss_terms: Unreduced losses.
        config: Steps, learning rate and decay.

    Returns:
        The noise, and its mean loss under the label before and after, nats.
    """
    noise = noise.clone().requires_grad_(True)
    labels = torch.full((len(noise),), label, dtype=torch.int64, device=noise.device)
    optimizer = torch.optim.Adam([noise], lr=config.noise_lr)
    seen: list[float] = []
    for _ in range(config.noise_steps):
        loss = loss_terms(model, (noise, labels)).mean()
        seen.append(float(loss.detach()))
        objective = config.noise_decay * noise.square().flatten(1).sum(1).mean() - loss
        optimizer.zero_grad()
        objective.backward(inputs=[noise])
        optimizer.step()
    with torch.no_grad():
        seen.append(float(loss_terms(model, (noise, labels)).mean()))
    return noise.detach(), seen[0], seen[-1]


def _normal(count: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal inputs, shaped like an example each.

    Raises:
        UnsupportedModule: The inputs are not floating-point numbers.
    """
    if not like.is_floating_point():
        raise UnsupportedModule(
            f"unsir learns noise in the place of inputs, and {like.dtype} inputs cannot be learned. Give "
            "floating-point inputs, or take another method."
        )
    return torch.randn((count, *like.shape[1:]), generator=generator).to(like)
