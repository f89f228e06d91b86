"""Training the trained model further on what is left: by a recipe, or in a loop of one's own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from expunge import params
from expunge.access import Blind
from expunge.seeds import seeded
from expunge.trace import Trace
from expunge.training import Recipe, StopRule, train


def train_further(
    model: nn.Module, given: Blind, recipe: Recipe, *, seed: int, trace: Trace, stop: StopRule | None = None
) -> None:
    """Minimise the loss on what is left, in place.

    Args:
        model: Where it is now is where training begins.
        given: With what is left, and the loop of one's own if there is one.
        recipe: How; a loop of one's own gets it, for the epochs and the learning rate that the method asks for.
        seed: Names the streams of randomness.
        trace: Where to record. What a loop of one's own computes is not counted.
        stop: As of `train`; a loop of one's own ends by itself.
    """
    if given.train_further is None:
        train(model, given.retain, given.loss_terms, recipe, seed=seed, trace=trace, stop=stop)
        return
    with own_loop(model, seed, "train further"):
        given.train_further(model, given.retain, recipe, seed)
    trace.stopped = "the loop of one's own ended"


@contextmanager
def own_loop(model: nn.Module, seed: int, name: str) -> Iterator[None]:
    """What a loop of one's own finds: a model in train mode, and global generators that are seeded."""
    with params.restoring_modes(model), seeded(seed, name), torch.enable_grad():
        model.train()
        yield
