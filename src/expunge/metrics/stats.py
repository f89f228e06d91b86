"""Statistics over seeds: intervals, comparisons of two methods, and "indistinguishable from retraining".

A seed is the unit: models of one seed share data, removed records and initialisation, so methods are compared seed by
seed. Everything here takes plain numbers, one a seed, and needs SciPy.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import Float

from expunge.errors import ConfigError, MismatchError, MissingExtra, NotFinite

Model = TypeVar("Model")
Values = Sequence[float] | Float[np.ndarray, " values"]
RESAMPLES = 2000
BOOTSTRAP_FROM, BOOTSTRAP_TO = 20, 1000  # below, resampling covers too little; above, it only costs time
EMPIRICAL_FROM = 40  # so that two values lie beyond the 95 % quantile
_ROUNDING = 8000 * float(np.finfo(np.float64).eps)  # a spread of that share is none: see `_rounding`


@dataclass(frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float
    level: float  # 0.95: covers the truth in 95 % of repetitions


@dataclass(frozen=True)
class Paired:
    """Two methods compared over the same seeds."""

    difference: float  # mean of a - b
    interval: Interval  # of the difference
    p: float  # two-sided, of no difference
    n: int  # seeds


@dataclass(frozen=True)
class Equivalence:
    """Whether a mean lies within ±delta (or, of a distance, below delta)."""

    delta: float  # in the unit of the values
    p: float  # of "it lies at delta or beyond"
    equivalent: bool  # p at or below the level of the test
    interval: Interval  # of the mean, at 1 - 2 x the level: equivalent means that it lies within the margin
    n: int  # seeds


@dataclass(frozen=True)
class Margin:
    """A δ taken from how far retrained models are from each other."""

    delta: float  # in the unit of the distances; 0 if no two retrained models differ
    estimate: Literal["half-normal", "log-normal", "empirical"]
    n: int  # distances


def t_interval(values: Values, level: float = 0.95) -> Interval:
    """Student's interval of the mean: exact for normal values, whatever their number.

    Raises:
        ConfigError: Fewer than two values, or a level outside (0, 1).
        NotFinite: NaN or infinity among the values.
        MissingExtra: SciPy is not installed.
    """
    array, level = _checked(values), _fraction("level", level)
    half = float(scipy_special().stdtrit(len(array) - 1, (1 + level) / 2)) * _standard_error(array)
    return Interval(float(array.mean()) - half, float(array.mean()) + half, level)


def bootstrap(values: Values, *, level: float = 0.95, seed: int = 0) -> Interval:
    """The bias-corrected and accelerated (BCa) bootstrap interval of the mean, for values that are not normal.

    Fewer than 20 values get Student's interval: a resample of a handful is narrower than the population, and of ten
    normal values the "95 %" interval covers the mean about nine times in ten. So do values that are all equal, and more
    than 1,000, where the two agree and resampling only costs time.

    Args:
        values: Independent of each other: one a seed, or one a record of a single model.
        level: Coverage.
        seed: Of the resampling.

    Raises:
        ConfigError: Fewer than two values, or a level outside (0, 1).
        NotFinite: NaN or infinity among the values.
        MissingExtra: SciPy is not installed.
    """
    array, level = _checked(values), _fraction("level", level)
    if not BOOTSTRAP_FROM <= len(array) <= BOOTSTRAP_TO or _all_the_same(array, _rounding(array)):
        return t_interval(array, level)
    scipy_special()
    from scipy import stats

    generator = np.random.default_rng(seed)
    found = stats.bootstrap(
        (array,), np.mean, confidence_level=level, n_resamples=RESAMPLES, method="BCa", rng=generator
    )
    low, high = found.confidence_interval
    return Interval(float(low), float(high), level)


def paired(a: Values, b: Values, *, level: float = 0.95) -> Paired:
    """Compare two methods over the same seeds with the paired t-test.

    Not with a permutation test: with n seeds that cannot give a p below 2 / 2ⁿ (0.25 for three, 0.06 for five), so no
    comparison of a few seeds could ever succeed. The t-test pays with an assumption, that differences are roughly
    normal. Where it breaks down, at differences that are all the same (up to the rounding of numbers of the size of a
    and b), p is that of the permutation test.

    Args:
        a: One number a seed.
        b: The other method's, in the same order.
        level: Of the interval.

    Raises:
        MismatchError: Different numbers of seeds.
        ConfigError: Fewer than two seeds, or a level outside (0, 1).
        NotFinite: NaN or infinity among the values.
        MissingExtra: SciPy is not installed.
    """
    if len(a) != len(b):
        raise MismatchError(f"{len(a)} and {len(b)} values: a comparison over the same seeds needs one of each a seed.")
    differences = _checked(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64))
    rounding = _rounding(a, b)
    p = min(2 * min(_beyond(differences, 0.0, rounding), _beyond(-differences, 0.0, rounding)), 1.0)
    return Paired(float(differences.mean()), t_interval(differences, level), p, len(differences))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: the chance of a single false alarm among all stays at the level.

    Source: Holm, A simple sequentially rejective multiple test procedure (1979).

    Raises:
        ConfigError: A p-value outside [0, 1].
    """
    if any(not 0 <= p <= 1 for p in p_values):
        raise ConfigError(f"p-values {list(p_values)}: each lies in [0, 1].")
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def equivalence(differences: Values, delta: float, *, level: float = 0.05) -> Equivalence:
    """Is a method indistinguishable from retraining within ±delta? Two one-sided t-tests (TOST).

    A large p of an ordinary test would only say that too few seeds were run. Here the claim has to be proven: what
    lies at ±delta or beyond passes in at most 5 % of cases, at any number of seeds. More seeds make it easier to
    pass. With the δ of `floor_margin` from as many pairs of retrained models, a method that does equal retraining
    passes in 45 % of cases with 3 seeds, 83 % with 5 and 95 % with 7: fewer than 7 seeds prove little either way.

    Differences that are all the same, up to the rounding of numbers a thousand times as large as they or δ (what they
    were taken of is not known here), prove what a sign test would.

    Args:
        differences: Method minus retrained, with their sign, one a seed.
        delta: What still counts as the same, in the unit of the differences.
        level: Accepted chance of a false "equivalent".

    Source: Schuirmann, A comparison of the two one-sided tests procedure and the power approach (1987).

    Raises:
        ConfigError: Fewer than two seeds, delta not positive, or a level outside (0, 0.5).
        NotFinite: NaN or infinity among the differences.
        MissingExtra: SciPy is not installed.
    """
    array, delta, level = _checked(differences), _positive(delta), _fraction("level", level, below=0.5)
    rounding = _rounding(array, [delta])
    p = max(_beyond(array, -delta, rounding), _beyond(-array, -delta, rounding))
    return Equivalence(delta, p, p <= level, t_interval(array, 1 - 2 * level), len(array))


def non_inferiority(distances: Values, delta: float, *, level: float = 0.05) -> Equivalence:
    """The same for what is a distance by nature, such as NSKL and FSKL: is its mean below delta? One t-test.

    With the δ of `floor_margin` from as many pairs of retrained models, and distances that spread by 40 % or less, a
    method that does equal retraining passes in 76 % of cases with 5 seeds, 86 % with 7 and 95 % with 12.

    Args:
        distances: Between method and retrained model, one a seed, none negative.
        delta: What still counts as the same, in the unit of the distances.
        level: Accepted chance of a false "equivalent".

    Raises:
        ConfigError: A negative distance, fewer than two seeds, delta not positive, or a level outside (0, 0.5).
        NotFinite: NaN or infinity among the distances.
        MissingExtra: SciPy is not installed.
    """
    array, delta, level = _not_negative(distances), _positive(delta), _fraction("level", level, below=0.5)
    p, found = _beyond(-array, -delta, _rounding(array, [delta])), t_interval(array, 1 - 2 * level)
    return Equivalence(delta, p, p <= level, Interval(max(0.0, found.low), found.high, found.level), len(array))


def floor_margin(
    floor_distances: Values, quantile: float = 0.95, *, shape: Literal["gap", "divergence"] = "gap"
) -> Margin:
    """The default δ: the distance that 95 % of pairs of retrained models stay below.

    With fewer than 40 distances the empirical quantile is one of the largest two, that is, mostly chance. Instead:

    - a gap (ΔFA, ΔFE …) is the absolute difference of two draws from one population, so it is taken as half-normal,
      and its quantile is z((1 + q) / 2) times the root mean square. Over all pairs of k models that is √2 times their
      standard deviation, so it does not matter that pairs share models;
    - a divergence (NSKL, FSKL …) is positive and its spread grows with its size, so it is taken as log-normal.

    Both are plain estimates, without an allowance for the small number, which would reward few retrained models with
    a wider margin. From three distances a half-normal δ is off by 41 % (one standard error), from ten by 22 %.

    Args:
        floor_distances: Between retrained models, none negative; `noise_floor` gives them.
        quantile: Share of pairs that stay below.
        shape: Which kind of distance.

    Raises:
        ConfigError: A negative distance, fewer than two, or a quantile outside (0, 1).
        NotFinite: NaN or infinity among the distances.
        MissingExtra: SciPy is not installed.
    """
    array, quantile = _not_negative(floor_distances), _fraction("quantile", quantile)
    if len(array) >= EMPIRICAL_FROM:
        return Margin(float(np.quantile(array, quantile)), "empirical", len(array))
    if shape == "gap" or not array.all():
        delta = scipy_special().ndtri((1 + quantile) / 2) * np.sqrt(np.mean(array**2))
        return Margin(float(delta), "half-normal", len(array))
    logarithms = np.log(array)
    delta = np.exp(logarithms.mean() + scipy_special().ndtri(quantile) * logarithms.std(ddof=1))
    return Margin(float(delta), "log-normal", len(array))


def noise_floor(retrained: Sequence[Model], distance: Callable[[Model, Model], float]) -> Float[np.ndarray, " pairs"]:
    """How far retrained models are from each other: the distance of every pair.

    Args:
        retrained: Whatever the distance takes, one a model: outputs, profiles, models.
        distance: Any metric of two models.

    Raises:
        ConfigError: Fewer than two models.
    """
    if len(retrained) < 2:
        raise ConfigError(f"{len(retrained)} retrained models: a noise floor needs at least 2.")
    return np.array([distance(a, b) for a, b in itertools.combinations(retrained, 2)], dtype=np.float64)


def _beyond(values: Float[np.ndarray, " values"], at: float, rounding: float) -> float:
    """One-sided p of "the mean is at or below ``at``"; of values that are all the same, that of the sign test."""
    above = float(values.mean()) - at
    if _all_the_same(values, rounding):
        return float(0.5 ** len(values)) if above > rounding else 1.0
    return float(scipy_special().stdtr(len(values) - 1, -above / _standard_error(values)))


def _all_the_same(values: Float[np.ndarray, " values"], rounding: float) -> bool:
    return float(np.ptp(values)) <= rounding


def _rounding(*numbers: Values) -> float:
    """By how much numbers computed from these may differ by rounding alone: 8 times the last bit, times 1,000.

    A thousand, since these may themselves be differences of numbers that much larger (0.1 points of 100 %), whose
    rounding they carry. That is still 2e-12 of their size, far below any spread over seeds.
    """
    return _ROUNDING * max(float(np.abs(np.asarray(each, dtype=np.float64)).max()) for each in numbers)


def _standard_error(values: Float[np.ndarray, " values"]) -> float:
    return 0.0 if np.ptp(values) == 0 else float(values.std(ddof=1) / np.sqrt(len(values)))


def _checked(values: Values) -> Float[np.ndarray, " values"]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < 2:
        raise ConfigError(f"{array.size} values of shape {array.shape}: a spread needs at least 2, one a seed.")
    require_finite("values", array)
    return array


def require_finite(what: str, *sides: Float[np.ndarray, "*_"]) -> None:
    """Refuse numbers that nothing can be computed from.

    Raises:
        NotFinite: Some are NaN or infinite; says how many.
    """
    for side in sides:
        if not np.isfinite(side).all():
            raise NotFinite(
                f"{int((~np.isfinite(side)).sum())} of {side.size} {what} are NaN or infinite. Leave these records or "
                "models out, or find out why."
            )


def _not_negative(distances: Values) -> Float[np.ndarray, " values"]:
    array = _checked(distances)
    if (array < 0).any():
        raise ConfigError(f"a distance of {array.min():g}: distances are not negative. Signed: equivalence().")
    return array


def _positive(delta: float) -> float:
    if not 0 < delta < float("inf"):
        raise ConfigError(
            f"delta={delta}: the margin within which two models count as the same must be positive. If no two "
            "retrained models differ in this number, state a margin of your own."
        )
    return delta


def _fraction(name: str, value: float, below: float = 1.0) -> float:
    if not 0 < value < below:
        raise ConfigError(f"{name}={value}: must lie between 0 and {below:g}.")
    return value


def scipy_special(what: str = "statistics over seeds") -> Any:
    """SciPy's special functions.

    Raises:
        MissingExtra: SciPy is not installed.
    """
    try:
        from scipy import special
    except ImportError as error:
        raise MissingExtra(f"{what} need SciPy: pip install 'expunge[eval]'.") from error
    return special
