"""Certified removal from a graph: nodes, edges or node features, for a linear classifier of propagated features.

Source: Chien, Pan & Milenkovic, "Certified Graph Unlearning" (2022; as "Efficient Model Updates for Approximate
Unlearning of Graph-Structured Data", ICLR 2023). The classifier is SGC (Wu et al., 2019): logistic regression on
Z = PᴷX, where P averages over a node and its neighbours. A removal changes the features of everybody within K steps:
Z is computed anew, and the classifier follows with the Newton step, bound and budget of `certified`, where Δ also holds
the change of the gradients of the nodes that stay. For any data, that change is at most 1 + ‖θ‖/4 times the distance S
by which their features move together: with P = D⁻¹A, S ≤ 2K for each neighbour lost at either end of an edge (4K for
an edge) and S ≤ the degree of a node, itself included, whose features go.

Deviations: those of `certified`; S counts lost edges in place of 2K times the degree of a node, and holds for many
removals at once. The paper has no bound for "symmetric" propagation, P = D^(-1/2) A D^(-1/2); ours: S ≤ 2K + 1 for each
neighbour lost and the root of the degree for features, with feature vectors as long as the root of the degree.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from expunge.errors import ConfigError, MismatchError
from expunge.exact.head import Certified, Head, Removal, require_classes, require_short
from expunge.trace import Trace

__all__ = ["CertifiedGraph", "Graph", "Propagation", "Removal", "fit", "propagate"]

Normalisation = Literal["row", "symmetric"]


@dataclass(frozen=True, kw_only=True)
class Propagation:
    """How features spread.

    Raises:
        ConfigError: A value that cannot work.
    """

    steps: int = 2  # K: how far
    normalisation: Normalisation = "row"  # D⁻¹A: a mean over neighbours; or "symmetric": D^(-1/2) A D^(-1/2)
    all_steps: bool = False  # features of every step, 0 to K, side by side and divided by K + 1: generalised PageRank

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ConfigError(f"steps={self.steps}: must be 0 or more.")
        if self.normalisation not in get_args(Normalisation):
            raise ConfigError(f"normalisation={self.normalisation!r}: must be one of {get_args(Normalisation)}.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Graph:
    """Nodes with features and class numbers, and edges without direction. A node keeps its number for life.

    Edges are kept once each, the smaller number first; those from a node to itself are left out, since propagation
    gives every node one.

    Raises:
        MismatchError: Tensors that do not fit together.
        ConfigError: An edge to a node that does not exist.
    """

    features: Float[Tensor, "nodes features"]
    edges: Int[Tensor, "edges 2"]
    labels: Int[Tensor, " nodes"]  # only those of training nodes are used
    train: Bool[Tensor, " nodes"]  # which nodes the classifier learns from

    def __post_init__(self) -> None:
        count = len(self.features)
        if self.labels.shape != (count,) or self.train.shape != (count,) or self.edges.shape[1:] != (2,):
            raise MismatchError(
                f"features {tuple(self.features.shape)}, edges {tuple(self.edges.shape)}, labels "
                f"{tuple(self.labels.shape)}, train {tuple(self.train.shape)}: must be (n, features), (edges, 2), (n,) "
                "and (n,)."
            )
        if self.edges.is_floating_point():
            raise ConfigError(f"edges of type {self.edges.dtype}: give pairs of node numbers, as edges.long().")
        object.__setattr__(self, "edges", canonical(self.edges))
        if len(self.edges) and not (int(self.edges.min()) >= 0 and int(self.edges.max()) < count):
            raise ConfigError(f"an edge joins nodes that do not exist: nodes are 0 to {count - 1}.")

    def without_nodes(self, nodes: Int[Tensor, " _"]) -> "Graph":
        """Nodes gone: no edges, features, label. Their numbers are not used again."""
        bare = self.without_features(nodes)  # refuses what are no nodes
        touched = torch.isin(self.edges, nodes).any(1)
        return Graph(features=bare.features, edges=self.edges[~touched], labels=bare.labels, train=bare.train)

    def without_features(self, nodes: Int[Tensor, " _"]) -> "Graph":
        """Features and label of nodes gone, their edges not."""
        self._require(nodes)
        features, labels, train = self.features.clone(), self.labels.clone(), self.train.clone()
        features[nodes], labels[nodes], train[nodes] = 0, 0, False
        return Graph(features=features, edges=self.edges, labels=labels, train=train)

    def without_edges(self, edges: Int[Tensor, "_ 2"]) -> "Graph":
        """Edges gone, in either direction."""
        ordered = edges.sort(dim=1).values
        # One number an edge: no two pairs share one, whatever numbers were asked for.
        base = 1 + int(torch.cat([self.edges, ordered]).max()) if len(self.edges) + len(ordered) else 1
        here, there = (pairs[:, 0] * base + pairs[:, 1] for pairs in (self.edges, ordered))
        unknown = edges[~torch.isin(there, here)]
        if len(unknown):
            raise ConfigError(f"edges {unknown[:3].tolist()} are not in the graph ({len(unknown)} such).")
        kept = self.edges[~torch.isin(here, there)]
        return Graph(features=self.features, edges=kept, labels=self.labels, train=self.train)

    def degrees(self) -> Float[Tensor, " nodes"]:
        """Neighbours of each node, itself included."""
        return torch.bincount(self.edges.flatten(), minlength=len(self.features)).double() + 1

    def _require(self, nodes: Tensor) -> None:
        count = len(self.features)
        if nodes.is_floating_point() or nodes.dtype == torch.bool:
            raise ConfigError(
                f"nodes of type {nodes.dtype}: give their numbers. Of a mask those are mask.nonzero()[:, 0]."
            )
        if len(nodes) and not (int(nodes.min()) >= 0 and int(nodes.max()) < count):
            raise ConfigError(f"nodes {nodes.tolist()[:5]}: the graph has nodes 0 to {count - 1}.")


def canonical(edges: Int[Tensor, "_ 2"]) -> Int[Tensor, "_ 2"]:
    """Each edge once, the smaller number first, none from a node to itself."""
    ordered = edges.sort(dim=1).values
    once: Tensor = torch.unique(ordered[ordered[:, 0] != ordered[:, 1]], dim=0)
    return once


def propagate(graph: Graph, how: Propagation) -> Float[Tensor, "nodes propagated"]:
    """PᴷX in float64, with an edge from every node to itself."""
    count, degrees = len(graph.features), graph.degrees()
    loops = torch.arange(count, device=graph.edges.device)
    sources, targets = torch.cat([graph.edges, graph.edges.flip(1), torch.stack([loops, loops], 1)]).unbind(1)
    symmetric = how.normalisation == "symmetric"
    weights = (degrees[sources] * degrees[targets]).rsqrt() if symmetric else 1 / degrees[targets]
    places = torch.stack([targets, sources])
    spread = torch.sparse_coo_tensor(places, weights, (count, count), check_invariants=False).coalesce()
    steps = [graph.features.double()]
    for _ in range(how.steps):
        steps.append(torch.sparse.mm(spread, steps[-1]))
    return torch.cat(steps, 1) / len(steps) if how.all_steps else steps[-1]


class CertifiedGraph(nn.Module):
    """A node classifier from whose graph nodes, edges and features can be removed.

    Called with node numbers, it gives their logits. It keeps the graph, less what was removed; ``trace`` counts the fit
    and all removals.
    """

    def __init__(self, graph: Graph, how: Propagation, config: Certified, *, classes: int, seed: int) -> None:
        super().__init__()
        self.graph, self.how, self.trace = graph, how, Trace("certified-graph", seed)
        with self.trace.stage("fit", self):
            self.propagated = propagate(graph, how)
            features, labels = self.propagated[graph.train], graph.labels[graph.train]
            self.head = Head(features, labels, config, classes=classes, seed=seed)
        self.trace.backwarded = self.head.passed

    def forward(self, nodes: Int[Tensor, " n"]) -> Float[Tensor, "n classes"]:
        """Logits of nodes."""
        logits: Tensor = self.head(self.propagated[nodes])
        return logits

    def remove(
        self,
        *,
        nodes: Int[Tensor, " _"] | None = None,
        edges: Int[Tensor, "_ 2"] | None = None,
        features: Int[Tensor, " _"] | None = None,
    ) -> Removal:
        """Delete parts of the graph: a Newton step if the budget allows it, else as ``when_spent`` says.

        Args:
            nodes: Numbers of nodes that go with all they have.
            edges: Pairs of nodes whose edge goes.
            features: Numbers of nodes whose features and label go, while their edges stay.

        Raises:
            ConfigError: Something that is not there, or no training node left; nothing has changed then.
        """
        if nodes is edges is features is None:
            raise ConfigError("remove() without anything to remove: give nodes=…, edges=… or features=….")
        left = self.graph
        if edges is not None:
            left = left.without_edges(edges)
        if features is not None:
            left = left.without_features(features)
        if nodes is not None:
            left = left.without_nodes(nodes)
        if not bool(left.train.any()):
            raise ConfigError("no training node would be left: nothing to learn from.")
        with self.trace.stage("remove", self):
            propagated = propagate(left, self.how)
            radius, drift = self._worst_case(left)
            # Only nodes within K steps have moved: the gradients of all others cancel exactly.
            changed = (propagated != self.propagated).any(1) | (left.train != self.graph.train)
            was, now = changed & self.graph.train, changed & left.train
            lost = self.head.pull(self.propagated[was], self.graph.labels[was])
            lost = lost - self.head.pull(propagated[now], left.labels[now])
            removal = self.head.move(propagated[left.train], left.labels[left.train], lost, radius=radius, drift=drift)
        self.trace.backwarded = self.head.passed
        if removal.outcome != "refused":
            self.graph, self.propagated = left, propagated
        return removal

    def _worst_case(self, left: Graph) -> tuple[float, float]:
        """The longest that a propagated vector can be, and the farthest that those of the nodes that stay can move."""
        before, after = self.graph.degrees(), left.degrees()
        emptied = (self.graph.features != 0).any(1) & ~(left.features != 0).any(1)
        gone = emptied & (after == 1)  # reaches nobody any more, so neither its edges nor its features count
        lost = float((before - after)[~gone].sum())
        zeroed = before[emptied & ~gone]
        if self.how.normalisation == "row":
            return 1.0, 2 * self.how.steps * lost + float(zeroed.sum())
        return math.sqrt(float(before.max())), (2 * self.how.steps + 1) * lost + float(zeroed.sqrt().sum())


def fit(graph: Graph, how: Propagation, config: Certified, *, classes: int, seed: int) -> CertifiedGraph:
    """Train a node classifier from whose graph parts can be removed.

    Args:
        graph: Its feature vectors must not be longer than 1.
        how: How features spread.
        config: What is promised.
        classes: How many there are.
        seed: Names the stream of the noise b, which must stay secret: so must the seed.

    Raises:
        ConfigError: No training node, class numbers out of range, or a feature vector longer than 1.
        NotFinite: The problem is too badly conditioned.
    """
    if not bool(graph.train.any()):
        raise ConfigError("train marks no node: there is nothing to learn from.")
    require_classes(graph.labels[graph.train], classes)
    require_short(graph.features, "every feature vector by its own length")
    return CertifiedGraph(graph, how, config, classes=classes, seed=seed)
