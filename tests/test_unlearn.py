"""The front door, and what a method may see."""

import copy
import math
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expunge import Blind, Examples, Recipe, Reload, Retrain, Sighted, cross_entropy, unlearn
from expunge.errors import ConfigError, ForgetSetAccessed, MismatchError, NotFinite, NotInformative
from expunge.methods import METHODS, method_of
from tests.contract import BRIEF, quick, same, state, without_type_checks, world

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


@pytest.mark.parametrize("config", [BRIEF, "reload", Recipe])
def test_what_is_no_configuration_of_a_method_is_refused(config):
    here = world()
    with pytest.raises(
        ConfigError,
        match=r"is not the configuration of a method. Give one of Reload, OrthogonalAscent, ClassOrthogonalAscent",
    ):
        unlearn(here.model, here.blind(), config)


@pytest.mark.parametrize(("config", "call"), [(Reload, r"Reload\(\)"), (Retrain, r"Retrain\(\)")])
def test_a_class_in_place_of_settings_is_refused_with_how_to_call_it(config, call):
    here = world()
    with pytest.raises(ConfigError, match=rf"{config.__name__} is a class, and not settings of .*\. Call it: {call}"):
        unlearn(here.model, here.blind(), config)


@pytest.mark.parametrize(
    ("name", "wrapped"),
    [
        ("reload", r"Blind\(retain=…, loss_terms=…, fresh=…, full=…\)"),
        ("gradient-ascent", r"Sighted\(retain=…, forget=…, loss_terms=…, fresh=…, full=…\)"),
    ],
)
def test_data_alone_is_refused_with_what_to_wrap_it_in(name, wrapped):
    here = world()
    with pytest.raises(ConfigError, match=rf"{name} was given Examples, and takes data .*\. Wrap it: {wrapped}"):
        unlearn(here.model, here.original, quick(name))


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


def test_a_sighted_is_also_a_blind():
    assert issubclass(Sighted, Blind)


def _widened(model: nn.Module) -> nn.Module:
    name, p = next(model.named_parameters())
    owner = model.get_submodule(name.rpartition(".")[0])
    setattr(owner, name.rpartition(".")[2], nn.Parameter(torch.cat([p, p]).detach()))
    return model


@pytest.mark.parametrize(
    "change", [nn.Sequential, _widened, lambda model: model.register_buffer("extra", torch.zeros(1)) or model]
)
def test_a_model_of_another_architecture_is_refused(change, monkeypatch):
    method = METHODS["fine-tune"]

    def wrapping(model: nn.Module, given: Blind, config: object, *, seed: int, trace: object) -> nn.Module:
        return change(model)

    monkeypatch.setitem(METHODS, "fine-tune", replace(method, run=wrapping))
    with pytest.raises(MismatchError, match=r"returned a model of another architecture, .* \((0\.|layers\.|extra)"):
        unlearn(world().model, world().blind(), quick("fine-tune"))
