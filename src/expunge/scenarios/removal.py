"""Which records are removed."""

import torch
from jaxtyping import Int
from torch import Tensor

from expunge.errors import ConfigError
from expunge.seeds import stream


def random_removal(count: int, fraction: float, seed: int) -> Int[Tensor, " removed"]:
    """Positions drawn uniformly from ``range(count)``, ascending: round(fraction x count) of them.

    Raises:
        ConfigError: A fraction that removes nothing or everything.
    """
    removed = round(fraction * count)
    if not 0 < removed < count:
        raise ConfigError(
            f"fraction={fraction} of {count} records removes {removed}: it must leave some and take some."
        )
    return torch.randperm(count, generator=stream(seed, "random removal"))[:removed].sort().values
