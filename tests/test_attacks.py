"""Attacks on membership: by the loss, LiRA and RMIA with reference models, and shadow models."""

import sys

import numpy as np
import pytest
from scipy import stats as scipy_stats

from expunge.errors import ConfigError, MismatchError, MissingExtra, NotFinite
from expunge.metrics import membership
from expunge.metrics.membership import loss_attack, matched_by_class, times_matched
from expunge.metrics.outputs import Outputs
from expunge.metrics.reference_attacks import lira, rmia
from expunge.metrics.roc import Attack, judge
from expunge.metrics.shadow import shadow_attack
from tests.test_roc import draws

pytestmark = pytest.mark.usefixtures("one_thread")


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
