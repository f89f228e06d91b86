"""Faulty inputs, to be corrected."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.batches import Examples
from expunge.errors import ConfigError
from expunge.scenarios.corruption import Corruption, broadcast, inputs_and_labels
from expunge.scenarios.removal import random_removal
from expunge.seeds import stream


@dataclass(frozen=True)
class Noise:
    """Gaussian noise: a function from inputs (batch, …) to a noisy copy, with the same noise for the same shape."""

    deviation: Float[Tensor, "..."]  # of each entry of an input
    seed: int
    purpose: str

    def __call__(self, inputs: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """Noise is drawn for every entry of every input; nothing is clipped."""
        drawn = torch.randn(inputs.shape, generator=stream(self.seed, "covariate noise", self.purpose))
        return drawn.to(inputs).mul_(self.deviation.to(inputs)).add_(inputs)


def noisy_inputs(
    data: Examples, fraction: float, seed: int, *, span: float | Float[Tensor, "..."] = 1.0, sigma: float = 0.4
) -> Corruption:
    """Add Gaussian noise to the inputs of a random part of the examples; labels stay.

    Args:
        data: Inputs of any shape, and labels.
        fraction: Share of the examples.
        seed: Which examples, and the noise.
        span: Largest minus smallest input: 1 for images in [0, 1], or a tensor (channels, 1, 1) for normalised ones.
        sigma: Standard deviation of the noise, as a share of the span; 0.4 in the paper's grid.

    Raises:
        ConfigError: A fraction that changes nothing or everything, a sigma or span that is not positive, or inputs
            that are not floating-point numbers.
    """
    inputs, labels = inputs_and_labels(data)
    deviation = sigma * broadcast(span, inputs, "span").cpu()
    if not bool((deviation > 0).all()) or not bool(deviation.isfinite().all()):
        raise ConfigError(f"sigma={sigma} of span={span}: both must be above 0 and finite.")
    rows = random_removal(len(inputs), fraction, seed)
    changed = inputs.clone()
    changed[rows.to(inputs.device)] = Noise(deviation, seed, "training")(inputs[rows.to(inputs.device)])
    faulty = Examples(changed, labels, positions=data.positions)
    return Corruption(faulty, data.positions[rows], Noise(deviation, seed, "test"))
