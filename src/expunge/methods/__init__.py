"""The table of methods: one file each, one line here.

A method is a frozen dataclass of settings and a function ``(model, given, config, *, seed, trace) -> model``,
which may change the model it is given. Whether ``given`` is annotated `Blind` or `Sighted` decides what it gets.
"""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from typing import Any

from torch import nn

from expunge.access import Blind, Sighted
from expunge.errors import ConfigError
from expunge.methods import fine_tune, gradient_ascent, reload, retrain
from expunge.space import Space


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    name: str  # on the command line and in tables
    config: type[Any]
    run: Callable[..., nn.Module]
    space: Space  # settings worth trying

    @property
    def access(self) -> type[Blind]:
        """`Blind` or `Sighted`: the annotation of the function's second argument."""
        annotation = list(inspect.signature(self.run, eval_str=True).parameters.values())[1].annotation
        assert issubclass(annotation, Blind), f"{self.name}: annotate the second argument as Blind or Sighted"
        return Sighted if issubclass(annotation, Sighted) else Blind

    @property
    def summary(self) -> str:
        """The first sentence about its settings."""
        return (inspect.getdoc(self.config) or "").splitlines()[0]

    def defaults(self) -> dict[str, Any]:
        """Its settings with their defaults, as plain values; None where one must be given."""
        filled: dict[str, Any] = {}
        for setting in fields(self.config):
            default = None if setting.default is MISSING else setting.default
            filled[setting.name] = asdict(default) if is_dataclass(default) else default  # type: ignore[arg-type]
        return filled

    @property
    def blind(self) -> bool:
        """Whether it works without the removed records."""
        return self.access is Blind


METHODS = {
    method.name: method
    for method in (
        Method("reload", reload.Reload, reload.reload, reload.SPACE),
        Method("retrain", retrain.Retrain, retrain.retrain, retrain.SPACE),
        Method("fine-tune", fine_tune.FineTune, fine_tune.fine_tune, fine_tune.SPACE),
        Method(
            "gradient-ascent", gradient_ascent.GradientAscent, gradient_ascent.gradient_ascent, gradient_ascent.SPACE
        ),
    )
}


def method_of(config: object) -> Method:
    """The method that a configuration belongs to.

    Raises:
        ConfigError: It belongs to none.
    """
    for method in METHODS.values():
        if type(config) is method.config:
            return method
    known = ", ".join(method.config.__name__ for method in METHODS.values())
    raise ConfigError(f"{config!r} is not the configuration of a method. Give one of {known}.")
