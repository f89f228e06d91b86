"""Loss terms for common models: unreduced, in nats where the loss is a log-likelihood.

A `LossTerms` takes a model and a batch and returns one loss a term, never a mean: sums of terms are what makes
the gradient of all data minus the gradient of what is left equal to the gradient of what was removed. A term
is an example, or for language models a target token.
"""

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from expunge import params
from expunge.batches import Batch, described
from expunge.errors import ConfigError, MismatchError


def cross_entropy(model: nn.Module, batch: Batch) -> Float[Tensor, " terms"]:
    """Classification: the batch is (inputs, class numbers), the model returns logits. Nats an example.

    Raises:
        ConfigError: The batch is something else, or labels and logits do not fit.
    """
    inputs, labels = _pair(batch)
    logits = model(inputs)
    if logits.ndim < 2:
        raise ConfigError(
            f"the model returned logits {described(logits)}, and cross_entropy needs one for each class, shape "
            "(examples, classes). For a model with one logit write a loss of your own, with "
            "torch.nn.functional.binary_cross_entropy_with_logits(…, reduction='none'); docs/own-model.md shows it."
        )
    try:
        return functional.cross_entropy(_wide(logits), labels, reduction="none")
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        raise ConfigError(
            f"labels {described(labels)} do not fit logits {described(logits)}: {str(error).splitlines()[0]} Give "
            "class numbers, int64 of shape (examples,), counted from 0, and a model with a logit for each class."
        ) from error


def logit_margin(model: nn.Module, batch: Batch) -> Float[Tensor, " terms"]:
    """Classification: log((1 - p) / p) of the probability of the label, to be cached for orthogonal ascents.

    The gradient of cross-entropy is (1 - p) times this one: a record that is fitted well has hardly a part in it, and
    here as much as any other. The batch is (inputs, class numbers), the model returns a logit for each class; or one,
    (examples,) or (examples, 1), that of class 1 of two, and the batch has 0 or 1 of any type. Nats an example, without
    a lower bound: nothing to train with. Source: Carlini et al., "Membership Inference Attacks From First Principles"
    (2022), with the opposite sign.

    Raises:
        ConfigError: The batch is something else, or labels and logits do not fit.
    """
    inputs, labels = _pair(batch)
    logits = model(inputs)
    if tuple(logits.shape) in (labels.shape[:1], (*labels.shape[:1], 1)):
        return _margin_of_one(logits, labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ConfigError(
            f"labels {described(labels)} do not fit logits {described(logits)}: a margin takes class numbers, int64 "
            "of shape (examples,), and a model with a logit for each class, or one for two."
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise ConfigError(
            f"labels from {int(labels.min())} to {int(labels.max())} do not fit logits {described(logits)}: a margin "
            f"is one of a class, 0 to {logits.shape[1] - 1}. Leave records without a class out."
        )
    wide = _wide(logits)
    own = wide.gather(1, labels[:, None])
    others: Tensor = wide.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    return others - own[:, 0]


def tempered_margin(model: nn.Module, batch: Batch) -> Float[Tensor, " terms"]:
    """Classification: 2 artanh √(1 - p) of the probability of the label, to be cached where deletions recur.

    Its gradient is √(1 - p) times that of `logit_margin`, that of cross-entropy (1 - p) times. It lies between the two:
    a record counts the less the better it is fitted, as in cross-entropy, but where a model fits some records far
    better than others, as an unlearning leaves it, those do not vanish. The batch is as of `logit_margin`. Nats
    an example, not negative. Source: this library, docs/findings.md.

    Raises:
        ConfigError: As of `logit_margin`.
    """
    margin = logit_margin(model, batch)
    error = (functional.logsigmoid(margin) / 2).exp()  # √(1 - p)
    tempered: Tensor = functional.softplus(margin, threshold=40) + 2 * error.log1p()  # -log p + 2 log(1 + √(1 - p))
    return tempered


def _margin_of_one(logits: Tensor, labels: Tensor) -> Tensor:
    z = _wide(logits.flatten())
    if labels.shape not in (z.shape, logits.shape) or not bool(((labels == 0) | (labels == 1)).all()):
        raise ConfigError(
            f"labels {described(labels)} do not fit the single logit of {described(logits)}: a margin takes 0 or 1 for "
            "each example, the classes that it is against and for."
        )
    return torch.where(labels.flatten() == 1, -z, z)


def squared_error(model: nn.Module, batch: Batch) -> Float[Tensor, " terms"]:
    """Regression: the batch is (inputs, targets). Squared units of the target, summed over its dimensions.

    Raises:
        MismatchError: The model's outputs and the targets have different shapes.
        ConfigError: The batch is something else.
    """
    inputs, targets = _pair(batch)
    outputs: Tensor = model(inputs)
    if outputs.shape != targets.shape:
        raise MismatchError(
            f"the model returns shape {tuple(outputs.shape)} and the targets have {tuple(targets.shape)}: their "
            "difference would compare examples with each other. Reshape one of them."
        )
    errors: Tensor = (outputs - targets).square()
    return errors.flatten(1).sum(1) if errors.ndim > 1 else errors


def causal_lm(model: nn.Module, batch: Batch) -> Float[Tensor, " terms"]:
    """Causal language models: nats a target token.

    The batch is a dictionary with ``input_ids``, ``labels`` (-100 where there is no target, padding included)
    and optionally ``attention_mask``, each (examples, tokens). The model returns logits, or an object that has
    them. Tokens are shifted here, and positions without a target give no term: a mean over the padded batch
    would weigh examples by the company they keep.

    Raises:
        ConfigError: The batch is something else.
    """
    losses, targets = _of_tokens(model, batch)
    return losses[targets]


def causal_lm_documents(model: nn.Module, batch: Batch) -> Float[Tensor, " terms"]:
    """Causal language models: nats a document, the sum over its target tokens, of batches as those of `causal_lm`.

    The gradient of all documents is the same. Counts are of documents, as deletions are, and a method that takes a
    batch apart into terms has one for each of them: natural ascent, for example, which `causal_lm` cannot serve.

    Raises:
        ConfigError: The batch is something else.
    """
    losses, targets = _of_tokens(model, batch)
    return (losses * targets).sum(1)


def require_loss_terms(loss: object) -> None:
    """Refuse a criterion of torch, which takes outputs and targets, and not a model and a batch.

    Raises:
        ConfigError: It is one.
    """
    if type(loss).__module__ == "torch.nn.modules.loss":
        raise ConfigError(
            f"{type(loss).__name__}() takes outputs and targets, and loss terms are called with (model, batch). Write "
            "a function that returns one loss an example: def loss_terms(model, batch): inputs, targets = batch; "
            "return torch.nn.functional.…(model(inputs), targets, reduction='none')."
        )


def _of_tokens(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss at each position of each document, and which positions have a target."""
    if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= batch.keys():
        got = f"has {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f"is a {described(batch)}"
        raise ConfigError(
            f"a batch {got}, and this loss takes a dictionary with input_ids and labels, each (examples, tokens). Let "
            "the dataset return such dictionaries, or write a loss_terms for your batches."
        )
    inputs = {key: value for key, value in batch.items() if key in ("input_ids", "attention_mask")}
    output = model(**inputs)
    logits: Tensor = getattr(output, "logits", output)
    labels: Tensor = batch["labels"][:, 1:]
    losses = functional.cross_entropy(
        _wide(logits[:, :-1].flatten(0, 1)), labels.flatten(), reduction="none", ignore_index=-100
    )
    return losses.view(labels.shape), labels != -100


def _pair(batch: Batch) -> tuple[Tensor, Tensor]:
    pair = isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(each, Tensor) for each in batch)
    if not pair:
        raise ConfigError(
            f"a batch is {described(batch)}, and this loss takes two tensors, (inputs, targets). Give Examples(inputs, "
            "targets) or a loader of such pairs, or write a loss_terms for your batches."
        )
    return batch[0], batch[1]


def _wide(logits: Tensor) -> Tensor:
    """In float64 where the device has it: of an example that is fitted well, 1 - p is all rounding in float32."""
    return logits.to(params.wide(logits.device))


def name_of(loss_terms: object) -> str:
    """The name a cache records for a loss: that of the function, or of the type of a callable object.

    Of a ``functools.partial`` it is that of its function and what is filled in: functions and objects by their names,
    tensors and arrays by their fingerprints. It is the same in every process.
    """
    if isinstance(loss_terms, partial):
        filled = [_value(value) for value in loss_terms.args]
        filled += [f"{key}={_value(value)}" for key, value in sorted(loss_terms.keywords.items())]
        return f"{name_of(loss_terms.func)}({', '.join(filled)})"
    named = loss_terms if hasattr(loss_terms, "__qualname__") else type(loss_terms)
    return str(named.__qualname__)


def _value(value: object) -> str:
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.dtype.kind not in "biufc"):
        value = value.tolist()
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value.copy())
    if isinstance(value, nn.Module):
        return f"{name_of(value)}({params.fingerprint(params.state(value))[:12]})"
    if isinstance(value, Tensor):
        return params.fingerprint({"": value})[:12]
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_value(each)}' for key, each in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    told = repr(value)
    return name_of(value) if callable(value) or f"at {hex(id(value))}" in told else told
