"""DUCK: pull the embedding of every removed record to the centre of the nearest wrong class.

Source: Cotogni et al., "DUCK: Distance-based Unlearning via Centroid Kinematics" (2023). Deviations: an epoch is one
pass over what is left, and batches of removed records come along in turn, as often as needed. Adam is AdamW without
weight decay. The published code ends with two epochs at a lower rate, of which the paper says nothing: here they train
on what is left, and count. BatchNorm statistics stay as they are until then, since the removed records must not enter
them. An epoch whose training loss passes a bound is taken back.

Needs: classifiers whose logits come from a last linear layer.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from expunge.access import Sighted
from expunge.batches import Batch, Batches, shuffled, to_device
from expunge.errors import ConfigError
from expunge.methods.classifier import classifying_layer, embeddings, in_eval_mode, inputs_and_labels, labelled, logits
from expunge.methods.further import train_further
from expunge.methods.guard import keeping_what_is_left, taking_back
from expunge.seeds import derive, stream
from expunge.space import Range, Space
from expunge.trace import Trace
from expunge.training import Recipe, train


@dataclass(frozen=True, kw_only=True)
class Duck:
    """Pull embeddings of removed records to the nearest wrong class centre, keeping the rest classified.

    Raises:
        ConfigError: A value that cannot work.
    """

    recipe: Recipe = Recipe(
        epochs=10, lr=1e-3, batch_size=1024, optimizer="adamw", weight_decay=0.0, schedule="constant"
    )
    forget_weight: float = 1.0  # λ of the cosine distance to the nearest wrong centre
    retain_weight: float = 1.4  # λ of the cross-entropy on what is left
    temperature: float = 2.0  # T: divides the logits in that cross-entropy
    stop_accuracy: float = 0.01  # share of removed records still classified right, below which to end; 0: never
    repair: Recipe = Recipe(
        epochs=2, lr=1e-4, batch_size=1024, optimizer="adamw", weight_decay=0.0, schedule="constant"
    )
    loss_bound: float = 10.0  # mean training loss of an epoch (weighted nats and distances) that is taken back

    def __post_init__(self) -> None:
        for name in ("forget_weight", "retain_weight", "temperature", "loss_bound"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)}: must be a positive number.")
        if not 0 <= self.stop_accuracy <= 1:
            raise ConfigError(f"stop_accuracy={self.stop_accuracy}: must be in [0, 1], a share of the removed records.")


SPACE: Space = {
    "recipe.lr": Range(1e-5, 1e-2, log=True),
    "forget_weight": Range(0.1, 3.0, log=True),
    "retain_weight": Range(0.1, 3.0, log=True),
    "temperature": Range(1.0, 4.0),
}


def duck(model: nn.Module, given: Sighted, config: Duck, *, seed: int, trace: Trace) -> nn.Module:
    """Centres of the embeddings of what is left, then both losses together, then a short repair.

    ``trace.facts``: forget_accuracy after the last of the epochs that pull, distance_stopped (why those ended).

    Raises:
        UnsupportedModule: No classifier, or its logits do not come from a linear layer.
        ConfigError: A class of the removed records is the only one in what is left.
    """
    device = next(model.parameters()).device

    with trace.stage("centres", model):
        with in_eval_mode(model):
            few = next(labelled(given.retain, device, "duck"))[0][:8]
        layer = classifying_layer(model, few, "duck")
        trace.forwarded += len(few)
        centres, classes = centroids(model, layer, given.retain, trace)
        centres, classes = centres.to(layer.weight), classes.to(device)

    removed = _forever(given.forget, config.recipe.batch_size, seed)

    def both(model: nn.Module, batch: Batch) -> Tensor:
        inputs, labels = inputs_and_labels(batch, "duck")
        kept = functional.cross_entropy(
            logits(model, inputs, "duck") / config.temperature, labels, reduction="none"
        )  # (examples,), nats
        inputs, labels = inputs_and_labels(to_device(next(removed), device), "duck")
        with embeddings(layer) as seen:
            model(inputs)
        targets = nearest_wrong(seen[-1], labels, centres, classes)
        distance = 1 - functional.cosine_similarity(seen[-1], centres[targets], dim=1)  # (removed,)
        trace.backwarded += len(labels)
        return config.retain_weight * kept + config.forget_weight * distance.mean()

    diverged = taking_back(model, config.loss_bound, trace=trace)

    def stop(model: nn.Module, training_loss: float) -> str | None:
        reason = diverged(model, training_loss)
        trace.facts["forget_accuracy"] = reached = accuracy(model, given.forget, trace)
        if reason or reached >= config.stop_accuracy:
            return reason
        return f"forget accuracy {reached:.1%} fell below {config.stop_accuracy:.1%}"

    with trace.stage("distance", model):
        train(model, given.retain, both, config.recipe, seed=seed, trace=trace, stop=stop, freeze_statistics=True)
        trace.facts["distance_stopped"] = trace.stopped
    with trace.stage("repair", model):
        again = keeping_what_is_left(model, given, config.loss_bound, trace, config.repair.epochs)
        once_more = derive(seed, "repair")
        train_further(model, given, config.repair, seed=once_more, trace=trace, stop=again)
    return model


@torch.no_grad()
def centroids(
    model: nn.Module, layer: nn.Linear, data: Batches, trace: Trace
) -> tuple[Float[Tensor, "classes features"], Int[Tensor, " classes"]]:
    """The mean embedding of every class in the data, in eval mode; and which classes those are."""
    sums = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    counts = torch.zeros(layer.out_features, dtype=torch.int64)
    with in_eval_mode(model), embeddings(layer) as seen:
        for inputs, labels in labelled(data, layer.weight.device, "duck"):
            model(inputs)
            sums.index_add_(0, labels.cpu(), seen.pop().cpu().double())
            counts += labels.cpu().bincount(minlength=len(counts))
            trace.forwarded += len(labels)
    present = counts.nonzero()[:, 0]
    return sums[present] / counts[present, None], present


def nearest_wrong(
    embedded: Float[Tensor, "examples features"],
    labels: Int[Tensor, " examples"],
    centres: Float[Tensor, "classes features"],
    classes: Int[Tensor, " classes"],
) -> Int[Tensor, " examples"]:
    """The row of the centre with the largest cosine to each example, of the classes that it does not belong to.

    Raises:
        ConfigError: There is no such class.
    """
    similarity = functional.cosine_similarity(embedded.detach()[:, None], centres[None], dim=2)
    own = labels[:, None] == classes[None]
    if bool(own.all(1).any()):
        raise ConfigError(
            f"what is left holds one class only, {classes.tolist()}, and removed records belong to it: there is no "
            "wrong class to move them to. Take another method."
        )
    return similarity.masked_fill(own, -math.inf).argmax(1)


@torch.no_grad()
def accuracy(model: nn.Module, data: Batches, trace: Trace) -> float:
    """The share of examples classified right, in eval mode."""
    right, count = 0, 0
    with in_eval_mode(model):
        for inputs, labels in labelled(data, next(model.parameters()).device, "duck"):
            right += int((logits(model, inputs, "duck").argmax(1) == labels).sum())
            count += len(labels)
    trace.forwarded += count
    return right / max(count, 1)


def _forever(data: Batches, size: int, seed: int) -> Iterator[Batch]:
    """Batches in a new random order every time the data is used up."""
    turn = 0
    while True:
        yield from shuffled(data, size, stream(seed, "forget", turn))[1]
        turn += 1
