"""The one forward pass: what a model says about a split, from which every metric is computed."""

from collections.abc import Callable, Sized
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from expunge import params
from expunge.batches import Batch, Batches, micro_batches, to_device
from expunge.errors import ConfigError, NotFinite
from expunge.seeds import keeping_random_state

Logits = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]  # -> logits (examples, classes), labels (examples,)
_FOR_CLASSIFIERS = (
    " Metrics, audits of what a model remembers and rehearsals are for classifiers. Of a regression, `unlearn`, `audit "
    "preflight` and `retrain` work: compare losses of your own, of the unlearned model and of a retrained one. Of a "
    "classifier with one logit let logits(model, batch) return two (docs/own-model.md shows it)."
)


@dataclass(frozen=True)
class Outputs:
    """Logits and labels of a split, in the order of its examples."""

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


def images_and_labels(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits and labels for a batch that is (inputs, class numbers).

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


def outputs(model: nn.Module, data: Batches, logits: Logits = images_and_labels, *, batch_size: int = 512) -> Outputs:
    """Run a model over a split in eval mode, without gradients.

    Args:
        model: Left as it was found.
        data: The split, once through, in its own order.
        logits: How to get logits and labels from a batch.
        batch_size: Positions a batch, for data with positions.

    Raises:
        ConfigError: The split is empty, or logits and labels do not fit together.
        NotFinite: NaN or infinity in the logits.
    """
    device = next(model.parameters()).device
    parts = []
    with params.restoring_modes(model), keeping_random_state(), torch.no_grad():
        model.eval()
        for _, batch in micro_batches(data, batch_size)[1]:
            values, labels = logits(model, to_device(batch, device))
            no_classes = labels.is_floating_point() or values.ndim < 2 or values.shape[1] == 1
            advice = _FOR_CLASSIFIERS if no_classes else ""
            if values.ndim != 2 or labels.shape != values.shape[:1]:
                raise ConfigError(
                    f"logits of shape {tuple(values.shape)} with labels of shape {tuple(labels.shape)}: metrics need "
                    "(examples, classes) and (examples,). Give logits=… to say where they are in your batches." + advice
                )
            wrong = labels.is_floating_point() or bool(((labels < 0) | (labels >= values.shape[1])).any())
            if wrong:
                if bool((labels == -100).any()):
                    advice = " Where there is no target (-100) leave logits and label out."
                raise ConfigError(
                    f"labels {labels.dtype} from {labels.min().item()} to {labels.max().item()} for {values.shape[1]} "
                    f"logits: labels are class numbers, whole and counted from 0.{advice}"
                )
            parts.append((values.cpu().double().numpy(), labels.cpu().numpy()))
    if not parts:
        raise ConfigError("the split to measure on is empty.")
    result = Outputs(np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]))
    if not np.isfinite(result.logits).all():
        bad = int((~np.isfinite(result.logits).all(axis=1)).sum())
        raise NotFinite(f"the model's logits are NaN or infinite for {bad} of {len(result.labels)} examples.")
    return result
