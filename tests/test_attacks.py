import itertools
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from scipy import stats as scipy_stats
from sklearn.metrics import balanced_accuracy_score, roc_auc_score, roc_curve
from threadpoolctl import threadpool_limits

from expunge.errors import ConfigError, MismatchError, MissingExtra, NotFinite
from expunge.metrics import membership
from expunge.metrics.membership import loss_attack, matched_by_class, times_matched
from expunge.metrics.outputs import Outputs
from expunge.metrics.population import klom, u_lira
from expunge.metrics.reference_attacks import lira, rmia
from expunge.metrics.roc import Attack, area, judge, placements, wilson
from expunge.metrics.shadow import shadow_attack


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threadpool_limits(1):
        yield


def draws(*names: int) -> np.random.Generator:
    return np.random.default_rng([23, *names])


# Judging scores


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


# The loss attack's intervals, and unseen records of the same classes


def test_the_loss_attack_has_intervals_around_its_numbers():
    generator = draws(7)
    found = loss_attack(generator.exponential(0.5, 60), generator.exponential(1.0, 300))
    assert found.auc_interval.low < found.auc < found.auc_interval.high
    assert found.accuracy_interval.low < found.accuracy < found.accuracy_interval.high
    assert found.true_positives[0].value is not None
    assert found.n == 60
    assert 250 < found.unseen < 300  # 300 (1 - 0.8^10) are drawn at least once


def test_without_memory_the_interval_of_the_loss_attack_covers_chance_and_holds_its_area(monkeypatch):
    monkeypatch.setattr(membership, "DRAWS", 2)
    covered = 0
    for number in range(40):
        generator = draws(8, number)
        found = loss_attack(generator.exponential(1, 100), generator.exponential(1, 300))
        covered += found.auc_interval.low <= 0.5 <= found.auc_interval.high
        assert found.auc_interval.low <= found.auc <= found.auc_interval.high
    assert 0.95 - 3 * np.sqrt(0.95 * 0.05 / 40) <= covered / 40


def test_the_interval_of_the_loss_attack_is_delongs_of_the_loss_whichever_side_has_the_larger_one():
    generator = draws(9)
    small, large = generator.exponential(0.4, 80), generator.exponential(1.0, 200)
    expected = judge(-small, -large).auc_interval
    for members, unseen in ((small, large), (large, small)):
        found = loss_attack(members, unseen).auc_interval
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_matched_records_have_the_classes_of_the_removed_ones():
    wanted, pool = np.array([2, 2, 0]), np.array([0, 1, 2, 0, 2, 2, 1, 2, 2])
    rows = matched_by_class(wanted, pool, seed=1)
    assert sorted(pool[rows]) == [0, 2, 2]
    assert len(set(rows.tolist())) == 3
    assert times_matched(wanted, pool) == 2
    assert sorted(pool[matched_by_class(wanted, pool, times=None)]) == [0, 0, 2, 2, 2, 2]
    assert len({tuple(matched_by_class(wanted, pool, seed=seed)) for seed in range(20)}) > 3


def test_a_pool_with_too_few_records_of_a_class_is_named():
    with pytest.raises(ConfigError, match="2 removed records of class 1 and 1 unseen ones: matching needs 1"):
        matched_by_class(np.array([1, 1]), np.array([0, 1]))
    with pytest.raises(ConfigError, match="1 removed records of class 3 and 0 unseen ones"):
        matched_by_class(np.array([3]), np.array([0, 1]), times=None)


# LiRA and RMIA


def shadows(seed: int, memory: float, *, records: int = 60, models: int = 32, others: int = 100) -> dict:
    """Confidences of reference models and of a target that remembers records by ``memory``; records differ a lot."""
    generator = draws(8, seed)
    hard = generator.normal(1, 3, records)
    included = np.zeros((models, records), dtype=bool)
    for column in range(records):
        included[generator.permutation(models)[: models // 2], column] = True
    member = np.arange(records) < records // 2
    return {
        "target": hard + memory * member + generator.normal(size=records),
        "references": hard + memory * included + generator.normal(size=(models, records)),
        "included": included,
        "member": member,
        "population": (level := generator.normal(1, 3, others)) + generator.normal(size=others),
        "population_references": level + generator.normal(size=(models, others)),
    }


def log_p(confidences: np.ndarray) -> np.ndarray:
    return -np.log1p(np.exp(-confidences))


def attack(name: str, seed: int, memory: float) -> Attack:
    made = shadows(seed, memory)
    known = [made[key] for key in ("references", "included", "member")]
    if name.startswith("LiRA"):
        return lira(made["target"], *known, online="online" in name)
    population = {key: log_p(made[key]) for key in ("population", "population_references")}
    return rmia(log_p(made["target"]), log_p(known[0]), *known[1:], **population, online="online" in name)


ATTACKS = ["LiRA online", "LiRA offline", "RMIA online", "RMIA offline"]


@pytest.mark.parametrize("name", ATTACKS)
def test_memory_is_found_that_the_loss_alone_hardly_shows(name):
    found = np.mean([attack(name, seed, 2.0).auc for seed in range(6)])
    made = [shadows(seed, 2.0) for seed in range(6)]
    plain = np.mean([judge(m["target"][m["member"]], m["target"][~m["member"]]).auc for m in made])
    assert found > 0.7
    assert plain < found - 0.05


@pytest.mark.parametrize("name", ATTACKS)
def test_without_memory_the_attacks_are_at_chance(name):
    found = [attack(name, seed, 0.0) for seed in range(60)]
    for values in ([each.auc for each in found], [each.accuracy for each in found]):
        assert np.mean(values) == pytest.approx(0.5, abs=4 * np.std(values, ddof=1) / np.sqrt(60))
        assert np.std(values) < 0.12


@pytest.mark.parametrize("own", [True, False])
def test_lira_is_the_likelihood_ratio_of_scipys_gaussians_record_by_record(own):
    made = shadows(3, 1.5, records=12, models=10)
    included, references = made["included"], made["references"]
    split = [[references[kind[:, r], r] for r in range(12)] for kind in (included, ~included)]
    pooled = [np.sqrt(sum(((c - c.mean()) ** 2).sum() for c in columns) / (12 * 4)) for columns in split]
    scores, offline = [], []
    for record in range(12):
        parts = [
            scipy_stats.norm(columns[record].mean(), columns[record].std(ddof=1) if own else sd)
            for columns, sd in zip(split, pooled, strict=True)
        ]
        scores.append(parts[0].logpdf(made["target"][record]) - parts[1].logpdf(made["target"][record]))
        offline.append(parts[1].cdf(made["target"][record]))
    scores, offline = np.array(scores), np.array(offline)
    member = made["member"]
    arguments = (made["target"], references, included, member)
    assert lira(*arguments, per_record_variance=own) == judge(scores[member], scores[~member], threshold=0.0)
    assert lira(*arguments, per_record_variance=own, online=False).auc == judge(offline[member], offline[~member]).auc
    assert lira(*arguments) == lira(*arguments, per_record_variance=False)


@pytest.mark.parametrize("online", [True, False])
def test_rmia_counts_the_population_records_that_a_record_gains_on_by_gamma(online):
    made = shadows(4, 2.0, records=14, models=8, others=15)
    target, references, population, others = (
        log_p(made[key]) for key in ("target", "references", "population", "population_references")
    )
    included, member = made["included"], made["member"]
    scores = []
    for record in range(14):
        without = np.exp(references[~included[:, record], record]).mean()
        within = np.exp(references[included[:, record], record]).mean()
        usual = (without + within) / 2 if online else 0.5 * ((1 + 0.3) * without + (1 - 0.3))
        ratio = np.exp(target[record]) / usual
        ratios = []
        for z in range(15):
            mean = np.exp(others[:, z]).mean()
            ratios.append(ratio / (np.exp(population[z]) / (mean if online else 0.5 * (1.3 * mean + 0.7))))
        scores.append(np.mean([each >= 2.0 for each in ratios]))
    scores = np.array(scores)
    found = rmia(
        target, references, included, member, population=population, population_references=others, online=online
    )
    assert scores.std() > 0
    assert found == judge(scores[member], scores[~member])


def test_reference_models_that_do_not_fit_are_refused():
    made = shadows(0, 1.0, records=12, models=8)
    target, references, included, member = (made[key] for key in ("target", "references", "included", "member"))
    population = {key: made[key] for key in ("population", "population_references")}
    with pytest.raises(MismatchError, match=r"have the shapes \[\(12,\), \(8, 12\), \(7, 12\), \(12,\)\]"):
        lira(target, references, included[1:], member)
    with pytest.raises(MismatchError, match="all of the same records"):
        lira(target[1:], references, included, member)
    few = included.copy()
    few[:, 0] = [True] * 7 + [False]
    with pytest.raises(ConfigError, match="1 of 12 records have fewer than 2 reference models trained without it"):
        lira(target, references, few, member, online=False)
    few[:, 1] = False
    with pytest.raises(ConfigError, match=r"2 of 12 records .* trained with it and as many trained without it"):
        lira(target, references, few, member)
    with pytest.raises(ConfigError, match=r"gamma=0\.5, a=0\.3: gamma is at least 1"):
        rmia(target, references, included, member, **population, gamma=0.5)
    with pytest.raises(MismatchError, match="8 reference models and 99 population records"):
        rmia(target, references, included, member, **population | {"population": made["population"][1:]})
    with pytest.raises(NotFinite, match="1 of 6 scores are NaN or infinite"):
        lira(np.where(np.arange(12) == 2, np.nan, target), references, included, member)


# Shadow models


def memorising(seed: int, memory: float, count: int = 120, classes: int = 3) -> tuple[Outputs, np.ndarray]:
    generator = draws(9, seed)
    labels, member = np.arange(count) % classes, np.arange(count) % 2 == 0
    logits = generator.normal(size=(count, classes))
    logits[np.arange(count), labels] += 2 + labels + memory * member  # classes differ in difficulty
    return Outputs(logits, labels), member


def test_the_shadow_attack_finds_what_shadow_models_show():
    target, member = memorising(0, 4.0)
    found = shadow_attack(target, member, [memorising(seed, 4.0) for seed in (1, 2, 3)])
    assert found.auc > 0.85
    assert found.accuracy > 0.75
    losses = target.losses
    assert found.auc > judge(-losses[member], -losses[~member]).auc  # it knows the classes


def test_the_shadow_attack_is_at_chance_on_a_target_without_memory():
    remembering = [memorising(seed, 4.0) for seed in (1, 2)]
    found = [shadow_attack(*memorising(10 + seed, 0.0), remembering) for seed in range(5)]
    values = [each.auc for each in found]
    assert np.mean(values) == pytest.approx(0.5, abs=4 * np.std(values, ddof=1) / np.sqrt(5))
    assert np.std(values) < 0.1


def test_the_shadow_attack_names_what_is_missing(monkeypatch):
    target, member = memorising(0, 1.0)
    with pytest.raises(ConfigError, match="no shadow model"):
        shadow_attack(target, member, [])
    outputs, _ = memorising(1, 1.0)
    with pytest.raises(ConfigError, match="class 0: 40 shadow members and 0 others"):
        shadow_attack(target, member, [(outputs, np.ones(120, dtype=bool))])
    with pytest.raises(MismatchError, match="with 119 marks of membership"):
        shadow_attack(target, member, [(outputs, member[1:])])
    monkeypatch.setitem(sys.modules, "sklearn.neural_network", None)
    with pytest.raises(MissingExtra, match=r"expunge\[eval\]"):
        shadow_attack(target, member, [(outputs, member)])


# Populations


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


def test_too_few_scores_and_clusters_are_refused():
    with pytest.raises(ConfigError, match="4 members and 9 unseen records: an attack needs 5 of each"):
        judge(np.arange(4.0), np.arange(9.0))
    same = np.zeros(9, dtype=np.int64)
    with pytest.raises(ConfigError, match="1 cluster of scores"):
        judge(np.arange(9.0), np.arange(9.0), clusters=(same, same))
