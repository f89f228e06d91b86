"""One training loop for everything that trains: the original, retraining from scratch, fine-tuning."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor, nn

from expunge import distributed, params, progress, sharding
from expunge.augmentation import augmentation
from expunge.batches import Batch, Batches, LossTerms, length_of, micro_batches, positioned, to_device
from expunge.errors import ConfigError, NotFinite, UnsupportedModule
from expunge.execution import Autocast, Compiled, Precision, ahead, channels_last
from expunge.probe import checked_terms
from expunge.resuming import Resumable, identity
from expunge.seeds import derive, keeping_random_state, seeded, stream
from expunge.trace import Trace

Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["constant", "step", "cosine", "one-cycle"]
StopRule = Callable[[nn.Module, float], str | None]  # after each epoch, given its mean loss: a reason, or go on


@dataclass(frozen=True)
class Step:
    """An update of the weights that was just made."""

    positions: Int[Tensor, " _"] | None  # of the examples in its batch; None for data without positions
    optimizer: torch.optim.Optimizer  # with the weights it moves, and what it remembers of them


AfterStep = Callable[[Step], None]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train: SGD with momentum or AdamW, a learning rate and its schedule; augmentation; what makes it fast.

    The defaults of the last six change nothing: images as they are, float32, no compilation.

    Raises:
        ConfigError: A value that cannot work.
    """

    epochs: int  # at most; 0 trains not at all
    lr: float  # learning rate on the mean loss of a batch
    batch_size: int = 128  # examples; data without positions keeps its own batches
    optimizer: Optimizer = "sgd"
    momentum: float = 0.9  # SGD only, Nesterov
    weight_decay: float = 5e-4
    schedule: Schedule = "cosine"
    milestones: tuple[int, ...] = ()  # epochs at which "step" multiplies the learning rate by 0.1
    crop: int = 0  # pixels of zeros around every image, of which a random window is kept
    flip: bool = False  # mirror every other image at random
    cutout: int = 0  # pixels, height and width of a square of zeros at a random place
    channels_last: bool = False  # images laid out pixel by pixel, which convolutions are faster on
    precision: Precision = "float32"  # of matrix products; "fastest" measures, so that machines may differ
    compile: bool = False  # with torch.compile, if it can

    def __post_init__(self) -> None:
        _require(type(self.epochs) is int and self.epochs >= 0, "epochs", self.epochs, "a whole number, 0 or more")
        _require(0 < self.lr < math.inf, "lr", self.lr, "a positive number")
        _require(self.optimizer in get_args(Optimizer), "optimizer", self.optimizer, f"one of {get_args(Optimizer)}")
        _require(self.schedule in get_args(Schedule), "schedule", self.schedule, f"one of {get_args(Schedule)}")
        _require(
            type(self.batch_size) is int and self.batch_size >= 1,
            "batch_size",
            self.batch_size,
            "a whole number, at least 1",
        )
        _require(0 <= self.momentum < 1, "momentum", self.momentum, "in [0, 1)")
        _require(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, "0 or more")
        _require(self.crop >= 0, "crop", self.crop, "0 or more")
        _require(self.cutout >= 0, "cutout", self.cutout, "0 or more")
        _require(self.precision in get_args(Precision), "precision", self.precision, f"one of {get_args(Precision)}")

    def shortened(self, epochs: int) -> "Recipe":
        """The same in fewer epochs: milestones move in proportion."""
        milestones = tuple(round(m * epochs / max(self.epochs, 1)) for m in self.milestones)
        return replace(self, epochs=epochs, milestones=milestones)

    def factor(self, position: float) -> float:
        """What multiplies the learning rate after ``position`` epochs, a fraction inside an epoch."""
        share = position / max(self.epochs, 1)
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * share))
        if self.schedule == "one-cycle":  # up for 30 % of the time, then down to zero
            return share / 0.3 if share < 0.3 else (1 - share) / 0.7
        if self.schedule == "step":
            return float(0.1 ** sum(position >= milestone for milestone in self.milestones))
        return 1.0


def train(
    model: nn.Module,
    data: Batches,
    loss_terms: LossTerms,
    recipe: Recipe,
    *,
    seed: int,
    trace: Trace | None = None,
    stop: StopRule | None = None,
    freeze_statistics: bool = False,
    after_step: AfterStep | None = None,
    resume: Path | str | None = None,
) -> Trace:
    """Minimise the mean loss, in place.

    The same seed gives the same bits on a CPU: every epoch draws its order and its dropout from streams of its
    own, and the global generators are left alone.

    Args:
        model: Parameters that require a gradient are trained; training flags are restored at the end.
        data: With positions: shuffled every epoch.
        loss_terms: Unreduced losses of a batch.
        recipe: How.
        seed: Names the streams of randomness.
        trace: Where to record; a new one by default.
        stop: Asked after each epoch whether to end.
        freeze_statistics: Keep BatchNorm's running statistics, for data the model must not absorb.
        after_step: Called after every update, to correct or to record it.
        resume: A file for the state after an epoch, written at most once a minute. If it is there, training goes on
            from it, to the same bits on a CPU. Delete it once the trained model is saved; it is as personal as the
            data, since the optimiser remembers gradients.

    Returns:
        The trace, with the reason why training ended in ``stopped``.

    Raises:
        ConfigError: Nothing trainable; steps without milestones; a file of another training; resume beside stop or
            after_step.
        NotFinite: A loss became NaN or infinite; names the epoch and the step.
        UnsupportedModule: Sparse gradients.
    """
    trace = trace or Trace("train", seed)
    sharding.settle(model)
    require_trainable(model, recipe)
    trainable = params.named_parameters(model)
    device = next(iter(trainable.values())).device
    optimizer = _optimizer(list(trainable.values()), recipe)
    kept = None
    if resume is not None:
        _require_nothing_else_remembers(resume, stop, after_step)
        settings = {"recipe": asdict(recipe), "seed": seed, "freeze_statistics": freeze_statistics}
        kept = Resumable(Path(resume), identity(model, data, loss_terms, **settings), model, optimizer, trace)
    done = kept.restore() if kept else 0
    autocast = Autocast(recipe.precision, device, trace)
    own_rows = distributed.mine(recipe.batch_size)
    compiled = Compiled(model, own_rows.stop - own_rows.start, trace) if recipe.compile else None
    trace.stopped = f"all {recipe.epochs} epochs done"
    replica = sharding.replicated(model)
    with (
        distributed.failing_together(),
        params.restoring_modes(model),
        progress.task(trace.method, recipe.epochs) as advance,
    ):
        _train_mode(model, freeze_statistics)
        for _ in range(done):
            advance()
        for epoch in range(done, recipe.epochs):
            losses: list[Tensor] = []
            ready = _ready(recipe, seed, epoch, device)
            with seeded(seed, "train", epoch, *distributed.names()):
                order = stream(seed, "shuffle", epoch)
                count, batches = positioned(data, recipe.batch_size, order, distributed.mine)
                for step, (positions, batch) in enumerate(ahead(distributed.reading(batches), device)):
                    _set_rate(optimizer, recipe.lr * recipe.factor(epoch + _share_of_epoch(step, count)))
                    forward = partial(_terms, replica, loss_terms, ready(batch), autocast, compiled)
                    with autocast.step():
                        loss, mean_of_batch, terms = distributed.mean_of_all(forward, replica is model)
                        if not terms:
                            continue  # a text without a target, say
                        optimizer.zero_grad()
                        loss.backward()
                        optimizer.step()
                    if after_step:
                        after_step(Step(positions, optimizer))
                    losses.append(mean_of_batch)
                    trace.backwarded += terms
            distributed.same_buffers(model)
            mean = _record(trace, losses, epoch)
            if kept:
                kept.keep(epoch + 1)
            advance()
            trace.show(f"epoch {epoch + 1}", model)
            reason = stop(model, mean) if stop else None
            if reason:
                trace.stopped = reason
                break
    return trace


def require_trainable(model: nn.Module, *recipes: Recipe) -> None:
    """Refuse what cannot be trained with these recipes, or not as they say.

    Raises:
        ConfigError: "step" without milestones. (Settings come one by one, so that no recipe can refuse it itself.)
        UnsupportedModule: An embedding with sparse gradients, which momentum and weight decay cannot have.
    """
    for recipe in recipes:
        if recipe.schedule == "step" and not recipe.milestones and recipe.epochs:
            raise ConfigError(
                "schedule='step', milestones=(): the learning rate would never change. Write the epochs at which it "
                f"is multiplied by 0.1, such as milestones=({max(recipe.epochs // 2, 1)},), or schedule='constant'."
            )
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            raise UnsupportedModule(
                f"{name or type(module).__name__} has sparse=True: momentum and weight decay need dense gradients. Set "
                f"{name + '.' if name else ''}sparse = False; weights and results stay the same."
            )


def mean_loss(model: nn.Module, data: Batches, loss_terms: LossTerms, trace: Trace | None = None) -> float:
    """The mean loss a term in eval mode, without gradients."""
    device = next(model.parameters()).device
    sharded = sharding.is_sharded(model)

    def seen() -> dict[int, tuple[float, int]]:
        sums: dict[int, Tensor] = {}
        counts: list[int] = []
        for number, batch in micro_batches(data, 512, None if sharded else distributed.is_mine)[1]:
            terms = checked_terms(loss_terms(model, to_device(batch, device)))
            sums[number] = terms.sum()
            counts.append(len(terms))
        losses = torch.stack(list(sums.values())).double().tolist() if sums else []
        return dict(zip(sums, zip(losses, counts, strict=True), strict=True))

    with distributed.failing_together(), params.restoring_modes(model), keeping_random_state(), torch.no_grad():
        model.eval()
        found = seen() if sharded else distributed.merged(distributed.agreed(seen, lambda _: ())[0])
    sharding.settle(model)
    total, count = sum(loss for loss, _ in found.values()), round(sum(terms for _, terms in found.values()))
    if trace is not None:
        trace.forwarded += count
    return total / max(count, 1)


def until_converged(
    data: Batches, loss_terms: LossTerms, *, target: float | None, tolerance: float, patience: int, trace: Trace
) -> StopRule:
    """End when the mean loss on the data is down to that of the original model on its own, or on a plateau.

    Args:
        data: What is fine-tuned on.
        loss_terms: Its loss.
        target: Mean loss, nats a term, that the original model had reached on all of its data; None: not known.
        tolerance: Share of the target by which the loss may stay above it.
        patience: Epochs without a new lowest training loss that make a plateau; 0 for never.
        trace: Counts the extra forward passes.
    """
    best, waited, epoch = math.inf, 0, 0
    enough = -math.inf if target is None else target + tolerance * abs(target)  # a density's loss can be negative
    near = enough + 3 * abs(enough)

    def stop(model: nn.Module, training_loss: float) -> str | None:
        nonlocal best, waited, epoch
        epoch += 1
        # The training loss is an average over moving weights (and dropout), an upper estimate: look closer once it
        # is near, and now and then in any case.
        if target is not None and (training_loss <= near or epoch % 5 == 0):
            reached = mean_loss(model, data, loss_terms, trace)
            if reached <= enough:
                return f"loss {reached:.4g} reached the original's {target:.4g} (tolerance {tolerance:.0%})"
        waited = 0 if training_loss < best else waited + 1
        best = min(best, training_loss)
        return f"plateau: no lower loss for {patience} epochs" if patience and waited >= patience else None

    return stop


def _terms(
    model: nn.Module, loss_terms: LossTerms, batch: Batch, autocast: Autocast, compiled: Compiled | None
) -> Tensor:
    with autocast.forward(), compiled.active() if compiled else nullcontext():
        return checked_terms(in_train_mode(model, loss_terms, batch))


def in_train_mode(model: nn.Module, loss_terms: LossTerms, batch: Batch) -> Tensor:
    """The loss terms of a batch; with frozen statistics where it is one example, and has too few values for them."""
    if length_of(batch) != 1:
        return loss_terms(model, batch)
    counters = [buffer for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")]
    counted = [counter.clone() for counter in counters]
    try:
        return loss_terms(model, batch)
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):
            raise
    for counter, count in zip(counters, counted, strict=True):  # a layer counts before it refuses
        counter.copy_(count)
    with frozen_statistics(model):
        return loss_terms(model, batch)


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Train mode but for BatchNorm, which uses its statistics and does not change them."""
    with params.restoring_modes(model):
        for module in model.modules():
            if getattr(module, "track_running_stats", False):
                module.eval()
        yield


def _require_nothing_else_remembers(resume: Path | str, stop: StopRule | None, after_step: AfterStep | None) -> None:
    if stop or after_step:
        raise ConfigError(
            f"resume={str(resume)!r}: what {'stop' if stop else 'after_step'} remembers of earlier epochs is in no "
            "file. Leave one of them out."
        )


def _optimizer(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    return torch.optim.SGD(
        parameters,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.momentum > 0,
        fused=not sharding.is_piece(parameters[0]),  # torch has no fused SGD for sharded parameters
    )


def _ready(recipe: Recipe, seed: int, epoch: int, device: torch.device) -> Callable[[Batch], Batch]:
    """What a batch goes through before the model, in the order of the steps of an epoch."""
    own = derive(seed, *distributed.names()) if distributed.names() else seed
    augmented = augmentation(
        crop=recipe.crop, flip=recipe.flip, cutout=recipe.cutout, seed=own, epoch=epoch, device=device
    )

    def ready(batch: Batch) -> Batch:
        batch = augmented(batch) if augmented else batch
        return channels_last(batch) if recipe.channels_last else batch

    return ready


def _set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _share_of_epoch(step: int, count: int | None) -> float:
    """How far an epoch has got before a step; where that is not known, or there is but one, the middle.

    At the beginning "one-cycle" has a learning rate of zero: a training of one such step would move nothing.
    """
    return step / count if count and count > 1 else 0.5


def _train_mode(model: nn.Module, freeze_statistics: bool) -> None:
    """Train mode for all modules but normalisations whose statistics are to stay: all, or those with frozen scales."""
    model.train()
    for module in model.modules():
        if (freeze_statistics and getattr(module, "track_running_stats", False)) or is_frozen_normalisation(module):
            module.eval()


def is_frozen_normalisation(module: nn.Module) -> bool:
    """Whether it has running statistics, and scales that are all frozen."""
    own = list(module.parameters(recurse=False))
    return getattr(module, "track_running_stats", False) and bool(own) and not any(p.requires_grad for p in own)


def _record(trace: Trace, losses: list[Tensor], epoch: int) -> float:
    if not losses:
        raise ConfigError(f"{trace.method}: epoch {epoch + 1} had no loss term. Is the data read only once?")
    values = torch.stack(losses).double().cpu()
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise NotFinite(
            f"{trace.method}: the loss became {float(values[bad[0]])} in epoch {epoch + 1}, step {bad[0] + 1} of "
            f"{len(values)}. Lower the learning rate, or look at that batch."
        )
    trace.losses += values.tolist()
    trace.epoch_ends.append(len(trace.losses))
    return float(values.mean())


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{name}={value!r}: must be {allowed}.")
