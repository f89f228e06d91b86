"""`Curvature`: the Fisher information of a loss, as its diagonal or block by block, and equations solved with it.

It is data only; ``methods/kronecker.py`` measures it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from expunge import params
from expunge.errors import ConfigError, NotInformative
from expunge.params import Params


@dataclass(frozen=True)
class Block:
    """The weight of a linear layer or convolution, with its bias as one more column, in a Kronecker eigenbasis."""

    names: tuple[str, ...]  # of the weight and, where there is one, the bias
    inputs: Float[Tensor, "groups within within"]  # eigenvectors of E[a aᵀ], a column each
    outputs: Float[Tensor, "groups out out"]  # eigenvectors of E[g gᵀ]
    moments: Float[Tensor, "groups out within"]  # sum of squared gradients in that basis: the eigenvalues


@dataclass(frozen=True)
class Curvature:
    """The Fisher information Σ ∇ℓ ∇ℓᵀ of a sum of loss terms; what is in no block has its diagonal alone.

    Raises:
        NotFinite: NaN or infinity among its eigenvalues.
    """

    diagonal: Params  # sum of squared gradients
    blocks: tuple[Block, ...] = ()

    def __post_init__(self) -> None:
        moments = {block.names[0]: block.moments for block in self.blocks}
        params.require_finite(self.diagonal | moments, "the curvature")

    def solve(self, vector: Params, damping: float) -> Params:
        """(F + λ)⁻¹ times a vector, λ being a share of the mean eigenvalue of the whole of F.

        Args:
            vector: Over the parameters of this curvature.
            damping: That share, positive.

        Raises:
            ConfigError: The damping is not positive.
            NotInformative: F is zero.
        """
        floor = self._floor(damping)
        solved = {name: (vector[name].to(f) / (f + floor)).to(vector[name]) for name, f in self.diagonal.items()}
        for block in self.blocks:
            matrix = joined([vector[name] for name in block.names], len(block.moments))
            rotated = block.outputs.mT @ matrix.to(block.moments) @ block.inputs
            back = block.outputs @ (rotated / (block.moments + floor)) @ block.inputs.mT
            solved |= _split(back, vector, block)
        return {name: solved[name] for name in vector}

    def effective_parameters(self, damping: float) -> float:
        """How many directions the data determines, tr F(F + λ)⁻¹ with the λ of `solve` (MacKay, 1992).

        Raises:
            ConfigError: The damping is not positive.
            NotInformative: F is zero.
        """
        floor = self._floor(damping)
        return sum(float((each / (each + floor)).sum()) for each in self._eigenvalues)

    def _floor(self, damping: float) -> float:
        if not damping > 0:
            raise ConfigError(f"damping={damping}: must be positive; without it a flat direction has no solution.")
        count = sum(each.numel() for each in self._eigenvalues)
        floor = damping * sum(float(each.sum()) for each in self._eigenvalues) / max(count, 1)
        if not floor > 0:
            raise NotInformative(
                "the Fisher information of what is left is zero: every gradient on it vanishes, so it says nothing "
                "about which weights are free. Take a method or selector without it, as orthogonal-ascent or small-kv."
            )
        return floor

    @property
    def _eigenvalues(self) -> list[Tensor]:
        return [*self.diagonal.values(), *(block.moments for block in self.blocks)]

    @property
    def kronecker_share(self) -> float:
        """The share of entries that are in a block."""
        inside = sum(block.moments.numel() for block in self.blocks)
        return inside / max(inside + params.size(self.diagonal), 1)


def joined(weight_and_bias: list[Tensor], groups: int) -> Float[Tensor, "groups out within"]:
    """A weight and, if there is one, a bias as one matrix a group, with a column for each input."""
    weight, *bias = weight_and_bias
    matrix = weight.reshape(groups, len(weight) // groups, -1)
    return torch.cat([matrix, *(each.reshape(groups, -1, 1) for each in bias)], -1)


def _split(matrix: Tensor, vector: Params, block: Block) -> Params:
    """The opposite of `joined`, in the shapes and types of a vector."""
    within = vector[block.names[0]][0].numel()
    parts = dict(zip(block.names, (matrix[..., :within], matrix[..., within:]), strict=False))
    return {name: part.reshape(vector[name].shape).to(vector[name]) for name, part in parts.items()}
