"""Amnesiac unlearning: wrong labels, and the log of updates."""

import copy
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from expunge import Amnesiac, Examples, Recipe, Sighted, UpdateLog, cross_entropy, squared_error, train, unlearn
from expunge.errors import ConfigError, CorruptCache, MismatchError, UnsupportedModule
from expunge.methods.amnesiac import relabelled
from expunge.params import named_parameters
from expunge.trace import Trace
from tests.contract import architecture, examples, same, state, world

ONE_STEP = Recipe(epochs=1, lr=0.5, batch_size=1000, momentum=0.0, weight_decay=0.0, schedule="constant")


# Wrong labels


def test_no_label_is_the_true_one_and_every_other_one_comes_up_equally_often():
    labels = torch.arange(3000) % 3
    data = Examples(torch.randn(3000, 6), labels)
    new = relabelled(architecture("plain"), data, "test", 1, Trace("test", 0)).tensors[1]
    for own in range(3):
        counts = new[labels == own].bincount(minlength=3).tolist()
        assert counts[own] == 0
        assert all(abs(count - 500) < 4 * math.sqrt(250) for other, count in enumerate(counts) if other != own)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_labels_are_never_true_in_any_world_seed_or_type(dtype):
    here = world()
    for seed in range(50):
        data = Examples(here.forget.tensors[0], here.forget.tensors[1].to(dtype))
        new = relabelled(here.model, data, "test", seed, Trace("test", 0)).tensors
        assert torch.equal(new[0], here.forget.tensors[0])
        assert (new[1] != data.tensors[1]).all()
        assert new[1].dtype == dtype
        assert (new[1] < 3).all()
    other = relabelled(here.model, here.forget, "test", 51, Trace("test", 0)).tensors[1]
    assert not torch.equal(other, new[1].long())


def test_one_step_descends_on_wrong_labels_and_on_what_is_left_together():
    here = world()
    result = unlearn(here.model, here.sighted(), Amnesiac(recipe=ONE_STEP), seed=3)
    (x, y), (fx, _) = here.retain.tensors, here.forget.tensors
    wrong = relabelled(here.model, here.forget, "amnesiac", 3, Trace("test", 0)).tensors[1]
    model = copy.deepcopy(here.model)
    functional.cross_entropy(model(torch.cat([x, fx])), torch.cat([y, wrong])).backward()
    for before, after in zip(model.parameters(), result.model.parameters(), strict=True):
        torch.testing.assert_close(after, before - 0.5 * before.grad)
    assert result.trace.backwarded == len(here.original)
    assert result.trace.forwarded == 2  # to see how many classes there are


def test_settings_that_cannot_work_are_refused():
    for bound in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match=f"loss_bound={bound}: must be a positive number"):
            Amnesiac(loss_bound=bound)


def test_what_has_no_wrong_label_is_refused():
    here = world()
    x = here.original.tensors[0]
    regression = Examples(x, torch.zeros(len(x), 3))
    given = Sighted(retain=regression, forget=regression, loss_terms=squared_error, fresh=here.fresh)
    with pytest.raises(UnsupportedModule, match="amnesiac works on classifiers"):
        unlearn(here.model, given, Amnesiac())
    one = Examples(x, torch.zeros(len(x), dtype=torch.int64))
    with pytest.raises(UnsupportedModule, match="a model of 1 class has none"):
        relabelled(nn.Linear(6, 1), one, "amnesiac", 0, Trace("test", 0))


def test_an_epoch_that_destroys_the_model_is_taken_back():
    here = world()
    recipe = Recipe(epochs=4, lr=3.0, batch_size=8, schedule="constant")
    result = unlearn(here.model, here.sighted(), Amnesiac(recipe=recipe, loss_bound=2.0))
    assert "passed the bound 2; the epoch was taken back" in result.trace.stopped


def test_the_defaults_are_those_of_the_paper():
    recipe = Amnesiac().recipe
    assert (recipe.optimizer, recipe.lr, recipe.epochs, recipe.batch_size) == ("adamw", 1e-4, 3, 128)


# The log of updates

RECIPES = {
    "sgd": Recipe(epochs=3, lr=0.05, batch_size=8),
    "adamw": Recipe(epochs=3, lr=0.01, batch_size=8, optimizer="adamw"),
}


def logged(
    kind: str = "plain", recipe: str = "sgd", watched: Any = None, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, nn.Module, UpdateLog]:
    """A model before training, after it, and the log."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = architecture(kind).to(dtype)
    before = copy.deepcopy(model)
    log = UpdateLog.of(model, watched)
    x, y = examples().tensors
    train(model, Examples(x.to(dtype), y), cross_entropy, RECIPES[recipe], seed=2, after_step=log)
    return before, model, log


@pytest.mark.parametrize("kind", ["plain", "batch-norm"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_without_any_of_its_updates_a_model_is_where_training_began(kind, recipe):
    before, after, log = logged(kind, recipe)
    kept = state(after)
    restored = log.subtract(after, torch.arange(60))
    assert len(log.updates) == 3 * 8  # 60 examples in batches of 8
    for (name, was), now in zip(before.named_parameters(), restored.parameters(), strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=1e-12)
        assert not torch.equal(dict(after.named_parameters())[name], was)
    assert same(state(after), kept)


def test_in_float32_to_the_rounding_of_the_changes():
    before, after, log = logged(dtype=torch.float32)
    restored = log.subtract(after, torch.arange(60))
    largest = max(float(change.abs().max()) for update in log.updates for change in update.change.values())
    for was, now in zip(before.parameters(), restored.parameters(), strict=True):
        torch.testing.assert_close(now, was, rtol=2**-24, atol=24 * 2**-24 * largest)


def test_only_updates_of_batches_that_held_the_records_are_taken_back():
    _, after, log = logged()
    removed = torch.tensor([7, 31])
    restored = log.subtract(after, removed)
    hit = [update for update in log.updates if {7, 31} & set(update.positions.tolist())]
    assert 3 <= len(hit) <= 6  # one or two an epoch
    for name, now in named_parameters(restored).items():
        expected = dict(after.named_parameters())[name] - sum(update.change[name] for update in hit)
        torch.testing.assert_close(now.detach(), expected.detach(), rtol=0, atol=1e-14)


def test_the_log_knows_the_records_of_every_batch():
    _, _, log = logged()
    for epoch in range(3):
        batches = [update.positions for update in log.updates[8 * epoch : 8 * epoch + 8]]
        assert torch.cat(batches).sort().values.tolist() == list(range(60))
    x, y = examples().tensors
    seen: list[Any] = []

    def watch(model: nn.Module, batch: Any) -> torch.Tensor:
        seen.append(batch[0])
        return cross_entropy(model, batch)

    for data in (
        Examples(x, y).without(torch.arange(0, 60, 3)),
        DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True),
    ):
        model = architecture("plain")
        log = UpdateLog.of(model)
        seen.clear()
        train(model, data, watch, RECIPES["sgd"], seed=3, after_step=log)
        assert len(seen) == len(log.updates)
        assert all(torch.equal(x[update.positions], b) for update, b in zip(log.updates, seen, strict=True))


def test_steps_without_a_watched_record_are_not_logged_and_the_others_are_right():
    watched = torch.tensor([3, 7, 31])
    _, after, log = logged(watched=watched)
    _, _, everything = logged()
    hit = [u for u in everything.updates if {3, 7, 31} & set(u.positions.tolist())]
    assert len(log.updates) == len(hit) < len(everything.updates)
    for mine, theirs in zip(log.updates, hit, strict=True):
        assert torch.equal(mine.positions, theirs.positions)
        assert same(mine.change, theirs.change)
    assert same(state(log.subtract(after, torch.tensor([7]))), state(everything.subtract(after, torch.tensor([7]))))
    with pytest.raises(ConfigError, match=r"position 8 was not watched \(1 such\)"):
        log.subtract(after, torch.tensor([7, 8]))


def test_survives_a_file(tmp_path):
    for watched in (None, torch.tensor([3, 7])):
        _, after, log = logged("batch-norm", watched=watched)
        log.save(tmp_path / "log.safetensors")
        again = UpdateLog.load(tmp_path / "log.safetensors")
        assert len(again.updates) == len(log.updates)
        assert same(state(again.subtract(after, torch.tensor([3]))), state(log.subtract(after, torch.tensor([3]))))
        assert (again.watched is None) == (watched is None)


def test_a_damaged_or_foreign_file_is_refused(tmp_path):
    path = tmp_path / "log.safetensors"
    with pytest.raises(FileNotFoundError, match="no such log"):
        UpdateLog.load(path)
    logged()[2].save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptCache, match="cannot be read as safetensors"):
        UpdateLog.load(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CorruptCache, match="altered"):
        UpdateLog.load(path)
    path.write_bytes(whole)
    save_file(load_file(path), path)  # without its header
    with pytest.raises(CorruptCache, match="no log of updates"):
        UpdateLog.load(path)


def test_another_model_or_other_weights_are_refused():
    _, after, log = logged()
    with torch.no_grad():
        list(after.parameters())[1][0] += 1e-9
    with pytest.raises(MismatchError, match=r"is not what it was when the log ended"):
        log.subtract(after, torch.tensor([1]))
    with pytest.raises((MismatchError, ConfigError), match="no such parameter"):
        log.subtract(architecture("batch-norm"), torch.tensor([1]))


def test_records_that_no_logged_batch_held_are_refused():
    _, after, log = logged()
    with pytest.raises(ConfigError, match=r"position 60 \(2 such\) of 2 was in no batch of the 24 logged"):
        log.subtract(after, torch.tensor([60, 99]))
    with pytest.raises(ConfigError, match=r"position 99 \(1 such\) of 2"):
        log.subtract(after, torch.tensor([1, 99]))


def test_data_without_positions_is_refused():
    model = architecture("plain")
    with pytest.raises(ConfigError, match="no positions, so no update can be told from another"):
        train(model, [examples().tensors], cross_entropy, ONE_STEP, seed=0, after_step=UpdateLog.of(model))
