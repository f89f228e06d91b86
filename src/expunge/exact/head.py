"""A perturbed linear classifier that can be moved to other data, with a bound on the error: the core of `certified`.

The formulas are in ``certified.py``; ``graph.py`` uses the same with features that are propagated.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn import functional

from expunge.errors import ConfigError, NotFinite
from expunge.seeds import stream

Bound = Literal["data", "worst-case"]
WhenSpent = Literal["retrain", "refuse"]
Outcome = Literal["removed", "retrained", "refused"]

GAMMA = 0.25  # γ: the logistic loss's second derivative changes by at most this per unit (in truth 1 / (6 √3))
SLOPE = 0.25  # its first derivative, likewise; and that is at most 1


@dataclass(frozen=True, kw_only=True)
class Certified:
    """What is promised, and what it may cost.

    Raises:
        ConfigError: A value that cannot work.
    """

    sigma: float  # σ: standard deviation of b, unit of a summed gradient (published: 10)
    l2: float  # λ: weight penalty a record (published: 1e-6 to 1e-3)
    epsilon: float = 1.0  # ε of the promise, at most 2
    delta: float = 1e-4  # δ: about the probability that ε does not hold
    bound: Bound = "data"  # what a removal is charged: the bound for this data, or that for any
    steps: int = 1  # Newton steps a removal; from the second on, each undoes the error of those before
    when_spent: WhenSpent = "retrain"  # a removal beyond the budget: retrain with fresh noise, or refuse

    def __post_init__(self) -> None:
        for name in ("sigma", "l2"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)}: must be a positive number.")
        if not 0 < self.epsilon <= 2:
            raise ConfigError(f"epsilon={self.epsilon}: must be in (0, 2]; beyond, the formula of δ is not proven.")
        if not 0 < self.delta <= 0.5:
            raise ConfigError(f"delta={self.delta}: must be in (0, 0.5]; well below 1 / (number of records) is usual.")
        if self.bound not in get_args(Bound):
            raise ConfigError(f"bound={self.bound!r}: must be one of {get_args(Bound)}.")
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps}: a removal takes at least 1.")
        if self.when_spent not in get_args(WhenSpent):
            raise ConfigError(f"when_spent={self.when_spent!r}: must be one of {get_args(WhenSpent)}.")

    @property
    def budget(self) -> float:
        """How large a gradient the noise hides: σε/c."""
        c = math.sqrt(2 * math.log(1.5 / self.delta))
        return self.sigma * self.epsilon / c


@dataclass(frozen=True)
class Removal:
    """What became of a removal, in the unit of a summed gradient."""

    outcome: Outcome  # "refused": nothing has changed
    data_bound: float  # on the gradient that this removal's Newton steps leave
    worst_bound: float  # the same for any data
    spent: float  # of the budget, so far
    budget: float


class Head(nn.Module):
    """One-vs-rest logistic regression at the minimum of its perturbed loss, and how much of the budget is spent.

    The weights are its only parameter and all that ``state_dict`` holds. The features, the noise b and the amounts
    spent are secrets: publish the weights only. It computes in float64, which the bound is stated for.
    """

    b: Float[Tensor, "features heads"]
    features: Float[Tensor, "n features"]
    signs: Float[Tensor, "n heads"]
    spent: Float[Tensor, " heads"]  # of the budget

    def __init__(
        self,
        features: Float[Tensor, "n features"],
        labels: Integer[Tensor, " n"],
        config: Certified,
        *,
        classes: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.config, self.classes, self.seed, self.fits = config, classes, seed, 0
        self.passed = 0  # examples that went through a gradient or a Hessian, so far
        shape = (features.shape[1], 1 if classes == 2 else classes)
        self.weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64, device=features.device), requires_grad=False)
        for name in ("b", "features", "signs", "spent"):  # so that they go where the weights go
            self.register_buffer(name, None, persistent=False)
        self.retrain(features, labels)

    def forward(self, features: Float[Tensor, "n features"]) -> Float[Tensor, "n classes"]:
        """Log-odds of each class against the rest, as log-probabilities; their softmax is the usual normalisation."""
        scores = features.to(self.weight) @ self.weight
        logits: Tensor = functional.logsigmoid(torch.cat([-scores, scores], 1) if self.classes == 2 else scores)
        return logits

    def residual(self) -> Float[Tensor, " heads"]:
        """The norm of the gradient as it is now, which the bound bounds: one pass over the data.

        Raises:
            ConfigError: The head was converted to another type.
        """
        self._require_float64()
        norms: Tensor = self._gradient(self.weight, self.features, self.signs).norm(dim=0)
        return norms

    def retrain(self, features: Float[Tensor, "n features"], labels: Integer[Tensor, " n"]) -> None:
        """Fit with fresh noise, to the smallest gradient that rounding allows.

        Raises:
            NotFinite: The gradient does not get small: the problem is too badly conditioned.
        """
        draws = torch.randn(self.weight.shape, generator=stream(self.seed, "b", self.fits), dtype=torch.float64)
        self.b, self.fits = (self.config.sigma * draws).to(self.weight), self.fits + 1
        self.features, self.signs = features.to(self.weight), self._signs(labels)
        weight = torch.zeros_like(self.weight)
        gradient = self._gradient(weight, self.features, self.signs)
        floor = 1e-15 * (len(features) + self.b.norm(dim=0))  # below this a gradient is all rounding
        moving = torch.ones_like(floor, dtype=torch.bool)
        for _ in range(100):
            moving &= ~(gradient.norm(dim=0) <= floor)
            step = self._solve(weight, self.features, -gradient)[0]
            size = moving.to(weight)
            for _ in range(40):  # halve the step of each class until its gradient gets smaller
                moved = self._gradient(weight + size * step, self.features, self.signs)
                worse = moving & ~(moved.norm(dim=0) <= (1 - 1e-4 * size) * gradient.norm(dim=0))
                if not bool(worse.any()):
                    break
                size = torch.where(worse, size / 2, size)
            moving &= ~worse
            if not bool(moving.any()):
                break
            weight = weight + torch.where(moving, size, 0.0) * step
            gradient = self._gradient(weight, self.features, self.signs)
        self.weight.copy_(weight)
        self.spent = gradient.norm(dim=0)  # of the budget, by class: the residual never exceeds it
        if not float(self.spent.norm()) <= self.config.budget:
            raise NotFinite(
                f"the gradient stays at {float(self.spent.norm()):.3g}, above the budget {self.config.budget:.3g}: the "
                f"problem is too badly conditioned for float64. Raise l2={self.config.l2:g}."
            )

    @torch.no_grad()
    def move(
        self,
        features: Float[Tensor, "n features"],
        labels: Integer[Tensor, " n"],
        lost: Float[Tensor, "features heads"],
        *,
        radius: float = 1.0,
        drift: float = 0.0,
    ) -> Removal:
        """Newton steps from the minimum for the old data to that for the new, if the budget allows.

        Args:
            features: Of what is left.
            labels: Of what is left.
            lost: Sum of the loss gradients that were in the old objective at the weights, less those in the new.
            radius: No feature vector can be longer.
            drift: Sum of the distances that the feature vectors of what is left have moved, at most.

        Raises:
            ConfigError: The head was converted to another type.
        """
        self._require_float64()
        config, old, n = self.config, len(self.features), len(features)
        features, signs = features.to(self.weight), self._signs(labels)
        weight = self.weight.clone()
        longest = (old * radius + self.b.norm(dim=0) + self.spent) / (config.l2 * old)  # no θ can be longer
        reach = (old - n) * (config.l2 * longest + radius) + (1 + SLOPE * radius * longest) * drift  # nor any Δ
        spectral = torch.linalg.matrix_norm(features, 2)
        widest = features.norm(dim=1).max()
        delta = (old - n) * config.l2 * weight + lost
        data = worst = before = self.spent
        for step in range(config.steps):
            v, error = self._solve(weight, features, delta)
            data = GAMMA * widest * spectral * v.norm(dim=0) * (features @ v).norm(dim=0) + error
            worst = GAMMA * radius**3 * reach**2 / (config.l2**2 * n) + error
            weight = weight + v
            if step + 1 < config.steps:  # the next step is against the whole gradient, also that of earlier removals
                reach, before = before + worst, torch.zeros_like(before)
                delta = -self._gradient(weight, features, signs)
        spent = before + (data if config.bound == "data" else worst)
        bounds = float(data.norm()), float(worst.norm())
        outcome: Outcome = "removed"
        if float(spent.norm()) <= config.budget:
            self.weight.copy_(weight)
            self.features, self.signs, self.spent = features, signs, spent
        elif config.when_spent == "retrain":
            self.retrain(features, labels)
            outcome = "retrained"
        else:
            outcome = "refused"
        return Removal(outcome, *bounds, float(self.spent.norm()), config.budget)

    def pull(self, features: Float[Tensor, "n features"], labels: Integer[Tensor, " n"]) -> Tensor:
        """The sum of the loss gradients of records at the weights, without the penalty; (features, heads)."""
        return _pull(self.weight, features.to(self.weight), self._signs(labels))

    def _require_float64(self) -> None:
        if self.weight.dtype != torch.float64:
            raise ConfigError(
                f"the head was made {self.weight.dtype}, and its bound holds in float64. Keep it as it was built, and "
                "convert a copy of its weights to answer with."
            )

    def _gradient(self, weight: Tensor, features: Tensor, signs: Tensor) -> Tensor:
        self.passed += len(features)
        gradient: Tensor = _pull(weight, features, signs) + self.config.l2 * len(features) * weight + self.b
        return gradient

    def _solve(self, weight: Tensor, features: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """H⁻¹Δ for every class, and the norm of the error that the solver leaves in Δ."""
        self.passed += len(features)
        likely = torch.sigmoid(features @ weight)
        columns, errors = [], []
        for curvature, right in zip((likely * (1 - likely)).T, delta.T, strict=True):
            hessian = features.T @ (curvature[:, None] * features)
            hessian.diagonal().add_(self.config.l2 * len(features))
            column = torch.linalg.solve(hessian, right)
            columns.append(column)
            errors.append((hessian @ column - right).norm())
        return torch.stack(columns, 1), torch.stack(errors)

    def _signs(self, labels: Tensor) -> Tensor:
        """+1 for a record's class, -1 for the others; (n, heads)."""
        labels = labels.long()  # bytes would wrap below 0
        each = labels[:, None] if self.classes == 2 else functional.one_hot(labels, self.classes)
        return (2 * each - 1).to(self.weight)


def _pull(weight: Tensor, features: Tensor, signs: Tensor) -> Tensor:
    pulls: Tensor = features.T @ (-signs * torch.sigmoid(-signs * (features @ weight)))
    return pulls


def require_classes(labels: Tensor, classes: int) -> None:
    """Refuse class numbers that are not in range(classes).

    Raises:
        ConfigError: Also for fewer than two classes.
    """
    if labels.is_floating_point() or classes < 2 or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ConfigError(
            f"classes={classes} with labels of type {labels.dtype} from {labels.min()} to {labels.max()}: labels must "
            "be whole numbers from 0 to classes - 1, and classes at least 2."
        )


def require_short(features: Tensor, divide: str) -> None:
    """Refuse vectors longer than 1, for which the bound would not hold.

    Raises:
        ConfigError: Says which.
    """
    lengths = features.double().norm(dim=1)
    if not bool((lengths <= 1 + 1e-6).all()):
        raise ConfigError(
            f"row {int(lengths.argmax())} of the features is {float(lengths.max()):.4g} long; the bound holds up to 1. "
            f"Divide {divide}. (Dividing all of them by the longest would depend on a record to be removed.)"
        )
