import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from expunge import Examples
from expunge.errors import ConfigError, MismatchError
from expunge.exact import graph as graphs
from expunge.exact.graph import Graph, Propagation, propagate
from expunge.exact.head import Certified
from expunge.metrics.outputs import outputs
from tests.contract import without_type_checks

CONFIG = Certified(sigma=1.0, l2=0.1, epsilon=2.0, delta=0.1)
WAYS = [
    Propagation(steps=steps, normalisation=normalisation, all_steps=all_steps)
    for steps, normalisation, all_steps in itertools.product((0, 1, 3), ("row", "symmetric"), (False, True))
]


def graph(count: int = 30, seed: int = 0, share: float = 0.1, classes: int = 3) -> Graph:
    """A random graph whose neighbours tend to share a class; vectors of many lengths up to 1."""
    source = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=source)
    pairs = torch.triu_indices(count, count, 1).T
    likely = share * (1 + 2 * (labels[pairs[:, 0]] == labels[pairs[:, 1]]))
    edges = pairs[torch.rand(len(pairs), generator=source) < likely]
    features = torch.randn(count, 4, generator=source, dtype=torch.float64)
    features[torch.arange(count), labels] += 1.5
    lengths = torch.rand(count, 1, generator=source, dtype=torch.float64) ** 0.2
    train = torch.rand(count, generator=source) < 0.7
    return Graph(features=functional.normalize(features, dim=1) * lengths, edges=edges, labels=labels, train=train)


def dense(features: np.ndarray, adjacency: np.ndarray, how: Propagation) -> np.ndarray:
    """Propagation written with matrices; the adjacency without self loops."""
    looped = adjacency + np.eye(len(adjacency))
    degrees = looped.sum(1)
    scale = degrees[:, None] if how.normalisation == "row" else np.sqrt(np.outer(degrees, degrees))
    spread = looped / scale
    hops = [np.linalg.matrix_power(spread, k) @ features for k in range(how.steps + 1)]
    return np.concatenate(hops, 1) / len(hops) if how.all_steps else hops[-1]


def adjacency(given: Graph) -> np.ndarray:
    matrix = np.zeros((len(given.features),) * 2)
    for a, b in given.edges.tolist():
        matrix[a, b] = matrix[b, a] = 1
    return matrix


def some_edges(given: Graph, count: int, seed: int = 0) -> Tensor:
    return given.edges[torch.randperm(len(given.edges), generator=torch.Generator().manual_seed(seed))[:count]]


def fitted(given: Graph, how: Propagation | None = None, config: Certified = CONFIG, **options: Any) -> Any:
    return graphs.fit(given, how or Propagation(), config, **({"classes": 3, "seed": 0} | options))


# Propagation


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_propagation_equals_matrix_powers(how):
    given = graph()
    np.testing.assert_allclose(propagate(given, how), dense(given.features.numpy(), adjacency(given), how), atol=1e-13)


def test_edges_count_once_whatever_their_direction_and_loops_not_at_all():
    given = graph()
    messy = torch.cat([given.edges.flip(1), given.edges, torch.tensor([[4, 4], [0, 0]])])
    again = Graph(features=given.features, edges=messy, labels=given.labels, train=given.train)
    assert torch.equal(again.edges, given.edges)


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_after_removing_nodes_propagation_is_that_of_the_smaller_graph(how):
    given, gone = graph(), torch.tensor([3, 11, 29])
    model = fitted(given, how)
    model.remove(nodes=gone)
    kept = np.setdiff1d(np.arange(30), gone.numpy())
    smaller = dense(given.features.numpy()[kept], adjacency(given)[np.ix_(kept, kept)], how)
    np.testing.assert_allclose(model.propagated[kept], smaller, atol=1e-13)
    assert not model.propagated[gone].any()
    assert not model.graph.features[gone].any()
    assert not model.graph.train[gone].any()
    assert not torch.isin(model.graph.edges, gone).any()


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_after_removing_edges_and_features_propagation_is_that_of_the_changed_graph(how):
    given = graph()
    model = fitted(given, how)
    gone = some_edges(given, 4)
    matrix, features = adjacency(given), given.features.numpy().copy()
    for a, b in gone.tolist():
        assert matrix[a, b] == 1
        matrix[a, b] = matrix[b, a] = 0
    model.remove(edges=gone.flip(1))  # either direction
    np.testing.assert_allclose(model.propagated, dense(features, matrix, how), atol=1e-13)
    features[[2, 8]] = 0
    model.remove(features=torch.tensor([2, 8]))
    np.testing.assert_allclose(model.propagated, dense(features, matrix, how), atol=1e-13)
    assert np.array_equal(adjacency(model.graph), matrix)  # features go, edges stay
    assert not model.graph.train[[2, 8]].any()


# The step and the bound


def objective(weight: Tensor, given: Graph, how: Propagation, l2: float, b: Tensor) -> Tensor:
    """Written from the definition, with matrices."""
    features = torch.from_numpy(dense(given.features.numpy(), adjacency(given), how))[given.train]
    signs = 2.0 * functional.one_hot(given.labels[given.train], 3) - 1
    losses = torch.logaddexp(torch.zeros(()), -signs * (features @ weight))
    return losses.sum() + l2 * len(features) / 2 * weight.square().sum() + (b * weight).sum()


def gradient(model: Any, given: Graph | None = None, weight: Tensor | None = None) -> Tensor:
    weight = (model.head.weight if weight is None else weight).detach().clone().requires_grad_(True)
    value = objective(weight, given or model.graph, model.how, model.head.config.l2, model.head.b)
    return torch.autograd.grad(value, weight)[0]


REMOVALS = {
    "nodes": lambda given: {"nodes": torch.tensor([3, 11])},
    "edges": lambda given: {"edges": some_edges(given, 3)},
    "features": lambda given: {"features": torch.tensor([5, 6])},
    "all": lambda given: {
        "nodes": torch.tensor([3]),
        "edges": some_edges(given, 2),
        "features": torch.tensor([3, 7]),
    },
}


@pytest.mark.parametrize("kind", REMOVALS)
@pytest.mark.parametrize("how", WAYS[4:8], ids=str)
def test_a_removal_is_the_newton_step_of_autograd(kind, how):
    given = graph()
    model = fitted(given, how, Certified(sigma=10.0, l2=1.0, epsilon=2.0))
    assert gradient(model).norm() < 1e-10
    before, b = model.head.weight.detach().clone(), model.head.b
    removal = model.remove(**REMOVALS[kind](given))
    assert removal.outcome == "removed"
    count = before.numel()
    hessian = torch.autograd.functional.hessian(lambda w: objective(w, model.graph, how, 1.0, b), before)
    step = torch.linalg.solve(hessian.reshape(count, count), -gradient(model, weight=before).flatten())
    torch.testing.assert_close(model.head.weight, before + step.reshape(before.shape), rtol=0, atol=1e-11)
    assert step.norm() > 1e-3


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("how", [WAYS[0], *WAYS[4:]], ids=str)
def test_the_gradient_never_exceeds_the_bound_and_the_bound_not_the_worst_case(how, seed):
    given = graph(80, seed, share=0.03)
    model = fitted(given, how, Certified(sigma=100.0, l2=0.5))
    source = torch.Generator().manual_seed(seed)
    for turn in range(30):
        kind = ("nodes", "edges", "features")[turn % 3]
        node = torch.randint(80, (1 + turn % 2,), generator=source).unique()
        what = some_edges(model.graph, 1 + turn % 2, turn) if kind == "edges" else node
        removal = model.remove(**{kind: what})
        true = gradient(model).norm(dim=0)
        assert (true <= model.head.spent + 1e-12).all()
        assert float(true.norm()) <= removal.spent + 1e-12
        assert removal.data_bound <= removal.worst_bound
        assert removal.outcome == "removed"


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_nodes_move_no_further_than_in_the_worst_case_and_vectors_are_no_longer(how):
    share_of_bound = []
    for seed in range(40):
        given = graph(12, seed, share=0.15)
        aligned = given.features * 0 + torch.tensor([1.0, 0, 0, 0])
        aligned[torch.arange(0, 12, 2)] *= -1  # far apart
        given = Graph(features=aligned, edges=given.edges, labels=given.labels, train=given.train | True)
        model = fitted(given, how)
        for kind in ("nodes", "edges", "features", "all"):
            what = REMOVALS[kind](given)
            if len(what.get("edges", [0])) == 0:
                continue
            left = given
            for name, value in sorted(what.items()):  # edges, features, nodes
                left = getattr(left, f"without_{name}")(value)
            radius, drift = model._worst_case(left)
            after = propagate(left, how)
            moved = float((after - model.propagated)[left.train].norm(dim=1).sum())
            assert moved <= drift + 1e-9
            assert float(torch.cat([after, model.propagated]).norm(dim=1).max()) <= radius + 1e-9
            share_of_bound.append(moved / drift if drift else 0.0)
    assert (max(share_of_bound) > 0.1) == (how.steps > 0)  # a bound, not a guess


def test_the_worst_case_of_one_edge_and_one_feature_is_the_papers():
    given = graph()
    model = fitted(given, Propagation(steps=3))
    assert model._worst_case(given.without_edges(some_edges(given, 1))) == (1.0, 4 * 3)
    node = int(given.degrees().argmax())
    degree = float(given.degrees()[node])
    assert model._worst_case(given.without_features(torch.tensor([node]))) == (1.0, degree)
    # a node: the paper has K (2 d - 1), itself included in d; only its edges to others count here
    assert model._worst_case(given.without_nodes(torch.tensor([node]))) == (1.0, 2 * 3 * (degree - 1))


# The budget


def test_removals_beyond_the_budget_are_refused_or_retrained():
    given = graph(80, share=0.03)
    small = {"sigma": 0.3, "l2": 0.1}
    refuse = fitted(given, config=Certified(**small, when_spent="refuse"))
    retrain = fitted(given, config=Certified(**small))
    b = retrain.head.b
    for node in range(70):
        before, weight = refuse.graph, refuse.head.weight.clone()
        outcomes = [model.remove(nodes=torch.tensor([node])).outcome for model in (refuse, retrain)]
        if outcomes[0] == "refused":
            break
        assert outcomes == ["removed", "removed"]
    assert 1 <= node < 69
    assert outcomes == ["refused", "retrained"]
    assert refuse.graph is before
    assert torch.equal(refuse.head.weight, weight)
    torch.testing.assert_close(refuse.propagated, propagate(before, refuse.how))
    assert not torch.equal(retrain.head.b, b)
    assert gradient(retrain).norm() < 1e-10
    assert not retrain.graph.train[node]


# As a model


def test_it_is_evaluated_like_a_model():
    given = graph(200, share=0.02)
    model = fitted(given, config=Certified(sigma=0.1, l2=1e-2))
    unseen = (~given.train).nonzero()[:, 0]
    result = outputs(model, Examples(unseen, given.labels[unseen]))
    assert result.logits.shape == (len(unseen), 3)
    assert result.correct.mean() > 0.6
    assert list(model.state_dict()) == ["head.weight"]
    state = torch.get_rng_state()
    again = fitted(given, config=Certified(sigma=0.1, l2=1e-2))
    for each in (model, again):
        each.remove(nodes=torch.tensor([0]), edges=given.edges[-1:])
    assert torch.equal(model.head.weight, again.head.weight)
    assert torch.equal(state, torch.get_rng_state())
    assert set(model.trace.seconds) == {"fit", "remove"}
    assert model.trace.backwarded > 0


# What is refused


def test_what_cannot_work():
    given = graph()
    parts = {"features": given.features, "edges": given.edges, "labels": given.labels, "train": given.train}
    for changes, error, message in (
        ({"labels": given.labels[:-1]}, MismatchError, r"labels \(29,\).*must be \(n, features\)"),
        ({"edges": torch.tensor([[0, 30]])}, ConfigError, "an edge joins nodes that do not exist: nodes are 0 to 29"),
        ({"edges": torch.tensor([[-1, 3]])}, ConfigError, "an edge joins nodes that do not exist"),
        ({"edges": torch.empty(0, 2)}, ConfigError, r"edges of type torch\.float32: give pairs of node numbers"),
        ({"features": given.features * 2}, ConfigError, r"row \d+ of the features is .* long"),
        ({"labels": given.labels + 1}, ConfigError, "classes=3 with labels of type torch.int64 from 1 to 3"),
        ({"train": given.train & False}, ConfigError, "train marks no node"),
    ):
        with without_type_checks(), pytest.raises(error, match=message):
            fitted(Graph(**(parts | changes)))
    with pytest.raises(ConfigError, match="steps=-1: must be 0 or more"):
        Propagation(steps=-1)
    with without_type_checks(), pytest.raises(ConfigError, match=r"nodes of type torch\.bool: give their numbers"):
        given.without_nodes(given.train)


def test_removing_what_is_not_there_changes_nothing():
    given = graph()
    model = fitted(given)
    missing = next(pair for pair in itertools.combinations(range(30), 2) if list(pair) not in given.edges.tolist())
    for request, message in (
        (
            {"edges": torch.tensor([missing])},
            rf"edges \[\[{missing[0]}, {missing[1]}\]\] are not in the graph \(1 such",
        ),
        ({"edges": torch.tensor([[2, 2]])}, r"edges \[\[2, 2\]\] are not in the graph"),
        ({"edges": torch.tensor([[0, 900]])}, r"edges \[\[0, 900\]\] are not in the graph"),
        ({"nodes": torch.tensor([30])}, r"nodes \[30\]: the graph has nodes 0 to 29"),
        ({"features": torch.tensor([-1])}, r"nodes \[-1\]: the graph has nodes 0 to 29"),
        ({"nodes": torch.arange(30)}, "no training node would be left"),
        ({}, r"remove\(\) without anything to remove"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.remove(**request)
    assert model.graph is given
