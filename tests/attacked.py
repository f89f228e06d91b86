"""What somebody has who attacks the difference of two gradients."""

from dataclasses import replace

import torch

from expunge import cross_entropy, gradient
from expunge.audit.finding import Evidence, evidence


def seen(model, data, removed, loss=cross_entropy):
    """What an attacker has when the records at these positions are gone, and the truth."""
    full = gradient(model, loss, data, micro_batch=4)
    has = evidence(model, loss, data.without(removed), full)
    return has, data.only(removed)


def with_noise(has: Evidence, size: float, seed: int = 0) -> Evidence:
    """The same with a difference that is random: within its floor for a size below 1, far above it for a large one."""
    generator = torch.Generator().manual_seed(seed)
    total = {
        name: size * floor.double() * (2 * torch.rand(floor.shape, generator=generator, dtype=torch.float64) - 1)
        for name, floor in has.removed.noise.items()
    }
    return replace(has, removed=replace(has.removed, total=total))
