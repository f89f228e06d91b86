"""Regressions are measured, audited and rehearsed like classifiers, in squared units of their targets."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from expunge import Examples, squared_error, train
from expunge.audit import residual
from expunge.bench import closeness
from expunge.bench.closeness import Seen
from expunge.cli import main
from expunge.errors import ConfigError, MismatchError, NotFinite
from expunge.metrics import membership
from expunge.metrics.compare import Measured, distances, divergence, profile
from expunge.metrics.outputs import Outputs, Predictions, answers, outputs
from expunge.metrics.regression import mean_squared_difference, mean_squared_error, r_squared, variance
from expunge.report.summaries import number
from expunge.rows import read_rows
from tests.reported import Page

pytestmark = pytest.mark.usefixtures("one_thread")

SETUP = """
import torch
from sklearn.datasets import load_diabetes
from torch import nn
from expunge import Examples, Recipe, seeded, squared_error

found = load_diabetes()
inputs = torch.tensor(20 * found.data, dtype=torch.float32)
targets = torch.tensor(found.target[:, None], dtype=torch.float32)  # 25 to 346
targets = (targets - targets.mean()) / targets.std()
data = Examples(inputs[:240], targets[:240])
loss_terms = squared_error
recipe = Recipe(epochs=40, lr=0.01, optimizer="adamw", batch_size=32)

def model(seed):
    with seeded(seed, "model"):
        return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))

def original():
    return data

def retain():
    return data.without(torch.arange(40))

def forget():
    return data.only(torch.arange(40))

def test():
    return Examples(inputs[240:], targets[240:])

def persons():
    return [row // 2 for row in range(200)]
"""
RELOAD = ("reload", "--fine-tune.epochs", "5", "--fine-tune.lr", "0.01", "--fine-tune.optimizer", "adamw")


def of(values, targets):
    return Predictions(np.array(values, dtype=float), np.array(targets, dtype=float))


def returned(values):
    """A model that returns these rows, whatever it is asked."""

    class Fixed(nn.Linear):
        def forward(self, rows):
            return values[rows.long()]

    return Fixed(1, 1)


def answered(values, targets, more=None):
    rows = torch.arange(len(targets), dtype=torch.float32)
    splits = {"retain": Examples(rows, targets)} | ({} if more is None else {"test": Examples(rows[: len(more)], more)})
    return answers(returned(values), splits)


# What a model says


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 2, 3)])
def test_errors_are_those_that_training_has(shape):
    generator = torch.Generator().manual_seed(0)
    values, targets = (torch.randn(shape, generator=generator) for _ in range(2))
    found = answered(values, targets)["retain"]
    assert found.values.shape == (4, max(1, values[0].numel()))
    terms = squared_error(returned(values), (torch.arange(4.0), targets))
    np.testing.assert_allclose(found.losses, terms.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "targets", "message"),
    [
        (torch.zeros(3, 1), torch.tensor([0.5, 1.5, 2.5]), r"float32 .* for 1 logits: .*of one shape"),
        (torch.zeros(3), torch.tensor([[0.5], [1.5], [2.5]]), r"\(3,\) with labels of shape \(3, 1\).*reshape one"),
        (
            torch.zeros(3),
            torch.tensor([5, 6, 7]),
            r"targets are torch\.int64, of the shape .* \(3,\).*targets\.float\(\)",
        ),
        (torch.zeros(3, 1), torch.tensor([[5], [6], [7]]), r"targets are torch\.int64, .* \(3, 1\).*floating point"),
        (torch.zeros(3), torch.tensor([[5], [6], [7]]), r"\(3,\) with labels of shape \(3, 1\)"),
        (torch.zeros(3, 3), torch.tensor([0.5, 1.5, 2.5]), r"labels torch.float32 .* are class numbers"),
        (torch.zeros(3), torch.tensor([0.0, 1.0, 1.0]), r"all targets are 0 or 1: two classes.*return two"),
        (torch.zeros(3, 1), torch.tensor([[1.0], [-1.0], [1.0]]), r"all targets are -1 or 1: two classes.*return two"),
        (
            torch.zeros(2, 2),
            torch.tensor([[0.0, 1.0], [1.0, 1.0]]),
            r"0 or 1: two classes.*measure one at a time, as two classes",
        ),
        (torch.zeros(2, 2), torch.tensor([[0.25, 0.75], [0.9, 0.1]]), r"add up to 1, as probabilities of classes do"),
        (torch.zeros(2, 3), torch.eye(3)[:2], r"add up to 1, .* class numbers, targets\.argmax\(1\)"),
        (torch.zeros(2), torch.tensor([0.5, torch.nan]), r"targets are NaN or infinite for 1 of 2 .*Leave"),
    ],
)
def test_what_is_no_regression_or_has_other_shapes_is_refused(values, targets, message):
    with pytest.raises(ConfigError, match=message):
        answered(values, targets)


def test_targets_of_0_and_1_are_those_of_a_regression_if_there_are_others():
    found = answered(torch.zeros(3), torch.tensor([0.0, 1.0, 2.0]), more=torch.tensor([0.0, 1.0]))
    assert isinstance(found["test"], Predictions)
    few, others = (Examples(torch.arange(2.0), torch.tensor(each)) for each in ([0.0, 1.0], [3.0, 4.0]))
    subject = residual.Subject(unlearned=returned(torch.zeros(2)), loss_terms=squared_error)
    assert "0.5 units²" in residual.quantisation(subject, few, others).words
    with pytest.raises(ConfigError, match="all targets are 0 or 1"):
        residual.quantisation(subject, few)


def test_shares_that_do_not_add_up_and_differences_that_do_are_numbers():
    for targets in (torch.tensor([[0.2, 0.7], [0.9, 0.1]]), torch.tensor([[-0.5, 1.5], [0.9, 0.1]])):
        assert isinstance(answered(torch.zeros(2, 2), targets)["retain"], Predictions)


def test_splits_of_both_kinds_are_refused():
    here = {"retain": Examples(torch.zeros(2, 4), torch.tensor([0, 1]))}
    with pytest.raises(ConfigError, match=r"retain: labels are class numbers\. test: targets are floating point"):
        answers(nn.Linear(4, 2), here | {"test": Examples(torch.zeros(2, 4), torch.tensor([[0.5, 3.0], [1.0, 1.0]]))})


def test_predictions_that_are_not_finite_are_refused():
    with pytest.raises(NotFinite, match="predictions are NaN or infinite for 1 of 2"):
        answered(torch.tensor([torch.inf, 0.0]), torch.tensor([0.5, 2.0]))


def test_what_needs_classes_refuses_a_regression():
    rows = Examples(torch.arange(3.0), torch.tensor([0.5, 1.5, 2.5]))
    with pytest.raises(ConfigError, match=r"as those of a regression: .* takes class numbers\..*evaluate"):
        outputs(returned(torch.zeros(3)), rows)
    subject = residual.Subject(unlearned=returned(torch.zeros(3)), loss_terms=squared_error)
    with pytest.raises(ConfigError, match="takes class numbers"):
        residual.trigger(subject, rows, None)


# Metrics


def test_errors_and_differences_worked_by_hand():
    one, other = of([[1, 2], [3, 5]], [[1, 0], [0, 1]]), of([[1, 1], [1, 1]], [[1, 0], [0, 1]])
    assert one.losses.tolist() == [4, 25]
    assert mean_squared_error(one) == 14.5
    assert mean_squared_difference(one, other) == divergence(one, other) == (1 + 20) / 2
    assert variance(one) == 0.5  # every target is (0.5, 0.5) from the mean
    with pytest.raises(MismatchError, match="the same split"):
        divergence(one, of([[1, 1], [1, 1]], [[1, 0], [0, 2]]))
    with pytest.raises(MismatchError, match="the same split"):
        divergence(one, Outputs(np.zeros((2, 2)), np.zeros(2, dtype=int)))
    assert r_squared(one) == 1 - 14.5 / 0.5
    assert r_squared(of([[1, 0], [0, 1]], [[1, 0], [0, 1]])) == 1
    with pytest.raises(ConfigError, match=r"all 2 targets are \[3\.0\]: there is nothing to predict"):
        r_squared(of([[0], [1]], [[3], [3]]))


def test_a_profile_of_a_regression_worked_by_hand():
    splits = {
        "retain": of([[2], [4]], [[1], [3]]),
        "forget": of([[1], [5]], [[0], [4]]),
        "test": of([[2], [2]], [[0], [0]]),
    }
    assert profile(splits, full=True).values == [
        Measured("Retain MSE", 1, "units²", "retain", 2),
        Measured("Forget MSE", 1, "units²", "forget", 2),
        Measured("Test MSE", 4, "units²", "test", 2),
        Measured("Loss below unseen", 3, "units²", "forget", 2),
        Measured("Loss above unseen", 0, "units²", "forget", 2),
    ]
    other = profile(splits | {"forget": of([[3], [4]], [[0], [4]])}, full=True)  # errors of 3 and 0, and 2 if unseen
    assert [each.value for each in other.values] == [1, 4.5, 4, 2, 2.5]
    varied = profile({"test": of([[2], [2]], [[0], [4]])}).values  # R² needs targets that differ
    assert varied == [Measured("Test MSE", 4, "units²", "test", 2), Measured("Test R²", 0, "fraction", "test", 2)]


def test_distances_of_a_regression_worked_by_hand():
    model = {"retain": of([[2], [4]], [[1], [3]]), "forget": of([[1], [5]], [[0], [4]])}
    retrained = {"retain": of([[1], [1]], [[1], [3]]), "forget": of([[3], [4]], [[0], [4]])}
    assert distances(profile(model), profile(retrained), full=True) == [
        Measured("ΔForget MSE", 3.5, "units²", "forget", 2),  # 1 and 4.5
        Measured("Retain MSD", 5, "units²", "retain", 2),  # 1 and 9
        Measured("Forget MSD", 2.5, "units²", "forget", 2),  # 4 and 1
        Measured("Under-forgetting", 4, "units²", "forget", 2),  # 1 and 9
        Measured("Over-forgetting", 0.5, "units²", "forget", 2),  # 1 and 0
    ]


@pytest.mark.parametrize("unit", [1e-4, 1e4])
def test_the_unit_of_the_target_does_not_matter_to_the_attack(unit):
    generator = np.random.default_rng(0)
    wide, narrow = generator.normal(size=(60, 1)), generator.normal(size=(20, 1)) / 3

    def found(scale):
        seen = {"forget": of(scale * narrow, 0 * narrow), "test": of(scale * wide, 0 * wide)}
        return {each.metric: each.value for each in profile(seen).values}

    one, other = found(1.0), found(unit)
    assert one["AUC"] > 0.7
    assert (other["FMIA"], other["AUC"]) == pytest.approx((one["FMIA"], one["AUC"]))
    assert other["Test MSE"] == pytest.approx(unit**2 * one["Test MSE"])


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.000123456, "0.000123"), (0.28, "0.280"), (99.96, "100"), (123.4, "123"), (1234567, "1.23e+06"), (0, "0.00")],
)
def test_squared_units_have_three_digits_whatever_their_size(value, shown):
    assert number(value, "units²") == shown


# The score of a rehearsal


def seen(left, forget, unseen=2.0):
    """A model with these errors on what is left, on the set and on unseen records; what is left has a variance of 4."""
    targets = np.array([[-2.0], [2.0]])
    return Seen(of(targets + left, targets), of([[forget]], [[0]]), of([[unseen]], [[0]]))


def test_the_score_of_a_regression_counts_squared_units_and_points_of_r2():
    before, after = seen(left=0.0, forget=0.0), seen(left=0.1, forget=1.0)
    found = closeness.against_unseen([before], [after])
    assert found.forgetting == pytest.approx(3)  # 1 where unseen records have 4
    assert found.usefulness == pytest.approx(0.01)
    assert found.lost == pytest.approx(0.25)  # 0.01 of a variance of 4, in per cent
    assert found.total == pytest.approx(3.01)


def test_a_regression_that_loses_more_than_it_may_is_no_better_than_nothing():
    before, after = seen(left=0.0, forget=0.0), seen(left=0.4, forget=2.0)
    found = closeness.against_unseen([before], [after])
    assert (found.forgetting, found.lost) == pytest.approx((0, 4))
    assert found.total == pytest.approx(4 + 3 * 4)  # no unlearning, and the variance for every point beyond the first
    assert closeness.against_unseen([before], [after], may_lose=0.05).total == pytest.approx(0.16)


def test_the_score_of_a_regression_against_retrained_models_counts_noise_floors():
    references, after = [seen(left=0.0, forget=1.0), seen(left=1.0, forget=2.0)], seen(left=3.0, forget=3.0)
    found = closeness.against_retrained([references], [after])
    assert found.forgetting == pytest.approx((8 + 5) / 2 / 3)
    assert found.usefulness == pytest.approx((9 + 4) / 2 / 1)


# From training to evidence


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A regression of the diabetes data that was trained, cached, unlearned and retrained three times."""
    folder = tmp_path_factory.mktemp("regression")
    names: dict = {}
    exec(SETUP, names)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("setup.py").write_text(SETUP, encoding="utf-8")
        model = names["model"](0)
        train(model, names["data"], squared_error, names["recipe"], seed=0)
        save_file(model.state_dict(), "w.safetensors")
        base = ["setup.py", "--weights", "w.safetensors"]
        assert main(["cache", *base, "--out", "c.safetensors"]) == 0
        assert main(["unlearn", *base, "--cache", "c.safetensors", "--out", "u.safetensors", *RELOAD]) == 0
        for seed in (1, 2, 3):
            assert main(["unlearn", *base, "--seed", str(seed), "--out", f"r{seed}.safetensors", "retrain"]) == 0
    return folder


@pytest.fixture
def folder(made, monkeypatch):
    monkeypatch.chdir(made)
    monkeypatch.setattr(membership, "DRAWS", 1)
    return made


RETRAINED = ("--retrained", *(f"r{seed}.safetensors" for seed in (1, 2, 3)))


def test_a_regression_is_evaluated_reported_and_put_into_evidence(folder, capsys):
    command = ["evaluate", "setup.py", "--weights", "u.safetensors", "--original", "w.safetensors", *RETRAINED]
    assert main([*command, "--out", "run"]) == 0
    assert "ΔForget MSE (units² ↓)" in capsys.readouterr().out
    rows = read_rows("run/rows.csv")
    value = {(row.method, row.metric, row.seed): row.value for row in rows}
    gaps = [abs(value["original", "Forget MSE", 0] - value["retrain", "Forget MSE", k]) for k in range(3)]
    assert [value["original", "ΔForget MSE", k] for k in range(3)] == pytest.approx(gaps)
    assert min(gaps) > 0.05  # it knew them better than models that never saw them
    assert not {row.metric for row in rows} & {"FA", "FE", "TA", "NSKL", "ECE", "Activation distance"}
    assert "nats" not in {row.unit for row in rows}
    for form, name in {"html": "html", "markdown": "md", "latex": "tex", "csv": "csv"}.items():
        assert main(["report", "run", "--format", form]) == 0
        text = Path(f"run/report.{name}").read_text(encoding="utf-8")
        assert "Forget MSD" in text
        assert "nats" not in text
        assert ("²" in text) == (form != "latex")  # which has it as mathematics
    page = Page(Path("run/report.html").read_text(encoding="utf-8"))
    assert {link[1:] for link in page.links} <= set(page.ids)
    text = Path("run/report.html").read_text(encoding="utf-8")
    assert "changed the <a" in text
    assert "right is of a larger error" in text
    assert "loss, units²" in text
    assert main(["evidence", "run"]) == 0
    evidence = json.loads(Path("run/evidence.json").read_text(encoding="utf-8"))
    assert any("Forget MSD" in outcome for outcome in evidence["outcomes"])
    assert not any("Nothing was measured on the removed" in gap for gap in evidence["not_shown"])
    assert "nats" not in Path("run/evidence.html").read_text(encoding="utf-8")
    assert main(["evidence", "run", "--verify"]) == 0


@pytest.mark.parametrize("judge", [("--like", "random"), ("--like", "person", "--records", "8", "--retrain", "2")])
def test_a_regression_is_rehearsed(folder, tmp_path, capsys, judge):
    base = ["rehearse", "setup.py", "--weights", "w.safetensors", "--cache", "c.safetensors"]
    out = str(tmp_path / "settings.json")
    assert main([*base, "--trials", "2", "--sets", "2", "--out", out, *judge, *RELOAD]) == 0
    printed = capsys.readouterr().out
    unseen = "units²; 0 is perfect" in printed and "points of R² lost" in printed
    assert unseen == ("random" in judge)
    assert json.loads(Path(out).read_text(encoding="utf-8"))["method"] == "reload"


@pytest.mark.parametrize("like", ["removed", "in-class", "class"])
def test_a_regression_has_no_classes_to_rehearse(folder, tmp_path, capsys, like):
    base = ["rehearse", "setup.py", "--weights", "w.safetensors", "--cache", "c.safetensors", "--retrain", "2"]
    assert main([*base, "--out", str(tmp_path / "settings.json"), "--like", like, *RELOAD]) == 2
    assert "a regression, which has no classes to draw from. Take --like random" in capsys.readouterr().err


def test_a_regression_is_audited_without_a_word_of_classes(folder, capsys):
    command = ["audit", "residual", "setup.py", "--original", "w.safetensors", *RETRAINED, "--json", "--weights"]
    assert main([*command, "w.safetensors"]) == 3
    tests = {each["test"]: each for each in json.loads(capsys.readouterr().out)["tests"]}
    assert tests["membership by loss"]["numbers"]["AUC"] > 0.5
    assert "units²" in tests["quantisation"]["words"]
    assert "forget accuracy" not in tests["quantisation"]["numbers"]
    assert not any("class" in each["words"] or "nats" in each["words"] for each in tests.values())
    preflight = ["audit", "preflight", "setup.py", "--weights", "w.safetensors", "--cache", "c.safetensors", "--json"]
    assert main(preflight) == 0
    words = {each["name"]: each["words"] for each in json.loads(capsys.readouterr().out)["checks"]}
    assert words.pop("something to forget").startswith("Was not looked at: targets are floating point, 1 an example")


def test_an_audit_takes_no_model_as_a_reference_for_itself(folder, capsys):
    command = ["audit", "residual", "setup.py", "--weights", "w.safetensors", "--retrained", "w.safetensors"]
    assert main(command) == 2
    assert "are the same weights" in capsys.readouterr().err


def test_relearning_at_a_rate_that_is_too_large_for_the_unit_says_so():
    data = Examples(1000 * torch.ones(20, 1), 5000 * torch.ones(20, 1))
    original, unlearned = nn.Linear(1, 1), nn.Linear(1, 1)
    nn.init.constant_(original.weight, 5)
    subject = residual.Subject(unlearned=unlearned, loss_terms=squared_error, original=original)
    found = residual.relearning(subject, data)
    assert found.verdict == "cannot tell"
    assert "too large for this loss" in found.words
