import math
from typing import Any

import pytest
import torch

from expunge.curvature import Block, Curvature
from expunge.errors import ConfigError, MismatchError, NotFinite, NotInformative
from expunge.selectors import (
    SELECTORS,
    Evidence,
    ekfac,
    knowledge_values,
    large_gradient,
    large_kv,
    large_ratio,
    obs,
    random,
    small_kv,
)

# |g_F| = 0, 3, 8, 1 and |g_D| = 3, 1, 8, 0; g_new = g_D - g_F = 3, 4, 0, 1; ε = 1
REMOVED = {"a": torch.tensor([0.0, -3.0]), "b": torch.tensor([[8.0], [-1.0]])}
FULL = {"a": torch.tensor([-3.0, 1.0]), "b": torch.tensor([[8.0], [0.0]])}
KNOWLEDGE = {"a": [1 / 4, 4 / 2], "b": [[9 / 9], [2 / 1]]}
# Re-initialised minus trained values, and the diagonal of the Fisher information
CHANGE = {"a": torch.tensor([5.0, 2.0]), "b": torch.tensor([[-1.0], [0.5]])}
FISHER = Curvature({"a": torch.tensor([2.0, 4.0]), "b": torch.tensor([[0.0], [10.0]])})


def evidence(**changes: Any) -> Evidence:
    return Evidence(**{"removed": REMOVED, "full": FULL, "eps": 1.0, "change": CHANGE, "curvature": FISHER} | changes)


def close(scores: dict[str, torch.Tensor], expected: dict[str, list]) -> bool:
    return list(scores) == list(expected) and all(
        torch.allclose(scores[name], torch.tensor(expected[name])) for name in expected
    )


def negated(values: dict[str, list]) -> dict[str, list]:
    return {name: torch.tensor(each).neg().tolist() for name, each in values.items()}


def test_knowledge_values_are_equation_8():
    assert close(knowledge_values(REMOVED, FULL, 1.0), KNOWLEDGE)


def test_small_and_large_knowledge_values_are_opposites():
    assert close(small_kv(evidence()), KNOWLEDGE)
    assert close(large_kv(evidence()), negated(KNOWLEDGE))


def test_large_gradient_ranks_by_what_was_removed_alone():
    assert close(large_gradient(evidence()), {"a": [0.0, -3.0], "b": [[-8.0], [-1.0]]})


def test_large_ratio_is_relative_to_what_is_left():
    assert close(large_ratio(evidence()), {"a": [-1 / 4, -4 / 5], "b": [[-9 / 1], [-2 / 2]]})


def test_obs_is_half_the_curvature_times_the_squared_change_minus_the_gradient_times_the_change():
    # ½ F δ² - g_F δ = 25 - 0, 8 + 6, 0 + 8, 1.25 + 0.5
    assert close(obs(evidence()), {"a": [25.0, 14.0], "b": [[8.0], [1.75]]})


def test_obs_predicts_the_loss_of_a_quadratic_exactly():
    """L_D = ½ Σ h (θ - θ*)², of which the removed part has gradient g_F at θ* and no curvature."""
    generator = torch.Generator().manual_seed(0)
    h, g, change = (torch.rand(7, generator=generator, dtype=torch.float64) for _ in range(3))
    scores = obs(
        Evidence(
            removed={"w": g},
            full={"w": torch.zeros(7, dtype=torch.float64)},
            eps=1.0,
            change={"w": change},
            curvature=Curvature({"w": h}),
        )
    )["w"]

    def left(theta: torch.Tensor) -> torch.Tensor:
        return (h * theta.square()).sum() / 2 - g @ theta  # θ* = 0

    for k in range(7):
        moved = torch.zeros(7, dtype=torch.float64)
        moved[k] = change[k]
        assert float(scores[k]) == pytest.approx(float(left(moved) - left(torch.zeros_like(moved))))


def test_ekfac_without_blocks_divides_by_the_damped_diagonal():
    floor = 0.5 * (2 + 4 + 0 + 10) / 4
    expected = {"a": [0.0, -3 / (4 + floor)], "b": [[-8 / floor], [-1 / (10 + floor)]]}
    assert close(ekfac(evidence(damping=0.5)), expected)


def test_ekfac_inverts_a_fisher_information_that_is_a_kronecker_product():
    """Solved once more by a dense matrix over weight and bias: F = G ⊗ A, groups of a convolution in a row."""
    generator = torch.Generator().manual_seed(2)
    groups, out, within = 2, 3, 5  # 4 inputs and a bias
    factors = [torch.randn(groups, n, n, generator=generator, dtype=torch.float64) for n in (within, out)]
    A, G = ((f @ f.mT + torch.eye(f.shape[-1], dtype=torch.float64)) for f in factors)
    (values_a, inputs), (values_g, outputs) = torch.linalg.eigh(A), torch.linalg.eigh(G)
    other = torch.rand(3, generator=generator, dtype=torch.float64)
    block = Block(("conv.weight", "conv.bias"), inputs, outputs, values_g[:, :, None] * values_a[:, None, :])
    curvature = Curvature({"scale": other}, (block,))
    vector = {
        "scale": torch.randn(3, generator=generator, dtype=torch.float64),
        "conv.weight": torch.randn(groups * out, 2, 1, 2, generator=generator, dtype=torch.float64),
        "conv.bias": torch.randn(groups * out, generator=generator, dtype=torch.float64),
    }
    count = groups * out * within + 3
    floor = 0.3 * sum(float(torch.trace(A[i]) * torch.trace(G[i])) for i in range(groups)) / count
    floor += 0.3 * float(other.sum()) / count
    solved = curvature.solve(vector, 0.3)
    matrix = torch.cat([vector["conv.weight"].flatten(1), vector["conv.bias"][:, None]], 1)
    for i in range(groups):
        rows = slice(i * out, (i + 1) * out)
        dense = torch.kron(G[i], A[i]) + floor * torch.eye(out * within, dtype=torch.float64)
        expected = torch.linalg.solve(dense, matrix[rows].flatten()).view(out, within)
        torch.testing.assert_close(solved["conv.weight"].flatten(1)[rows], expected[:, :-1])
        torch.testing.assert_close(solved["conv.bias"][rows], expected[:, -1])
    torch.testing.assert_close(solved["scale"], vector["scale"] / (other + floor))
    assert list(solved) == list(vector)
    assert curvature.kronecker_share == pytest.approx(30 / 33)


def test_eps_smooths_towards_one():
    assert float(knowledge_values(REMOVED, FULL, 1e9)["a"][1]) == pytest.approx(1, abs=1e-6)
    assert float(knowledge_values(REMOVED, FULL, 1e-9)["a"][1]) == pytest.approx(3)


def test_random_depends_on_seed_and_name_and_not_on_the_order_or_the_values():
    first = random(evidence(seed=4))
    reordered = {name: REMOVED[name] * 7 for name in ("b", "a")}
    again = random(evidence(removed=reordered, eps=2.0, seed=4))
    other = random(evidence(seed=5))
    for name in REMOVED:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
    assert not torch.equal(first["a"], first["b"].flatten())


def test_random_ignores_the_global_generator_and_leaves_it_alone():
    before = torch.get_rng_state()
    first = random(evidence(seed=4))
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert torch.equal(first["a"], random(evidence(seed=4))["a"])


def test_random_is_uniform():
    entries = {"x": torch.zeros(20_000)}
    scores = random(Evidence(removed=entries, full=entries, eps=1.0))["x"]
    assert float(scores.min()) >= 0
    assert float(scores.max()) < 1
    counts = torch.histc(scores, 10, 0, 1)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 9 + 5 * 18**0.5  # chi-squared with 9 degrees of freedom


@pytest.mark.parametrize("name", SELECTORS)
def test_selectors_keep_names_shapes_and_types_and_leave_their_arguments_alone(name):
    removed = {key: value.double() for key, value in REMOVED.items()}
    full = {key: value.double() for key, value in FULL.items()}
    change = {key: value.clone() for key, value in CHANGE.items()}
    scores = SELECTORS[name](evidence(removed=removed, full=full, change=change, eps=0.5))
    assert list(scores) == list(removed)
    for key, value in REMOVED.items():
        assert scores[key].shape == value.shape
        assert scores[key].dtype == torch.float64
        assert torch.equal(removed[key], value.double())
        assert torch.equal(full[key], FULL[key].double())
        assert torch.equal(change[key], CHANGE[key])
        assert scores[key].data_ptr() not in (removed[key].data_ptr(), full[key].data_ptr(), change[key].data_ptr())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("removed", "the gradient of what was removed"),
        ("full", "the cached gradient"),
        ("change", "the change of values"),
    ],
)
def test_evidence_that_is_not_finite_is_refused(where, what, bad):
    poisoned = {"a": torch.tensor([1.0, bad]), "b": torch.zeros(2, 1)}
    with pytest.raises(NotFinite, match=f"{what}: tensor 'a' has 1 of 2 entries that are NaN or infinite"):
        evidence(**{where: poisoned})


def test_curvature_that_is_not_finite_is_refused():
    with pytest.raises(NotFinite, match="the curvature: tensor 'a' has 1 of 2 entries"):
        Curvature({"a": torch.tensor([math.nan, 1.0])})
    eye = torch.eye(2)[None]
    with pytest.raises(NotFinite, match="the curvature: tensor 'w' has 1 of 4 entries"):
        Curvature({}, (Block(("w",), eye, eye, torch.tensor([[[1.0, math.inf], [0, 0]]])),))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"eps": 0.0}, ConfigError, "eps=0.0: must be positive and finite"),
        ({"eps": math.nan}, ConfigError, "eps=nan: must be positive"),
        ({"damping": -1.0}, ConfigError, "damping=-1.0: must be positive"),
        ({"full": {"a": REMOVED["a"]}}, MismatchError, "only the gradient of what was removed has 'b'"),
        (
            {"change": {"a": REMOVED["a"], "b": torch.zeros(3)}},
            MismatchError,
            r"parameter 'b' has shape \(2, 1\) in the",
        ),
    ],
)
def test_evidence_that_does_not_fit_together_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        evidence(**changes)


def test_second_order_selectors_say_what_they_need():
    block = Block(("b",), torch.ones(1, 1, 1), torch.eye(2)[None], torch.ones(1, 2, 1))
    with pytest.raises(ConfigError, match=r"curvature=none, change=given: obs needs a diagonal curvature"):
        obs(evidence(curvature=None))
    with pytest.raises(ConfigError, match=r"curvature=diagonal, change=none: obs needs"):
        obs(evidence(change=None))
    with pytest.raises(ConfigError, match=r"curvature=in blocks"):
        obs(evidence(curvature=Curvature({"a": torch.ones(2)}, (block,))))
    with pytest.raises(ConfigError, match=r"curvature=none: ekfac needs one. See expunge.methods.kronecker"):
        ekfac(evidence(curvature=None))


def test_curvature_that_is_zero_or_undamped_is_refused():
    with pytest.raises(NotInformative, match="the Fisher information of what is left is zero"):
        ekfac(evidence(curvature=Curvature({"a": torch.zeros(2), "b": torch.zeros(2, 1)})))
    with pytest.raises(ConfigError, match=r"damping=0\.0: must be positive"):
        FISHER.solve(REMOVED, 0.0)
