"""RELOAD written again on one flat float64 vector, without anything of the library but the call under test."""

import copy
import warnings
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from expunge import Blind, Examples, Recipe, Reload, cross_entropy, gradient, train, unlearn
from expunge.models.mlp import MLP

ROUNDOFF = 2.0**-53  # of float64
SIZE = 8  # positions a micro-batch
STOP_BEFORE_TRAINING = Recipe(epochs=0, lr=0.1)
REMOVED = torch.tensor([0, 3, 17, 18, 19, 41])  # micro-batches 0, 2 and 5 of 8


def build(kind: str) -> nn.Module:
    if kind == "plain":
        return MLP((5, 9, 3)).double()
    return nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3)).double()


def fresh(kind: str, number: int = 0) -> nn.Module:
    """Untrained values that no trained entry can have by accident, whatever the generators are at."""
    model, generator = build(kind), torch.Generator().manual_seed(1000 + number)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


@dataclass
class Trained:
    kind: str
    model: nn.Module
    original: Examples

    @property
    def given(self) -> Blind:
        return Blind(
            retain=self.original.without(REMOVED),
            loss_terms=cross_entropy,
            fresh=lambda _: fresh(self.kind),
            full=gradient(self.model, cross_entropy, self.original, micro_batch=SIZE),
        )


@pytest.fixture(params=["plain", "batch-norm"])
def trained(request: pytest.FixtureRequest) -> Trained:
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(60) % 3
    inputs = torch.randn(3, 5, generator=generator, dtype=torch.float64)[labels]
    inputs = inputs + 0.9 * torch.randn(60, 5, generator=generator, dtype=torch.float64)
    inputs[REMOVED, 4] = 0  # weights on this input were never touched by what is removed: the lowest knowledge values
    original, model = Examples(inputs, labels), fresh(request.param, 77)
    train(model, original, cross_entropy, Recipe(epochs=8, lr=0.05, batch_size=20), seed=0)
    return Trained(request.param, model, original)


@dataclass
class Flat:
    """What each step of Algorithm 1 gives, over all parameters in one vector."""

    before: Tensor
    full: Tensor
    removed: Tensor
    noise: Tensor
    eps: float
    paper_choice: Tensor
    chosen: Tensor
    wanted: int
    after: Tensor


def flat_gradients(trained: Trained, keep: Tensor) -> dict[int, Tensor]:
    """The gradient of the summed loss over each micro-batch of the kept positions."""
    model, (inputs, labels) = copy.deepcopy(trained.model).eval(), trained.original.tensors
    names, shapes = zip(*((name, p.shape) for name, p in model.named_parameters()), strict=True)
    vector = torch.cat([p.detach().flatten() for p in model.parameters()]).requires_grad_()
    found = {}
    for number in range(-(-len(labels) // SIZE)):
        rows = keep[keep // SIZE == number]
        if len(rows):
            pieces = vector.split([shape.numel() for shape in shapes])
            weights = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
            logits = functional_call(model, weights, (inputs[rows],))
            loss = functional.cross_entropy(logits, labels[rows], reduction="sum")
            found[number] = torch.autograd.grad(loss, vector)[0]
    return found


def flat_reload(trained: Trained, config: Reload, seed: int) -> Flat:
    everything = torch.arange(len(trained.original))
    kept = everything[~torch.isin(everything, REMOVED)]
    of_all, of_kept = flat_gradients(trained, everything), flat_gradients(trained, kept)
    full = torch.stack(list(of_all.values())).sum(0)
    removed = full - torch.stack(list(of_kept.values())).sum(0)
    # The rounding floor: 4 u of what each micro-batch adds; the touched ones were rounded in both passes, and spread
    # to their rows and columns; then the float64 sums, and the removed gradient itself.
    lost = set((REMOVED // SIZE).tolist())
    size_lost = sum(float(g[n].abs().sum()) for g in (of_all, of_kept) for n in lost & set(g))
    touched = size_lost / sum(float(g.abs().sum()) for g in of_all.values())
    accumulation = 2.0**-54 * len(of_all) ** 0.5 / ROUNDOFF
    floor = 4 * ROUNDOFF * torch.stack(list(of_all.values())).abs().sum(0)
    noise = touched * spread(floor, trained.model) + accumulation * floor + 32 * ROUNDOFF * removed.abs()
    eps = float(noise.mean()) if config.eps == "auto" else config.eps
    knowledge = (removed.abs() + eps) / (full.abs() + eps)
    by_knowledge = torch.argsort(knowledge, stable=True)
    informative = removed.abs() > noise
    paper_choice, chosen = torch.zeros(len(full), dtype=torch.bool), torch.zeros(len(full), dtype=torch.bool)
    for group in groups(trained.model, config):
        ranked = by_knowledge[torch.isin(by_knowledge, group)]
        if config.threshold is None:
            most = int(Decimal(str(config.reset_fraction)) * len(group))
        else:
            most = int((knowledge[group] <= config.threshold).sum())
        paper_choice[ranked[:most]] = True
        allowed = ranked if config.reset_untouched else ranked[informative[ranked]]
        allowed = allowed if config.threshold is None else allowed[knowledge[allowed] <= config.threshold]
        chosen[allowed[:most]] = True
    wanted = int(paper_choice.sum())
    before = flat(trained.model)
    after = before + (config.priming_lr or 0) / len(everything) * removed
    after[chosen] = flat(fresh(trained.kind))[chosen]
    return Flat(before, full, removed, noise, eps, paper_choice, chosen, wanted, after)


def groups(model: nn.Module, config: Reload) -> list[Tensor]:
    """Places among which a share is taken: all, or those of a layer; vectors only if they may be reset."""
    found: dict[str, list[Tensor]] = {}
    start = 0
    for name, p in model.named_parameters():
        if config.reset_1d or p.ndim > 1:
            key = name[: name.rindex(".")] if config.scope == "layer" else "all"
            found.setdefault(key, []).append(torch.arange(start, start + p.numel()))
        start += p.numel()
    return [torch.cat(places) for places in found.values()]


def spread(vector: Tensor, model: nn.Module) -> Tensor:
    """Each entry, and a quarter of the mean of its row and of its column."""
    parts = []
    for piece, like in zip(vector.split([p.numel() for p in model.parameters()]), model.parameters(), strict=True):
        if like.ndim == 1:
            parts.append(piece + piece.mean() / 4)
        else:
            rows = piece.view(len(like), -1)
            parts.append((rows + rows.mean(1)[:, None] / 4 + rows.mean(0)[None] / 4).flatten())
    return torch.cat(parts)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def settings(**changes: Any) -> Reload:
    return Reload(**({"fine_tune": STOP_BEFORE_TRAINING} | changes))


@pytest.mark.parametrize("reset_untouched", [True, False])
@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.29, 0.9])
@pytest.mark.parametrize("eps", ["auto", 0.01])
def test_reload_equals_the_one_on_a_flat_vector(trained, reset_untouched, fraction, eps):
    config = settings(reset_fraction=fraction, eps=eps, reset_untouched=reset_untouched, priming_lr=0.7)
    expected = flat_reload(trained, config, seed=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # too few informative entries at 0.9, on purpose
        result = unlearn(trained.model, trained.given, config, seed=4).model
    after = flat(result)
    assert torch.equal(after == flat(fresh(trained.kind)), expected.chosen)
    torch.testing.assert_close(after, expected.after, rtol=0, atol=1e-12)
    buffers = zip(result.buffers(), trained.model.buffers(), strict=True)
    assert all(torch.equal(now, before) for now, before in buffers)


@pytest.mark.parametrize("reset_untouched", [True, False])
@pytest.mark.parametrize(
    "options",
    [{"scope": "layer"}, {"reset_1d": False}, {"scope": "layer", "reset_1d": False}, {"threshold": 0.1}],
    ids=str,
)
def test_options_of_the_choice_equal_those_on_a_flat_vector(trained, options, reset_untouched):
    config = settings(reset_fraction=0.29, eps=0.01, reset_untouched=reset_untouched, priming_lr=0.7, **options)
    expected = flat_reload(trained, config, seed=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a layer may have too few informative entries
        result = unlearn(trained.model, trained.given, config, seed=4)
    after = flat(result.model)
    assert expected.chosen.any()
    assert not expected.chosen.all()
    assert torch.equal(after == flat(fresh(trained.kind)), expected.chosen)
    torch.testing.assert_close(after, expected.after, rtol=0, atol=1e-12)
    assert result.trace.facts["requested_count"] == expected.wanted


@pytest.mark.parametrize("reset_untouched", [True, False])
def test_the_trace_says_what_the_flat_vector_says(trained, reset_untouched):
    config = settings(reset_fraction=0.25, reset_untouched=reset_untouched)
    expected = flat_reload(trained, config, seed=0)
    trace = unlearn(trained.model, trained.given, config).trace
    informative = expected.removed.abs() > expected.noise
    paper, chosen, wanted = expected.paper_choice, expected.chosen, expected.wanted
    inputs, labels = trained.original.tensors
    losses = functional.cross_entropy(copy.deepcopy(trained.model).eval()(inputs), labels, reduction="none").detach()
    weights = torch.cat([parameter.detach().flatten() for parameter in trained.model.parameters()]).double()
    moved = (config.priming_lr or 0) / len(labels) * expected.removed.norm() / weights.norm()
    assert trace.facts == {
        "removed_count": len(REMOVED),
        "priming_length": pytest.approx(float(moved)),
        "cached_count": len(labels),
        "eps": pytest.approx(expected.eps, rel=1e-6, abs=0),
        "relative_noise": pytest.approx(float(expected.noise.norm() / expected.removed.norm()), rel=1e-6, abs=0),
        "informative_share": pytest.approx(float(informative.double().mean()), abs=1e-12),
        "compared": len({row // SIZE for row in range(len(labels))} - {row // SIZE for row in REMOVED.tolist()}),
        "reset_count": int(chosen.sum()),
        "requested_count": wanted,
        "untouched_in_paper_choice": pytest.approx(int((paper & ~informative).sum()) / wanted),
        "overlap_with_paper_choice": pytest.approx(int((paper & chosen).sum()) / int((paper | chosen).sum())),
        "target_loss": pytest.approx(float(losses.mean())),
    }
    sizes = [parameter.numel() for parameter in trained.model.parameters()]
    shares = [float(mask.double().mean()) for mask in chosen.split(sizes)]
    assert trace.reset == dict(zip(dict(trained.model.named_parameters()), shares, strict=True))
    assert trace.backwarded == len(trained.original) - len(REMOVED)
    assert list(trace.seconds) == ["difference", "ascend", "select", "re-initialise", "fine-tune"]


def test_the_two_readings_of_the_paper_differ_here(trained):
    """Otherwise the oracle could not tell whether the informative filter works."""
    chosen = [
        flat_reload(trained, settings(reset_fraction=0.29, reset_untouched=each), 0).chosen for each in (True, False)
    ]
    assert not torch.equal(*chosen)


def test_a_small_ascent_raises_the_forget_loss_by_the_step_times_the_squared_norm(trained):
    step = 1e-6
    config = settings(reset_fraction=0.0, priming_lr=step * len(trained.original))
    after = unlearn(trained.model, trained.given, config).model
    inputs, labels = trained.original.only(REMOVED).tensors
    before, raised = (
        functional.cross_entropy(model.eval()(inputs), labels, reduction="sum").item()
        for model in (trained.model, after)
    )
    removed = flat_reload(trained, config, 0).removed
    assert raised - before == pytest.approx(step * float(removed.square().sum()), rel=0.01)


def test_the_whole_of_reload_is_these_steps_and_then_training(trained):
    recipe = Recipe(epochs=2, lr=0.03, batch_size=16)
    config = settings(reset_fraction=0.2, tolerance=0.0, fine_tune=recipe)
    expected = unlearn(trained.model, trained.given, settings(reset_fraction=0.2), seed=6).model
    trace = train(expected, trained.given.retain, cross_entropy, recipe, seed=6)
    whole = unlearn(trained.model, trained.given, config, seed=6)
    assert torch.equal(flat(whole.model), flat(expected))
    assert whole.trace.losses == trace.losses
