"""RELOAD against an example worked by hand: the ascent, which entries are re-initialised, and what is refused."""

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

from expunge import Blind, Examples, Recipe, Reload, gradient, squared_error, unlearn
from expunge.errors import ConfigError, MismatchError, NotFinite, NotInformative
from expunge.methods.kronecker import diagonal_fisher, kronecker_fisher
from expunge.methods.reload import PUBLISHED_CODE
from expunge.models.mlp import MLP
from expunge.selectors import SELECTORS, Evidence
from expunge.trace import Trace
from tests.contract import quick, same, state, without_type_checks, world
from tests.contract.test_methods import rebuild

ONLY_RESET = Reload(priming_lr=None, reset_untouched=True, fine_tune=Recipe(epochs=0, lr=0.1))
ONLY_ASCEND = Reload(reset_fraction=0.0, fine_tune=Recipe(epochs=0, lr=0.1, batch_size=2))


def change(config: Reload, **changes: Any) -> Reload:
    return dataclasses.replace(config, **changes)


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def given_all(model: nn.Module, original: Examples, removed: list[int], fresh: Callable[[int], nn.Module]) -> Blind:
    full = gradient(model, squared_error, original)
    retain = original.without(torch.tensor(removed))
    return Blind(retain=retain, loss_terms=squared_error, fresh=fresh, full=full)


# A worked example: y = w·x, loss (w·x - y)², so the gradient of an example is 2 r x with the residual r = w·x - y.
#   weights w = (1, 2, -1), fresh values (10, 20, 30)
#   example    x          y    w·x   r   loss   gradient
#      0    (1, 0, 0)     0     1    1     1    (2, 0, 0)
#      1    (0, 1, 0)     1     2    1     1    (0, 2, 0)
#      2    (1, 2, 1)     2     4    2     4    (4, 8, 4)     <- removed
#      3    (0, 0, 1)    -4    -1    3     9    (0, 0, 6)
#   g_D = (6, 10, 10), loss 15 over 4 examples; g_new = (2, 2, 6); g_F = g_D - g_new = (4, 8, 4)
# The ascent with priming_lr 0.4 is a step of 0.4 / 4 = 0.1: w' = (1.4, 2.8, -0.6).
# Knowledge values with ε = 1: (5/7, 9/11, 5/11) = (0.714, 0.818, 0.455). A third of three weights: the last is reset.
# The result is (1.4, 2.8, 30).
# Rounding, float32, u = 2^-24, all examples in one micro-batch, touched in both passes. The floor of g_D is
# f = 4 u |g_D| = u (24, 40, 40); spread over its row (mean 104/3 u) and its columns (one row: f itself) it is
# s = f + (f + 104/3 u) / 4 = u (116, 176, 176) / 3. The touched group has size 26 in one pass and 10 in the other, so
# the floor of the difference is (26 + 10) / 26 s + 32 u |g_F| but for one part in 2^31: in thirds of u,
# 18/13 (116, 176, 176) + 96 (4, 8, 4) = FLOOR.
FLOOR = tuple(18 / 13 * s + 96 * g for s, g in ((116, 4), (176, 8), (176, 4)))


class TestWorkedExample:
    @pytest.fixture
    def given(self) -> Blind:
        inputs = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 2, 1], [0, 0, 1]])
        targets = torch.tensor([[0.0], [1], [2], [-4]])
        fresh = lambda seed: linear(torch.tensor([[10.0, 20, 30]]))  # noqa: E731
        return given_all(self.model, Examples(inputs, targets), [2], fresh)

    model = linear(torch.tensor([[1.0, 2, -1]]))
    config = Reload(priming_lr=0.4, reset_fraction=0.34, eps=1.0, fine_tune=Recipe(epochs=0, lr=0.1))

    def test_gradients(self, given):
        assert given.full.total["weight"].tolist() == [[6, 10, 10]]
        assert (given.full.count, given.full.loss) == (4, 15)
        removed = given.full - gradient(self.model, squared_error, given.retain)
        assert removed.total["weight"].tolist() == [[4, 8, 4]]
        assert (removed.count, removed.loss) == (1, 4)
        assert (removed.noise["weight"] * 2**24 * 3).tolist() == [pytest.approx(FLOOR)]

    def test_every_step_gives_the_weights_worked_out_by_hand(self, given):
        seen = {}
        watch = lambda moment, model: seen.update({moment: model.weight[0].tolist()})  # noqa: E731
        result = unlearn(self.model, given, self.config, watch=watch)
        assert seen["difference"] == [1, 2, -1]
        assert seen["ascend"] == seen["select"] == pytest.approx([1.4, 2.8, -0.6])
        assert seen["re-initialise"] == seen["fine-tune"] == pytest.approx([1.4, 2.8, 30])
        assert result.model.weight[0].tolist() == pytest.approx([1.4, 2.8, 30])

    def test_every_fact_is_the_one_worked_out_by_hand(self, given):
        trace = unlearn(self.model, given, self.config).trace
        relative_noise = 2**-24 / 3 * math.hypot(*FLOOR) / math.hypot(4, 8, 4)
        assert trace.facts == {
            "removed_count": 1,
            "cached_count": 4,
            "eps": 1.0,
            "priming_length": pytest.approx(0.1 * math.hypot(4, 8, 4) / math.hypot(1, 2, 1)),
            "target_loss": 15 / 4,
            "informative_share": 1.0,
            "relative_noise": pytest.approx(relative_noise),
            "compared": 0,
            "reset_count": 1,
            "requested_count": 1,
            "untouched_in_paper_choice": 0.0,
            "overlap_with_paper_choice": 1.0,
        }
        assert trace.reset == {"weight": pytest.approx(1 / 3)}
        assert (trace.backwarded, trace.forwarded) == (3, 0)

    def test_automatic_eps_is_the_mean_rounding_floor(self, given):
        trace = unlearn(self.model, given, change(self.config, eps="auto")).trace
        assert trace.facts["eps"] == pytest.approx(2**-24 / 3 * sum(FLOOR) / 3)


def hundred() -> tuple[nn.Module, Blind]:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(2, 6, 10, generator=generator, dtype=torch.float64)
    model = linear(torch.randn(10, 10, generator=generator, dtype=torch.float64))
    fresh = lambda seed: linear(torch.full((10, 10), 77.0, dtype=torch.float64))  # noqa: E731
    return model, given_all(model, Examples(inputs, targets), [1, 4], fresh)


HUNDRED = hundred()


@for_all(thousandths=st.integers(0, 999), kind=st.sampled_from([float, np.float64]))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_exactly_the_floor_of_the_fraction_is_reset(thousandths, kind):
    model, given = HUNDRED
    result = unlearn(model, given, change(ONLY_RESET, reset_fraction=kind(thousandths / 1000)))
    expected = thousandths * 100 // 1000
    assert int((result.model.weight == 77).sum()) == expected
    assert result.trace.facts["reset_count"] == result.trace.facts["requested_count"] == expected
    assert torch.equal(model.weight[result.model.weight != 77], result.model.weight[result.model.weight != 77])


@pytest.mark.parametrize(("fraction", "count"), [(0.29, 29), (0.57, 57), (0.58, 58), (0.07, 7), (0.999, 99), (0, 0)])
def test_a_fraction_means_its_decimal_digits(fraction, count):
    model, given = HUNDRED
    result = unlearn(model, given, change(ONLY_RESET, reset_fraction=fraction))
    assert int((result.model.weight == 77).sum()) == count


class Ties(nn.Module):
    """Every entry has the same gradient, so every knowledge value ties."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.full((4,), value)), nn.Parameter(torch.full((2, 3), value))

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.first.sum() + self.second.sum()) * inputs


@pytest.mark.parametrize("reset_untouched", [True, False])
@pytest.mark.parametrize("count", [0, 3, 4, 5, 9])
def test_ties_are_reset_by_tensor_and_then_by_position(reset_untouched, count):
    model = Ties(0.0)
    given = given_all(model, Examples(torch.ones(4), torch.ones(4)), [3], lambda seed: Ties(5.0))
    config = change(ONLY_RESET, reset_fraction=count / 10, reset_untouched=reset_untouched)
    result = unlearn(model, given, config).model
    assert torch.cat([result.first, result.second.flatten()]).tolist() == [5.0] * count + [0.0] * (10 - count)


def one_weight_touched() -> tuple[nn.Module, Blind]:
    """Four inputs, one a record; removing the third record can only show in the third weight."""
    model = linear(torch.ones(1, 4))
    return model, given_all(
        model, Examples(torch.eye(4), torch.zeros(4, 1)), [2], lambda _: linear(torch.full((1, 4), 9.0))
    )


def test_entries_that_the_removed_data_never_touched_keep_their_values_and_a_warning_says_so():
    model, given = one_weight_touched()
    with pytest.warns(UserWarning, match="only 1 of the 2 entries that reset_fraction=0.5 asks for"):
        result = unlearn(model, given, change(ONLY_RESET, reset_fraction=0.5, reset_untouched=False))
    assert result.model.weight.tolist() == [[1, 1, 9, 1]]
    assert len(result.trace.warnings) == 1
    assert "only 1 of the 2 entries" in result.trace.warnings[0]
    assert result.trace.facts["informative_share"] == 0.25
    assert result.trace.facts["untouched_in_paper_choice"] == 1.0  # untouched entries have the lowest knowledge values
    assert result.trace.facts["overlap_with_paper_choice"] == 0.0


def test_the_paper_to_the_letter_resets_untouched_entries_too():
    model, given = one_weight_touched()
    result = unlearn(model, given, change(ONLY_RESET, reset_fraction=0.5))
    assert result.model.weight.tolist() == [[9, 9, 1, 1]]
    assert len(result.trace.warnings) == 1  # nothing was fine-tuned
    assert "67% of what training had gained there is lost" in result.trace.warnings[0]
    assert "`expunge rehearse` finds some" in result.trace.warnings[0]


def test_nothing_removed_is_refused():
    here = world()
    with pytest.raises(
        NotInformative, match=r"of 0 removed terms is below its rounding floor .* A cache is made before"
    ):
        unlearn(here.model, here.blind(retain=here.original), quick("reload"))


def test_without_a_priming_lr_there_is_no_ascent():
    model, given = HUNDRED
    assert same(state(unlearn(model, given, change(ONLY_ASCEND, priming_lr=None)).model), state(model))
    assert not same(state(unlearn(model, given, ONLY_ASCEND).model), state(model))


def steps(departures: tuple[str, ...], **changes: Any) -> tuple[Tensor, Tensor]:
    model, given = HUNDRED
    result = unlearn(model, given, change(ONLY_ASCEND, published_code=departures, **changes)).model
    removed = given.full - gradient(model, squared_error, given.retain)
    return (result.weight - model.weight).detach(), removed.total["weight"]


def test_the_ascent_goes_along_the_difference_on_the_mean_loss_over_all_data():
    moved, removed = steps((), priming_lr=0.3)
    torch.testing.assert_close(moved, 0.3 / 6 * removed)
    assert bool((removed < 0).any())  # or the next test could not tell


def test_a_relative_ascent_is_a_share_of_the_weights_norm():
    moved, removed = steps((), priming_length=0.3)
    length = 0.3 * float(HUNDRED[0].weight.detach().norm())
    torch.testing.assert_close(moved.double(), length * removed / removed.norm(), rtol=1e-5, atol=1e-7)


def test_the_length_of_one_ascent_can_be_taken_for_another():
    model, given = HUNDRED
    first = unlearn(model, given, change(ONLY_ASCEND, priming_lr=0.3))
    length = first.trace.facts["priming_length"]
    again = unlearn(model, given, change(ONLY_ASCEND, priming_lr=None, priming_length=length))
    torch.testing.assert_close(again.model.weight, first.model.weight)
    assert again.trace.facts["priming_length"] == pytest.approx(length)


def test_absolute_direction_ascends_along_absolute_values():
    moved, removed = steps(("absolute-direction",), priming_lr=0.3)
    torch.testing.assert_close(moved, 0.3 / 6 * removed.abs())


def test_batch_means_divides_by_the_batch_instead_of_the_data():
    moved, removed = steps(("batch-means",), priming_lr=0.3)
    torch.testing.assert_close(moved, 0.3 / 2 * removed)  # batches of 2, data of 6


def test_scaled_fraction_scales_by_the_removed_share_and_resets_a_twentieth_at_least():
    model, given = HUNDRED  # 2 of 6 removed
    for fraction, count in ((0.9, 30), (0.6, 20), (0.06, 5)):
        config = change(ONLY_RESET, reset_fraction=fraction, published_code=("scaled-fraction",))
        result = unlearn(model, given, config)
        assert int((result.model.weight == 77).sum()) == count
        assert result.trace.facts["eps"] == 1e-10


def test_normal_1d_draws_re_initialised_vectors_with_a_standard_deviation_of_two():
    def build(seed: int) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 400), nn.BatchNorm1d(400), nn.ReLU(), nn.Linear(400, 1))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs, targets = build(0), torch.randn(8, 3), torch.randn(8, 1)
    given = given_all(model, Examples(inputs, targets), [0], build)
    results = {}
    for departures in ((), ("normal-1d",)):
        config = change(ONLY_RESET, reset_fraction=0.99, published_code=departures)
        results[departures] = unlearn(model, given, config, seed=2).model
    plain, departed = results[()], results["normal-1d",]
    for before, after in zip(plain.parameters(), departed.parameters(), strict=True):
        assert before.ndim == 1 or torch.equal(before, after)
    assert set(plain[1].bias.tolist()) == {0.0}
    drawn = torch.cat([departed[0].bias, departed[1].weight, departed[1].bias]).detach()
    drawn = drawn[torch.cat([plain[0].bias != model[0].bias, torch.ones(800, dtype=torch.bool)])]
    drawn = drawn[(drawn != 1) & (drawn != 0)]  # BatchNorm entries that were not reset
    assert len(drawn) > 1000
    assert float(drawn.std()) == pytest.approx(2, abs=5 * 2 / math.sqrt(2 * len(drawn)))
    assert float(drawn.mean()) == pytest.approx(0, abs=5 * 2 / math.sqrt(len(drawn)))


@pytest.mark.parametrize("selector", SELECTORS)
def test_every_selector_resets_its_smallest_scores(selector):
    model, given = HUNDRED
    config = change(ONLY_RESET, reset_fraction=0.2, eps=0.5, selector=selector, damping=0.7)
    result = unlearn(model, given, config, seed=8)
    removed = given.full - gradient(model, squared_error, given.retain)
    measure = kronecker_fisher if selector == "ekfac" else diagonal_fisher
    curvature = measure(copy.deepcopy(model), squared_error, given.retain, ["weight"], Trace("", 0))
    delta = {"weight": 77 - model.weight.detach()}
    evidence = Evidence(
        removed=removed.total,
        full=given.full.total,
        eps=0.5,
        seed=8,
        change=delta,
        curvature=curvature,
        damping=0.7,
    )
    scores = SELECTORS[selector](evidence)["weight"]
    assert set((result.model.weight == 77).flatten().nonzero().flatten().tolist()) == set(
        scores.flatten().argsort()[:20].tolist()
    )


@pytest.mark.parametrize(
    ("fresh", "message"),
    [
        (lambda seed: MLP((6, 13, 3)), r"'layers.linear1.weight' has shape \(12, 6\) in the model and \(13, 6\)"),
        (lambda seed: MLP((6, 12)), "only the model has .*linear2"),
        (lambda seed: nn.Linear(6, 3), "only the model has .*only what fresh.. builds has .*weight"),
    ],
)
def test_a_fresh_model_of_another_architecture_is_refused(fresh, message):
    here = world()
    with pytest.raises(MismatchError, match=message):
        unlearn(here.model, here.blind(fresh=fresh), quick("reload"))


def test_a_learning_rate_that_blows_up_is_reported_with_epoch_and_step():
    here = world()
    config = change(quick("reload"), fine_tune=Recipe(epochs=3, lr=1e30, batch_size=16))
    with pytest.raises(NotFinite, match=r"reload: the loss became (nan|inf) in epoch 1, step [23] of 3"):
        unlearn(here.model, here.blind(), config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reset_fraction": 1.0}, r"reset_fraction=1.0: must be in \[0, 1\).*use retrain"),
        ({"reset_fraction": -0.1}, r"reset_fraction=-0.1: must be in \[0, 1\)"),
        ({"reset_fraction": math.nan}, "reset_fraction=nan"),
        ({"priming_lr": 0.0}, "priming_lr=0.0: must be positive, or None for no ascent"),
        ({"priming_lr": -1.0}, "priming_lr=-1.0: must be positive"),
        ({"priming_lr": math.inf}, "priming_lr=inf: must be positive"),
        ({"priming_length": 1.0}, r"priming_length=1.0: must be in \(0, 1\), a share of the weights"),
        ({"priming_length": 0.0}, r"priming_length=0.0: must be in \(0, 1\)"),
        (
            {"priming_length": 0.1, "published_code": ("batch-means",)},
            "priming_length=0.1: 'batch-means' scales priming_lr",
        ),
        ({"eps": 0.0}, "eps=0.0: must be positive, or 'auto'"),
        ({"eps": -1e-9}, "eps=-1e-09: must be positive"),
        ({"tolerance": -0.01}, "tolerance=-0.01, patience=10: must be 0 or more"),
        ({"patience": -1}, "patience=-1: must be 0 or more"),
        ({"selector": "smallest"}, "selector='smallest': choose from small-kv, large-kv"),
        ({"scope": "tensor"}, "scope='tensor': choose from global, layer"),
        ({"reset_to": "ones"}, "reset_to='ones': choose from fresh, zero, layer-mean, kaiming-normal"),
        ({"statistics": "reset"}, "statistics='reset': choose from kept, re-estimated"),
        ({"damping": 0.0}, "damping=0.0: must be positive"),
        ({"threshold": 0.0}, "threshold=0.0: must be positive, or None"),
        ({"threshold": math.nan}, "threshold=nan: must be positive, or None"),
        ({"threshold": 0.5, "selector": "random"}, "threshold=0.5, selector='random': a threshold is one of knowledge"),
        ({"threshold": 0.5, "published_code": ("scaled-fraction",)}, "threshold=0.5: 'scaled-fraction' scales a share"),
        ({"reset_std": -1.0, "reset_to": "normal"}, "reset_std=-1.0: must be positive, or None"),
        ({"reset_std": 0.1}, "reset_std=0.1: only reset_to='normal' has one, not 'fresh'"),
        ({"published_code": ("typo",)}, r"published_code=\['typo'\]: choose from absolute-direction, batch-means"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with without_type_checks(), pytest.raises(ConfigError, match=message):
        Reload(**settings)


def test_settings_with_lists_survive_json():
    config = Reload(published_code=PUBLISHED_CODE, eps=0.1, priming_lr=None, fine_tune=Recipe(epochs=1, lr=1.0))
    assert rebuild(Reload, json.loads(json.dumps(dataclasses.asdict(config)))) == config
    config = Reload(threshold=0.9, reset_to="normal", reset_std=0.3, scope="layer", statistics="re-estimated")
    assert rebuild(Reload, json.loads(json.dumps(dataclasses.asdict(config)))) == config
