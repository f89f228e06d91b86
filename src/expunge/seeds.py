"""Streams of randomness by name, so that no part of a run shifts the random numbers of another."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for one purpose: the same for the same seed and names, unrelated for any others."""
    digest = hashlib.sha256("\0".join(str(part) for part in (seed, *names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def stream(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator for one purpose, for example ``stream(seed, "shuffle", epoch)``."""
    return torch.Generator().manual_seed(derive(seed, *names))


@contextmanager
def keeping_random_state() -> Iterator[None]:
    """Restore the global generators of torch behind the block; a DataLoader draws from them, for one."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def seeded(seed: int, *names: str | int) -> Iterator[None]:
    """Seed the global generators of torch inside the block and restore them behind it.

    For code that draws from the global generators: initialisation of modules, dropout.
    """
    with keeping_random_state():
        torch.default_generator.manual_seed(derive(seed, *names))
        if torch.cuda.is_initialized():  # torch.manual_seed would also leave a seed for a later initialisation
            torch.cuda.manual_seed_all(derive(seed, *names))
        yield
