"""Diagonal Fisher information and EK-FAC of `methods/kronecker.py`, against loops over examples in float64."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from expunge import Blind, Examples, Recipe, Reload, cross_entropy, gradient, squared_error, unlearn
from expunge.curvature import Curvature
from expunge.errors import NonDeterministicLoss, NotFinite, UnsupportedModule
from expunge.methods import kronecker
from expunge.methods.kronecker import diagonal_fisher, kronecker_fisher
from expunge.models.convnet import ConvNet
from expunge.trace import Trace
from tests.contract import state, world
from tests.zoo import CLASSES, FEATURES, classification, network

RECIPE = Recipe(epochs=0, lr=0.1)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(build: Any, seed: int = 3) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().double()


def measured(measure: Any, model: nn.Module, data: Any, loss: Any = cross_entropy, names: Any = None) -> Curvature:
    names = [n for n, _ in model.named_parameters()] if names is None else names
    return measure(model, loss, data, names, Trace("test", 0))


def each_gradient(model: nn.Module, data: Examples, loss: Any = cross_entropy) -> dict[str, Tensor]:
    """The gradient of every loss term on its own, one call of autograd each: (terms, entries of the parameter)."""
    model = copy.deepcopy(model).eval()
    theta = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = []
    for row in range(len(data)):
        terms = loss(model, tuple(t[row : row + 1] for t in data.tensors))
        rows += [torch.autograd.grad(t, list(theta.values()), retain_graph=True, allow_unused=True) for t in terms]
    return {
        name: torch.stack([torch.zeros_like(p) if row[i] is None else row[i] for row in rows])
        for i, (name, p) in enumerate(theta.items())
    }


def eigenbasis(rows: Tensor) -> Tensor:
    """Of Σ r rᵀ, by the singular vectors of the rows rather than by an eigendecomposition."""
    return torch.linalg.svd(rows, full_matrices=True).Vh.T


def dense(names: tuple[str, ...], gradients: dict[str, Tensor], inputs: Tensor, outputs: Tensor) -> Tensor:
    """The EK-FAC matrix of one layer written out: (U_G ⊗ U_A) diag(E[((U_G ⊗ U_A)ᵀ g)²]) (U_G ⊗ U_A)ᵀ."""
    out = gradients[names[0]].shape[1]
    columns = [gradients[name].reshape(len(gradients[name]), out, -1) for name in names]
    flat = torch.cat(columns, 2).flatten(1)
    basis = torch.kron(eigenbasis(outputs), eigenbasis(inputs))
    return basis @ torch.diag((flat @ basis).square().sum(0)) @ basis.T


def assert_solves(curvature: Curvature, matrices: dict[tuple[str, ...], Tensor], shapes: dict[str, Any]) -> None:
    """`solve` is that of the dense matrices of all layers together."""
    vector = {name: drawn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    size = sum(len(matrix) for matrix in matrices.values())
    floor = 0.2 * sum(float(torch.trace(matrix)) for matrix in matrices.values()) / size
    solved = curvature.solve(vector, 0.2)
    for names, matrix in matrices.items():
        out = shapes[names[0]][0]
        columns = torch.cat([vector[name].reshape(out, -1) for name in names], 1)
        expected = torch.linalg.solve(matrix + floor * torch.eye(len(matrix), dtype=torch.float64), columns.flatten())
        found = torch.cat([solved[name].reshape(out, -1) for name in names], 1)
        torch.testing.assert_close(found.flatten(), expected, rtol=1e-7, atol=1e-12)


def with_ones(rows: Tensor) -> Tensor:
    return torch.cat([rows, torch.ones_like(rows[:, :1])], 1)


def shapes_of(model: nn.Module) -> dict[str, Any]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["mlp", "batch-norm"])
def test_the_diagonal_is_the_sum_of_squared_gradients_of_single_examples(kind):
    model, data = network(kind), classification(37)
    found = measured(diagonal_fisher, model, data)
    assert found.blocks == ()
    for name, each in each_gradient(model, data).items():
        torch.testing.assert_close(found.diagonal[name], each.square().sum(0))


def test_ekfac_of_a_linear_network_is_that_of_matrices_written_out():
    """39 examples, more than a batch; back-propagated errors by hand."""
    model, data = network("mlp"), classification(39)
    inputs, labels = data.tensors
    hidden = (inputs @ model[0].weight.T + model[0].bias).tanh().detach()
    p = (hidden @ model[3].weight.T + model[3].bias).softmax(1).detach()
    error = p - functional.one_hot(labels, CLASSES)
    back = (error @ model[3].weight.detach()) * (1 - hidden.square())
    gradients = each_gradient(model, data)
    found = measured(kronecker_fisher, model, data)
    assert {block.names for block in found.blocks} == {("0.weight", "0.bias"), ("3.weight", "3.bias")}
    assert found.diagonal == {}
    matrices = {
        ("0.weight", "0.bias"): dense(("0.weight", "0.bias"), gradients, with_ones(inputs), back),
        ("3.weight", "3.bias"): dense(("3.weight", "3.bias"), gradients, with_ones(hidden), error),
    }
    assert_solves(found, matrices, shapes_of(model))


def test_the_eigenvalues_of_one_layer_are_the_exact_diagonal_in_its_basis_and_sum_to_the_trace():
    model, data = built(lambda: nn.Linear(FEATURES, CLASSES)), classification(30)
    block = measured(kronecker_fisher, model, data).blocks[0]
    gradients = each_gradient(model, data)
    exact = torch.cat([gradients["weight"], gradients["bias"][:, :, None]], 2)
    assert float(block.moments.sum()) == pytest.approx(float(exact.square().sum()))
    rotated = torch.stack([block.outputs[0].T @ each @ block.inputs[0] for each in exact])
    torch.testing.assert_close(block.moments[0], rotated.square().sum(0))


class Convolving(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, (2, 3), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=groups)
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.relu_(self.conv(images)).mean((2, 3)))


def patches_by_hand(images: Tensor, groups: int) -> Tensor:
    """What the kernel of `Convolving` sees: (examples, groups, places, inputs), read off one by one."""
    count, channels, height, width = images.shape
    padded = torch.zeros(count, channels, height + 2, width, dtype=torch.float64)
    padded[:, :, 1:-1] = images
    corners = [(top, left) for top in range(0, height + 1, 2) for left in range(width - 4)]
    seen = [padded[:, :, i : i + 2, j : j + 5 : 2] for i, j in corners]  # 2 rows, 3 columns two apart
    each = channels // groups
    return torch.stack(
        [torch.stack([s[:, g * each : (g + 1) * each].flatten(1) for s in seen], 1) for g in range(groups)], 1
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_ekfac_of_a_convolution_sees_the_patches_read_off_one_by_one(groups):
    model = built(lambda: Convolving(groups))
    images, labels = drawn(35, 2, 5, 7), torch.arange(35) % 3
    patches = patches_by_hand(images, groups)
    found = measured(kronecker_fisher, model, Examples(images, labels))
    conv = next(block for block in found.blocks if block.names == ("conv.weight", "conv.bias"))
    weight = model.conv.weight.detach().view(groups, 4 // groups, -1)
    out = torch.einsum("ngpi,goi->ngop", patches, weight) + model.conv.bias.detach().view(1, groups, -1, 1)
    expected = model.conv(images).flatten(2).view(35, groups, 4 // groups, -1)
    torch.testing.assert_close(out, expected)  # the patches are right
    out.requires_grad_()
    logits = model.head(out.relu().mean(3).flatten(1))
    slopes = torch.autograd.grad(functional.cross_entropy(logits, labels, reduction="sum"), out)[0].mT
    for g in range(groups):
        a = torch.cat([patches[:, g], torch.ones(35, patches.shape[2], 1, dtype=torch.float64)], 2)
        spans = torch.linalg.eigvalsh(a.flatten(0, 1).T @ a.flatten(0, 1))
        rotated = conv.inputs[g].T @ (a.flatten(0, 1).T @ a.flatten(0, 1)) @ conv.inputs[g]
        torch.testing.assert_close(rotated, torch.diag(spans), rtol=1e-9, atol=1e-9 * float(spans.max()))
        s = slopes[:, g].flatten(0, 1)
        rotated = conv.outputs[g].T @ (s.T @ s) @ conv.outputs[g]
        torch.testing.assert_close(rotated, torch.diag(torch.diag(rotated)), rtol=0, atol=1e-12)
        of_examples = [slopes[n, g].T @ a[n] for n in range(35)]  # Σ over places, one example each
        moments = sum((conv.outputs[g].T @ each @ conv.inputs[g]).square() for each in of_examples)
        torch.testing.assert_close(conv.moments[g], moments)


def test_parameters_outside_linear_layers_and_convolutions_have_the_diagonal():
    model, images = built(lambda: ConvNet(widths=(3, 4))), drawn(34, 1, 8, 8)
    data = Examples(images, torch.arange(34) % 10)
    trace = Trace("test", 0)
    found = kronecker_fisher(model, cross_entropy, data, [n for n, _ in model.named_parameters()], trace)
    inside = {name for block in found.blocks for name in block.names}
    assert {name for name, p in model.named_parameters() if p.ndim > 1} <= inside
    assert set(found.diagonal) == {n for n, _ in model.named_parameters()} - inside
    gradients = each_gradient(model, data)
    assert found.diagonal
    for name, diagonal in found.diagonal.items():
        torch.testing.assert_close(diagonal, gradients[name].square().sum(0))
    assert trace.backwarded == 3 * 34  # two passes, and one for the rest


def test_sequences_sum_over_places_within_an_example():
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.inner(inputs).tanh().sum(1)

    model, data = built(Tagger), Examples(drawn(33, 5, 4), torch.arange(33) % 3)
    block = measured(kronecker_fisher, model, data).blocks[0]
    gradients = each_gradient(model, data)
    exact = torch.cat([gradients["inner.weight"], gradients["inner.bias"][:, :, None]], 2)
    rotated = torch.stack([block.outputs[0].T @ each @ block.inputs[0] for each in exact])
    torch.testing.assert_close(block.moments[0], rotated.square().sum(0))


def test_several_terms_an_example_are_squared_one_by_one():
    def two_terms(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - batch[1]).square().flatten()

    model, data = built(lambda: nn.Linear(3, 2)), Examples(drawn(34, 3), drawn(34, 2, seed=1))
    block = measured(kronecker_fisher, model, data, two_terms).blocks[0]
    gradients = each_gradient(model, data, two_terms)
    assert len(gradients["bias"]) == 68
    exact = torch.cat([gradients["weight"], gradients["bias"][:, :, None]], 2)
    rotated = torch.stack([block.outputs[0].T @ each @ block.inputs[0] for each in exact])
    torch.testing.assert_close(block.moments[0], rotated.square().sum(0))


class Reused(nn.Module):
    """A layer that runs twice, a weight read from outside its layer, and an honest head."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.read, self.head = nn.Linear(5, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.twice(self.twice(inputs).tanh())
        return self.head((self.read(hidden) + hidden @ self.read.weight).tanh())


@pytest.mark.parametrize(("kind", "blocks"), [("reused", {"head.weight"}), ("tied", {"head.weight"})])
def test_weights_used_more_than_once_have_the_diagonal(kind, blocks):
    model = built(Reused) if kind == "reused" else network("tied")
    data = classification(20)
    found = measured(kronecker_fisher, model, data)
    assert {block.names[0] for block in found.blocks} == blocks
    gradients = each_gradient(model, data)
    for name, diagonal in found.diagonal.items():
        torch.testing.assert_close(diagonal, gradients[name].square().sum(0))
    assert set(found.diagonal) == set(gradients) - {name for block in found.blocks for name in block.names}


def test_a_layer_too_wide_for_an_eigenbasis_has_the_diagonal(monkeypatch):
    monkeypatch.setattr(kronecker, "LARGEST", FEATURES)  # its inputs and the bias are one more
    found = measured(kronecker_fisher, network("mlp"), classification(20))
    assert found.blocks == ()
    assert set(found.diagonal) == {"0.weight", "0.bias", "3.weight", "3.bias"}


def test_a_frozen_bias_and_parameters_that_were_not_asked_for_stay_out():
    model, data = network("mlp"), classification(20)
    found = measured(kronecker_fisher, model, data, names=["0.weight"])
    assert [block.names for block in found.blocks] == [("0.weight",)]
    assert found.diagonal == {}
    exact = each_gradient(model, data)["0.weight"]
    block = found.blocks[0]
    rotated = torch.stack([block.outputs[0].T @ each @ block.inputs[0] for each in exact])
    torch.testing.assert_close(block.moments[0], rotated.square().sum(0))
    assert set(measured(diagonal_fisher, model, data, names=["3.bias"]).diagonal) == {"3.bias"}


@pytest.mark.parametrize("measure", [diagonal_fisher, kronecker_fisher])
def test_measuring_leaves_the_model_as_it_was(measure):
    model, data = network("batch-norm").train(), classification(20)
    model[0].bias.requires_grad_(False)
    before, flags = state(model), [m.training for m in model.modules()]
    random_state = torch.get_rng_state()
    measured(measure, model, data, names=["0.weight", "1.weight"])
    assert all(torch.equal(now, before[name]) for name, now in state(model).items())
    assert [m.training for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("measure", [diagonal_fisher, kronecker_fisher])
def test_data_and_losses_that_cannot_work_are_refused(measure):
    model, (inputs, labels) = network("mlp"), classification(40).tensors
    poisoned = inputs.clone()
    poisoned[38, 1] = math.nan
    with pytest.raises(NotFinite, match="the loss of an example is nan"):
        measured(measure, model, Examples(poisoned, labels))

    def noisy(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model, batch) + torch.rand(1)

    with pytest.raises(NonDeterministicLoss, match="two different losses"):
        measured(measure, model, classification(20), noisy)

    def some(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model, batch)[batch[1] > 0]

    with pytest.raises(UnsupportedModule, match=r"as many for each|taken apart into examples by torch.func.vmap"):
        measured(measure, model, Examples(inputs, (torch.arange(40) < 36).long()), some)


@pytest.mark.parametrize("selector", ["obs", "ekfac"])
@pytest.mark.parametrize("kind", ["plain", "batch-norm"])
def test_reload_measures_the_curvature_of_what_is_left_before_the_ascent_and_counts_it(selector, kind):
    here = world(kind)
    config = Reload(selector=selector, reset_fraction=0.2, priming_lr=5.0, reset_untouched=True, fine_tune=RECIPE)
    result = unlearn(here.model, here.blind(), config, seed=2)
    wide = copy.deepcopy(here.model).double()
    gradients = each_gradient(wide, Examples(here.retain.tensors[0].double(), here.retain.tensors[1]))
    removed = (here.full - gradient(here.model, cross_entropy, here.retain, micro_batch=8)).total
    passes = {"obs": 2, ("plain", "ekfac"): 3, ("batch-norm", "ekfac"): 4}
    assert result.trace.backwarded == passes.get(selector, passes.get((kind, selector))) * len(here.retain)
    assert list(result.trace.seconds)[:3] == ["difference", "curvature", "ascend"]
    kronecker_share = {"obs": 0.0, ("plain", "ekfac"): 1.0, ("batch-norm", "ekfac"): 1 - 24 / 147}
    expected = kronecker_share.get(selector, kronecker_share.get((kind, selector)))
    assert result.trace.facts["kronecker_share"] == pytest.approx(expected)
    if selector == "obs":  # once more, entry by entry
        fresh = here.blind().fresh_values(2, here.model, removed)
        scores = {}
        for name, p in here.model.named_parameters():
            delta = (fresh[name] - p.detach()).double()
            curvature = sum(each.square() for each in gradients[name])
            scores[name] = curvature * delta**2 / 2 - removed[name] * delta
        flat = torch.cat([score.flatten() for score in scores.values()])
        bound = flat.sort().values[flat.numel() // 5 - 1]
        for name, p in result.model.named_parameters():
            certain = (scores[name] - bound).abs() > 1e-6 * bound.abs()  # float32 passes round
            assert torch.equal((p == fresh[name])[certain], (scores[name] <= bound)[certain])


def test_second_order_selectors_are_blind_and_refuse_what_first_order_ones_need_not():
    """Batches whose tensors have other lengths cannot be taken apart into examples."""
    model = built(lambda: nn.Linear(3, 2, bias=False))

    def pairs(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - batch[1][: len(batch[0])]).square().sum(1)

    batches = [(drawn(4, 3), drawn(5, 2, seed=1)), (drawn(4, 3, seed=2), drawn(5, 2, seed=3))]
    full = gradient(model, pairs, batches)
    given = Blind(retain=batches[:1], loss_terms=pairs, fresh=lambda _: nn.Linear(3, 2, bias=False), full=full)
    unlearn(model, given, Reload(fine_tune=RECIPE))
    for selector in ("obs", "ekfac"):
        with pytest.raises(UnsupportedModule, match="each needs one row"):
            unlearn(model, given, Reload(selector=selector, fine_tune=RECIPE))


def test_ekfac_points_at_the_weights_that_retraining_moves():
    """Least squares: F is not the Hessian, but the step it predicts must rank entries as retraining does."""
    x, w = drawn(400, 6), drawn(1, 6, seed=9)
    y = x @ w.T + drawn(400, 1, seed=5)
    model = nn.Linear(6, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    data, gone = Examples(x, y), torch.arange(0, 400, 13)
    kept = data.without(gone)
    moved = (torch.linalg.lstsq(*kept.tensors).solution.T - model.weight).detach().flatten()
    removed = (gradient(model, squared_error, data) - gradient(model, squared_error, kept)).total
    step = measured(kronecker_fisher, model, kept, squared_error).solve(removed, 1e-6)["weight"].flatten()
    assert float(torch.corrcoef(torch.stack([step, moved]))[0, 1]) > 0.95
