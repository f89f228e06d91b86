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
from expunge.methods import (
    amnesiac,
    bad_teacher,
    boundary_expand,
    boundary_shrink,
    cf_k,
    class_orthogonal_ascent,
    duck,
    eu_k,
    fine_tune,
    fisher,
    gar,
    gradient_ascent,
    grda,
    l1_sparse,
    orthogonal_ascent,
    reload,
    retrain,
    salun,
    scrub,
    ssd,
    unsir,
)
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
        Method(
            "orthogonal-ascent",
            orthogonal_ascent.OrthogonalAscent,
            orthogonal_ascent.orthogonal_ascent,
            orthogonal_ascent.SPACE,
        ),
        Method(
            "class-orthogonal-ascent",
            class_orthogonal_ascent.ClassOrthogonalAscent,
            class_orthogonal_ascent.class_orthogonal_ascent,
            class_orthogonal_ascent.SPACE,
        ),
        Method("retrain", retrain.Retrain, retrain.retrain, retrain.SPACE),
        Method("fine-tune", fine_tune.FineTune, fine_tune.fine_tune, fine_tune.SPACE),
        Method("cf-k", cf_k.CFk, cf_k.cf_k, cf_k.SPACE),
        Method("eu-k", eu_k.EUk, eu_k.eu_k, eu_k.SPACE),
        Method("l1-sparse", l1_sparse.L1Sparse, l1_sparse.l1_sparse, l1_sparse.SPACE),
        Method("fisher", fisher.FisherForgetting, fisher.fisher, fisher.SPACE),
        Method(
            "gradient-ascent", gradient_ascent.GradientAscent, gradient_ascent.gradient_ascent, gradient_ascent.SPACE
        ),
        Method("ssd", ssd.SSD, ssd.ssd, ssd.SPACE),
        Method("scrub", scrub.Scrub, scrub.scrub, scrub.SPACE),
        Method("bad-teacher", bad_teacher.BadTeacher, bad_teacher.bad_teacher, bad_teacher.SPACE),
        Method("salun", salun.SalUn, salun.salun, salun.SPACE),
        Method("amnesiac", amnesiac.Amnesiac, amnesiac.amnesiac, amnesiac.SPACE),
        Method("gar", gar.GAR, gar.gar, gar.SPACE),
        Method("grda", grda.GRDA, grda.grda, grda.SPACE),
        Method("duck", duck.Duck, duck.duck, duck.SPACE),
        Method(
            "boundary-shrink", boundary_shrink.BoundaryShrink, boundary_shrink.boundary_shrink, boundary_shrink.SPACE
        ),
        Method(
            "boundary-expand", boundary_expand.BoundaryExpand, boundary_expand.boundary_expand, boundary_expand.SPACE
        ),
        Method("unsir", unsir.Unsir, unsir.unsir, unsir.SPACE),
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
