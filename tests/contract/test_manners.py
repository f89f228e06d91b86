"""Source: the manners that every method of this library keeps, and methods without. Deviations: one each."""

import dataclasses
import json
import re

import pytest
import torch

from expunge import Blind, Examples, Recipe, Sighted, cli, train
from expunge.audit import manners as manners_of
from expunge.audit.manners import manners
from expunge.batches import indexed, micro_batches
from expunge.errors import ConfigError
from expunge.methods import METHODS, Method
from expunge.seeds import keeping_random_state, seeded
from expunge.space import Range
from tests.contract import quick

BRIEF = Recipe(epochs=1, lr=0.05, batch_size=16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rude:
    """Fine-tune, and do one thing that is not done."""

    share: float = 0.5
    recipe: Recipe = BRIEF

    def __post_init__(self):
        if self.share > 1:
            raise ConfigError(f"share={self.share}: must be at most 1.")


def fine_tuned(model, given, config, seed, trace):
    with trace.stage("train", model):
        train(model, given.retain, given.loss_terms, config.recipe, seed=seed, trace=trace)
    return model


def draws_from_a_global_generator(model, given: Blind, config, *, seed, trace):
    """Draws, and puts the generator back."""
    with keeping_random_state(), torch.no_grad():
        list(model.parameters())[-1].add_(0.01 * torch.randn(()))
    return fine_tuned(model, given, config, seed, trace)


def moves_a_global_generator(model, given: Blind, config, *, seed, trace):
    """Draws what it has no use for."""
    torch.rand(())
    return fine_tuned(model, given, config, seed, trace)


def writes_to_the_cache(model, given: Blind, config, *, seed, trace):
    """Uses the gradient up."""
    next(iter(given.full.total.values())).zero_()
    return fine_tuned(model, given, config, seed, trace)


def empties_the_cache(model, given: Blind, config, *, seed, trace):
    """Takes what it does not need out."""
    given.full.total.popitem()
    return fine_tuned(model, given, config, seed, trace)


def builds_a_model_of_its_own(model, given: Blind, config, *, seed, trace):
    """With what the user gave, which draws from the global generator."""
    new = given.fresh(seed)
    new.load_state_dict(model.state_dict())
    return fine_tuned(new, given, config, seed, trace)


RUNS = iter(range(1, 100))


def remembers_how_often_it_ran(model, given: Blind, config, *, seed, trace):
    """And trains otherwise each time."""
    return fine_tuned(model, given, config, seed + next(RUNS), trace)


def writes_to_the_records(model, given: Sighted, config, *, seed, trace):
    """Wipes what was removed."""
    if isinstance(given.forget, Examples):
        given.forget.tensors[0].zero_()
    return fine_tuned(model, given, config, seed, trace)


def does_nothing(model, given: Blind, config, *, seed, trace):
    """Counts what it did not do."""
    with trace.stage("train", model):
        trace.forwarded += 1
    return model


def moves_everything(model, given: Blind, config, *, seed, trace):
    """Also what is frozen."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.99)
    return fine_tuned(model, given, config, seed, trace)


def trains_on_what_was_removed(model, given: Sighted, config, *, seed, trace):
    """In train mode."""
    with torch.no_grad():
        model.train()
        for _, (inputs, _) in micro_batches(given.forget, 60)[1]:
            model(inputs)
    return fine_tuned(model, given, config, seed, trace)


def counts_nothing(model, given: Blind, config, *, seed, trace):
    """No stage, no examples."""
    train(model, given.retain, given.loss_terms, config.recipe, seed=seed)
    return model


def counts_no_examples(model, given: Blind, config, *, seed, trace):
    """A stage and no examples."""
    with trace.stage("train", model):
        train(model, given.retain, given.loss_terms, config.recipe, seed=seed)
    return model


def reads_in_the_order_of_the_loader(model, given: Blind, config, *, seed, trace):
    """As it comes."""
    batches = (
        [batch for _, batch in micro_batches(given.retain, 60)[1]]
        if isinstance(given.retain, Examples)
        else list(given.retain)
    )
    inputs = torch.cat([inputs for inputs, _ in batches])
    with torch.no_grad():
        list(model.parameters())[-1].add_(0.01 * inputs[0].mean())
    return fine_tuned(model, given, config, seed, trace)


def needs_positions(model, given: Blind, config, *, seed, trace):
    """And does not say so."""
    assert len(indexed(given.retain).positions)
    return fine_tuned(model, given, config, seed, trace)


def behaves(model, given: Blind, config, *, seed, trace):
    """As all do."""
    return fine_tuned(model, given, config, seed, trace)


def says_nothing(model, given: Blind, config, *, seed, trace):
    return fine_tuned(model, given, config, seed, trace)


def found_in(monkeypatch, run, space=None):
    monkeypatch.setitem(METHODS, "rude", Method("rude", Rude, run, space or {"share": Range(0.1, 1.0)}))
    return manners(Rude())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_all_of_them(name):
    assert [(each.name, each.words) for each in manners(quick(name)) if not each.kept] == []


@pytest.mark.parametrize(
    ("run", "broken", "words"),
    [
        (draws_from_a_global_generator, "repeats", "Draw from expunge.seeds.stream"),
        (moves_a_global_generator, "leaves the rest alone", "a global generator was moved on"),
        (writes_to_the_cache, "leaves the rest alone", "cached gradient were written to"),
        (empties_the_cache, "leaves the rest alone", "cached gradient were written to"),
        (builds_a_model_of_its_own, "leaves the rest alone", r"given\.fresh_model"),
        (remembers_how_often_it_ran, "repeats", "keep nothing between runs"),
        (writes_to_the_records, "leaves the rest alone", "records or"),
        (does_nothing, "does something", "the weights are those of before"),
        (moves_everything, "keeps frozen parameters", r"hidden\.weight needs no gradient"),
        (trains_on_what_was_removed, "keeps statistics clean", r"1 batches with removed records"),
        (counts_nothing, "counts its work", "no stage was timed.*; no example was counted"),
        (counts_no_examples, "counts its work", "^no example was counted"),
        (reads_in_the_order_of_the_loader, "reads a DataLoader", "led to other weights"),
        (needs_positions, "reads batches", "it raised AttributeError: 'NoneType'.*micro_batches"),
        (says_nothing, "is documented", "says_nothing has no docstring"),
    ],
)
def test_what_is_not_done_is_noticed_and_nothing_else(run, broken, words, monkeypatch):
    lacking = [each for each in found_in(monkeypatch, run) if not each.kept]
    assert [each.name for each in lacking] == [broken]
    assert re.search(words, lacking[0].words)


def test_a_search_space_with_settings_that_cannot_be_is_noticed(monkeypatch):
    lacking = [each for each in found_in(monkeypatch, behaves, {"share": Range(0.9, 9.0)}) if not each.kept]
    assert [each.name for each in lacking] == ["can be searched"]
    assert "must be at most 1" in lacking[0].words


def test_settings_of_its_space_with_which_a_method_breaks_are_noticed(monkeypatch):
    def breaks(model, given: Blind, config, *, seed, trace):
        """Works with the settings it starts from."""
        if config.share != 0.5:
            raise KeyError("share")
        return fine_tuned(model, given, config, seed, trace)

    lacking = [each for each in found_in(monkeypatch, breaks, {"share": Range(0.1, 0.4)}) if not each.kept]
    assert [each.name for each in lacking] == ["can be searched"]
    assert re.search(r"drawn from its search space, Rude\(share=0\..*, it raised KeyError: 'share'", lacking[0].words)


def test_a_file_that_names_no_source_is_noticed(monkeypatch):
    monkeypatch.setattr("tests.contract.test_manners.__doc__", "Tests.")
    lacking = [each for each in found_in(monkeypatch, behaves) if not each.kept]
    assert [each.name for each in lacking] == ["is documented"]
    assert "“Source” and “Deviations”" in lacking[0].words


def test_what_a_method_raises_when_it_is_run_as_it_should_is_its_own(monkeypatch):
    def fails(model, given: Blind, config, *, seed, trace):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        found_in(monkeypatch, fails)


def test_settings_of_no_method_are_refused():
    with pytest.raises(ConfigError, match="is not the configuration of a method"):
        manners(Recipe(epochs=1, lr=0.1))


def test_global_generators_are_left_as_they_were(monkeypatch):
    before = manners_of._global_generators()
    with seeded(1):
        manners(quick("fine-tune"))
    assert manners_of._global_generators() == before


def test_on_the_command_line(capsys, monkeypatch):
    assert cli.main(["audit", "method", "fine-tune"]) == 0
    assert "leaves the rest alone" in capsys.readouterr().out
    assert cli.main(["audit", "method", "--json", "ssd", "--selection", "1e9"]) == 3
    found = {each["name"]: each["kept"] for each in json.loads(capsys.readouterr().out)}
    assert not found["does something"]
    assert all(kept for name, kept in found.items() if name != "does something")
