"""Scores of an attack are judged: area, accuracy and true positives, each with its interval."""

import numpy as np
import pytest
from scipy import stats as scipy_stats
from sklearn.metrics import balanced_accuracy_score, roc_auc_score, roc_curve

from expunge.errors import ConfigError
from expunge.metrics.roc import area, judge, placements, wilson

pytestmark = pytest.mark.usefixtures("one_thread")


def draws(*names: int) -> np.random.Generator:
    return np.random.default_rng([23, *names])


def test_the_area_is_that_of_scikit_learn_also_with_ties():
    generator = draws(0)
    for members, unseen in ((generator.normal(1, 1, 30), generator.normal(0, 1, 50)), (np.arange(9) % 3.0, np.ones(7))):
        truth = np.repeat([1, 0], [len(members), len(unseen)])
        expected = roc_auc_score(truth, np.concatenate([members, unseen]))
        assert judge(members, unseen).auc == pytest.approx(expected)


def test_the_variance_of_the_area_is_delongs_by_hand():
    members, unseen = np.array([3.0, 1.0, 2.5, 4.0, 0.5]), np.array([0.0, 2.0, 1.5, 0.7, 3.5, 1.0])
    above = np.array([[0.5 if m == u else float(m > u) for u in unseen] for m in members])
    auc = above.mean()
    variance = above.mean(axis=1).var(ddof=1) / 5 + above.mean(axis=0).var(ddof=1) / 6
    found = judge(members, unseen).auc_interval
    logits = [np.log(each / (1 - each)) for each in (found.low, auc, found.high)]
    half = 1.959964 * np.sqrt(variance) / (auc * (1 - auc))
    assert np.diff(logits) == pytest.approx([half, half], rel=1e-5)


def test_the_interval_of_the_area_covers_the_truth():
    true = scipy_stats.norm.cdf(1 / np.sqrt(2))
    covered = 0
    for number in range(400):
        generator = draws(1, number)
        found = area(*placements(generator.normal(1, 1, 25), generator.normal(0, 1, 40)))[1]
        covered += found.low <= true <= found.high
    assert 0.92 <= covered / 400 <= 0.98


def test_counting_models_widens_the_interval_where_scores_of_a_model_belong_together():
    generator = draws(2)
    shared = np.repeat(generator.normal(size=(2, 20)), 10, axis=1)
    members, unseen = shared + 0.1 * generator.normal(size=(2, 200))
    model = np.repeat(np.arange(20), 10)
    together = judge(members, unseen, clusters=(model, model)).auc_interval
    one_each = judge(members[::10], unseen[::10]).auc_interval
    alone = judge(members, unseen).auc_interval
    assert together.high - together.low == pytest.approx(one_each.high - one_each.low, rel=0.15)
    assert alone.high - alone.low < 0.5 * (together.high - together.low)
    single = judge(members, unseen, clusters=(np.arange(200),) * 2).auc_interval
    assert (single.low, single.high) == pytest.approx((alone.low, alone.high), rel=5e-3)


def test_scores_of_different_fits_are_not_ranked_against_each_other():
    members, unseen = np.array([1.0, 2, 3, 101, 102, 103]), np.array([0.0, 1.5, 0, 100, 101.5, 100])
    turn = np.repeat([0, 1], 3)
    found = judge(members, unseen, turns=(turn, turn))
    assert found.auc == pytest.approx(roc_auc_score([1, 1, 1, 0, 0, 0], [1, 2, 3, 0, 1.5, 0]))
    assert found.auc != judge(members, unseen).auc


def test_true_positives_have_a_threshold_for_each_fit_and_no_rate_is_claimed_for_them():
    generator = draws(10)
    members, unseen = generator.normal(1, 1, 80), generator.normal(0, 1, 400)
    turns = np.repeat([0, 1], 40), np.repeat([0, 1], 200)
    models = np.arange(80) % 8, np.arange(400) % 8
    found = judge(members, unseen, turns=turns, clusters=models).true_positives
    shifted = judge(members + 100 * turns[0], unseen + 100 * turns[1], turns=turns, clusters=models).true_positives
    by_hand = [members[turns[0] == k] > np.sort(unseen[turns[1] == k])[-3] for k in (0, 1)]
    assert found[0].value == shifted[0].value == pytest.approx(np.mean(by_hand))
    assert found[0].actual is None
    assert judge(members, unseen, clusters=models).true_positives[0].actual is None
    assert judge(members, unseen).true_positives[0].actual is not None
    assert (
        found[1].reason == "200 unseen records cannot show a false-positive rate of 0.001: it takes 1000 for each fit."
    )


def test_with_a_threshold_the_accuracy_is_the_balanced_one_of_scikit_learn():
    generator = draws(3)
    members, unseen = generator.normal(1, 1, 20), generator.normal(0, 1, 200)
    truth, said = np.repeat([1, 0], [20, 200]), np.concatenate([members, unseen]) > 0.4
    assert judge(members, unseen, threshold=0.4).accuracy == pytest.approx(balanced_accuracy_score(truth, said))


def test_a_threshold_is_chosen_on_other_records_than_it_is_judged_on():
    accuracies = [judge(*draws(4, n).normal(size=(2, 15)), seed=n).accuracy for n in range(150)]
    assert np.mean(accuracies) <= 0.5 + 4 * np.std(accuracies) / np.sqrt(150)  # fitted and judged at once: 0.62
    assert judge(np.arange(20, 30.0), np.arange(10.0)).accuracy == 1


def test_true_positives_at_a_low_rate_are_those_of_the_roc_curve_of_scikit_learn():
    generator = draws(5)
    members, unseen = generator.normal(2, 1, 200), generator.normal(0, 1, 2000)
    truth = np.repeat([1, 0], [200, 2000])
    false, true, _ = roc_curve(truth, np.concatenate([members, unseen]), drop_intermediate=False)
    for found in judge(members, unseen).true_positives:
        assert found.value == pytest.approx(true[false <= found.at + 1e-9].max())
        low, high = scipy_stats.binomtest(round(found.value * 200), 200).proportion_ci(0.95, "exact")
        assert (found.interval.low, found.interval.high) == pytest.approx((low, high))


def test_the_false_positive_rate_that_a_threshold_really_has_is_covered():
    covered = 0
    for number in range(300):
        unseen = draws(6, number).random(100)  # a threshold of t has a false-positive rate of 1 - t
        found = judge(np.zeros(5), unseen).true_positives[0]
        assert found.value == 0
        covered += found.actual.low <= 1 - np.sort(unseen)[-2] <= found.actual.high
    assert 0.95 - 4 * np.sqrt(0.95 * 0.05 / 300) <= covered / 300 <= 0.95 + 4 * np.sqrt(0.95 * 0.05 / 300)


def test_a_rate_that_the_unseen_records_cannot_show_is_not_given():
    first, second = judge(np.arange(10.0), np.arange(999.0)).true_positives
    assert first.value is not None
    assert second.value is None
    assert second.reason == "999 unseen records cannot show a false-positive rate of 0.001: it takes 1000."
    assert judge(np.arange(10.0), np.arange(1000.0)).true_positives[1].value is not None


def test_a_perfect_score_on_a_few_records_is_not_certain():
    found = judge(np.arange(20, 30.0), np.arange(10.0))
    assert found.auc == found.accuracy == 1
    assert found.auc_interval.low == pytest.approx(scipy_stats.binomtest(10, 10).proportion_ci(0.95, "exact").low)
    assert judge(np.arange(10.0), np.arange(10, 20.0)).auc_interval.low == 0


def test_wilsons_interval_is_that_of_scipy():
    for hits, of in ((0, 7), (3, 7), (7, 7)):
        expected = scipy_stats.binomtest(hits, of).proportion_ci(0.9, "wilson")
        found = wilson(hits, of, 0.9)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_too_few_scores_and_clusters_are_refused():
    with pytest.raises(ConfigError, match="4 members and 9 unseen records: an attack needs 5 of each"):
        judge(np.arange(4.0), np.arange(9.0))
    same = np.zeros(9, dtype=np.int64)
    with pytest.raises(ConfigError, match="1 cluster of scores"):
        judge(np.arange(9.0), np.arange(9.0), clusters=(same, same))
