"""Where two models differ inside: weights, activations and representations, layer by layer."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from expunge import params
from expunge.batches import Batch, Batches, micro_batches, to_device
from expunge.errors import ConfigError, MismatchError
from expunge.metrics.classification import same_examples
from expunge.metrics.outputs import Outputs
from expunge.passes import layer_by_layer
from expunge.seeds import keeping_random_state

Run = Callable[[nn.Module, Batch], object]  # a forward pass over a batch


def weight_distance(model: nn.Module, other: nn.Module) -> dict[str, float]:
    """Relative weight distance of every trainable parameter.

    Formula: ‖w - w'‖ / ‖w'‖ (Euclidean; ‖w - w'‖ itself where w' is zero). Unit: ratio. Direction: to a retrained
    model, none: networks that compute the same may have far apart weights. To the original: where a method changed
    it. 0 means: the same weights.

    Args:
        model: The unlearned model.
        other: What to compare with, of the same architecture.

    Raises:
        MismatchError: Other names or shapes.
    """
    mine, theirs = params.named_parameters(model), params.named_parameters(other)
    if {name: p.shape for name, p in mine.items()} != {name: p.shape for name, p in theirs.items()}:
        raise MismatchError("the two models have parameters of other names or shapes: compare models of one kind.")
    found = {}
    for name, weight in mine.items():
        reference = theirs[name].detach().double().cpu()
        length = float(reference.norm())
        found[name] = float((weight.detach().double().cpu() - reference).norm()) / (length or 1.0)
    return found


def activation_distance(a: Outputs, b: Outputs) -> float:
    """Activation distance: how far apart two models' probabilities are.

    Formula: mean over examples of the Euclidean distance of the softmax outputs. Unit: fraction, 0 to √2. Direction:
    low. 0 means: the same probabilities. Misses: small probabilities, which the divergences weigh.

    Source: Golatkar et al., Mixed-Privacy Forgetting in Deep Networks (2021).

    Raises:
        MismatchError: Outputs of other examples.
    """
    same_examples(a, b)
    return float(np.linalg.norm(np.exp(a.log_probabilities) - np.exp(b.log_probabilities), axis=1).mean())


def linear_cka(a: Float[np.ndarray, "_ features"], b: Float[np.ndarray, "_ others"]) -> float:
    """Linear centred kernel alignment of two representations of the same examples.

    Formula: ‖BᵀA‖² / (‖AᵀA‖ ‖BᵀB‖), Frobenius norms of the centred features. Unit: fraction in [0, 1]. Direction: high,
    as high as between two retrained models. 1 means: equal up to rotation and scale. Misses: directions of little
    variance; with fewer examples than features it is high for anything.

    Source: Kornblith et al., Similarity of Neural Network Representations Revisited (2019).

    Raises:
        MismatchError: Other numbers of examples.
        ConfigError: A representation that is the same for every example.
    """
    if len(a) != len(b):
        raise MismatchError(f"representations of {len(a)} and {len(b)} examples: measure both on the same.")
    left, right = a - a.mean(axis=0), b - b.mean(axis=0)
    if a.shape[1] + b.shape[1] > 2 * len(a):  # the same by Gram matrices, which are then the smaller ones
        left_gram, right_gram = left @ left.T, right @ right.T
        cross, lengths = (left_gram * right_gram).sum(), np.linalg.norm(left_gram) * np.linalg.norm(right_gram)
    else:
        cross = np.linalg.norm(right.T @ left) ** 2
        lengths = np.linalg.norm(left.T @ left) * np.linalg.norm(right.T @ right)
    if lengths == 0:
        raise ConfigError("a representation does not vary over the examples: its alignment with another is undefined.")
    return float(cross / lengths)


def activations(
    model: nn.Module,
    data: Batches,
    layers: Iterable[str],
    *,
    run: Run | None = None,
    batch_size: int = 512,
) -> dict[str, Float[np.ndarray, "examples _"]]:
    """What layers put out for every example, flattened; float64.

    Args:
        model: Left as it was found.
        data: A split, once through, in its own order.
        layers: Names as in ``model.named_modules()``.
        run: The forward pass; by default the model on the first element of a batch.
        batch_size: Positions a batch, for data with positions.

    Raises:
        ConfigError: No such layer, or one that did not run, ran twice on a batch, or puts out no tensor.
    """
    modules, wanted = dict(params.plain(model).named_modules()), list(layers)
    unknown = [name for name in wanted if name not in modules]
    if unknown:
        raise ConfigError(
            f"layers={unknown!r}: the model has no such layer. It has {', '.join(filter(None, modules))}."
        )
    kept: dict[str, list[np.ndarray]] = {name: [] for name in wanted}

    def keep(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_: nn.Module, __: object, output: object) -> None:
            if not isinstance(output, Tensor):
                raise ConfigError(f"layer {name!r} puts out a {type(output).__name__}: name one that gives a tensor.")
            if len(kept[name]) == begun:
                raise ConfigError(
                    f"layer {name!r} runs more than once in a forward pass, so it has no single output for an example. "
                    "Name a layer that runs once, such as the one around it."
                )
            kept[name].append(output.detach().reshape(len(output), -1).cpu().double().numpy())

        return hook

    device, begun = next(model.parameters()).device, 0
    handles = [modules[name].register_forward_hook(keep(name)) for name in wanted]
    try:
        with params.restoring_modes(model), keeping_random_state(), torch.no_grad(), layer_by_layer():
            model.eval()
            for _, batch in micro_batches(data, batch_size)[1]:
                begun += 1
                moved = to_device(batch, device)
                if run is None:
                    model(moved[0])
                else:
                    run(model, moved)
    finally:
        for handle in handles:
            handle.remove()
    silent = [name for name, parts in kept.items() if not parts]
    if silent:
        raise ConfigError(f"layers={silent!r} did not run in the forward pass, or the data is empty.")
    return {name: np.concatenate(parts) for name, parts in kept.items()}
