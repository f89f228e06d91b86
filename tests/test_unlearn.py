"""The front door, what a method may see, the trace, and the methods that are not RELOAD."""

import copy
import json
import math
from dataclasses import FrozenInstanceError, dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from expunge import (
    Blind,
    CFk,
    Examples,
    FineTune,
    GradientAscent,
    Recipe,
    Reload,
    Retrain,
    Sighted,
    cross_entropy,
    gradient,
    train,
    unlearn,
)
from expunge import trace as trace_module
from expunge.errors import ConfigError, ForgetSetAccessed, MismatchError, NotFinite, NotInformative
from expunge.methods import METHODS, method_of
from expunge.methods.guard import keeping_what_is_left
from expunge.trace import Trace
from expunge.training import mean_loss
from tests.contract import BRIEF, World, quick, same, state, without_type_checks, world

ONE_STEP = Recipe(epochs=1, lr=0.5, batch_size=1000, momentum=0.0, weight_decay=0.0, schedule="constant")


# The front door


def test_a_cache_taken_at_other_weights_is_refused():
    here = world()
    model = copy.deepcopy(here.model)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-6
    for name in METHODS:
        with pytest.raises(MismatchError, match=r"the cached gradient was taken at weights .* bit for bit"):
            unlearn(model, here.sighted(), quick(name))


def test_a_cache_taken_with_other_batch_norm_statistics_is_refused():
    here = world("batch-norm")
    model = copy.deepcopy(here.model)
    model.train()(here.original.tensors[0])
    with pytest.raises(MismatchError, match=r"taken with buffers .*BatchNorm statistics"):
        unlearn(model, here.blind(), quick("reload"))


def test_a_cache_of_another_loss_is_refused():
    def other(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model, batch)

    here = world()
    with pytest.raises(MismatchError, match=r"is of the loss 'cross_entropy', and now .*other"):
        unlearn(here.model, here.blind(loss_terms=other), quick("reload"))


@pytest.mark.parametrize("config", [BRIEF, "reload", Reload])
def test_what_is_no_configuration_of_a_method_is_refused(config):
    here = world()
    with pytest.raises(
        ConfigError,
        match=r"is not the configuration of a method. Give one of Reload, OrthogonalAscent, ClassOrthogonalAscent",
    ):
        unlearn(here.model, here.blind(), config)


def test_configurations_name_their_method():
    for name in METHODS:
        assert method_of(quick(name)) is METHODS[name]
    assert len({method.config for method in METHODS.values()}) == len(METHODS)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [("plain", "layers.linear1.bias", math.inf), ("batch-norm", "1.running_var", math.nan)],
)
def test_a_model_that_is_not_finite_is_refused(kind, name, value):
    here = world(kind)
    model = copy.deepcopy(here.model)
    model.state_dict()[name][0] = value
    with pytest.raises(NotFinite, match=f"the model to unlearn from: tensor '{name}' has 1 of 12"):
        unlearn(model, here.blind(full=None), quick("fine-tune"))


def test_statistics_that_overflow_are_reported_though_the_weights_are_finite():
    here = world("batch-norm")
    inputs, labels = here.retain.tensors
    with pytest.raises(NotFinite, match=r"the result of fine-tune: tensor '1.running_var'"):
        unlearn(here.model, here.blind(retain=Examples(inputs * 1e20, labels)), quick("fine-tune"))


def test_a_buffer_may_hold_infinities_that_were_there_before():
    here = world()
    model = copy.deepcopy(here.model)
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    result = unlearn(model, here.blind(full=None), quick("fine-tune")).model
    assert result.mask.tolist() == [0, -math.inf]


def test_a_compiled_model_comes_back_uncompiled_with_the_same_bits():
    here = world()
    compiled = torch.compile(copy.deepcopy(here.model), backend="eager")
    result = unlearn(compiled, here.blind(), quick("reload")).model
    assert type(result) is type(here.model)
    assert same(state(result), state(unlearn(here.model, here.blind(), quick("reload")).model))


def test_only_reload_needs_the_cached_gradient():
    here = world()
    with pytest.raises(ConfigError, match="full=None: this method needs the gradient of all data, cached before"):
        unlearn(here.model, here.blind(full=None), quick("reload"))
    for name in ("retrain", "fine-tune", "gradient-ascent"):
        unlearn(here.model, here.sighted(full=None), quick(name))


# What a method may see


def test_a_blind_has_no_forget_set_and_both_are_frozen():
    here = world()
    assert not hasattr(here.blind(), "forget")
    assert not hasattr(here.blind(), "original")
    for given in (here.blind(), here.sighted()):
        with pytest.raises(FrozenInstanceError):
            given.retain = here.original


def test_access_errors_are_what_callers_expect():
    assert issubclass(ForgetSetAccessed, PermissionError)
    assert issubclass(ConfigError, ValueError)
    assert issubclass(NotInformative, RuntimeError)


@pytest.mark.parametrize("part", ["retain", "forget", "original", "validation"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (iter([]), "is a list_iterator that can be read only once"),
        ((batch for batch in ()), "is a generator that can be read only once"),
        ([], "is empty: there is nothing left to learn from"),
        (Examples(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64)), "is empty"),
        (3, "is a int, which holds no batches"),
    ],
)
def test_data_that_cannot_be_unlearned_from_is_refused_at_once(part, data, message):
    here = world()
    parts = {"retain": here.retain, "forget": here.forget, "loss_terms": cross_entropy, "fresh": here.fresh}
    with without_type_checks(), pytest.raises(ConfigError, match=f"{part} {message}"):
        Sighted(**(parts | {part: data}))


def test_a_method_is_given_its_data_by_name():
    for given in (Blind, Sighted):
        assert all(field.kw_only for field in fields(given))


def test_a_fresh_model_depends_on_the_seed_alone():
    given, seeds = world().blind(), []
    models = []
    for number, seed in enumerate((5, 5, 6)):
        with torch.random.fork_rng():
            torch.manual_seed(number)
            models.append(state(given.fresh_model(seed, world().model)))
    assert same(models[0], models[1])
    assert not same(models[0], models[2])
    Blind(
        retain=given.retain, loss_terms=cross_entropy, fresh=lambda seed: seeds.append(seed) or nn.Linear(1, 1)
    ).fresh_model(7, nn.Linear(1, 1))
    assert seeds != [7]  # derived: or a fresh that seeds torch with it gives the original's own first values


def test_a_fresh_that_gives_the_trained_weights_builds_no_module_or_another_architecture_is_refused():
    here = world()
    blind = lambda fresh: Blind(retain=here.retain, loss_terms=cross_entropy, fresh=fresh)  # noqa: E731
    with pytest.raises(ConfigError, match=r"fresh\(\) returned the weights to be unlearned"):
        blind(lambda _: here.model).fresh_model(0, here.model)
    with pytest.raises(MismatchError, match="only what fresh"):
        blind(lambda _: nn.Sequential(here.model, nn.Linear(3, 3))).fresh_model(0, here.model)
    with pytest.raises(ConfigError, match=r"fresh\(\) returned NoneType"):
        blind(lambda _: None).fresh_model(0, here.model)


def test_fresh_values_have_the_type_of_the_model_and_only_the_names_asked_for():
    here = world()
    model = copy.deepcopy(here.model).double()
    values = here.blind().fresh_values(2, model, ["layers.linear1.bias"])
    assert list(values) == ["layers.linear1.bias"]
    assert values["layers.linear1.bias"].dtype == torch.float64
    expected = here.blind().fresh_model(2, model).layers.linear1.bias.detach().double()
    assert torch.equal(values["layers.linear1.bias"], expected)


# The methods that are not RELOAD


@pytest.mark.parametrize("epochs", [0, 3])
def test_retraining_shares_no_value_with_the_original(epochs):
    here = world()
    result = unlearn(here.model, here.blind(), Retrain(recipe=Recipe(epochs=epochs, lr=0.05)), seed=2).model
    for original, retrained in zip(here.model.parameters(), result.parameters(), strict=True):
        assert not torch.isin(retrained, original).any()


@pytest.mark.parametrize("kind", ["plain", "batch-norm"])
def test_retraining_is_training_a_fresh_model_on_what_is_left_bit_for_bit(kind):
    here = world(kind)
    recipe = Recipe(epochs=4, lr=0.07, batch_size=10)
    result = unlearn(here.model, here.blind(), Retrain(recipe=recipe), seed=9)
    model = here.blind().fresh_model(9, here.model)
    trace = train(model, here.retain, cross_entropy, recipe, seed=9)
    assert same(state(result.model), state(model))
    assert result.trace.losses == trace.losses


@pytest.mark.parametrize("kind", ["plain", "batch-norm"])
def test_fine_tuning_is_training_the_original_on_what_is_left_bit_for_bit(kind):
    here = world(kind)
    recipe = Recipe(epochs=4, lr=0.07, batch_size=10)
    result = unlearn(here.model, here.blind(), FineTune(recipe=recipe), seed=9)
    model = copy.deepcopy(here.model)
    train(model, here.retain, cross_entropy, recipe, seed=9)
    assert same(state(result.model), state(model))


def in_float64() -> tuple[nn.Module, World]:
    here = world()
    tensors = here.original.tensors
    original = Examples(tensors[0].double(), tensors[1])
    model = copy.deepcopy(here.model).double()
    return model, World(model, here.fresh, original, gradient(model, cross_entropy, original))


def test_the_first_step_of_gradient_ascent_climbs_the_mean_loss_on_the_removed_records():
    model, here = in_float64()
    result = unlearn(model, here.sighted(), GradientAscent(recipe=ONE_STEP, loss_bound=100.0)).model
    inputs, labels = here.forget.tensors
    functional.cross_entropy(model(inputs), labels).backward()
    for before, after in zip(model.parameters(), result.parameters(), strict=True):
        torch.testing.assert_close(after, before + 0.5 * before.grad)
    assert mean_loss(result, here.forget, cross_entropy) > mean_loss(model, here.forget, cross_entropy)


def test_gradient_ascent_ends_before_its_bound():
    here = world()
    recipe = Recipe(epochs=100, lr=0.05, batch_size=12, weight_decay=0.0, schedule="constant")
    given = here.sighted()
    result = unlearn(here.model, given, GradientAscent(recipe=recipe, loss_bound=2.0))
    epochs = len(result.trace.epoch_ends)
    assert 1 < epochs < 100
    assert "passed the bound 2; the epoch was taken back" in result.trace.stopped
    assert mean_loss(result.model, here.forget, cross_entropy) <= 2.0
    unbounded = Recipe(epochs=epochs, lr=0.05, batch_size=12, weight_decay=0.0, schedule="constant")
    beyond = unlearn(here.model, given, GradientAscent(recipe=unbounded, loss_bound=1e6))
    assert beyond.trace.stopped == f"all {epochs} epochs done"
    assert mean_loss(beyond.model, here.forget, cross_entropy) > 2.0
    just_before = Recipe(epochs=epochs - 1, lr=0.05, batch_size=12, weight_decay=0.0, schedule="constant")
    within = unlearn(here.model, given, GradientAscent(recipe=just_before, loss_bound=1e6))
    assert same(state(result.model), state(within.model))


@pytest.mark.parametrize(("kind", "lr"), [(FineTune, 20.0), (CFk, 1e4)])
def test_training_that_ends_past_its_bound_is_taken_back(kind, lr):
    here = world()
    recipe = Recipe(epochs=3, lr=lr, batch_size=8, schedule="constant")
    settings = {"recipe": recipe} if kind is FineTune else {"recipe": recipe, "k": 1}
    with pytest.warns(UserWarning, match=r"was taken back. Lower the learning rate, or raise loss_bound"):
        result = unlearn(here.model, here.blind(), kind(**settings))
    assert len(result.trace.epoch_ends) == 3
    assert "passed the bound 5; all after epoch 0 was taken back" in result.trace.stopped
    assert same(state(result.model), state(here.model))


def test_an_epoch_past_the_bound_is_no_end_if_what_follows_is_fine():
    here, trace = world(), Trace("test", 0)
    model, wreck = copy.deepcopy(here.model), copy.deepcopy(here.model)
    with torch.no_grad():
        for p in wreck.parameters():
            p.mul_(-30)
    stop = keeping_what_is_left(model, here.blind(), 5.0, trace, epochs=4)
    for state_of, ends in ((wreck, False), (here.model, False), (wreck, False), (wreck, True)):
        model.load_state_dict(state_of.state_dict())
        assert bool(stop(model, 0.0)) == ends
    assert same(state(model), state(here.model))
    assert "all after epoch 2 was taken back" in trace.warnings[0]


def test_a_loss_that_is_large_by_nature_does_not_count_as_passing_the_bound():
    here = world()

    def large(model: nn.Module, batch: Any) -> Tensor:
        return 30 + cross_entropy(model, batch)

    given = Blind(retain=here.retain, loss_terms=large, fresh=here.fresh)
    assert unlearn(here.model, given, FineTune(recipe=BRIEF)).trace.stopped == "all 3 epochs done"


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
def test_a_loss_bound_that_cannot_work_is_refused(bound):
    with pytest.raises(ConfigError, match=f"loss_bound={bound}: must be a positive number of nats a term"):
        GradientAscent(loss_bound=bound)
    for kind in (FineTune, CFk):
        with pytest.raises(ConfigError, match=f"loss_bound={bound}: must be a positive number of nats a term"):
            kind(loss_bound=bound)


def test_all_of_the_defaults_are_those_of_the_sources():
    assert (FineTune().recipe.epochs, FineTune().recipe.lr) == (10, 0.01)  # SalUn
    assert (GradientAscent().recipe.epochs, GradientAscent().recipe.lr) == (5, 1e-3)  # SalUn
    assert (GradientAscent().recipe.weight_decay, GradientAscent().recipe.schedule) == (0, "constant")
    assert (Reload().published_code, Reload().selector) == ((), "small-kv")  # the paper, not its released code
    assert Reload().fine_tune.epochs == 35  # the paper
    assert (Reload().priming_lr, Reload().tolerance, Reload().reset_untouched) == (1.0, 0.05, False)


# The trace


@dataclass
class Clock:
    now: float = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(trace_module, "time", fake)
    return fake


def test_stages_are_timed_and_watching_is_not(clock):
    model, seen = nn.Linear(1, 1), []

    def watch(moment: str, shown: nn.Module) -> None:
        assert shown is model
        seen.append((moment, clock.now))
        clock.now += 100

    trace = Trace("x", 0, watch=watch)
    with trace.stage("first", model):
        clock.now += 2
        trace.show("inside", model)
        clock.now += 3
    with trace.stage("second", model):
        clock.now += 7
    with trace.stage("first", model):
        clock.now += 1
    assert trace.seconds == {"first": 6, "second": 7}
    assert seen == [("inside", 2), ("first", 105), ("second", 212), ("first", 313)]


def test_a_trace_without_a_watcher_only_times(clock):
    trace = Trace("x", 0)
    with trace.stage("only", nn.Linear(1, 1)):
        clock.now += 4
    assert trace.seconds == {"only": 4}


def test_stages_wait_for_the_accelerator(clock, monkeypatch):
    """Its queue is emptied before a clock is read, or a stage would pay for the one before it."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: setattr(clock, "now", clock.now + 10))
    trace = Trace("x", 0)
    with trace.stage("only", nn.Linear(1, 1)):
        clock.now += 1
    assert trace.seconds == {"only": 11}
    assert clock.now == 21


def test_the_watcher_is_no_part_of_what_a_trace_says():
    watched = Trace("x", 0, watch=lambda moment, model: None)
    watched.show("moment", nn.Linear(1, 1))
    assert watched == Trace("x", 0)
    assert "watch" not in repr(watched)


def test_a_trace_is_plain_values_for_json():
    trace = Trace("x", 3, watch=lambda moment, model: None)
    trace.facts["share"] = 0.5
    values = json.loads(json.dumps(trace.as_dict()))
    assert values == {
        "method": "x",
        "seed": 3,
        "seconds": {},
        "losses": [],
        "epoch_ends": [],
        "backwarded": 0,
        "forwarded": 0,
        "peak_memory": None,
        "reset": {},
        "stopped": "",
        "facts": {"share": 0.5},
        "warnings": [],
    }


def test_epochs_are_shown_to_the_watcher_in_order():
    here, seen = world(), []
    unlearn(here.model, here.blind(), quick("reload"), watch=lambda moment, _: seen.append(moment))
    epochs = [f"epoch {number}" for number in range(1, BRIEF.epochs + 1)]
    assert seen == ["difference", "ascend", "select", "re-initialise", *epochs, "fine-tune"]


def test_a_sighted_is_also_a_blind():
    assert issubclass(Sighted, Blind)
