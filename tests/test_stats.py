import sys

import numpy as np
import pytest
from scipy import stats as scipy_stats

from expunge.errors import ConfigError, MismatchError, MissingExtra, NotFinite
from expunge.metrics.stats import (
    Interval,
    bootstrap,
    equivalence,
    floor_margin,
    holm,
    noise_floor,
    non_inferiority,
    paired,
    t_interval,
)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([11, seed]).normal(size=shape)


def passes(differences: np.ndarray, delta: np.ndarray | float) -> np.ndarray:
    """SciPy's two one-sided tests, one a row; the functions under test agree with it (see below)."""
    margin = np.broadcast_to(np.asarray(delta, dtype=float), len(differences))[:, None]
    above = scipy_stats.ttest_1samp(differences + margin, 0, axis=1, alternative="greater").pvalue
    below = scipy_stats.ttest_1samp(differences - margin, 0, axis=1, alternative="less").pvalue
    return np.maximum(above, below) <= 0.05


def within_four_sd(hits: int, of: int, rate: float) -> bool:
    return abs(hits - of * rate) <= 4 * np.sqrt(of * rate * (1 - rate))


# Intervals


def test_the_t_interval_is_that_of_scipy():
    values = normal(6)
    found = t_interval(values, 0.9)
    expected = scipy_stats.t.interval(0.9, 5, loc=values.mean(), scale=scipy_stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.level == 0.9
    assert t_interval([2.0, 2.0, 2.0]) == Interval(2.0, 2.0, 0.95)


def test_the_t_interval_covers_the_mean_as_often_as_it_says_with_three_seeds():
    found = [t_interval(values, 0.9) for values in 5 + normal(800, 3)]
    assert within_four_sd(sum(each.low <= 5 <= each.high for each in found), 800, 0.9)


def test_the_bootstrap_is_that_of_scipy_and_follows_its_seed():
    values = np.exp(normal(40))
    expected = scipy_stats.bootstrap((values,), np.mean, n_resamples=2000, method="BCa", rng=np.random.default_rng(3))
    found = bootstrap(values, seed=3)
    assert (found.low, found.high) == (expected.confidence_interval.low, expected.confidence_interval.high)
    assert bootstrap(values, seed=4) != found


def test_the_bootstrap_covers_the_mean_of_skewed_values():
    draws = np.random.default_rng(5).exponential(size=(200, 60))
    found = [bootstrap(values, seed=seed) for seed, values in enumerate(draws)]
    covered = sum(each.low <= 1 <= each.high for each in found)
    assert 0.94 - 4 * np.sqrt(0.95 * 0.05 / 200) <= covered / 200  # a point less is usual at 60 values
    assert covered < 200  # or the interval would say nothing
    mean = np.mean([each.high - each.low for each in found])
    assert mean == pytest.approx(2 * 1.96 / np.sqrt(60), rel=0.1)


def test_the_bootstrap_of_ten_values_covers_too_little_which_is_why_it_is_not_used():
    found = scipy_stats.bootstrap(
        (normal(400, 10),), np.mean, axis=1, n_resamples=1000, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    assert 0.83 < np.mean((found.low <= 0) & (found.high >= 0)) < 0.93


@pytest.mark.parametrize("values", [normal(19), np.full(30, 0.1), normal(1001)])
def test_where_resampling_has_nothing_to_offer_the_bootstrap_is_the_t_interval(values):
    assert bootstrap(values) == t_interval(values)


# Two methods


def test_the_paired_test_is_that_of_scipy():
    a, b = normal(7), normal(7, seed=1)
    expected = scipy_stats.ttest_rel(a, b)
    found = paired(a, b, level=0.9)
    assert (found.p, found.n) == (pytest.approx(expected.pvalue), 7)
    assert (found.interval.low, found.interval.high) == pytest.approx(tuple(expected.confidence_interval(0.9)))
    assert found.difference == pytest.approx(a.mean() - b.mean())
    assert paired(b, a).p == pytest.approx(found.p)


def test_equal_methods_differ_significantly_no_more_often_than_the_level():
    shared = 10 * normal(700, 5, seed=2)  # what a seed does to both
    p = [paired(a, b).p for a, b in zip(shared + normal(700, 5), shared + normal(700, 5, seed=1), strict=True)]
    assert within_four_sd(sum(each <= 0.05 for each in p), 700, 0.05)


def test_the_paired_test_keeps_its_level_also_for_skewed_numbers():
    a, b = np.random.default_rng(3).exponential(size=(2, 20000, 5))
    p = scipy_stats.ttest_rel(a, b, axis=1).pvalue
    assert [paired(a[row], b[row]).p for row in range(20)] == pytest.approx(p[:20])
    assert np.mean(p <= 0.05) <= 0.05


def test_pairing_finds_a_difference_that_is_small_beside_the_spread_over_seeds():
    shared = 10 * normal(6)
    assert paired(shared + 1 + 0.1 * normal(6, seed=1), shared).p < 1e-4


def test_differences_that_are_all_the_same_prove_no_more_than_a_permutation_test_would():
    assert paired([1.0, 2.0, 3.0], [0.0, 1.0, 2.0]).p == 2 / 2**3
    assert paired([1.0, 2.0], [1.0, 2.0]).p == 1


def test_differences_that_differ_by_rounding_alone_are_all_the_same():
    assert paired([0.3, 0.4, 0.5, 0.7], [0.2, 0.3, 0.4, 0.6]).p == 2 / 2**4
    assert paired([0.1 + 0.2, 0.4], [0.3, 0.4]).p == 1
    assert equivalence([80.1 - 80.0, 80.2 - 80.1], 0.5).p == equivalence([0.1, 0.1], 0.5).p == 1 / 2**2
    assert equivalence([80.1 - 80.0, 80.2 - 80.1], 0.1).p == 1
    assert non_inferiority([80.1 - 80.0, 80.2 - 80.1], 0.5).p == 1 / 2**2


def test_a_spread_far_above_rounding_is_one():
    small = normal(6) * 1e-9
    assert paired(1 + small, np.ones(6)).p == pytest.approx(scipy_stats.ttest_1samp(small, 0).pvalue, rel=1e-5)
    expected = scipy_stats.ttest_1samp(0.9999 + small, 1.0, alternative="less").pvalue
    assert equivalence(0.9999 + small, 1.0).p == pytest.approx(expected, rel=1e-5)


def test_holm_by_hand_and_in_any_order():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_keeps_the_chance_of_a_single_false_alarm_at_the_level():
    alarms = sum(min(holm(p)) <= 0.05 for p in np.random.default_rng(0).random((3000, 8)).tolist())
    assert within_four_sd(alarms, 3000, 1 - (1 - 0.05 / 8) ** 8)
    # Three real effects that are always found leave five hypotheses, and the level still holds.
    mixed = [[0.0] * 3 + p for p in np.random.default_rng(1).random((3000, 5)).tolist()]
    assert within_four_sd(sum(min(holm(p)[3:]) <= 0.05 for p in mixed), 3000, 1 - (1 - 0.05 / 5) ** 5)


# Equivalence


def test_equivalence_is_two_one_sided_tests_of_scipy():
    differences = 0.3 + normal(8)
    expected = max(
        scipy_stats.ttest_1samp(differences, -1.2, alternative="greater").pvalue,
        scipy_stats.ttest_1samp(differences, 1.2, alternative="less").pvalue,
    )
    found = equivalence(differences, 1.2)
    assert found.p == pytest.approx(expected)
    assert found.interval == t_interval(differences, 0.9)
    assert (found.delta, found.n) == (1.2, 8)


@pytest.mark.parametrize("seed", range(20))
def test_equivalent_means_that_the_interval_lies_within_the_margin(seed):
    found = equivalence(0.5 * normal(5, seed=seed), 0.6)
    assert found.equivalent == (found.interval.low >= -0.6 and found.interval.high <= 0.6)


TRUE = 1.959964 * np.sqrt(2)  # 95 % of pairs of standard normal retrained models are closer


def demonstrations(seeds: int, shift: float) -> np.ndarray:
    """How often a method ``shift`` x true δ off passes, with a δ from as many pairs of retrained models."""
    method, retrained, again = normal(3, 20000, seeds, seed=9)
    differences, gaps = shift * TRUE + method - retrained, np.abs(retrained - again)
    margins = 1.959964 * np.sqrt((gaps**2).mean(axis=1))
    found = passes(differences, margins)
    for row in range(20):
        assert equivalence(differences[row], floor_margin(gaps[row]).delta).equivalent == found[row]
    return np.mean(found)


def test_with_seven_seeds_a_method_that_equals_retraining_passes_in_95_percent():
    assert demonstrations(7, 0) >= 0.95
    # The numbers that the docstring gives for fewer:
    assert demonstrations(3, 0) == pytest.approx(0.45, abs=0.01)
    assert demonstrations(5, 0) == pytest.approx(0.83, abs=0.01)


@pytest.mark.parametrize("seeds", [3, 7])
def test_a_method_that_is_two_margins_off_fails_in_95_percent(seeds):
    assert demonstrations(seeds, 2) <= 0.05


def test_a_method_exactly_at_a_given_margin_passes_in_five_percent():
    passed = sum(equivalence(values, 9.0).equivalent for values in 9 + normal(700, 7))
    assert within_four_sd(passed, 700, 0.05)


def test_no_difference_at_all_still_needs_five_seeds():
    assert [equivalence([0.0] * n, 1.0).equivalent for n in (2, 4, 5)] == [False, False, True]
    assert not equivalence([1.0] * 9, 1.0).equivalent


def test_non_inferiority_is_the_one_sided_test_of_scipy():
    distances = np.exp(0.3 * normal(6))
    found = non_inferiority(distances, 1.5)
    assert found.p == pytest.approx(scipy_stats.ttest_1samp(distances, 1.5, alternative="less").pvalue)
    assert found.equivalent == (found.interval.high <= 1.5)
    assert non_inferiority([0.0, 0.0, 0.3], 2.0).interval.low == 0


def divergences(seeds: int, shift: float, spread: float = 0.4) -> float:
    floors, own = np.exp(spread * normal(2, 20000, seeds))
    own += shift * np.exp(spread * 1.644854)  # x the true margin
    logs = np.log(floors)
    margins = np.exp(logs.mean(axis=1) + 1.644854 * logs.std(axis=1, ddof=1))
    found = scipy_stats.ttest_1samp(own - margins[:, None], 0, axis=1, alternative="less").pvalue <= 0.05
    for row in range(20):
        margin = floor_margin(floors[row], shape="divergence").delta
        assert non_inferiority(own[row], margin).equivalent == found[row]
    return float(np.mean(found))


def test_divergences_like_those_of_retrained_models_pass_in_95_percent_with_twelve_seeds():
    assert divergences(12, 0) >= 0.95
    assert divergences(12, 0, spread=0.1) >= 0.95
    # The numbers that the docstring gives for fewer:
    assert divergences(5, 0) == pytest.approx(0.76, abs=0.01)
    assert divergences(7, 0) == pytest.approx(0.86, abs=0.015)


@pytest.mark.parametrize("seeds", [3, 7, 12])
def test_divergences_two_margins_off_fail_in_95_percent(seeds):
    assert divergences(seeds, 2) <= 0.05


# The margin and the floor


def test_the_margin_of_a_few_gaps_is_a_half_normal_quantile():
    found = floor_margin([1.0, 2.0, 2.0])
    assert found.delta == pytest.approx(scipy_stats.halfnorm.ppf(0.95, scale=np.sqrt(3.0)))
    assert (found.estimate, found.n) == ("half-normal", 3)


def test_the_margin_of_a_few_divergences_is_a_log_normal_quantile():
    logs = np.array([0.1, 0.5, -0.2])
    found = floor_margin(np.exp(logs), shape="divergence")
    assert found.delta == pytest.approx(scipy_stats.lognorm.ppf(0.95, logs.std(ddof=1), scale=np.exp(logs.mean())))
    assert found.estimate == "log-normal"
    assert floor_margin([0.0, 1.0], shape="divergence").estimate == "half-normal"  # there is no logarithm of 0


def test_the_margin_of_many_distances_is_their_quantile():
    values = np.abs(normal(40))
    assert floor_margin(values).delta == np.quantile(values, 0.95)
    assert floor_margin(values).estimate == "empirical"
    assert floor_margin(values[:39]).estimate == "half-normal"


@pytest.mark.parametrize(("shape", "truth"), [("gap", 1.959964 * np.sqrt(2)), ("divergence", np.exp(0.822427))])
def test_the_margin_is_near_the_truth_on_average_at_any_number(shape, truth):
    for count in (5, 10):
        draws = np.sqrt(2) * np.abs(normal(300, count)) if shape == "gap" else np.exp(0.5 * normal(300, count))
        margins = [floor_margin(each, shape=shape).delta for each in draws]
        assert np.mean(margins) == pytest.approx(truth, rel=0.1)


def test_over_all_pairs_the_margin_is_that_of_the_standard_deviation():
    models = normal(6)
    floor = noise_floor(models.tolist(), lambda a, b: abs(a - b))
    assert len(floor) == 15
    assert floor_margin(floor).delta == pytest.approx(1.959964 * np.sqrt(2) * models.std(ddof=1), rel=1e-6)


def test_the_floor_holds_the_distance_of_every_pair_in_order():
    assert noise_floor(["a", "ccc", "bb"], lambda a, b: len(a) * 10 + len(b)).tolist() == [13, 12, 32]


# What a caller may get wrong


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: t_interval([1.0]), ConfigError, "1 values of shape .* needs at least 2, one a seed"),
        (lambda: bootstrap([1.0]), ConfigError, "needs at least 2"),
        (lambda: t_interval([1.0, np.nan, np.inf]), NotFinite, "2 of 3 values are NaN or infinite"),
        (lambda: t_interval([1.0, 2.0], 95), ConfigError, "level=95: must lie between 0 and 1"),
        (lambda: paired([1.0, 2.0], [1.0]), MismatchError, "2 and 1 values"),
        (lambda: holm([0.1, 1.2]), ConfigError, r"1\.2\]: each lies in \[0, 1\]"),
        (lambda: equivalence([1.0, 2.0], 0.0), ConfigError, r"delta=0\.0: .* state a margin of your own"),
        (lambda: equivalence([1.0, 2.0], 1.0, level=0.95), ConfigError, r"level=0\.95: must lie between 0 and 0\.5"),
        (lambda: non_inferiority([1.0, -2.0], 1.0), ConfigError, "a distance of -2: .* Signed: equivalence"),
        (lambda: floor_margin([0.1, -0.1]), ConfigError, r"a distance of -0\.1"),
        (lambda: floor_margin([0.1]), ConfigError, "needs at least 2"),
        (lambda: floor_margin([0.1, 0.2], 1.0), ConfigError, r"quantile=1\.0"),
        (lambda: noise_floor([0], lambda a, b: 0.0), ConfigError, "1 retrained models: .* at least 2"),
    ],
)
def test_mistakes_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_without_scipy_the_cure_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(MissingExtra, match=r"pip install 'expunge\[eval\]'"):
        t_interval([1.0, 2.0])
