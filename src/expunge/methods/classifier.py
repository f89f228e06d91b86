"""What methods share that work on classifiers only: batches of (inputs, class numbers), a model that gives logits."""

from torch import Tensor, nn

from expunge.batches import Batch
from expunge.errors import UnsupportedModule


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
        f"{method} works on classifiers: batches of (inputs, class numbers). Got a {type(batch).__name__}. For another "
        "kind of model take a method that needs only its loss: reload, retrain, fine-tune, gradient-ascent."
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
