"""The table of methods: one file each, one line here; packages that are installed may add their own.

A method is a frozen dataclass of settings and a function ``(model, given, config, *, seed, trace) -> model``,
which may change the model it is given. Whether ``given`` is annotated `Blind` or `Sighted` decides what it gets.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from torch import nn

from expunge.access import Blind, Sighted
from expunge.batches import LossTerms
from expunge.errors import ConfigError
from expunge.losses import cross_entropy, logit_margin
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
    natural_ascent,
    orthogonal_ascent,
    reload,
    retrain,
    salun,
    scrub,
    ssd,
    unsir,
)
from expunge.space import Choice, Range, Space, settings_of, with_settings

GROUP = "expunge.methods"  # of the entry points by which packages add methods


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Raises:
        ConfigError: Settings that are no frozen dataclass, or a function that does not say what it may see.
    """

    name: str  # on the command line and in tables
    config: type[Any]
    run: Callable[..., nn.Module]
    space: Space  # settings worth trying
    cached_loss: LossTerms | None = None  # what it takes a cached gradient of in comparisons, if it needs one
    unfit: Mapping[str, str] = field(default_factory=dict)  # kind of scenario: why it takes no part

    def __post_init__(self) -> None:
        if not (is_dataclass(self.config) and self.config.__dataclass_params__.frozen):  # type: ignore[attr-defined]
            raise ConfigError(f"method {self.name}: {self.config!r} is no frozen dataclass. Write its settings as one.")
        given = self._given
        if not (inspect.isclass(given) and issubclass(given, Blind)):
            raise ConfigError(
                f"method {self.name}: the second argument of {self.run.__name__} is annotated as {given!r}. "
                "Annotate it as Blind if the removed records are not needed, as Sighted if they are."
            )

    @property
    def _given(self) -> Any:
        return list(inspect.signature(self.run, eval_str=True).parameters.values())[1].annotation

    @property
    def access(self) -> type[Blind]:
        """`Blind` or `Sighted`: the annotation of the function's second argument."""
        return Sighted if issubclass(self._given, Sighted) else Blind

    @property
    def of_expunge(self) -> bool:
        """Whether its code is a part of expunge, or of another package."""
        return self.run.__module__.partition(".")[0] == __name__.partition(".")[0]

    @property
    def summary(self) -> str:
        """The first sentence about its settings."""
        return (inspect.getdoc(self.config) or "").splitlines()[0]

    def published(self) -> Any:
        """Its configuration with all defaults, which searches and tables begin with.

        Raises:
            ConfigError: A setting without a default.
        """
        try:
            return self.config()
        except TypeError as error:
            raise ConfigError(
                f"method {self.name}: {error}. Give every setting a default: tables and searches begin with them."
            ) from error

    def defaults(self) -> dict[str, Any]:
        """Its settings with their defaults, as plain values; None where one must be given."""
        filled: dict[str, Any] = {}
        for setting in fields(self.config):
            made = setting.default_factory() if setting.default_factory is not MISSING else setting.default
            default = None if made is MISSING else made
            filled[setting.name] = asdict(default) if is_dataclass(default) else default  # type: ignore[arg-type]
        return filled

    @property
    def blind(self) -> bool:
        """Whether it works without the removed records."""
        return self.access is Blind


_WHOLE_CLASSES = {
    "removal": "removes whole classes: it would forget what is left of them, too",
    "label-correction": "removes whole classes, and a correction removes none",
    "input-correction": "removes whole classes, and a correction removes none",
}
_OTHER_LABELS = {"label-correction": "teaches the corrected records something else than their corrected labels"}

METHODS = {
    method.name: method
    for method in (
        Method("reload", reload.Reload, reload.reload, reload.SPACE, cross_entropy),
        Method(
            "orthogonal-ascent",
            orthogonal_ascent.OrthogonalAscent,
            orthogonal_ascent.orthogonal_ascent,
            orthogonal_ascent.SPACE,
            logit_margin,
        ),
        Method(
            "class-orthogonal-ascent",
            class_orthogonal_ascent.ClassOrthogonalAscent,
            class_orthogonal_ascent.class_orthogonal_ascent,
            class_orthogonal_ascent.SPACE,
            logit_margin,
        ),
        Method(
            "natural-ascent",
            natural_ascent.NaturalAscent,
            natural_ascent.natural_ascent,
            natural_ascent.SPACE,
            cross_entropy,
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
        Method("bad-teacher", bad_teacher.BadTeacher, bad_teacher.bad_teacher, bad_teacher.SPACE, unfit=_OTHER_LABELS),
        Method("salun", salun.SalUn, salun.salun, salun.SPACE, unfit=_OTHER_LABELS),
        Method("amnesiac", amnesiac.Amnesiac, amnesiac.amnesiac, amnesiac.SPACE, unfit=_OTHER_LABELS),
        Method("gar", gar.GAR, gar.gar, gar.SPACE),
        Method("grda", grda.GRDA, grda.grda, grda.SPACE),
        Method("duck", duck.Duck, duck.duck, duck.SPACE),
        Method(
            "boundary-shrink",
            boundary_shrink.BoundaryShrink,
            boundary_shrink.boundary_shrink,
            boundary_shrink.SPACE,
            unfit=_WHOLE_CLASSES,
        ),
        Method(
            "boundary-expand",
            boundary_expand.BoundaryExpand,
            boundary_expand.boundary_expand,
            boundary_expand.SPACE,
            unfit=_WHOLE_CLASSES,
        ),
        Method("unsir", unsir.Unsir, unsir.unsir, unsir.SPACE, unfit=_WHOLE_CLASSES),
    )
}


def all_methods() -> dict[str, Method]:
    """`METHODS`, and those of installed packages, by name.

    A package adds one by an entry point of the group ``expunge.methods`` that names a `Method`. One that cannot be used
    is left out with a warning: it must not keep the others from working.
    """
    return METHODS | _installed()


@cache  # it reads what every installed package says of itself
def _installed() -> dict[str, Method]:
    found: dict[str, Method] = {}
    for point in entry_points(group=GROUP):
        try:
            method = _of(point, METHODS | found)
        except (Exception, SystemExit) as error:
            why = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
            package = point.dist.name if point.dist else "an unknown package"
            said = f"the method {point.name} = {point.value} of {package} is left out: {why.rstrip('.')}."
            warnings.warn_explicit(said, RuntimeWarning, package, 0)  # no line of expunge is to blame
        else:
            found[method.name] = method
    return found


def _of(point: EntryPoint, known: Mapping[str, Method]) -> Method:
    """The method of another package, with the mistakes that would show late found now."""
    method = point.load()
    if not isinstance(method, Method):
        raise ConfigError(f"it is {type(method).__name__}, and not an expunge.methods.Method")
    if method.name in known:
        raise ConfigError(f"there is a method of the name {method.name!r} already; give it another")
    if method.name != point.name:
        raise ConfigError(f"its Method has the name {method.name!r}; write the same name in both places")
    _require_usable(method)
    return method


def _require_usable(method: Method) -> None:
    """Refuse a method that a search or a table could not begin with.

    Raises:
        ConfigError: A setting without default or annotation, a search space that does not fit, another signature.
    """
    config, named = method.config, {each.name for each in fields(method.config)}
    # Functions, properties and the like are no settings.
    plain = {name: value for name, value in vars(config).items() if not hasattr(value, "__get__")}
    stray = [name for name in plain if not name.startswith("_") and name not in named]
    if stray:
        raise ConfigError(
            f"{config.__name__}.{stray[0]} has no annotation, so it is no setting. Write one: {stray[0]}: float = …"
        )
    start = method.published()
    known = settings_of(start)
    for path, values in method.space.items():
        if path not in known or not isinstance(values, Range | Choice):
            raise ConfigError(
                f"its search space has {path!r}: {values!r}. Name one of {', '.join(known)}, and give a Range or a "
                "Choice"
            )
        for value in (values.low, values.high) if isinstance(values, Range) else values.options:
            try:
                with_settings(start, {path: value})
            except ConfigError as error:
                raise ConfigError(
                    f"its search space allows {path}={value!r}, which it refuses itself: {error}"
                ) from error
    try:
        inspect.signature(method.run).bind(None, None, start, seed=0, trace=None)
    except TypeError as error:
        raise ConfigError(
            f"{method.run.__name__} must take (model, given, config, *, seed, trace), and does not: {error}"
        ) from error


def method_of(config: object) -> Method:
    """The method that a configuration belongs to.

    Raises:
        ConfigError: It belongs to none.
    """
    methods = all_methods().values()
    for method in methods:
        if type(config) is method.config:
            return method
        if config is method.config:
            required = ", ".join(f"{each.name}=…" for each in fields(method.config) if _is_required(each))
            raise ConfigError(
                f"{method.config.__name__} is a class, and not settings of {method.name}. Call it: "
                f"{method.config.__name__}({required})."
            )
    known = ", ".join(method.config.__name__ for method in methods)
    raise ConfigError(
        f"{config!r} is not the configuration of a method. Give one of {known}, or install your own "
        "(docs/own-method.md)."
    )


def _is_required(setting: Field[Any]) -> bool:
    return setting.default is MISSING and setting.default_factory is MISSING
