"""Small worlds to unlearn in, and a cheap configuration of every method.

Whoever adds a method adds one line to `QUICK`; the suite in ``test_methods.py`` does the rest.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor, nn

from expunge import (
    GAR,
    GRDA,
    SSD,
    Amnesiac,
    BadTeacher,
    Blind,
    BoundaryExpand,
    BoundaryShrink,
    CFk,
    ClassOrthogonalAscent,
    Duck,
    EUk,
    Examples,
    FineTune,
    FisherForgetting,
    Gradient,
    GradientAscent,
    L1Sparse,
    NaturalAscent,
    OrthogonalAscent,
    Recipe,
    Reload,
    Retrain,
    SalUn,
    Scrub,
    Sighted,
    Unsir,
    cross_entropy,
    gradient,
    train,
)
from expunge.models.mlp import MLP

BRIEF = Recipe(epochs=3, lr=0.05, batch_size=16)

QUICK: dict[str, object] = {  # cheap, and still moving the forget loss
    "reload": Reload(reset_fraction=0.3, priming_lr=0.5, fine_tune=BRIEF),
    "orthogonal-ascent": OrthogonalAscent(fine_tune=BRIEF),
    "class-orthogonal-ascent": ClassOrthogonalAscent(fine_tune=BRIEF),
    "natural-ascent": NaturalAscent(fine_tune=BRIEF),
    "retrain": Retrain(recipe=BRIEF),
    "fine-tune": FineTune(recipe=BRIEF),
    "cf-k": CFk(k=1, recipe=BRIEF),
    "eu-k": EUk(k=1, recipe=BRIEF),
    "l1-sparse": L1Sparse(recipe=BRIEF),
    "fisher": FisherForgetting(alpha=1e-5),
    "gradient-ascent": GradientAscent(
        recipe=Recipe(epochs=2, lr=0.02, batch_size=4, weight_decay=0.0, schedule="constant"), loss_bound=50.0
    ),
    "ssd": SSD(selection=1.0, dampening=0.5),
    "scrub": Scrub(recipe=Recipe(epochs=3, lr=0.01, batch_size=16, optimizer="adamw"), forget_epochs=2),
    "bad-teacher": BadTeacher(recipe=Recipe(epochs=2, lr=0.01, batch_size=16, optimizer="adamw", weight_decay=0.0)),
    "salun": SalUn(recipe=BRIEF),
    "amnesiac": Amnesiac(recipe=Recipe(epochs=3, lr=0.01, batch_size=16, optimizer="adamw", weight_decay=0.0)),
    "gar": GAR(
        ascent=Recipe(epochs=2, lr=0.01, batch_size=16, weight_decay=0.0, schedule="constant"),
        descent=BRIEF,
        loss_bound=50.0,
    ),
    "grda": GRDA(epochs=3, lr=0.1, batch_size=8, loss_bound=50.0),
    "duck": Duck(
        recipe=Recipe(epochs=2, lr=0.01, batch_size=16, optimizer="adamw", weight_decay=0.0, schedule="constant"),
        repair=Recipe(epochs=1, lr=0.001, batch_size=16, optimizer="adamw", weight_decay=0.0, schedule="constant"),
    ),
    "boundary-shrink": BoundaryShrink(recipe=Recipe(epochs=2, lr=0.02, batch_size=4), any_forget_set=True),
    "boundary-expand": BoundaryExpand(recipe=Recipe(epochs=2, lr=0.02, batch_size=4), any_forget_set=True),
    "unsir": Unsir(
        noise_examples=8,
        noise_steps=5,
        impair=Recipe(epochs=1, lr=0.01, batch_size=16, optimizer="adamw", weight_decay=0.0, schedule="constant"),
        repair=Recipe(epochs=1, lr=0.01, batch_size=16, optimizer="adamw", weight_decay=0.0, schedule="constant"),
        any_forget_set=True,
    ),
}
DRAWS_NOTHING: frozenset[str] = frozenset({"ssd", "grda"})  # methods whose result is the same for every seed

KINDS = ("plain", "batch-norm")
FORGET = torch.arange(0, 60, 5)


def quick(name: str) -> Any:
    if name not in QUICK:
        pytest.fail(f"add a quick configuration for {name!r} here: QUICK in tests/contract/__init__.py")
    return QUICK[name]


@dataclass(frozen=True)
class World:
    """A trained model, its data and its cached gradient. Shared between tests: do not change it."""

    model: nn.Module
    fresh: Callable[[int], nn.Module]
    original: Examples
    full: Gradient

    @property
    def retain(self) -> Examples:
        return self.original.without(FORGET)

    @property
    def forget(self) -> Examples:
        return self.original.only(FORGET)

    def blind(self, **changes: Any) -> Blind:
        given = {"retain": self.retain, "loss_terms": cross_entropy, "fresh": self.fresh, "full": self.full}
        return Blind(**(given | changes))

    def sighted(self, **changes: Any) -> Sighted:
        mine = ("forget", "original", "validation", "importance")
        blind = vars(self.blind(**{name: value for name, value in changes.items() if name not in mine}))
        return Sighted(**({"forget": self.forget, "original": self.original} | blind | changes))


def architecture(kind: str) -> nn.Module:
    if kind == "plain":
        return MLP((6, 12, 3))
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 3))


def examples() -> Examples:
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(60) % 3
    centres = torch.randn(3, 6, generator=generator)
    return Examples(centres[labels] + 0.8 * torch.randn(60, 6, generator=generator), labels)


@cache
def world(kind: str = "plain", *, frozen: bool = False) -> World:
    """A world; with ``frozen``, the first weight is pretrained and stays as it is, also in untrained models."""

    def fresh(seed: int) -> nn.Module:
        model = architecture(kind)
        if frozen:
            first = next(model.parameters())
            first.requires_grad_(False).copy_(torch.linspace(-1, 1, first.numel()).view_as(first))
        return model

    with torch.random.fork_rng():
        torch.manual_seed(1)
        model, original = fresh(1), examples()
    train(model, original, cross_entropy, Recipe(epochs=15, lr=0.05, batch_size=16), seed=1)
    model.zero_grad(set_to_none=True)
    return World(model, fresh, original, gradient(model, cross_entropy, original, micro_batch=8))


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights and buffers."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two states agree in every bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@contextmanager
def without_type_checks() -> Iterator[None]:
    """What a user sees, for whom no type checker runs."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
