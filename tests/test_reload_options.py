"""What is chosen, what it becomes, and whose statistics are kept: the options of RELOAD beside the paper's."""

import dataclasses
import json
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
import tyro
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

from expunge import Blind, Examples, Recipe, Reload, cross_entropy, gradient, unlearn
from expunge.errors import NotFinite
from expunge.methods.choice import at_most, decimal, smallest_share
from expunge.methods.reinitialise import new_values, re_estimate_statistics_
from expunge.selectors import SELECTORS, Evidence, knowledge_values
from expunge.trace import Trace
from tests.contract import same, state, world
from tests.contract.test_methods import rebuild
from tests.zoo import classification, network

ONLY_RESET = Reload(priming_lr=None, reset_untouched=True, fine_tune=Recipe(epochs=0, lr=0.1))


def change(config: Reload = ONLY_RESET, **changes: Any) -> Reload:
    return dataclasses.replace(config, **changes)


def moved(before: nn.Module, after: nn.Module) -> dict[str, Tensor]:
    return {n: a != b for (n, a), b in zip(before.named_parameters(), after.parameters(), strict=True)}


# What is chosen


@for_all(fraction=st.integers(0, 999), sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5), tied=st.booleans())
@settings(deadline=None, derandomize=True, max_examples=60)
def test_each_layer_gives_exactly_the_floor_of_its_share_and_the_first_of_ties(fraction, sizes, tied):
    generator = torch.Generator().manual_seed(sum(sizes))
    scores = {}
    for i, n in enumerate(sizes):
        values = torch.randint(3, (n + 2,), generator=generator) if tied else torch.randperm(n + 2, generator=generator)
        scores |= {f"layer{i}.weight": values[:n].double(), f"layer{i}.bias": values[n:].double()}
    chosen, wanted = smallest_share(scores, decimal(fraction / 1000), "layer")
    counts = [fraction * (n + 2) // 1000 for n in sizes]
    assert wanted == sum(counts)
    for i, count in enumerate(counts):
        mine = torch.cat([scores[f"layer{i}.weight"], scores[f"layer{i}.bias"]])
        marked = torch.cat([chosen[f"layer{i}.weight"], chosen[f"layer{i}.bias"]])
        order = sorted(range(len(mine)), key=lambda k: (float(mine[k]), k))  # stable: by position among ties
        assert marked.nonzero().flatten().tolist() == sorted(order[:count])
    assert list(chosen) == list(scores)


def test_a_share_of_all_entries_may_come_from_one_layer():
    scores = {"a.weight": torch.arange(10.0), "b.weight": torch.arange(10.0) + 100}
    chosen, wanted = smallest_share(scores, Fraction(1, 2), "global")
    assert (wanted, int(chosen["a.weight"].sum()), int(chosen["b.weight"].sum())) == (10, 10, 0)
    chosen, wanted = smallest_share(scores, Fraction(1, 2), "layer")
    assert (wanted, int(chosen["a.weight"].sum()), int(chosen["b.weight"].sum())) == (10, 5, 5)


def test_a_threshold_takes_all_that_is_at_most_that_and_equal_ones_too():
    scores = {"a": torch.tensor([0.5, 0.75, math.inf]), "b": torch.tensor([[0.75, 0.76]])}
    chosen, wanted = at_most(scores, 0.75)
    assert wanted == 3
    assert chosen["a"].tolist() == [True, True, False]
    assert chosen["b"].tolist() == [[True, False]]
    with pytest.raises(NotFinite, match="a score of 'a' is NaN, so it is on no side of a threshold"):
        at_most({"a": torch.tensor([math.nan])}, 0.7)


@pytest.mark.parametrize("reset_untouched", [True, False])
def test_a_threshold_at_the_largest_chosen_knowledge_value_chooses_what_the_share_chooses(reset_untouched):
    here = world()
    removed = here.full - gradient(here.model, cross_entropy, here.retain, micro_batch=8)
    config = change(reset_fraction=0.3, reset_untouched=reset_untouched, eps=1e-3)
    by_share = unlearn(here.model, here.blind(), config)
    chosen = moved(here.model, by_share.model)
    values = knowledge_values(removed.total, here.full.total, 1e-3)
    largest = max(float(values[name][mask].max()) for name, mask in chosen.items() if mask.any())
    by_threshold = unlearn(here.model, here.blind(), change(config, threshold=largest, reset_fraction=0.0))
    assert same(state(by_share.model), state(by_threshold.model))
    facts = by_share.trace.facts, by_threshold.trace.facts
    assert facts[0]["reset_count"] == facts[1]["reset_count"] > 0
    inside = removed.informative()
    expected = sum(int((v <= largest)[inside[n] | torch.tensor(reset_untouched)].sum()) for n, v in values.items())
    assert facts[1]["reset_count"] == expected
    assert facts[1]["requested_count"] == sum(int((v <= largest).sum()) for v in values.values())


def test_layers_get_their_share_in_reload_and_the_smallest_scores_in_each():
    here = world("batch-norm")
    removed = here.full - gradient(here.model, cross_entropy, here.retain, micro_batch=8)
    result = unlearn(here.model, here.blind(), change(reset_fraction=0.25, scope="layer", eps=1e-3), seed=1)
    scores = SELECTORS["small-kv"](Evidence(removed=removed.total, full=here.full.total, eps=1e-3))
    fresh = here.blind().fresh_values(1, here.model, scores)
    layers = {}
    for name in scores:
        layers.setdefault(name.split(".")[0], []).append(name)
    assert {key: len(names) for key, names in layers.items()} == {"0": 2, "1": 2, "4": 2}
    total = 0
    for names in layers.values():
        mine = torch.cat([scores[name].flatten() for name in names])
        wanted = len(mine) // 4
        bound = mine.sort().values[wanted - 1]
        for name in names:
            p = result.model.get_parameter(name)
            assert torch.equal(p, torch.where(scores[name] <= bound, fresh[name], here.model.get_parameter(name)))
        total += wanted
    assert result.trace.facts["reset_count"] == result.trace.facts["requested_count"] == total


def test_untouched_layers_give_nothing_and_no_other_layer_gives_more():
    """The first layer sees nothing of a record of zeros but through its bias."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].bias.fill_(-1.0)  # dead for an input of zeros
    inputs, labels = torch.rand(10, 3) + 2, torch.arange(10) % 2
    inputs[4] = 0
    data = Examples(inputs, labels)
    full = gradient(model, cross_entropy, data)
    given = Blind(
        retain=data.without(torch.tensor([4])),
        loss_terms=cross_entropy,
        fresh=lambda seed: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)),
        full=full,
    )
    with pytest.warns(UserWarning, match="only 2 of the 13 entries that reset_fraction=0.5 asks for"):
        result = unlearn(model, given, change(reset_fraction=0.5, scope="layer", reset_untouched=False))
    assert result.trace.reset == {"0.weight": 0.0, "0.bias": 0.0, "2.weight": 0.0, "2.bias": 1.0}
    with pytest.warns(UserWarning, match=r"only \d+ of the \d+ entries that threshold=100.0 asks for"):
        unlearn(model, given, change(threshold=100.0, reset_untouched=False))


def test_without_vectors_the_share_is_one_of_the_matrices():
    here = world("batch-norm")
    matrices = {name for name, p in here.model.named_parameters() if p.ndim > 1}
    entries = sum(here.model.get_parameter(name).numel() for name in matrices)
    result = unlearn(here.model, here.blind(), change(reset_fraction=0.5, reset_1d=False))
    assert result.trace.facts["requested_count"] == result.trace.facts["reset_count"] == entries // 2
    assert set(result.trace.reset) == {name for name, _ in here.model.named_parameters()}
    assert {name for name, share in result.trace.reset.items() if share} <= matrices
    for name, mask in moved(here.model, result.model).items():
        assert name in matrices or not mask.any()
    everything = unlearn(here.model, here.blind(), change(reset_fraction=0.5))
    assert any(share for name, share in everything.trace.reset.items() if name not in matrices)


# What it becomes


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(24, 40, 3), nn.BatchNorm2d(40)
        self.linear = nn.Linear(150, 90)
        self.scale = nn.Parameter(torch.tensor(3.0))


def values(reset_to: str, model: nn.Module | None = None, *, seed: int = 0, **more: Any) -> dict[str, Tensor]:
    model = model or Wide()
    given = Blind(retain=classification(4), loss_terms=cross_entropy, fresh=lambda _: Wide())
    return new_values(model, dict(model.named_parameters()), given, reset_to, seed=seed, **more)  # type: ignore[arg-type]


# fan-in and fan-out of the convolution: 24 x 9 and 40 x 9; of the linear layer: 150 and 90
FANS = {"conv.weight": (216, 360), "linear.weight": (150, 90)}


@pytest.mark.parametrize("kind", ["kaiming-normal", "kaiming-uniform", "xavier-normal", "xavier-uniform"])
def test_kaiming_and_xavier_have_their_variances_and_shapes(kind):
    found = values(kind)
    for name, (into, out) in FANS.items():
        variance = 2 / into if kind.startswith("kaiming") else 2 / (into + out)
        drawn = found[name].flatten().double()
        kurtosis = 3.0 if kind.endswith("normal") else 1.8
        error = math.sqrt((kurtosis - 1) / len(drawn))  # standard error of a variance, relative
        assert float(drawn.var()) == pytest.approx(variance, rel=5 * error)
        assert float(drawn.mean()) == pytest.approx(0, abs=5 * math.sqrt(variance / len(drawn)))
        bound = math.sqrt(3 * variance)
        assert (float(drawn.abs().max()) <= bound * (1 + 1e-6)) == kind.endswith("uniform")
        assert float((drawn**4).mean() / variance**2) == pytest.approx(kurtosis, rel=0.15)
    assert found["norm.weight"].tolist() == [1.0] * 40  # tensors without a fan are those of an untrained model
    assert found["norm.bias"].tolist() == [0.0] * 40
    assert float(found["scale"]) == 3


@pytest.mark.parametrize("kind", ["kaiming-normal", "xavier-uniform", "normal"])
def test_random_values_depend_on_seed_and_name_alone(kind):
    model = Wide()
    before = torch.get_rng_state()
    first, again, other = (values(kind, model, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for name in FANS:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
    assert not torch.equal(first["conv.weight"].flatten()[:50], first["linear.weight"].flatten()[:50])


def test_normal_values_have_the_standard_deviation_asked_for_or_that_of_the_tensor():
    model = Wide()
    with torch.no_grad():
        model.linear.weight.normal_(7, 0.5, generator=torch.Generator().manual_seed(0))  # around 7, and drawn around 0
    for std, expected in ((0.03, 0.03), (None, 0.5)):
        drawn = values("normal", model, std=std)["linear.weight"].double()
        assert float(drawn.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * drawn.numel()) + 0.01)
        assert float(drawn.mean()) == pytest.approx(0, abs=5 * expected / math.sqrt(drawn.numel()))
    assert float(values("normal", model)["scale"]) == 0.0  # a single number has no spread


def test_zero_and_the_mean_of_the_tensor():
    model = Wide()
    assert all(not value.any() for value in values("zero", model).values())
    means = values("layer-mean", model)
    for name, p in model.named_parameters():
        torch.testing.assert_close(means[name], torch.full_like(p, p.detach().double().mean()))
        assert means[name].is_contiguous()


@pytest.mark.parametrize("kind", ["fresh", "zero", "layer-mean", "kaiming-normal", "xavier-uniform", "normal"])
def test_re_initialised_entries_get_these_values_and_all_others_stay(kind):
    here = world("batch-norm")
    theta = dict(here.model.named_parameters())
    expected = new_values(here.model, theta, here.blind(), kind, seed=5)
    result = unlearn(here.model, here.blind(), change(reset_fraction=0.4, reset_to=kind), seed=5)
    removed = (here.full - gradient(here.model, cross_entropy, here.retain, micro_batch=8)).total
    eps = result.trace.facts["eps"]
    scores = knowledge_values(removed, here.full.total, eps)
    flat = torch.cat([score.flatten() for score in scores.values()])
    bound = flat.sort().values[len(flat) * 4 // 10 - 1]
    for name, p in theta.items():
        assert torch.equal(result.model.get_parameter(name), torch.where(scores[name] <= bound, expected[name], p))


def test_values_are_those_of_the_trained_tensor_not_of_the_ascended_one():
    here = world()
    config = change(reset_fraction=0.5, priming_lr=3.0, reset_to="layer-mean")
    result = unlearn(here.model, here.blind(), config)
    for name, p in here.model.named_parameters():
        if result.trace.reset[name]:
            mean = p.mean()
            found = int((result.model.get_parameter(name) == mean).sum())
            assert found == round(result.trace.reset[name] * p.numel())


def test_random_values_and_zero_need_no_untrained_model():
    here = world()

    def never(seed: int) -> nn.Module:
        raise AssertionError("fresh was called")

    for kind in ("zero", "layer-mean", "normal"):
        unlearn(here.model, here.blind(fresh=never), change(reset_to=kind))


# Whose statistics


def deep() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 4), nn.BatchNorm1d(4, momentum=0.3)
    ).double()


def re_estimate(model: nn.Module, data: Any, batch_size: int, trace: Trace | None = None) -> int:
    given = Blind(retain=data, loss_terms=cross_entropy, fresh=lambda _: deep())
    return re_estimate_statistics_(model, given, batch_size, seed=0, trace=trace or Trace("test", 0))


def test_statistics_of_one_batch_are_the_mean_and_the_variance_of_the_activations():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = deep()
    inputs, labels = classification(40).tensors
    model(100 + inputs)  # what the statistics were before must not matter
    trace, before = Trace("test", 0), torch.get_rng_state()
    assert re_estimate(model, Examples(inputs, labels), 64, trace) == 2
    assert torch.equal(torch.get_rng_state(), before)
    first = model[0](inputs).detach()
    mean, var = first.mean(0), first.var(0)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, var)
    normal = (first - mean) / (first.var(0, correction=0) + 1e-5).sqrt()
    second = model[4]((normal * model[1].weight + model[1].bias).relu()).detach()  # without dropout
    torch.testing.assert_close(model[5].running_mean, second.mean(0))
    torch.testing.assert_close(model[5].running_var, second.var(0))
    assert [int(model[i].num_batches_tracked) for i in (1, 5)] == [1, 1]
    assert [model[i].momentum for i in (1, 5)] == [0.1, 0.3]
    assert all(module.training for module in model.modules())
    assert trace.forwarded == 40
    assert all(p.grad is None for p in model.parameters())


def test_statistics_of_several_batches_are_the_plain_average():
    model = network("batch-norm")
    batches = [tuple(t[rows] for t in classification(30).tensors) for rows in torch.arange(30).split(10)]
    re_estimate(model, batches, 4)  # data without positions keeps its batches
    hidden = [model[0](inputs).detach() for inputs, _ in batches]
    torch.testing.assert_close(model[1].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([h.var(0) for h in hidden]).mean(0))


def test_batches_for_statistics_are_drawn_at_random_and_the_seed_decides():
    data = classification(30)
    found = []
    for seed in (0, 0, 1):
        model = network("batch-norm")
        given = Blind(retain=data, loss_terms=cross_entropy, fresh=lambda _: deep())
        re_estimate_statistics_(model, given, 10, seed=seed, trace=Trace("test", 0))
        found.append(model[1].running_var.clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_model_without_running_statistics_takes_no_pass():
    trace = Trace("test", 0)
    assert re_estimate(network("mlp"), classification(10), 4, trace) == 0
    assert re_estimate(nn.Sequential(nn.BatchNorm1d(5, track_running_stats=False)), classification(10), 4, trace) == 0
    assert trace.forwarded == 0


def test_frozen_normalisations_keep_their_statistics_as_in_training():
    model = nn.Sequential(nn.BatchNorm1d(5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    model[0].requires_grad_(False)
    model[0].running_mean.fill_(7)
    trace = Trace("test", 0)
    assert re_estimate(model, classification(10), 4, trace) == 1
    assert (model[0].running_mean == 7).all()
    assert not (model[1].running_mean == 0).any()


def test_reload_re_estimates_after_the_re_initialisation_and_only_from_what_is_left():
    here = world("batch-norm")
    config = change(reset_fraction=0.3, statistics="re-estimated")  # one batch: 256 or more examples
    kept = unlearn(here.model, here.blind(), change(reset_fraction=0.3), seed=2).model
    result = unlearn(here.model, here.blind(), config, seed=2)
    assert same(
        {n: p for n, p in state(kept).items() if "running" not in n and "num" not in n},
        {n: p for n, p in state(result.model).items() if "running" not in n and "num" not in n},
    )
    assert torch.equal(kept[1].running_mean, here.model[1].running_mean)
    hidden = result.model[0](here.retain.tensors[0]).detach()
    torch.testing.assert_close(result.model[1].running_mean, hidden.mean(0))
    torch.testing.assert_close(result.model[1].running_var, hidden.var(0))
    assert list(result.trace.seconds)[-2:] == ["statistics", "fine-tune"]
    assert result.trace.facts["statistics_layers"] == 1
    assert result.trace.forwarded == len(here.retain)
    assert "statistics_layers" not in unlearn(here.model, here.blind(), change()).trace.facts


# As settings


EVERY = Reload(
    threshold=0.7,
    scope="layer",
    damping=0.01,
    reset_1d=False,
    reset_to="normal",
    reset_std=0.02,
    statistics="re-estimated",
)


def test_every_option_survives_json_and_can_be_given_on_the_command_line():
    assert rebuild(Reload, json.loads(json.dumps(dataclasses.asdict(EVERY)))) == EVERY
    line = "--threshold 0.7 --scope layer --damping 0.01 --no-reset-1d --reset-to normal --reset-std 0.02"
    assert tyro.cli(Reload, args=[*line.split(), "--statistics", "re-estimated"]) == EVERY
    for name in SELECTORS:
        assert tyro.cli(Reload, args=["--selector", name]) == Reload(selector=name)
    assert tyro.cli(Reload, args=["--threshold", "None"]) == Reload()


@pytest.mark.parametrize(
    "options",
    [
        {"selector": "obs"},
        {"selector": "ekfac", "reset_1d": False},
        {"reset_to": "kaiming-uniform", "scope": "layer", "statistics": "re-estimated"},
        {"threshold": 0.9, "reset_to": "normal"},
    ],
)
@pytest.mark.parametrize("kind", ["plain", "batch-norm"])
def test_the_same_seed_gives_the_same_bits_and_another_one_others(options, kind):
    here = world(kind)
    config = Reload(**({"reset_fraction": 0.3, "fine_tune": Recipe(epochs=2, lr=0.05, batch_size=16)} | options))
    first, again, other = (unlearn(here.model, here.blind(), config, seed=seed) for seed in (3, 3, 4))
    assert same(state(first.model), state(again.model))
    assert not same(state(first.model), state(other.model))
    assert json.loads(json.dumps(first.trace.as_dict()))["facts"] == again.trace.facts
