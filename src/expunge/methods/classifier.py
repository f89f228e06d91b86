"""What methods share that work on classifiers only: batches of (inputs, class numbers), a model that gives logits."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from expunge import params
from expunge.access import Sighted
from expunge.batches import Batch, Batches, described, micro_batches, to_device
from expunge.errors import ConfigError, UnsupportedModule
from expunge.seeds import keeping_random_state

READING = 512  # positions a batch, where nothing is trained


def inputs_and_labels(batch: Batch, method: str) -> tuple[Tensor, Tensor]:
    """The two parts of a batch.

    Raises:
        UnsupportedModule: It is not (inputs, class numbers).
    """
    if isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, labels = batch
        if (
            isinstance(inputs, Tensor)
            and isinstance(labels, Tensor)
            and labels.ndim == 1
            and not labels.is_floating_point()
        ):
            return inputs, labels
    raise UnsupportedModule(
        f"{method} works on classifiers: batches of (inputs, class numbers). Got {described(batch)}. For another kind "
        "of model take a method that needs only its loss, such as reload, natural-ascent, retrain or fine-tune."
    )


def logits(model: nn.Module, inputs: Tensor, method: str) -> Tensor:
    """What the model says, shape (examples, classes).

    Raises:
        UnsupportedModule: The model returns something else.
    """
    found = model(inputs)
    if not isinstance(found, Tensor) or found.ndim != 2:
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise UnsupportedModule(f"{method} needs logits of shape (examples, classes), and the model returned {got}.")
    return found


def floating(model: nn.Module, inputs: Tensor) -> Tensor:
    """Bytes as the model's own normalisation turns them into numbers, if it has one; other inputs as they are.

    For methods that move inputs or mix them with their own: ``models.from_bytes.FromBytes`` takes either.
    """
    normalised = getattr(params.plain(model), "normalised", None)
    found: Tensor = normalised(inputs) if callable(normalised) else inputs
    return found


def labelled(data: Batches, device: torch.device, method: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and class numbers of all the data, in order, on a device.

    Raises:
        UnsupportedModule: The batches are not (inputs, class numbers).
    """
    for _, batch in micro_batches(data, READING)[1]:
        yield inputs_and_labels(to_device(batch, device), method)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode; training flags and the global generators, which a DataLoader draws from, are restored behind it."""
    with params.restoring_modes(model), keeping_random_state():
        model.eval()
        yield


def require_whole_classes(given: Sighted, method: str, any_forget_set: bool) -> tuple[int, ...]:
    """The classes of the removed records, all of whose records are removed.

    Args:
        given: Labels are read, inputs are not.
        method: Its name.
        any_forget_set: Do not insist that the classes are gone from what is left.

    Raises:
        ConfigError: A class of the removed records is also in what is left.
        UnsupportedModule: The batches are not (inputs, class numbers).
    """
    removed = classes_in(given.forget, method)
    both = set() if any_forget_set else removed & classes_in(given.retain, method)
    if both:
        raise ConfigError(
            f"{method} removes whole classes, and class {min(both)} is both among the removed records and in what is "
            f"left ({len(both)} of {len(removed)} such classes): it would be forgotten altogether. Remove all records "
            "of a class, take another method, or accept it with any_forget_set=True."
        )
    return tuple(sorted(removed))


def classes_in(data: Batches, method: str) -> set[int]:
    """The classes that the data has records of; inputs are not looked at.

    Raises:
        UnsupportedModule: The batches are not (inputs, class numbers).
    """
    with keeping_random_state():
        return {int(each) for _, labels in labelled(data, torch.device("cpu"), method) for each in labels.unique()}


def classifying_layer(model: nn.Module, inputs: Tensor, method: str) -> nn.Linear:
    """The linear layer whose outputs are the logits, found by running a few examples in eval mode.

    Raises:
        UnsupportedModule: The logits come from something else, such as a convolution or a scaled layer.
    """
    outputs: list[tuple[nn.Linear, Tensor]] = []
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [layer.register_forward_hook(lambda own, _, out: outputs.append((own, out))) for layer in linear]
    try:
        with in_eval_mode(model), torch.no_grad():
            found = logits(model, inputs, method)
    finally:
        for handle in handles:
            handle.remove()
    for layer, last in outputs[-1:]:
        if last.shape == found.shape and torch.allclose(last, found, 0, 0, equal_nan=True):
            return layer
    raise UnsupportedModule(
        f"{method} works on the embeddings that a last nn.Linear turns into the logits, and those of "
        f"{type(model).__name__} come from something else. End the model with an nn.Linear, without anything behind it."
    )


@contextmanager
def embeddings(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what goes into a layer, as the classifying one; take it out of the list after every forward pass."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()
