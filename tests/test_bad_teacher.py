"""Bad teacher: its targets and the direction of its divergence, against plain autograd and by hand."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from expunge import BadTeacher, Examples, Recipe, Sighted, cross_entropy, squared_error, unlearn
from expunge.errors import ConfigError, MismatchError, UnsupportedModule
from expunge.methods import bad_teacher as module
from expunge.methods.bad_teacher import divergence
from expunge.models.mlp import MLP
from tests.contract import same, state, world

ONE_STEP = Recipe(epochs=1, lr=0.5, batch_size=1000, momentum=0.0, weight_decay=0.0, schedule="constant")
SLOW = Recipe(epochs=6, lr=0.01, batch_size=16, optimizer="adamw", weight_decay=0.0, schedule="constant")


def test_divergence_by_hand():
    teacher, student = torch.tensor([[math.log(3), 0.0]]), torch.tensor([[0.0, 0.0]])
    forward = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)  # KL(teacher ‖ student)
    backward = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert abs(forward - backward) > 0.01
    assert divergence(teacher, student, 1.0).tolist() == [pytest.approx(forward, abs=1e-7)]
    assert divergence(student, teacher, 1.0).tolist() == [pytest.approx(backward, abs=1e-7)]
    softened = torch.tensor([[2 * math.log(3), 0.0]])  # at T = 2 the same as above, times T²
    assert divergence(softened, student, 2.0).tolist() == [pytest.approx(4 * forward, abs=1e-7)]


def test_divergence_has_no_gradient_where_the_two_agree_and_is_exact_for_tiny_differences():
    said = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    divergence(said.detach(), said, 2.0).sum().backward()
    assert said.grad.abs().max() < 1e-15
    shifted = said.detach() + 1e-4 * torch.eye(5, 4)
    p, q = (torch.softmax(each.double(), 1) for each in (said.detach(), shifted))
    expected = (p * (p / q).log()).sum(1)
    torch.testing.assert_close(divergence(said.detach(), shifted, 1.0), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_one_step_goes_towards_the_untrained_network_on_the_removed_and_the_original_on_the_rest(temperature):
    here = world()
    model = copy.deepcopy(here.model).double()
    parts = [Examples(part.tensors[0].double(), part.tensors[1]) for part in (here.retain, here.forget)]
    given = Sighted(retain=parts[0], forget=parts[1], loss_terms=cross_entropy, fresh=here.fresh)
    config = BadTeacher(recipe=ONE_STEP, retain_share=1.0, temperature=temperature)
    result = unlearn(model, given, config, seed=3)

    bad, student = given.fresh_model(3, model).double(), copy.deepcopy(model)
    left, removed = parts[0].tensors[0], parts[1].tensors[0]
    targets = torch.cat([model(left), bad(removed)]).detach()
    wanted = torch.softmax(targets / temperature, 1)
    said = torch.log_softmax(student(torch.cat([left, removed])) / temperature, 1)
    (temperature**2 * functional.kl_div(said, wanted, reduction="batchmean")).backward()
    for before, after in zip(student.parameters(), result.model.parameters(), strict=True):
        torch.testing.assert_close(after, before - 0.5 * before.grad, rtol=0, atol=1e-12)
    assert result.trace.forwarded == len(left) + len(removed)  # both teachers
    assert result.trace.backwarded == len(left) + len(removed)


def test_ends_nearer_to_the_untrained_network_on_the_removed_records_only():
    here = world()
    result = unlearn(here.model, here.sighted(), BadTeacher(recipe=SLOW, retain_share=1.0), seed=3).model
    bad, removed, left = here.blind().fresh_model(3, here.model), here.forget.tensors[0], here.retain.tensors[0]
    with torch.no_grad():
        before = divergence(bad(removed), here.model(removed), 1.0).mean()
        after = divergence(bad(removed), result(removed), 1.0).mean()
        kept = divergence(here.model(left), result(left), 1.0).mean()
        lost = divergence(here.model(removed), result(removed), 1.0).mean()
    assert after < before / 2
    assert kept < lost


def test_only_a_share_of_what_is_left_takes_part():
    here = world()
    trace = unlearn(here.model, here.sighted(), BadTeacher(recipe=ONE_STEP)).trace
    assert trace.backwarded == round(0.3 * len(here.retain)) + len(here.forget)


@pytest.mark.parametrize("kind", ["plain", "batch-norm"])
def test_the_teachers_are_frozen_copies_that_nothing_moves(kind, monkeypatch):
    here, made = world(kind), []
    original = module.teacher

    def spied(of: nn.Module) -> nn.Module:
        made.append((of, original(of)))
        return made[-1][1]

    monkeypatch.setattr(module, "teacher", spied)
    result = unlearn(here.model, here.sighted(), BadTeacher(recipe=SLOW), seed=3).model
    good, bad = (teacher for _, teacher in made)
    tensors = [tensor.data_ptr() for each in (result, good, bad) for tensor in each.state_dict().values()]
    assert len(set(tensors)) == len(tensors)
    assert same(state(good), state(here.model))
    assert same(state(bad), state(here.blind().fresh_model(3, here.model)))
    for teacher in (good, bad):
        assert not any(part.training for part in teacher.modules())
        assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not same(state(result), state(here.model))


def test_an_epoch_that_leaves_the_original_on_what_is_left_is_taken_back():
    here = world()
    recipe = Recipe(epochs=4, lr=3.0, batch_size=8, schedule="constant")
    result = unlearn(here.model, here.sighted(), BadTeacher(recipe=recipe, loss_bound=0.5))
    assert "passed the bound 0.5; the epoch was taken back" in result.trace.stopped


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, r"temperature=-1.0: must be a positive number"),
        ({"loss_bound": 0.0}, r"loss_bound=0.0: must be a positive number"),
        ({"retain_share": 0.0}, r"retain_share=0.0: must be in \(0, 1\]"),
        ({"retain_share": 30.0}, r"retain_share=30.0: must be in \(0, 1\]"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message):
    with pytest.raises(ConfigError, match=message):
        BadTeacher(**changes)


def test_another_architecture_and_what_is_no_classifier_are_refused():
    here = world()
    with pytest.raises(MismatchError, match="fresh"):
        unlearn(here.model, here.sighted(fresh=lambda seed: MLP((6, 9, 3))), BadTeacher())
    x = here.original.tensors[0]
    regression = Examples(x, torch.zeros(len(x), 3))
    given = Sighted(retain=regression, forget=regression, loss_terms=squared_error, fresh=here.fresh)
    with pytest.raises(UnsupportedModule, match="bad-teacher works on classifiers"):
        unlearn(here.model, given, BadTeacher())


def test_the_defaults_are_those_of_the_paper():
    config = BadTeacher()
    assert (config.temperature, config.retain_share) == (1.0, 0.3)
    assert (config.recipe.optimizer, config.recipe.lr, config.recipe.epochs) == ("adamw", 1e-4, 1)
