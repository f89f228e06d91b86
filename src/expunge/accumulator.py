"""The running sums of a gradient pass, in one flat buffer for each type of parameter.

The parameters' ``.grad`` are views of a buffer, which backward adds into. A network of small tensors then takes a
handful of operations a micro-batch, where a few for each tensor would cost a large part of its backward pass.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from expunge.params import Params


class Accumulator:
    """Sums gradients, and their absolute values, over micro-batches.

    Args:
        parameters: Their ``.grad`` belong to this object from now on, until someone sets them anew.
        home: Where the sums are, if not beside the parameters: for devices without float64.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], home: torch.device | None = None) -> None:
        kinds: dict[tuple[torch.dtype, torch.device], dict[str, nn.Parameter]] = {}
        for name, p in parameters.items():
            kinds.setdefault((p.dtype, p.device), {})[name] = p
        self._order = list(parameters)
        self._members = list(kinds.values())
        sizes = [sum(p.numel() for p in members.values()) for members in self._members]
        alike = list(zip(sizes, kinds, strict=True))
        self.gradients = [torch.zeros(size, dtype=dtype, device=device) for size, (dtype, device) in alike]
        self._totals = [torch.zeros(size, dtype=torch.float64, device=home or device) for size, (_, device) in alike]
        self._magnitudes = [
            torch.zeros(size, dtype=torch.float32, device=home or device) for size, (_, device) in alike
        ]
        for members, flat in zip(self._members, self.gradients, strict=True):
            for name, view in _views(members, flat):
                members[name].grad = view

    def start(self) -> None:
        """Before the backward pass of a micro-batch."""
        torch._foreach_zero_(self.gradients)

    def add_up(self) -> Tensor:
        """After it. Uses the gradients up.

        Returns:
            The sum of the absolute values of all entries of the micro-batch's gradient, float64.
        """
        size = torch.zeros((), dtype=torch.float64, device=self._totals[0].device)
        for flat, total, magnitude in zip(self.gradients, self._totals, self._magnitudes, strict=True):
            here = flat.to(total.device)
            total.add_(here)
            magnitude.add_(here.abs_())
            size += here.sum(dtype=torch.float64).to(size.device)
        return size

    def totals(self) -> Params:
        """The sums of the gradients, float64."""
        return self._by_name(self._totals)

    def magnitudes(self) -> Params:
        """The sums of their absolute values, float32."""
        return self._by_name(self._magnitudes)

    def _by_name(self, flats: list[Tensor]) -> Params:
        pairs = zip(self._members, flats, strict=True)
        named = {name: view for members, flat in pairs for name, view in _views(members, flat)}
        return {name: named[name] for name in self._order}


def _views(members: Mapping[str, nn.Parameter], flat: Tensor) -> Iterator[tuple[str, Tensor]]:
    parts = flat.split([p.numel() for p in members.values()])
    for (name, p), part in zip(members.items(), parts, strict=True):
        yield name, part.view(p.shape)
