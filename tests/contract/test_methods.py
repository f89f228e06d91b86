"""The manners of every method in `expunge.methods.METHODS`; a new one is tested by being in the table."""

import copy
import dataclasses
import functools
import inspect
import json
import random
from typing import Any, get_args, get_type_hints

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn

from expunge import Blind, Examples, Sighted, Unlearned, cross_entropy, unlearn
from expunge.errors import ForgetSetAccessed, NotFinite
from expunge.methods import METHODS
from expunge.space import random_settings, with_settings
from expunge.training import mean_loss
from tests.contract import DRAWS_NOTHING, FORGET, KINDS, QUICK, World, quick, same, state, world

every_method = pytest.mark.parametrize("name", METHODS)
every_blind_method = pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.blind])
every_sighted_method = pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.blind])
every_kind = pytest.mark.parametrize("kind", KINDS)


def run(name: str, here: World, *, seed: int = 3, **changes: Any) -> Unlearned:
    return unlearn(here.model, here.sighted(**changes), quick(name), seed=seed)


class Tripwire(Examples):
    """A forget set that gives itself away on any touch once it is armed."""

    armed = False
    touched = 0

    def __getattribute__(self, name: str) -> Any:
        if object.__getattribute__(self, "armed"):
            type(self).touched += 1
            raise AssertionError(f"the forget set was touched: .{name}")
        return object.__getattribute__(self, name)


def tripwire(here: World) -> Tripwire:
    return Tripwire(*here.forget.tensors, positions=here.forget.positions)


def spy(monkeypatch: pytest.MonkeyPatch, name: str, tamper: Any = None) -> list[Any]:
    """Record what a method is handed, and optionally tamper with the model it returns."""
    method, seen = METHODS[name], []

    @functools.wraps(method.run)
    def watched(model: nn.Module, given: Any, config: Any, **rest: Any) -> nn.Module:
        seen.append(given)
        result = method.run(model, given, config, **rest)
        if tamper:
            tamper(result)
        return result

    monkeypatch.setitem(METHODS, name, dataclasses.replace(method, run=watched))
    return seen


def rebuild(kind: type[Any], values: dict[str, Any]) -> Any:
    """A config from what JSON made of it."""
    hints, settings = get_type_hints(kind), {}
    for name, value in values.items():
        nested = next(filter(dataclasses.is_dataclass, (hints[name], *get_args(hints[name]))), None)
        if nested is not None and value is not None:
            settings[name] = rebuild(nested, value)
        else:
            settings[name] = tuple(value) if isinstance(value, list) else value
    return kind(**settings)


@every_method
def test_has_a_quick_configuration_of_its_own_type(name):
    assert type(quick(name)) is METHODS[name].config
    assert METHODS[name].name == name


def test_quick_configurations_are_of_methods_that_exist():
    assert set(QUICK) <= set(METHODS)
    assert set(METHODS) >= DRAWS_NOTHING


@every_method
@every_kind
def test_same_seed_gives_the_same_bits_whatever_the_global_generators_are_at(name, kind):
    here = world(kind)
    first = run(name, here)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        second = run(name, here)
    assert same(state(first.model), state(second.model))
    assert first.trace.losses == second.trace.losses
    assert first.trace.facts == second.trace.facts


@every_method
@every_kind
def test_another_seed_gives_other_bits_where_randomness_is_used(name, kind):
    here = world(kind)
    identical = same(state(run(name, here, seed=3).model), state(run(name, here, seed=4).model))
    assert identical == (name in DRAWS_NOTHING)


@every_method
@every_kind
def test_leaves_the_model_it_is_given_untouched(name, kind):
    here = world(kind)
    model = copy.deepcopy(here.model)
    model.eval()
    next(iter(model.children())).train()
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(number))
    tensors = [*model.parameters(), *model.buffers()]
    before, flags = state(model), [module.training for module in model.modules()]
    unlearn(model, here.sighted(), quick(name))
    assert same(before, state(model))
    assert [module.training for module in model.modules()] == flags
    assert all(kept is now for kept, now in zip(tensors, [*model.parameters(), *model.buffers()], strict=True))
    assert all(parameter.requires_grad for parameter in model.parameters())
    for number, parameter in enumerate(model.parameters()):
        assert torch.equal(parameter.grad, torch.full_like(parameter, float(number)))


@every_method
@every_kind
def test_moves_the_weights_and_the_forget_loss(name, kind):
    here = world(kind)
    result = run(name, here).model
    assert any(not torch.equal(a, b) for a, b in zip(here.model.parameters(), result.parameters(), strict=True))
    before = mean_loss(here.model, here.forget, cross_entropy)
    assert mean_loss(result, here.forget, cross_entropy) != pytest.approx(before, rel=1e-3)


@every_method
@every_kind
def test_result_is_finite_without_grad_and_keeps_the_flags_of_the_model(name, kind):
    here = world(kind)
    model = copy.deepcopy(here.model).eval()
    model.requires_grad_(True)
    result = unlearn(model, here.sighted(), quick(name)).model
    assert all(bool(tensor.isfinite().all()) for tensor in result.state_dict().values())
    assert all(parameter.grad is None for parameter in result.parameters())
    assert all(parameter.requires_grad for parameter in result.parameters())
    assert not any(module.training for module in result.modules())
    assert run(name, here).model.training


@every_method
@every_kind
def test_frozen_parameters_stay_bit_identical(name, kind):
    here = world(kind, frozen=True)
    before, after = dict(here.model.named_parameters()), dict(run(name, here).model.named_parameters())
    frozen = next(iter(before))
    assert torch.equal(before[frozen], after[frozen])
    assert not after[frozen].requires_grad
    assert any(not torch.equal(before[other], after[other]) for other in before if other != frozen)


@every_blind_method
@every_kind
def test_blind_methods_never_touch_the_removed_records(name, kind):
    here = world(kind)
    forget, original = tripwire(here), tripwire(here)
    given = here.sighted(forget=forget, original=original)
    forget.armed = original.armed = True
    result = unlearn(here.model, given, quick(name), seed=3)
    assert same(state(result.model), state(unlearn(here.model, here.blind(), quick(name), seed=3).model))


def test_the_tripwire_works():
    forget = tripwire(world())
    forget.armed = True
    for touch in (lambda: forget.positions, lambda: len(forget), lambda: list(forget.fetch([torch.arange(2)]))):
        with pytest.raises(AssertionError, match="touched"):
            touch()


@every_sighted_method
def test_sighted_methods_do_read_the_removed_records(name):
    here = world()
    forget, original = tripwire(here), tripwire(here)
    given = here.sighted(forget=forget, original=original)
    forget.armed = original.armed = True
    before = Tripwire.touched
    with pytest.raises((AssertionError, TypeCheckError)):  # the type checker touches it, too
        unlearn(here.model, given, quick(name))
    assert Tripwire.touched > before


@every_blind_method
def test_blind_methods_are_handed_nothing_that_has_a_forget_set(name, monkeypatch):
    here, seen = world(), spy(monkeypatch, name)
    run(name, here)
    assert [type(given) for given in seen] == [Blind]
    assert not hasattr(seen[0], "forget")
    assert not hasattr(seen[0], "original")


@every_sighted_method
def test_sighted_methods_are_handed_what_was_given_and_refuse_a_blind(name, monkeypatch):
    here, seen = world(), spy(monkeypatch, name)
    given = here.sighted()
    unlearn(here.model, given, quick(name))
    assert seen == [given]
    with pytest.raises(ForgetSetAccessed, match=f"{name} needs the removed records and was given Blind"):
        unlearn(here.model, here.blind(), quick(name))
    assert len(seen) == 1


@every_method
@every_kind
def test_nan_in_what_comes_out_is_reported_with_the_name_of_the_method(name, kind, monkeypatch):
    def poison(model: nn.Module) -> None:
        tensor = next(iter(model.buffers())) if kind == "batch-norm" else list(model.parameters())[1]
        tensor.detach().view(-1)[0] = float("nan")

    spy(monkeypatch, name, poison)
    with pytest.raises(NotFinite, match=f"the result of {name}: tensor .* has 1 of 12 entries"):
        run(name, world(kind))


@every_method
def test_nan_in_the_data_is_reported_not_learned(name):
    here = world()
    poisoned = []
    for part in (here.retain, here.forget):
        inputs = part.tensors[0].clone()
        inputs[1, 2] = float("nan")
        poisoned.append(Examples(inputs, part.tensors[1], positions=part.positions))
    with pytest.raises(NotFinite, match="loss"):
        run(name, here, retain=poisoned[0], forget=poisoned[1])


@every_method
def test_config_is_frozen_by_keyword_only_and_survives_json(name):
    config = quick(name)
    assert all(setting.kw_only for setting in dataclasses.fields(config))
    for setting in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, setting.name, getattr(config, setting.name))
    again = rebuild(type(config), json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config
    assert hash(again) == hash(config)


@every_method
def test_every_draw_from_its_search_space_is_a_configuration(name):
    for seed in range(20):
        drawn = random_settings(METHODS[name].space, random.Random(seed))
        config = with_settings(quick(name), drawn)
        assert rebuild(type(config), json.loads(json.dumps(dataclasses.asdict(config)))) == config


@every_method
def test_documents_its_source_its_deviations_and_its_settings(name):
    method = METHODS[name]
    header = inspect.getmodule(method.run).__doc__
    assert "Source:" in header
    assert "eviations" in header
    assert method.run.__doc__
    assert method.config.__doc__
    assert method.summary.endswith(".")
    assert set(method.defaults()) == {setting.name for setting in dataclasses.fields(method.config)}
    json.dumps(method.defaults())


@every_method
def test_the_annotation_of_the_second_argument_decides_what_it_may_see(name):
    method = METHODS[name]
    annotation = list(inspect.signature(method.run, eval_str=True).parameters.values())[1].annotation
    assert annotation in (Blind, Sighted)
    assert method.access is annotation
    assert method.blind == (annotation is Blind)


def test_changing_the_annotation_changes_the_access(monkeypatch):
    method = METHODS["fine-tune"]

    def needs_more(model: nn.Module, given: Sighted, config: Any, *, seed: int, trace: Any) -> nn.Module:
        return method.run(model, given, config, seed=seed, trace=trace)

    monkeypatch.setitem(METHODS, "fine-tune", dataclasses.replace(method, run=needs_more))
    assert not METHODS["fine-tune"].blind
    with pytest.raises(ForgetSetAccessed, match="fine-tune"):
        unlearn(world().model, world().blind(), quick("fine-tune"))


@every_method
@every_kind
def test_trace_says_what_was_done_and_survives_json(name, kind):
    here = world(kind)
    trace = run(name, here, seed=11).trace
    assert (trace.method, trace.seed) == (name, 11)
    assert trace.seconds
    assert all(spent >= 0 for spent in trace.seconds.values())
    assert trace.stopped
    assert trace.backwarded >= len(FORGET)
    assert json.loads(json.dumps(trace.as_dict()))["method"] == name


@every_method
def test_a_watcher_sees_the_model_after_every_stage_and_changes_nothing(name):
    here, seen = world("batch-norm"), []
    watched = unlearn(
        here.model, here.sighted(), quick(name), seed=3, watch=lambda moment, model: seen.append((moment, state(model)))
    )
    assert same(state(watched.model), state(run(name, here).model))
    moments = [moment for moment, _ in seen]
    assert list(dict.fromkeys(each for each in moments if each in watched.trace.seconds)) == list(watched.trace.seconds)
    assert same(seen[-1][1], state(watched.model))
