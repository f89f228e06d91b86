"""The one forward pass: what a model says about a split, from which every metric is computed."""

from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from expunge import params
from expunge.batches import Batch, Batches, micro_batches, to_device
from expunge.errors import ConfigError, NotFinite
from expunge.rows import SQUARED
from expunge.seeds import keeping_random_state

# -> logits (examples, classes) and labels (examples,), or predictions and targets, floating point and of one shape
Logits = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]
_ONE_LOGIT = " Of a classifier with one logit let logits(model, batch) return two (docs/own-model.md shows it)."
_SEVERAL_LABELS = (
    " Of several labels an example measure one at a time, as two classes: let logits(model, batch) return two logits "
    "and the class numbers of that label (docs/own-model.md shows it)."
)
_NUMBERS = (
    " Of a regression predictions and targets are floating point and of one shape, or their difference would compare "
    "examples with each other: reshape one of them."
)


@dataclass(frozen=True)
class Outputs:
    """Logits and labels of a split, in the order of its examples."""

    unit: ClassVar[str] = "nats"  # of the losses
    logits: Float[np.ndarray, "examples classes"]  # float64
    labels: Int[np.ndarray, " examples"]

    @cached_property
    def log_probabilities(self) -> Float[np.ndarray, "examples classes"]:
        """Log-softmax of the logits, nats."""
        shifted = self.logits - self.logits.max(axis=1, keepdims=True)
        result: Float[np.ndarray, "examples classes"] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        return result

    @cached_property
    def losses(self) -> Float[np.ndarray, " examples"]:
        """Cross-entropy of each example, nats."""
        result: Float[np.ndarray, " examples"] = -self.log_probabilities[np.arange(len(self.labels)), self.labels]
        return result

    @cached_property
    def confidences(self) -> Float[np.ndarray, " examples"]:
        """log(p / (1 - p)) of the label, also called its margin: how LiRA and KLOM measure a record.

        Computed as logit minus the log-sum-exp of the others, so that p near 1 is not rounded away.
        """
        rows = np.arange(len(self.labels))
        others = self.logits.copy()
        others[rows, self.labels] = -np.inf
        largest = others.max(axis=1)
        rest = largest + np.log(np.exp(others - largest[:, None]).sum(axis=1))
        result: Float[np.ndarray, " examples"] = self.logits[rows, self.labels] - rest
        return result

    @cached_property
    def correct(self) -> Bool[np.ndarray, " examples"]:
        """Whether the largest logit is that of the label."""
        result: Bool[np.ndarray, " examples"] = self.logits.argmax(axis=1) == self.labels
        return result


@dataclass(frozen=True)
class Predictions:
    """What a regression predicts of a split, and its targets, in the order of its examples."""

    unit: ClassVar[str] = SQUARED  # of the losses
    values: Float[np.ndarray, "examples numbers"]  # float64
    targets: Float[np.ndarray, "examples numbers"]  # float64

    @cached_property
    def labels(self) -> Int[np.ndarray, " examples"]:
        """One class for all, so that what is compared within classes is compared with all."""
        return np.zeros(len(self.targets), dtype=np.int64)

    @cached_property
    def losses(self) -> Float[np.ndarray, " examples"]:
        """Squared error of each example, summed over its numbers, as `losses.squared_error`: squared units."""
        result: Float[np.ndarray, " examples"] = np.square(self.values - self.targets).sum(axis=1)
        return result


Answers = Outputs | Predictions


def average_loss(answers: Answers) -> float:
    """The mean loss: the FE of a split, of a regression its mean squared error."""
    return float(answers.losses.mean())


def images_and_labels(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits and labels for a batch that is (inputs, class numbers), predictions and targets for (inputs, targets).

    Raises:
        ConfigError: It is something else.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        got = f"{type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, Sized) else "")
        raise ConfigError(
            f"a batch is a {got}, and not (inputs, labels). Say what to measure: logits(model, batch) returns logits, "
            "shape (examples, classes), and labels; a function of this name in a setup file, or logits=… in Python."
        )
    inputs, labels = batch
    return model(inputs), labels


def answers(
    model: nn.Module, splits: Mapping[str, Batches], logits: Logits = images_and_labels, *, batch_size: int = 512
) -> dict[str, Outputs] | dict[str, Predictions]:
    """Run a classifier or a regression over splits in eval mode, without gradients.

    Which of the two it is, the targets tell: those of a regression are floating point, of the shape of what the model
    returns, and neither all of two classes (0 and 1, -1 and 1) nor probabilities of several.

    Args:
        model: Left as it was found.
        splits: Each once through, in its own order.
        logits: How to get logits and labels, or predictions and targets, from a batch.
        batch_size: Positions a batch, for data with positions.

    Raises:
        ConfigError: A split is empty, what the model returns and targets do not fit together, or floating-point targets
            are classes.
        NotFinite: NaN or infinity in what the model returns.
    """
    found: dict[str, Answers] = {}
    for name, data in splits.items():
        try:
            found[name] = forward(model, data, logits, batch_size=batch_size)
        except (ConfigError, NotFinite) as error:
            raise type(error)(f"{name}: {error}" if len(splits) > 1 else str(error)) from error
    classes = {name: each for name, each in found.items() if isinstance(each, Outputs)}
    numbers = {name: each for name, each in found.items() if isinstance(each, Predictions)}
    if classes and numbers:
        raise ConfigError(
            f"{', '.join(classes)}: labels are class numbers. {', '.join(numbers)}: targets are floating point. Give "
            "all splits targets of one kind."
        )
    if not numbers:
        return classes
    _require_no_classes(np.concatenate([each.targets for each in numbers.values()]))
    return numbers


def outputs(model: nn.Module, data: Batches, logits: Logits = images_and_labels, *, batch_size: int = 512) -> Outputs:
    """The same of a classifier and one split.

    Raises:
        ConfigError: As above, or it is a regression.
        NotFinite: NaN or infinity in the logits.
    """
    found = answers(model, {"all": data}, logits, batch_size=batch_size)["all"]
    if isinstance(found, Predictions):
        raise ConfigError(
            f"targets are floating point, {found.targets.shape[1]} an example, as those of a regression: what is asked "
            "for takes class numbers. `evaluate`, `rehearse` and `audit residual` measure regressions, too; in Python "
            "expunge.metrics.outputs.answers."
        )
    return found


def forward(model: nn.Module, data: Batches, logits: Logits = images_and_labels, *, batch_size: int = 512) -> Answers:
    """The same of one split of data that `answers` took before: whether its targets are classes is not asked again."""
    device = next(model.parameters()).device
    parts, numbers = [], False
    with params.restoring_modes(model), keeping_random_state(), torch.no_grad():
        model.eval()
        for _, batch in micro_batches(data, batch_size)[1]:
            values, wanted = logits(model, to_device(batch, device))
            numbers = wanted.is_floating_point() and wanted.ndim > 0 and wanted.shape == values.shape
            if not numbers:
                _require_classes(values, wanted)
            meant = wanted.cpu().double() if numbers else wanted.cpu()
            parts.append((values.cpu().double().numpy(), meant.numpy()))
    if not parts:
        raise ConfigError("the split to measure on is empty.")
    said, truth = (np.concatenate(each) for each in zip(*parts, strict=True))
    bad = _not_finite(said)
    if bad:
        what = "predictions" if numbers else "logits"
        raise NotFinite(f"the model's {what} are NaN or infinite for {bad} of {len(said)} examples.")
    if not numbers:
        return Outputs(said, truth)
    bad = _not_finite(truth)
    if bad:
        raise ConfigError(f"targets are NaN or infinite for {bad} of {len(truth)} examples. Leave those examples out.")
    return Predictions(said.reshape(len(said), -1), truth.reshape(len(truth), -1))


def _not_finite(values: Float[np.ndarray, "examples ..."]) -> int:
    return int((~np.isfinite(values.reshape(len(values), -1)).all(axis=1)).sum())


def _require_classes(values: Tensor, labels: Tensor) -> None:
    if not labels.is_floating_point() and labels.shape == values.shape and values.ndim > 0:
        raise ConfigError(
            f"targets are {labels.dtype}, of the shape of what the model returns, {tuple(values.shape)}. Of a "
            "regression make them floating point, targets.float(); class numbers have the shape (examples,)."
            + _ONE_LOGIT
        )
    advice = _NUMBERS + _ONE_LOGIT if labels.is_floating_point() or values.ndim < 2 or values.shape[1] == 1 else ""
    if values.ndim != 2 or labels.shape != values.shape[:1]:
        raise ConfigError(
            f"logits of shape {tuple(values.shape)} with labels of shape {tuple(labels.shape)}: metrics need "
            f"(examples, classes) and (examples,). Give logits=… to say where they are in your batches.{advice}"
        )
    whole = not labels.is_floating_point() and labels.dtype != torch.bool
    if not whole or bool(((labels < 0) | (labels >= values.shape[1])).any()):
        if bool((labels == -100).any()):
            advice = " Where there is no target (-100) leave logits and label out."
        raise ConfigError(
            f"labels {labels.dtype} from {labels.min().item()} to {labels.max().item()} for {values.shape[1]} "
            f"logits: labels are class numbers, whole and counted from 0.{advice}"
        )


def _require_no_classes(targets: Float[np.ndarray, "examples numbers"]) -> None:
    """Refuse what a classifier's loss takes: measured as a regression, its numbers would look as good as any."""
    if targets.shape[1] > 1 and (targets >= 0).all() and np.allclose(targets.sum(axis=1), 1, atol=1e-4):
        raise ConfigError(
            f"the {targets.shape[1]} targets of every example add up to 1, as probabilities of classes do. Let "
            "logits(model, batch) return class numbers, targets.argmax(1); of a regression of shares leave out one, "
            "which follows from the others."
        )
    for one, other in ((0, 1), (-1, 1)):
        if np.isin(targets, (one, other)).all():
            cure = _ONE_LOGIT if targets.shape[1] == 1 else _SEVERAL_LABELS
            raise ConfigError(f"all targets are {one} or {other}: two classes, and no regression.{cure}")
