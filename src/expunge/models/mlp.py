"""A multi-layer perceptron."""

import itertools
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn

from expunge.errors import ConfigError


class MLP(nn.Module):
    """Linear layers with ReLU in between; inputs are flattened.

    Args:
        widths: Inputs, hidden units of each layer, outputs: at least two numbers.

    Raises:
        ConfigError: Fewer.

    Shapes: (batch, ...) with widths[0] numbers an example -> (batch, widths[-1]).
    """

    def __init__(self, widths: Sequence[int] = (64, 64, 10)) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ConfigError(f"widths={tuple(widths)}: give at least the numbers of inputs and of outputs.")
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number, (inputs, outputs) in enumerate(itertools.pairwise(widths), 1):
            if number > 1:
                layers[f"relu{number - 1}"] = nn.ReLU()
            layers[f"linear{number}"] = nn.Linear(inputs, outputs)
        self.layers = nn.Sequential(layers)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits, or whatever the last layer stands for."""
        outputs: Tensor = self.layers(inputs.flatten(1))
        return outputs
