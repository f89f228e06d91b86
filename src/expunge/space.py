"""Search spaces: which settings of a method are worth trying, declared beside the method."""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

from expunge.errors import ConfigError

Config = TypeVar("Config")


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds, whole ones if both bounds are.

    Raises:
        ConfigError: Bounds that nothing lies between, or a logarithm of what has none.
    """

    low: float
    high: float
    log: bool = False  # uniform in the logarithm

    def __post_init__(self) -> None:
        if not -math.inf < self.low <= self.high < math.inf:
            raise ConfigError(f"Range({self.low}, {self.high}): give the smaller of two finite numbers first.")
        if self.log and not self.low > 0:
            raise ConfigError(f"Range({self.low}, {self.high}, log=True): only numbers above 0 have a logarithm.")

    def draw(self, source: random.Random) -> float:
        """One of them."""
        if self.log:
            value = math.exp(source.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = source.uniform(self.low, self.high + (1 if self.whole else 0))
        return min(int(value), int(self.high)) if self.whole else value

    def holds(self, value: Any) -> bool:
        """Whether a value is one of them."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.low <= value <= self.high and (isinstance(value, int) or not self.whole)

    def near_an_end(self, value: float) -> bool:
        """Whether it is among the twentieth of them next to either bound; of whole numbers there are too few."""
        if self.whole or self.low == self.high or not self.holds(value):
            return False
        low, high, here = (math.log(each) if self.log else each for each in (self.low, self.high, value))
        return not 0.05 < (here - low) / (high - low) < 0.95

    @property
    def whole(self) -> bool:
        """Whether these are whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)


@dataclass(frozen=True)
class Choice:
    """One of a few values.

    Raises:
        ConfigError: There is none.
    """

    options: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.options, tuple) or not self.options:
            raise ConfigError(f"Choice({self.options!r}): give a tuple of one value or more, as Choice((1, 2)).")

    def draw(self, source: random.Random) -> Any:
        """One of them."""
        return source.choice(self.options)

    def holds(self, value: Any) -> bool:
        """Whether a value is one of them."""
        return value in self.options


Space = Mapping[str, Range | Choice]  # by setting; "recipe.lr" for one inside another


def with_settings(config: Config, values: Mapping[str, Any]) -> Config:
    """A copy of a configuration with some settings changed.

    Args:
        config: A dataclass.
        values: By setting; "recipe.lr" for one inside another.

    Raises:
        ConfigError: A setting that it does not have, or a value that it refuses.
    """
    for path, value in values.items():
        name, _, inner = path.partition(".")
        if not hasattr(config, name):
            raise ConfigError(f"{path!r}: {type(config).__name__} has no such setting.")
        new = with_settings(getattr(config, name), {inner: value}) if inner else value
        config = replace(config, **{name: new})  # type: ignore[type-var]
    return config


def settings_of(config: Any) -> dict[str, Any]:
    """All settings of a configuration, those inside another as "recipe.lr": what `with_settings` takes."""
    found: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        inner = settings_of(value) if is_dataclass(value) else None
        found |= {field.name: value} if inner is None else {f"{field.name}.{name}": v for name, v in inner.items()}
    return found


def random_settings(space: Space, source: random.Random) -> dict[str, Any]:
    """A value for every setting of a space."""
    return {name: values.draw(source) for name, values in space.items()}
