"""Where a model multiplies by a matrix, what goes in there, and what the difference says of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from expunge import params
from expunge.audit.finding import Evidence, floor_of, weights_in
from expunge.batches import Batch, Batches, LossTerms, micro_batches, tensors_of, to_device
from expunge.errors import UnsupportedModule
from expunge.passes import layer_by_layer
from expunge.seeds import keeping_random_state

LIMIT = 512  # records that tell what a layer's inputs look like


@dataclass(frozen=True)
class Layer:
    """A linear map in the model, with the difference's part of it."""

    name: str
    weight: Float[Tensor, "outputs inputs"]  # gradient of what was removed
    weight_floor: Float[Tensor, "outputs inputs"]  # rounding floors, same unit
    bias: Float[Tensor, " outputs"] | None
    bias_floor: Float[Tensor, " outputs"] | None
    last: bool = False  # no other linear map runs after it: the head

    @property
    def free_rows(self) -> int:
        """How many output units can carry different mixtures: those of a two-class head always agree."""
        return len(self.weight) - 1 if self.last else len(self.weight)


@dataclass(frozen=True)
class Inputs:
    """What goes into a layer on some data."""

    values: Float[Tensor, "rows features"]  # float64; a row an example, or a token
    per_example: int  # rows an example; 0 where nobody knows which rows are whose
    is_model_input: bool  # whether it is the data itself, flattened
    shape: tuple[int, ...]  # of an example, if it is

    @property
    def spread(self) -> float:
        """How much rows differ: the root of their mean variance."""
        return max(float(self.values.var(0, correction=0).mean().sqrt()), 1e-12)

    @property
    def span(self) -> float:
        """From the smallest to the largest value."""
        return max(float(self.values.max() - self.values.min()), 1e-12)


_LINEAR = (nn.Linear, nn.MultiheadAttention)


def linear_layers(evidence: Evidence) -> list[Layer]:
    """The linear layers and attention projections that the difference covers, in the order they run.

    Layers whose weights are tied to others are left out: the gradient there is a sum over all uses.

    Raises:
        UnsupportedModule: There is none.
    """
    model, removed = params.plain(evidence.model), evidence.removed
    order = list(layer_inputs(model, evidence.loss_terms, evidence.retain, limit=2))
    modules, found = dict(model.named_modules()), []
    for name in order:
        names = weights_in(model, modules[name])
        prefix = "in_proj_" if isinstance(modules[name], nn.MultiheadAttention) else ""
        weight, bias = names.get(f"{prefix}weight"), names.get(f"{prefix}bias")
        if weight is None or weight not in removed.total:
            continue
        total, floor = removed.total[weight].double().cpu(), floor_of(removed, weight).cpu()
        if _transposed(modules[name]):
            total, floor = total.T, floor.T
        known = bias is not None and bias in removed.total
        found.append(
            Layer(
                name,
                total,
                floor,
                removed.total[bias].double().cpu() if bias is not None and known else None,
                floor_of(removed, bias).cpu() if bias is not None and known else None,
                last=name == order[-1],
            )
        )
    if not found:
        raise UnsupportedModule(
            f"{type(model).__name__} has no linear layer whose gradient was cached and that runs on the retain data: "
            "the attacks on linear layers, labels and attention have nothing to look at."
        )
    return found


def layer_inputs(
    model: nn.Module, loss_terms: LossTerms, data: Batches, *, limit: int | None = LIMIT, all_modules: bool = False
) -> dict[str, Inputs]:
    """Run the loss over data in eval mode and write down what goes into each linear layer.

    Args:
        model: Left as it was found.
        loss_terms: What runs the model on a batch.
        data: The records.
        limit: Ends behind the batch in which so many are reached; None for all.
        all_modules: Also embeddings, whose inputs are token numbers.

    Returns:
        By the name of the layer, in the order in which they first run.
    """
    model = params.plain(model)
    seen: dict[str, list[Tensor]] = {}
    originals: list[Tensor] = []
    device, count = next(model.parameters()).device, 0
    size = 128 if limit is None else min(128, limit)
    with (
        _watching(model, seen, all_modules),
        layer_by_layer(),
        params.restoring_modes(model),
        keeping_random_state(),
        torch.no_grad(),
    ):
        model.eval()
        for _, batch in micro_batches(data, size)[1]:
            loss_terms(model, to_device(batch, device))
            originals.append(first_tensor(batch))
            count += len(originals[-1])
            if limit is not None and count >= limit:
                break
    whole = torch.cat([each.flatten(1).double().cpu() for each in originals]) if originals else torch.empty(0, 0)
    result = {}
    for name, parts in seen.items():
        values = torch.cat([part.reshape(-1, part.shape[-1]) if part.ndim > 1 else part[:, None] for part in parts])
        values = values.double().cpu()
        same = values.shape == whole.shape and torch.equal(values, whole)
        known = len(parts) == len(originals) and len(values) % max(count, 1) == 0  # it ran once, and nothing is packed
        result[name] = Inputs(values, len(values) // count if known else 0, same, tuple(originals[0].shape[1:]))
    return result


def first_tensor(batch: Batch) -> Tensor:
    """The inputs of a batch: the tensor called ``input_ids`` of a dictionary, or the first one there is."""
    if isinstance(batch, dict) and "input_ids" in batch:
        ids: Tensor = batch["input_ids"]
        return ids
    return tensors_of(batch)[0]


@contextmanager
def _watching(model: nn.Module, seen: dict[str, list[Tensor]], all_modules: bool) -> Iterator[None]:
    kinds = (*_LINEAR, nn.Embedding) if all_modules else _LINEAR

    def write_down(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            value = arguments[0] if arguments else named.get("query", named.get("input"))
            if isinstance(value, Tensor):
                seen.setdefault(name, []).append(value.detach())

        return hook

    handles = [
        module.register_forward_pre_hook(write_down(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, kinds) or _transposed(module)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _transposed(module: nn.Module) -> bool:
    """Whether it is a linear layer as GPT-2 of the transformers library has them, with (inputs, outputs) weights."""
    return type(module).__name__ == "Conv1D" and getattr(module, "weight", torch.empty(0)).ndim == 2
