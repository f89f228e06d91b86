import copy
import sys
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import entropy
from sklearn.metrics import accuracy_score, log_loss
from torch import Tensor, nn

from expunge import Examples
from expunge.errors import ConfigError, MismatchError, MissingExtra, NotFinite
from expunge.metrics import membership
from expunge.metrics.classification import accuracy, cross_entropy, symmetric_kl
from expunge.metrics.compare import Measured, distances, profile
from expunge.metrics.membership import loss_attack
from expunge.metrics.outputs import Outputs, answers, outputs
from tests.contract import same, state, world

pytestmark = pytest.mark.usefixtures("one_thread")


def some(seed: int = 0, count: int = 40, classes: int = 5, scale: float = 3.0) -> Outputs:
    generator = np.random.default_rng(seed)
    return Outputs(scale * generator.normal(size=(count, classes)), np.arange(count) % classes)


# Metrics of stored outputs


def test_log_probabilities_are_those_of_scipy_also_where_exponentials_overflow():
    for split in (some(), some(scale=1000.0), Outputs(np.array([[1e5, 0.0, -1e5]]), np.array([1]))):
        np.testing.assert_allclose(split.log_probabilities, log_softmax(split.logits, axis=1), rtol=1e-12)


def test_cross_entropy_is_that_of_scikit_learn():
    split = some()
    probabilities = np.exp(log_softmax(split.logits, axis=1))
    assert cross_entropy(split) == pytest.approx(log_loss(split.labels, probabilities, labels=range(5)), rel=1e-9)
    np.testing.assert_allclose(split.losses, -np.log(probabilities[np.arange(40), split.labels]), rtol=1e-9)


def test_accuracy_is_that_of_scikit_learn_in_percent():
    split = some()
    assert accuracy(split) == pytest.approx(100 * accuracy_score(split.labels, split.logits.argmax(1)))
    assert 0 < accuracy(split) < 100
    right = np.eye(5)[split.labels]
    assert accuracy(Outputs(right, split.labels)) == 100
    assert accuracy(Outputs(-right, split.labels)) == 0


def test_symmetric_kl_is_the_sum_of_both_directions_of_scipy():
    a, b = some(0), some(1)
    p, q = (np.exp(log_softmax(each.logits, axis=1)) for each in (a, b))
    expected = np.mean(entropy(p, q, axis=1) + entropy(q, p, axis=1))
    assert symmetric_kl(a, b) == pytest.approx(expected, rel=1e-9)
    assert symmetric_kl(b, a) == pytest.approx(expected, rel=1e-9)


def test_symmetric_kl_is_zero_for_the_same_probabilities():
    a = some()
    assert symmetric_kl(a, a) == 0
    assert symmetric_kl(a, Outputs(a.logits + 7.0, a.labels)) == pytest.approx(0, abs=1e-12)


def test_symmetric_kl_by_hand():
    # softmax of (0, log 3) is (1/4, 3/4), of (0, 0) is (1/2, 1/2): (1/4 - 1/2)(-log 2) + (3/4 - 1/2)(log 3/2)
    a, b = (Outputs(np.array([[0.0, second]]), np.array([0])) for second in (np.log(3), 0.0))
    assert symmetric_kl(a, b) == pytest.approx(0.25 * np.log(2) + 0.25 * np.log(1.5))


@pytest.mark.parametrize("other", [some(count=39), some(classes=4), Outputs(some().logits, (some().labels + 1) % 5)])
def test_outputs_of_other_examples_are_not_compared(other):
    with pytest.raises(MismatchError, match="Measure both models on the same split"):
        symmetric_kl(some(), other)


# The one forward pass


def test_outputs_are_those_of_an_eval_forward_in_order_and_leave_the_model_alone():
    here = world("batch-norm")
    model = copy.deepcopy(here.model).train()
    next(iter(model.children())).eval()
    before, flags = state(model), [module.training for module in model.modules()]
    found = outputs(model, here.original, batch_size=7)
    assert same(before, state(model))
    assert [module.training for module in model.modules()] == flags
    expected = copy.deepcopy(model).eval()(here.original.tensors[0]).detach().double().numpy()
    np.testing.assert_allclose(found.logits, expected, rtol=1e-5, atol=1e-6)
    assert found.logits.dtype == np.float64
    assert found.labels.tolist() == here.original.tensors[1].tolist()


def test_outputs_of_a_float64_model_are_not_rounded():
    here = world()
    model = copy.deepcopy(here.model).double()
    inputs, labels = here.original.tensors
    found = outputs(model, Examples(inputs.double(), labels))
    assert np.array_equal(found.logits, model(inputs.double()).detach().numpy())


def test_outputs_read_batches_of_any_form_with_a_function_of_ones_own():
    here = world()
    batches = [{"image": x, "class": y} for x, y in here.original.fetch(torch.arange(60).split(9))]

    def logits(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return model(batch["image"]), batch["class"]

    found = outputs(here.model, batches, logits)
    np.testing.assert_allclose(found.logits, outputs(here.model, here.original).logits, rtol=1e-5, atol=1e-6)


def test_logits_that_are_not_finite_are_refused():
    here = world()
    inputs = here.original.tensors[0].clone()
    inputs[3], inputs[5] = float("nan"), float("inf")
    with pytest.raises(NotFinite, match="logits are NaN or infinite for 2 of 60 examples"):
        outputs(here.model, Examples(inputs, here.original.tensors[1]))
    with pytest.raises(NotFinite, match=r"^test: the model's logits are NaN"):
        answers(here.model, {"retain": here.retain, "test": Examples(inputs, here.original.tensors[1])})


def test_an_empty_split_is_refused():
    with pytest.raises(ConfigError, match="the split to measure on is empty"):
        outputs(world().model, [])
    with pytest.raises(ConfigError, match=r"^forget: the split to measure on is empty"):
        answers(world().model, {"retain": world().retain, "forget": []})


@pytest.mark.parametrize(
    ("logits", "shapes"),
    [
        (lambda model, batch: (model(batch[0])[None], batch[1]), r"\(1, 60, 3\) with labels of shape \(60,\)"),
        (
            lambda model, batch: (model(batch[0])[:, 0], batch[1]),
            r"int64, of the shape .*\(60,\).*floating.*return two",
        ),
        (lambda model, batch: (model(batch[0]), batch[1][:-1]), r"\(60, 3\) with labels of shape \(59,\)"),
        (lambda model, batch: (model(batch[0]), batch[1][:, None]), r"\(60, 3\) with labels of shape \(60, 1\)"),
    ],
)
def test_logits_and_labels_that_do_not_fit_are_refused(logits, shapes):
    here = world()
    with pytest.raises(ConfigError, match=shapes):
        outputs(here.model, here.original, logits)


# The membership attack


def test_planted_memorisation_is_found():
    generator = np.random.default_rng(0)
    attack = loss_attack(generator.exponential(0.02, 100), 3 + generator.exponential(1.0, 80))
    assert attack.accuracy > 0.97
    assert attack.auc > 0.999


def test_memorisation_is_found_whichever_side_has_the_larger_loss():
    generator = np.random.default_rng(0)
    attack = loss_attack(3 + generator.exponential(1.0, 50), generator.exponential(0.02, 50))
    assert attack.accuracy > 0.97
    assert attack.auc > 0.999


def test_losses_that_do_not_overlap_are_told_apart_without_error():
    found = loss_attack(np.linspace(0, 0.1, 20), np.linspace(10, 10.1, 25))
    assert (found.accuracy, found.auc, found.n) == (1.0, 1.0, 20)
    assert found.accuracy_interval.high == found.auc_interval.high == 1
    assert 0.7 < found.auc_interval.low < 1  # twenty records prove no more


def test_without_memorisation_the_attack_is_at_chance(monkeypatch):
    monkeypatch.setattr(membership, "DRAWS", 1)  # with fresh losses every time, more draws only cost time
    attacks = []
    for seed in range(60):
        generator = np.random.default_rng([7, seed])
        attacks.append(loss_attack(generator.exponential(1.0, 20), generator.exponential(1.0, 20), seed=seed))
    for values in ([each.auc for each in attacks], [each.accuracy for each in attacks]):
        assert np.mean(values) == pytest.approx(0.5, abs=4 * np.std(values, ddof=1) / np.sqrt(len(values)))
        assert np.std(values) < 0.15  # or the bound above would say nothing


def test_the_attack_is_balanced():
    losses = np.random.default_rng(0).exponential(1.0, 200)
    assert loss_attack(losses[:15], losses).n == 15
    assert loss_attack(losses, losses[:15]).n == 15
    # A guess at the larger side would be right 95 % of the time without balance.
    assert loss_attack(losses[:10], losses[10:]).accuracy < 0.8


def test_the_attack_is_deterministic_by_seed():
    generator = np.random.default_rng(1)
    members, unseen = generator.exponential(1.0, 30), generator.exponential(1.3, 200)
    assert loss_attack(members, unseen, seed=3) == loss_attack(members, unseen, seed=3)
    assert loss_attack(members, unseen, seed=3) != loss_attack(members, unseen, seed=4)


@pytest.mark.parametrize(("members", "unseen"), [(4, 100), (100, 4), (0, 0)])
def test_too_few_records_are_refused(members, unseen):
    with pytest.raises(ConfigError, match=f"{members} members and {unseen} unseen records: an attack needs 5 of each"):
        loss_attack(np.ones(members), np.ones(unseen))


def test_losses_that_are_no_numbers_are_refused():
    with pytest.raises(NotFinite, match="1 of 9 losses are NaN or infinite"):
        loss_attack(np.ones(9), np.r_[np.nan, np.ones(8)])


def test_without_scikit_learn_the_cure_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(MissingExtra, match=r"pip install 'expunge\[eval\]'"):
        loss_attack(np.ones(9), np.ones(9))


# All at once


def splits(seed: int) -> dict[str, Outputs]:
    return {"retain": some(seed), "forget": some(seed + 10, count=20), "test": some(seed + 20, count=30)}


def test_a_profile_holds_every_metric_on_its_split():
    model = splits(0)
    attack = loss_attack(model["forget"].losses, model["test"].losses, seed=5)
    assert profile(model, seed=5).values == [
        Measured("NA", accuracy(model["retain"]), "%", "retain", 40),
        Measured("FA", accuracy(model["forget"]), "%", "forget", 20),
        Measured("TA", accuracy(model["test"]), "%", "test", 30),
        Measured("FE", cross_entropy(model["forget"]), "nats", "forget", 20),
        Measured("FMIA", attack.accuracy, "fraction", "forget", 20),
        Measured("AUC", attack.auc, "fraction", "forget", 20),
    ]


def test_a_profile_leaves_out_what_its_splits_do_not_allow():
    model = splits(0)
    assert [each.metric for each in profile({"retain": model["retain"]}).values] == ["NA"]
    assert [each.metric for each in profile({"forget": model["forget"]}).values] == ["FA", "FE"]
    few, enough = ({"forget": some(count=count), "test": model["test"]} for count in (4, 5))
    assert [each.metric for each in profile(few).values] == ["FA", "TA", "FE"]
    assert [each.metric for each in profile(enough).values] == ["FA", "TA", "FE", "FMIA", "AUC"]
    found = distances(profile(enough), profile(enough))
    assert [each.metric for each in found] == ["ΔFA", "ΔFE", "ΔFMIA", "ΔAUC", "FSKL"]


def test_distances_are_absolute_gaps_and_divergences_to_the_retrained_model():
    model, retrained = splits(0), splits(100)
    own, reference = ({each.metric: each.value for each in profile(each).values} for each in (model, retrained))
    found = distances(profile(model), profile(retrained))
    assert found == [
        Measured("ΔFA", abs(own["FA"] - reference["FA"]), "points", "forget", 20),
        Measured("ΔFE", abs(own["FE"] - reference["FE"]), "nats", "forget", 20),
        Measured("ΔFMIA", abs(own["FMIA"] - reference["FMIA"]), "fraction", "forget", 20),
        Measured("ΔAUC", abs(own["AUC"] - reference["AUC"]), "fraction", "forget", 20),
        Measured("NSKL", symmetric_kl(model["retain"], retrained["retain"]), "nats", "retain", 40),
        Measured("FSKL", symmetric_kl(model["forget"], retrained["forget"]), "nats", "forget", 20),
    ]
    assert [each.value for each in distances(profile(retrained), profile(model))] == pytest.approx(
        [each.value for each in found]
    )


def test_a_model_has_no_distance_to_itself():
    assert [each.value for each in distances(profile(splits(0)), profile(splits(0)))] == [0] * 6


def test_distances_between_measurements_on_other_examples_are_refused():
    model, other = splits(0), splits(1) | {"forget": some(3, count=21)}
    with pytest.raises(MismatchError, match="the same split"):
        distances(profile(model), profile(other))
    with pytest.raises(MismatchError, match="measured on retain, forget, test and the other on retain, test"):
        distances(profile(model), profile({name: part for name, part in splits(1).items() if name != "forget"}))


@pytest.mark.parametrize(
    "labels", [torch.tensor([0.0, 1.0]), torch.tensor([0, 3]), torch.tensor([-1, 0]), torch.tensor([True, False])]
)
def test_labels_that_are_no_class_numbers_are_refused(labels):
    with pytest.raises(ConfigError, match=r"labels .* for 3 logits: labels are class numbers"):
        outputs(nn.Linear(4, 3), Examples(torch.zeros(2, 4), labels))
    with pytest.raises(ConfigError, match=r"Where there is no target \(-100\) leave logits and label out"):
        outputs(nn.Linear(4, 3), Examples(torch.zeros(2, 4), torch.tensor([0, -100])))


def test_class_numbers_for_one_output_are_told_what_a_classifier_and_a_regression_give():
    with pytest.raises(ConfigError, match=r"Of a regression .* floating point .* one logit let logits.* return two"):
        outputs(nn.Linear(4, 1), Examples(torch.zeros(2, 4), torch.tensor([0, 1])))
    with pytest.raises(ConfigError) as refused:  # no regression: nothing is said of one
        outputs(nn.Linear(4, 3), Examples(torch.zeros(2, 4), torch.tensor([0, 3])))
    assert "regression" not in str(refused.value)
