"""Does rounding the weights bring the forgotten back?

An unlearning that moves weights little is undone where the rounding step is larger than the move. Source: Zhang et al.
2024, "Catastrophic Failure of LLM Unlearning via Quantization"; here symmetric round-to-nearest, per tensor or per
output channel, of all weight matrices.
"""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from expunge import params
from expunge.errors import ConfigError


def rounded(values: Float[Tensor, "..."], bits: int, *, per_channel: bool) -> Float[Tensor, "..."]:
    """Values on a symmetric grid of 2^bits - 1 steps around zero, as wide as the largest of them.

    Args:
        values: At least one dimension; the first counts channels.
        bits: 2 to 16.
        per_channel: A grid for each channel, not one for the tensor.

    Raises:
        ConfigError: Another number of bits.
    """
    if not 2 <= bits <= 16:
        raise ConfigError(f"bits={bits}: weights are rounded to between 2 and 16 bits.")
    top = 2 ** (bits - 1) - 1
    flat = values.reshape(len(values), -1) if per_channel else values.reshape(1, -1)
    step = (flat.abs().amax(1, keepdim=True) / top).clamp(min=torch.finfo(values.dtype).tiny)
    grid: Tensor = (flat / step).round().clamp(-top, top) * step
    return grid.view_as(values)


def quantised(model: nn.Module, bits: int, *, per_channel: bool) -> nn.Module:
    """A copy of a model whose weight matrices (parameters of two dimensions or more) are rounded."""
    model = copy.deepcopy(params.plain(model))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2 and p.is_floating_point() and p.numel():
                p.copy_(rounded(p, bits, per_channel=per_channel))
    return model
