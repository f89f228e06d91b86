import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset, TensorDataset

from expunge import Examples
from expunge.errors import ConfigError, NotFinite
from expunge.exact import certified
from expunge.exact.certified import Certified, extract_features
from expunge.metrics.outputs import outputs
from tests import zoo
from tests.contract import without_type_checks

GENEROUS = Certified(sigma=1.0, l2=0.1, epsilon=2.0, delta=0.1)


def data(count: int = 300, classes: int = 3, features: int = 5, seed: int = 0) -> Examples:
    """Classes that overlap, vectors of many lengths up to 1."""
    source = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=source)
    centres = torch.randn(classes, features, generator=source, dtype=torch.float64)
    inputs = centres[labels] + torch.randn(count, features, generator=source, dtype=torch.float64)
    lengths = torch.rand(count, 1, generator=source, dtype=torch.float64) ** 0.3
    return Examples(functional.normalize(inputs, dim=1) * lengths, labels)


def objective(weight: Tensor, examples: Examples, l2: float, b: Tensor) -> Tensor:
    """Written from the definition, for one-vs-rest with three classes or more."""
    features, labels = examples.tensors
    signs = torch.full((len(features), weight.shape[1]), -1.0, dtype=torch.float64)
    signs[torch.arange(len(features)), labels] = 1.0
    losses = torch.logaddexp(torch.zeros(()), -signs * (features @ weight))  # log(1 + exp(-y θᵀx))
    return losses.sum() + l2 * len(features) / 2 * weight.square().sum() + (b * weight).sum()


def gradient(weight: Tensor, examples: Examples, l2: float, b: Tensor) -> Tensor:
    weight = weight.detach().clone().requires_grad_(True)
    return torch.autograd.grad(objective(weight, examples, l2, b), weight)[0]


# The fit


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("l2", [1e-1, 1e-4])
def test_without_noise_the_fit_is_scikit_learns(classes, l2):
    examples = data(classes=classes)
    model = certified.fit(examples, Certified(sigma=1e-8, l2=l2), classes=classes, seed=0)
    features, labels = (tensor.numpy() for tensor in examples.tensors)
    reference = LogisticRegression(C=1 / (l2 * 300), fit_intercept=False, tol=1e-12, max_iter=10000, solver="newton-cg")
    if classes > 2:
        reference = OneVsRestClassifier(reference)
    reference.fit(features, labels)
    probabilities = model(examples.tensors[0]).softmax(1).numpy()
    np.testing.assert_allclose(probabilities, reference.predict_proba(features), atol=1e-6)


def test_the_fit_is_the_minimum_of_the_perturbed_objective_and_its_noise_is_normal():
    examples = data(features=40)
    config = Certified(sigma=2.0, l2=1e-2)
    model = certified.fit(examples, config, classes=3, seed=4)
    head = model.head
    assert gradient(head.weight, examples, 1e-2, head.b).norm() < 1e-10
    assert 1.5 < head.b.std() < 2.5
    assert torch.equal(head.b, certified.fit(data(50, features=40), config, classes=3, seed=4).head.b)
    assert not torch.equal(head.b, certified.fit(examples, config, classes=3, seed=5).head.b)


def test_the_fit_converges_from_far_away():
    examples = data()
    head = certified.fit(examples, Certified(sigma=1e3, l2=1e-3), classes=3, seed=0).head
    assert head.weight.norm() > 1e3
    assert gradient(head.weight, examples, 1e-3, head.b).norm() < 1e-8


# The step


def test_a_removal_is_the_newton_step_of_autograd():
    examples, gone = data(60), torch.tensor([5, 17, 40])
    model = certified.fit(examples, GENEROUS, classes=3, seed=0)
    before, b = model.head.weight.detach().clone(), model.head.b
    removal = model.remove(gone)
    left = examples.without(gone)
    hessian = torch.autograd.functional.hessian(lambda w: objective(w, left, 0.1, b), before).reshape(15, 15)
    step = torch.linalg.solve(hessian, -gradient(before, left, 0.1, b).flatten()).reshape(5, 3)
    torch.testing.assert_close(model.head.weight, before + step, rtol=0, atol=1e-11)
    # the bound as the paper writes it, for each class, then the root of the sum of squares
    features = left.tensors[0]
    each = [torch.linalg.svdvals(features)[0] * v.norm() * (features @ v).norm() / 4 for v in step.T]
    length = features.norm(dim=1).max()
    assert removal.outcome == "removed"
    assert removal.data_bound == pytest.approx(float(length * torch.stack(each).norm()), rel=1e-6)


def test_two_classes_are_one_direction():
    examples, gone = data(60, classes=2), torch.tensor([3])
    model = certified.fit(examples, GENEROUS, classes=2, seed=0)
    assert model.head.weight.shape == (5, 1)
    left, b = examples.without(gone), model.head.b

    def single(weight: Tensor) -> Tensor:
        scores = left.tensors[0] @ weight[:, 0]
        log_likely = functional.binary_cross_entropy_with_logits(scores, left.tensors[1].double(), reduction="sum")
        return log_likely + 0.1 * 59 / 2 * weight.square().sum() + (b * weight).sum()

    before = model.head.weight.detach().clone().requires_grad_(True)
    slope = torch.autograd.grad(single(before), before)[0]
    hessian = torch.autograd.functional.hessian(single, before).reshape(5, 5)
    model.remove(gone)
    torch.testing.assert_close(model.head.weight, before.detach() - torch.linalg.solve(hessian, slope))


def test_where_the_loss_is_all_but_quadratic_a_removal_is_retraining():
    """A heavy penalty keeps the scores near zero, where the third derivative of the loss vanishes."""
    examples, gone = data(100), torch.tensor([7])
    heavy = Certified(sigma=1e-3, l2=10.0, epsilon=2.0)
    model, other = (certified.fit(given, heavy, classes=3, seed=0) for given in (examples, examples.without(gone)))
    distance = (model.head.weight - other.head.weight).norm()
    model.remove(gone)
    assert distance > 1e-5
    assert (model.head.weight - other.head.weight).norm() < 1e-6 * distance


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_distance_to_retraining_is_within_the_bound(steps):
    examples, gone = data(100), torch.arange(10)
    config = Certified(sigma=0.1, l2=1e-2, steps=steps, epsilon=2.0, when_spent="refuse", delta=0.1)
    model, other = (certified.fit(given, config, classes=3, seed=0) for given in (examples, examples.without(gone)))
    model.head.config = Certified(sigma=1e6, l2=1e-2, steps=steps)  # a budget for anything
    distance = float((model.head.weight - other.head.weight).norm())
    removal = model.remove(gone)
    left = float((model.head.weight - other.head.weight).norm())
    assert left <= removal.spent / (1e-2 * 90)  # the objective's curvature is at least λn
    assert left < distance * [0.2, 1e-2, 1e-5][steps - 1]


# The bound


@pytest.mark.parametrize(
    ("classes", "bound", "sigma", "l2"), [(2, "data", 10.0, 0.05), (3, "data", 10.0, 0.05), (3, "worst-case", 1.0, 0.2)]
)
def test_over_a_thousand_removals_the_gradient_never_exceeds_the_bound(classes, bound, sigma, l2):
    examples = data(1300, classes=classes)
    config = Certified(sigma=sigma, l2=l2, bound=bound)
    model = certified.fit(examples, config, classes=classes, seed=1)
    order = torch.randperm(1300, generator=torch.Generator().manual_seed(0))[:1000]
    outcomes = set()
    largest = 0.0
    for position in order:
        removal = model.remove(position[None])
        true = model.head.residual()
        assert (true <= model.head.spent).all()
        assert removal.data_bound <= removal.worst_bound
        assert float(true.norm()) <= removal.spent <= removal.budget
        outcomes.add(removal.outcome)
        largest = max(largest, float(true.norm() / removal.spent)) if removal.outcome == "removed" else largest
    assert len(model.data) == 300
    assert (outcomes == {"removed"}) if bound == "data" else ("removed" in outcomes and "retrained" in outcomes)
    if bound == "data":
        assert largest > 1e-3  # a bound, not a guess a million times too large
    if classes == 3:  # the class's own gradient is also that of autograd
        truth = gradient(model.head.weight, model.data, l2, model.head.b).norm(dim=0)
        torch.testing.assert_close(truth, model.head.residual(), rtol=1e-6, atol=1e-12)


def test_many_at_once_cost_more_than_one_and_stay_within_the_bound():
    one, many = (certified.fit(data(), Certified(sigma=100.0, l2=1e-2), classes=3, seed=0) for _ in range(2))
    single, batch = one.remove(torch.tensor([0])), many.remove(torch.arange(30))
    assert float(many.head.residual().norm()) <= batch.data_bound <= batch.worst_bound
    assert batch.worst_bound > 500 * single.worst_bound  # grows as the square
    assert single.worst_bound == pytest.approx(
        float((2 + (one.head.b.norm(dim=0) / 300)).square().norm() / 4 / (1e-4 * 299)), rel=1e-4
    )


def test_further_steps_pay_off_what_earlier_removals_spent():
    config = Certified(sigma=1.0, l2=1e-2, steps=2)
    model = certified.fit(data(), config, classes=3, seed=0)
    for position in range(50):
        removal = model.remove(torch.tensor([position]))
        assert float(model.head.residual().norm()) <= removal.spent == removal.data_bound < 1e-4
        assert removal.outcome == "removed"


# The budget


def test_the_budget_hides_what_it_says():
    """Against the exact privacy of Gaussian noise (Balle & Wang, 2018)."""
    for epsilon in (0.01, 0.1, 1.0, 2.0):
        for delta in (0.5, 0.1, 1e-2, 1e-4, 1e-8):
            config = Certified(sigma=3.0, l2=1.0, epsilon=epsilon, delta=delta)
            shift = config.budget / 3.0
            exact = norm.cdf(shift / 2 - epsilon / shift) - math.exp(epsilon) * norm.cdf(-shift / 2 - epsilon / shift)
            assert exact <= delta
    assert Certified(sigma=10.0, l2=1.0).budget == pytest.approx(10 / math.sqrt(2 * math.log(15000)))


def small_budget(**settings: Any) -> certified.CertifiedLinear:
    return certified.fit(data(), Certified(sigma=0.02, l2=0.1, **settings), classes=3, seed=0)


def test_a_removal_beyond_the_budget_is_refused_and_changes_nothing():
    model = small_budget(when_spent="refuse")
    spent = []
    for position in range(300):
        weight, before = model.head.weight.clone(), float(model.head.spent.norm())
        removal = model.remove(torch.tensor([position]))
        if removal.outcome == "refused":
            break
        spent.append(removal.spent)
        assert not torch.equal(weight, model.head.weight)
    assert 1 <= len(spent) < 290
    assert spent == sorted(spent)
    assert spent[-1] <= removal.budget < spent[-1] + removal.data_bound
    assert removal.spent == before == spent[-1]
    assert torch.equal(weight, model.head.weight)
    assert len(model.data) == 300 - len(spent)
    assert model.remove(torch.tensor([position])).outcome == "refused"


def test_a_removal_beyond_the_budget_retrains_with_fresh_noise():
    model = small_budget()
    b = model.head.b
    positions = iter(range(300))
    while (removal := model.remove(torch.tensor([position := next(positions)]))).outcome == "removed":
        assert model.head.b is b
    assert removal.outcome == "retrained"
    assert not torch.equal(model.head.b, b)
    assert removal.spent < 1e-10
    assert len(model.data) == 299 - position
    assert gradient(model.head.weight, model.data, 0.1, model.head.b).norm() < 1e-10
    assert model.remove(torch.tensor([position + 1])).outcome == "removed"


def test_the_worst_case_spends_faster():
    assert small_budget(bound="worst-case").remove(torch.tensor([0])).outcome == "retrained"
    assert small_budget(bound="data").remove(torch.tensor([0])).outcome == "removed"


# As a model


def test_it_is_evaluated_like_a_model():
    examples = data()
    model = certified.fit(examples, GENEROUS, classes=3, seed=0)
    result = outputs(model, examples)
    assert result.logits.shape == (300, 3)
    assert result.correct.mean() > 0.6
    assert list(model.state_dict()) == ["head.weight"]  # no data, no noise
    assert model.trace.backwarded > 0
    assert list(model.trace.seconds) == ["fit"]


def test_the_same_seed_gives_the_same_bits_and_the_global_generator_stays():
    state = torch.get_rng_state()
    first, second = (certified.fit(data(), GENEROUS, classes=3, seed=0) for _ in range(2))
    for model in (first, second):
        model.remove(torch.tensor([4]))
    assert torch.equal(first.head.weight, second.head.weight)
    assert torch.equal(state, torch.get_rng_state())


def test_features_of_a_model_have_length_one_and_keep_their_positions():
    body = nn.Sequential(nn.Linear(zoo.FEATURES, 7), nn.BatchNorm1d(7), nn.Dropout(0.5)).double()
    examples = zoo.classification(30).without(torch.tensor([3, 4]))
    before = {name: value.clone() for name, value in body.state_dict().items()}
    features = extract_features(body, examples, batch_size=8)
    assert torch.equal(features.positions, examples.positions)
    torch.testing.assert_close(features.tensors[0].norm(dim=1), torch.ones(28, dtype=torch.float64))
    raw = body.eval()(examples.tensors[0])
    torch.testing.assert_close(features.tensors[0], (raw / raw.norm(dim=1, keepdim=True)).detach())
    assert torch.equal(features.tensors[1], examples.tensors[1])
    assert all(torch.equal(before[name], value) for name, value in body.state_dict().items())
    certified.fit(features, GENEROUS, classes=3, seed=0).remove(torch.tensor([5]))


def test_features_of_a_part_of_a_dataset_keep_the_positions_of_the_whole():
    inputs, labels = zoo.tensors(40)
    part = Subset(TensorDataset(inputs, labels), [*range(20, 40), 3])
    features = extract_features(nn.Flatten(), DataLoader(part, batch_size=8))  # which has no parameters
    assert features.positions.tolist() == [3, *range(20, 40)]
    torch.testing.assert_close(features.tensors[0][0], functional.normalize(inputs[3], dim=0))


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma": 0.0}, "sigma=0.0: must be a positive number"),
        ({"l2": -1.0}, "l2=-1.0: must be a positive number"),
        ({"l2": math.nan}, "l2=nan: must be a positive number"),
        ({"epsilon": 2.5}, r"epsilon=2.5: must be in \(0, 2\]"),
        ({"epsilon": 0.0}, r"epsilon=0.0: must be in \(0, 2\]"),
        ({"delta": 0.6}, r"delta=0.6: must be in \(0, 0.5\]"),
        ({"bound": "none"}, "bound='none': must be one of"),
        ({"steps": 0}, "steps=0: a removal takes at least 1"),
        ({"when_spent": "ignore"}, "when_spent='ignore': must be one of"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with without_type_checks(), pytest.raises(ConfigError, match=message):
        Certified(**({"sigma": 1.0, "l2": 1e-3} | settings))


@pytest.mark.parametrize("classes", [2, 3])
def test_class_numbers_of_any_whole_type_are_the_same(classes):
    features, labels = data(40, classes).tensors
    fitted = [
        certified.fit(Examples(features, labels.to(dtype)), GENEROUS, classes=classes, seed=0)
        for dtype in (torch.int64, torch.uint8, torch.int32)
    ]
    assert all(torch.equal(fitted[0].head.weight, each.head.weight) for each in fitted)


def test_a_head_goes_where_its_weights_go_and_stays_in_float64():
    model = certified.fit(data(40), GENEROUS, classes=3, seed=0)
    assert set(model.head.state_dict()) == {"weight"}
    assert {buffer.device.type for buffer in model.head.to("meta").buffers()} == {"meta"}
    model = certified.fit(data(40), GENEROUS, classes=3, seed=0).float()
    for asked in (model.head.residual, lambda: model.remove(torch.tensor([3]))):
        with pytest.raises(ConfigError, match=r"the head was made torch\.float32, and its bound holds in float64"):
            asked()


def test_data_that_cannot_work():
    features, labels = data(20).tensors
    for wrong, message in (
        (Examples(2 * features, labels), r"row \d+ of the features is .* long; the bound holds up to 1. Divide every"),
        (Examples(features, labels.double()), r"classes=3 with labels of type torch.float64 from 0.0 to 2.0"),
        (Examples(features, labels + 1), "classes=3 with labels of type torch.int64 from 1 to 3"),
        (Examples(features), r"data is Examples of shapes \[\(20, 5\)\]: .*extract_features"),
        ([(features, labels)], r"data is list of shapes \[\]: .*Examples\(features, labels\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            certified.fit(wrong, GENEROUS, classes=3, seed=0)


def test_removing_everything_or_nobody_is_refused():
    model = certified.fit(data(20), GENEROUS, classes=3, seed=0)
    with pytest.raises(ConfigError, match="all 20 records are to be removed"):
        model.remove(torch.arange(20))
    with pytest.raises(ConfigError, match="position 20 is not among these 20"):
        model.remove(torch.tensor([20]))
    assert len(model.data) == 20


def test_a_problem_that_float64_cannot_solve_is_reported():
    with pytest.raises(NotFinite, match=r"the gradient stays at .*, above the budget .* Raise l2=1e-12"):
        certified.fit(data(20), Certified(sigma=1e-18, l2=1e-12), classes=3, seed=0)
