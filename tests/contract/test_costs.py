"""What every method says it cost, counted independently; and what it does when its settings are far too large."""

import contextlib
import copy
import dataclasses
import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from expunge import Examples, Recipe, cross_entropy, gradient, squared_error, train, unlearn
from expunge.errors import ConfigError, NotFinite, UnsupportedModule
from expunge.methods import METHODS, kronecker, per_example
from expunge.methods.guard import note_if_nothing_was_learned
from expunge.trace import Trace
from expunge.training import mean_loss
from tests.contract import FORGET, KINDS, World, architecture, quick, same, state, without_type_checks, world

every_method = pytest.mark.parametrize("name", METHODS)
every_kind = pytest.mark.parametrize("kind", KINDS)


class Counted(nn.Module):
    """Counts the rows that pass through any copy of it, forward and backward (to its logits or its embeddings)."""

    forward_rows = 0
    backwards: ClassVar[list[list[int]]] = []  # a row a forward pass: rows that came back to logits, to embeddings
    counting = True

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = architecture(kind)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        embedded: list[torch.Tensor] = []
        last = [module for module in self.inner.modules() if isinstance(module, nn.Linear)][-1]
        handle = last.register_forward_pre_hook(lambda _, entered: embedded.append(entered[0]))
        found = self.inner(inputs)
        handle.remove()
        if Counted.counting:
            Counted.forward_rows += len(inputs)
            came_back = [0, 0]
            Counted.backwards.append(came_back)
            for place, tensor in enumerate((found, embedded[0])):
                if tensor.requires_grad:
                    tensor.register_hook(functools.partial(self.add, came_back, place, len(inputs)))
        return found

    @staticmethod
    def add(came_back: list[int], place: int, rows: int, _: torch.Tensor) -> None:
        came_back[place] += rows

    @classmethod
    def backward_rows(cls) -> int:
        return sum(max(each) for each in cls.backwards)


@contextlib.contextmanager
def not_counting() -> Iterator[None]:
    before, Counted.counting = Counted.counting, False
    yield
    Counted.counting = before


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[Counted]:
    """Both counters at zero; the few examples that are tried before a gradient pass do not count."""
    monkeypatch.setattr(Counted, "forward_rows", 0)
    monkeypatch.setattr(Counted, "backwards", [])
    for module, check in (
        (importlib.import_module("expunge.gradient"), "probe"),
        (per_example, "probe"),
        (per_example, "_try_layers"),
        (kronecker, "probe"),
        (kronecker, "_usable_layers"),
        (importlib.import_module("expunge.unlearn"), "note_what_was_lost"),
    ):
        monkeypatch.setattr(module, check, not_counting()(getattr(module, check)))
    return Counted


def counted_world(kind: str) -> World:
    here, model = world(kind), Counted(kind)
    model.inner.load_state_dict(here.model.state_dict())
    with not_counting():
        full = gradient(model, cross_entropy, here.original, micro_batch=8)
    return World(model, lambda seed: Counted(kind), here.original, full)


@every_method
@every_kind
def test_the_trace_counts_every_example_that_passed(name, kind, counted):
    here = counted_world(kind)
    given = here.sighted()
    trace = unlearn(here.model, given, quick(name), seed=3).trace
    assert trace.backwarded == counted.backward_rows()
    classes = 3 if name == "fisher" else 1  # one forward pass serves a backward pass for every class
    assert trace.forwarded + trace.backwarded // classes == counted.forward_rows


def test_the_counter_counts(counted):
    model = Counted("plain")
    model(torch.zeros(5, 6)).sum().backward()
    with torch.no_grad():
        model(torch.zeros(2, 6))
    assert (counted.forward_rows, counted.backward_rows()) == (7, 5)


@every_method
def test_peak_memory_is_of_the_run(name):
    trace = unlearn(world().model, world().sighted(), quick(name), seed=3).trace
    assert trace.peak_memory is None or 0 <= trace.peak_memory < 200e6
    assert trace.as_dict()["peak_memory"] == trace.peak_memory


def test_peak_memory_is_by_how_much_the_memory_grew():
    spent = []
    for floats in (50_000_000, 10_000_000):  # the larger one first: a mark that stays up would show
        trace = Trace("test", 0)
        with trace.measuring_memory(torch.device("cpu")):
            torch.ones(floats)
        spent.append(trace.peak_memory)
    if spent[0] is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    assert spent == [pytest.approx(4 * floats, rel=0.1) for floats in (50_000_000, 10_000_000)]


def test_where_memory_cannot_be_measured_nothing_is_claimed(monkeypatch):
    trace = Trace("test", 0)
    with trace.measuring_memory(torch.device("meta")):
        pass
    monkeypatch.setattr("expunge.trace._reset_high_water_mark", lambda: False)
    with trace.measuring_memory(torch.device("cpu")):
        pass
    assert trace.peak_memory is None


def far_too_large(name: str) -> Any:
    """The quick configuration with rates at which nothing converges."""
    config, changes = quick(name), {}
    for setting in dataclasses.fields(config):
        value = getattr(config, setting.name)
        if dataclasses.is_dataclass(value):
            changes[setting.name] = dataclasses.replace(value, lr=1e4, optimizer="sgd", schedule="constant")
    changes |= {"fisher": {"alpha": 1e9}, "grda": {"lr": 1e7}, "ssd": {"selection": 1e-9, "dampening": 1e-9}}.get(
        name, {}
    )
    return dataclasses.replace(config, **changes)


BACK_TO_NOTHING = ("retrain", "eu-k", "reload")  # from re-initialised weights there is no good state to go back to


@every_method
@every_kind
def test_settings_far_too_large_end_in_a_note_and_a_model_that_works_or_in_an_error(name, kind):
    here = world(kind)
    said, result = "", None
    with without_type_checks():
        try:
            result = unlearn(here.model, here.sighted(), far_too_large(name), seed=3)
        except NotFinite as error:
            said = str(error)
    if result is None:
        assert re.search(rf"^{name}: the loss became .* in epoch \d+, step \d+|^the result of {name}: tensor", said)
        return
    assert any(name in warning or "taken back" in warning for warning in result.trace.warnings)
    assert all(bool(p.isfinite().all()) for p in result.model.parameters())
    if name not in BACK_TO_NOTHING:
        assert mean_loss(result.model, here.retain, cross_entropy) < 5


ANY_LOSS = {
    name for name, method in METHODS.items() if "Needs: classifiers" not in inspect.getmodule(method.run).__doc__
}


def test_methods_say_whether_they_need_a_classifier():
    for name in ANY_LOSS - {"reload"}:
        assert re.search(r"Needs: .*any loss", inspect.getmodule(METHODS[name].run).__doc__, re.DOTALL), name
    assert {"reload", "retrain", "fine-tune", "cf-k", "eu-k", "l1-sparse", "gradient-ascent", "ssd", "gar"} < ANY_LOSS


@every_method
def test_without_classes_a_method_works_or_says_why_not(name):
    here = world()
    inputs, labels = here.original.tensors
    targets = Examples(inputs, nn.functional.one_hot(labels, 3).float())
    model = copy.deepcopy(here.model)
    train(model, targets, squared_error, Recipe(epochs=10, lr=0.05, batch_size=16), seed=1)
    full = gradient(model, squared_error, targets)
    parts = {"retain": targets.without(FORGET), "forget": targets.only(FORGET), "original": targets}
    given = here.sighted(**parts, loss_terms=squared_error, full=full)
    with without_type_checks():
        if name in ANY_LOSS:
            result = unlearn(model, given, quick(name), seed=3)
            assert not same(state(result.model), state(model))
        else:
            with pytest.raises(
                UnsupportedModule, match=rf"{name} works on classifiers: batches of .*take a method that"
            ):
                unlearn(model, given, quick(name), seed=3)


@pytest.mark.parametrize(
    "name", [name for name, m in METHODS.items() if "any_forget_set" in {f.name for f in dataclasses.fields(m.config)}]
)
def test_class_wise_methods_refuse_single_records_unless_told(name):
    here = world()
    with pytest.raises(ConfigError, match=f"{name} removes whole classes, and class 0 is both among"):
        unlearn(here.model, here.sighted(), dataclasses.replace(quick(name), any_forget_set=False))
    unlearn(here.model, here.sighted(), dataclasses.replace(quick(name), any_forget_set=True))


def test_a_model_no_better_than_an_untrained_one_is_named_and_others_are_not(recwarn):
    here = world()
    nothing_left = dataclasses.replace(quick("ssd"), selection=1e-9, dampening=1e-9)  # all weights end at about 0
    trace = unlearn(here.model, here.sighted(), nothing_left).trace
    assert "ssd: the loss on what is left went from" in trace.warnings[-1]
    assert "an untrained model has" in trace.warnings[-1]
    assert unlearn(here.model, here.sighted(), quick("fine-tune")).trace.warnings == []


@pytest.mark.parametrize("name", ["retrain", "eu-k"])
def test_training_from_scratch_that_learns_nothing_is_named(name):
    here = world()
    recipe = dataclasses.replace(quick(name).recipe, lr=30.0 if name == "retrain" else 3000.0, schedule="constant")
    trace = unlearn(here.model, here.sighted(), dataclasses.replace(quick(name), recipe=recipe)).trace
    assert f"{name}: training from scratch ended at a loss of" in trace.warnings[0]
    learned = unlearn(here.model, here.sighted(), quick(name)).trace.warnings
    assert not any("training from scratch" in warning for warning in learned)


def test_only_the_last_epoch_counts_for_what_was_learned():
    trace = Trace("retrain", 0, losses=[1.0, 9.0, 9.0, 0.8, 0.9], epoch_ends=[3, 5])
    note_if_nothing_was_learned(trace)
    assert not trace.warnings
    trace.losses[-1] = 1.3
    note_if_nothing_was_learned(trace)
    assert "ended at a loss of 1.05, where it began at 1" in trace.warnings[0]
