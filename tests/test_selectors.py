import pytest
import torch

from expunge.selectors import SELECTORS, knowledge_values, large_gradient, large_kv, large_ratio, random, small_kv

# |g_F| = 0, 3, 8, 1 and |g_D| = 3, 1, 8, 0; g_new = g_D - g_F = 3, 4, 0, 1; ε = 1
REMOVED = {"a": torch.tensor([0.0, -3.0]), "b": torch.tensor([[8.0], [-1.0]])}
FULL = {"a": torch.tensor([-3.0, 1.0]), "b": torch.tensor([[8.0], [0.0]])}
KNOWLEDGE = {"a": [1 / 4, 4 / 2], "b": [[9 / 9], [2 / 1]]}


def close(scores: dict[str, torch.Tensor], expected: dict[str, list]) -> bool:
    return list(scores) == list(expected) and all(
        torch.allclose(scores[name], torch.tensor(expected[name])) for name in expected
    )


def negated(values: dict[str, list]) -> dict[str, list]:
    return {name: torch.tensor(each).neg().tolist() for name, each in values.items()}


def test_knowledge_values_are_equation_8():
    assert close(knowledge_values(REMOVED, FULL, 1.0), KNOWLEDGE)


def test_small_and_large_knowledge_values_are_opposites():
    assert close(small_kv(REMOVED, FULL, 1.0, 0), KNOWLEDGE)
    assert close(large_kv(REMOVED, FULL, 1.0, 0), negated(KNOWLEDGE))


def test_large_gradient_ranks_by_what_was_removed_alone():
    assert close(large_gradient(REMOVED, FULL, 1.0, 0), {"a": [0.0, -3.0], "b": [[-8.0], [-1.0]]})


def test_large_ratio_is_relative_to_what_is_left():
    assert close(large_ratio(REMOVED, FULL, 1.0, 0), {"a": [-1 / 4, -4 / 5], "b": [[-9 / 1], [-2 / 2]]})


def test_eps_smooths_towards_one():
    assert float(knowledge_values(REMOVED, FULL, 1e9)["a"][1]) == pytest.approx(1, abs=1e-6)
    assert float(knowledge_values(REMOVED, FULL, 1e-9)["a"][1]) == pytest.approx(3)


def test_random_depends_on_seed_and_name_and_not_on_the_order_or_the_values():
    first = random(REMOVED, FULL, 1.0, 4)
    reordered = {name: REMOVED[name] * 7 for name in ("b", "a")}
    again = random(reordered, FULL, 2.0, 4)
    other = random(REMOVED, FULL, 1.0, 5)
    for name in REMOVED:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
    assert not torch.equal(first["a"], first["b"].flatten())


def test_random_ignores_the_global_generator_and_leaves_it_alone():
    before = torch.get_rng_state()
    first = random(REMOVED, FULL, 1.0, 4)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert torch.equal(first["a"], random(REMOVED, FULL, 1.0, 4)["a"])


def test_random_is_uniform():
    entries = {"x": torch.zeros(20_000)}
    scores = random(entries, entries, 1.0, 0)["x"]
    assert float(scores.min()) >= 0
    assert float(scores.max()) < 1
    counts = torch.histc(scores, 10, 0, 1)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 9 + 5 * 18**0.5  # chi-squared with 9 degrees of freedom


@pytest.mark.parametrize("name", SELECTORS)
def test_selectors_keep_names_shapes_and_types_and_leave_their_arguments_alone(name):
    removed = {key: value.double() for key, value in REMOVED.items()}
    full = {key: value.double() for key, value in FULL.items()}
    scores = SELECTORS[name](removed, full, 0.5, 0)
    for key, value in REMOVED.items():
        assert scores[key].shape == value.shape
        assert scores[key].dtype == torch.float64
        assert torch.equal(removed[key], value.double())
        assert torch.equal(full[key], FULL[key].double())
        assert scores[key].data_ptr() not in (removed[key].data_ptr(), full[key].data_ptr())
