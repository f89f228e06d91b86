"""U-LiRA and KLOM, which compare populations of unlearned and of retrained models."""

import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats
from sklearn.metrics import roc_auc_score

from expunge.errors import ConfigError, MismatchError, NotFinite
from expunge.metrics.population import klom, u_lira
from expunge.metrics.roc import judge
from tests.test_roc import draws

pytestmark = pytest.mark.usefixtures("one_thread")


def populations(seed: int, shift: float, models: int = 16, records: int = 12) -> tuple[np.ndarray, np.ndarray]:
    generator = draws(10, seed)
    level = generator.normal(0, 3, records)  # records differ much more than models do
    unlearned, retrained = level + generator.normal(size=(2, models, records))
    return unlearned + shift, retrained


def test_u_lira_tells_populations_apart_that_differ_less_than_records_do():
    unlearned, retrained = populations(0, 2.0)
    assert judge(unlearned.ravel(), retrained.ravel()).auc < 0.7
    found = u_lira(unlearned, retrained)
    assert found.auc > 0.85  # the two Gaussians, known exactly, would give 0.92
    assert found.accuracy > 0.75


def test_u_lira_finds_a_difference_in_spread_alone():
    generator = draws(11)
    assert u_lira(generator.normal(size=(24, 20)), 4 * generator.normal(size=(24, 20))).auc > 0.75


def test_u_lira_is_at_chance_between_equal_populations_and_its_intervals_say_so():
    found = [u_lira(*populations(seed, 0.0)) for seed in range(150)]
    for values in ([each.auc for each in found], [each.accuracy for each in found]):
        assert np.mean(values) == pytest.approx(0.5, abs=4 * np.std(values, ddof=1) / np.sqrt(150))
        assert np.std(values) < 0.05
    for intervals in ([each.auc_interval for each in found], [each.accuracy_interval for each in found]):
        covered = np.mean([each.low <= 0.5 <= each.high for each in intervals])
        assert 0.95 - 4 * np.sqrt(0.95 * 0.05 / 150) <= covered < 1
        assert np.mean([each.high - each.low for each in intervals]) < 0.3


def test_u_lira_is_the_likelihood_ratio_of_scipys_gaussians():
    unlearned, retrained = populations(1, 1.0, models=6, records=5)
    below = []
    for fold, record in itertools.product(range(2), range(5)):
        held = np.arange(6) % 2 == fold
        fits = [scipy_stats.norm(p[~held, record].mean(), p[~held, record].std(ddof=1)) for p in (unlearned, retrained)]
        below.append(
            [fits[0].logpdf(each) - fits[1].logpdf(each) for each in (unlearned[held, record], retrained[held, record])]
        )
    scores = np.array(below).reshape(2, 5, 2, 3)  # fold, record, kind, model
    expected = np.mean(
        [
            roc_auc_score(np.repeat([1, 0], 15), np.concatenate([turn[:, 0].ravel(), turn[:, 1].ravel()]))
            for turn in scores
        ]
    )
    found = u_lira(unlearned, retrained)
    assert found.auc == pytest.approx(expected)
    assert found.accuracy == pytest.approx(((scores[:, :, 0] > 0).mean() + (scores[:, :, 1] <= 0).mean()) / 2)


def test_klom_is_the_divergence_of_histograms_by_hand():
    # Bins of width 2.5 over [0, 10]: unlearned 2, 1, 1, 0; retrained 0, 1, 1, 2.
    unlearned, retrained = np.array([[0.0], [1], [3], [6]]), np.array([[10.0], [8], [3], [6]])
    p, q = ((np.array(c) / 4 + 1e-5) / (1 + 4e-5) for c in ([2, 1, 1, 0], [0, 1, 1, 2]))
    assert klom(unlearned, retrained, bins=4) == pytest.approx([scipy_stats.entropy(p, q)])


def test_klom_against_a_naive_loop_over_numpys_histogram():
    unlearned, retrained = populations(2, 1.0, models=30)
    unlearned[0, 0] = 500.0  # clipped to 100
    for record, found in enumerate(klom(unlearned, retrained)):
        a, b = (np.clip(p[:, record], -100, 100) for p in (unlearned, retrained))
        edges = np.linspace(min(a.min(), b.min()), max(a.max(), b.max()), 21)
        p, q = (np.histogram(each, edges)[0] / 30 + 1e-5 for each in (a, b))
        assert found == pytest.approx(scipy_stats.entropy(p, q))


def test_equal_populations_have_a_klom_near_that_of_retrained_ones_and_different_ones_do_not():
    generator = draws(12)
    first, second, third = generator.normal(size=(3, 200, 40))
    floor = klom(first, second).mean()
    assert klom(first, third).mean() == pytest.approx(floor, rel=0.15)
    assert klom(first + 0.5, third).mean() > 1.3 * floor
    assert klom(first + 20, third).mean() == pytest.approx(np.log(1e5), abs=2.5)
    assert klom(first, first).tolist() == [0] * 40
    assert klom(np.ones((4, 1)), np.ones((4, 1))).tolist() == [0]


def test_populations_that_cannot_be_compared_are_refused():
    some = populations(0, 0.0, models=8)
    with pytest.raises(MismatchError, match="confidences of 12 and 11 records"):
        klom(some[0], some[1][:, 1:])
    with pytest.raises(MismatchError, match="8 unlearned and 7 retrained models: unequal numbers"):
        u_lira(some[0], some[1][1:])
    with pytest.raises(ConfigError, match="3 unlearned and 8 retrained models: populations need 4"):
        klom(some[0][:3], some[1])
    with pytest.raises(ConfigError, match=r"bins=1, limit=100\.0"):
        klom(*some, bins=1)
    with pytest.raises(NotFinite, match="1 of 96 confidences"):
        klom(np.where(np.arange(96).reshape(8, 12) == 5, np.inf, some[0]), some[1])
