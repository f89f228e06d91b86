"""SCRUB: against the algorithm written again with plain autograd, and the trap of a student equal to its teacher."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from expunge import Examples, Recipe, Scrub, Sighted, cross_entropy, squared_error, unlearn
from expunge.errors import ConfigError, UnsupportedModule
from expunge.methods import scrub as scrub_module
from tests.contract import World, same, state, world

LR, GAMMA, ALPHA, T = 0.1, 0.9, 0.4, 2.0
PLAIN_SGD = {"batch_size": 1000, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}


def config(epochs: int = 2, **changes: Any) -> Scrub:
    settings = {
        "recipe": Recipe(epochs=epochs, lr=LR, **PLAIN_SGD),
        "forget_epochs": 1,
        "loss_weight": GAMMA,
        "obey_weight": ALPHA,
        "temperature": T,
    }
    return Scrub(**(settings | changes))


def in_float64(here: World) -> tuple[nn.Module, Sighted]:
    parts = [
        Examples(part.tensors[0].double(), part.tensors[1], positions=part.positions)
        for part in (here.retain, here.forget)
    ]
    given = Sighted(retain=parts[0], forget=parts[1], loss_terms=cross_entropy, fresh=here.fresh)
    return copy.deepcopy(here.model).double(), given


def divergence(teacher: nn.Module, student: nn.Module, inputs: Tensor) -> Tensor:
    wanted = torch.softmax(teacher(inputs).detach() / T, 1)
    said = torch.log_softmax(student(inputs) / T, 1)
    return T * T * functional.kl_div(said, wanted, reduction="batchmean")


def step_(student: nn.Module, loss: Tensor) -> float:
    grads = torch.autograd.grad(loss, list(student.parameters()))
    with torch.no_grad():
        for p, grad in zip(student.parameters(), grads, strict=True):
            p.sub_(LR * grad)
    return math.sqrt(sum(float(grad.square().sum()) for grad in grads))


def by_hand(model: nn.Module, given: Sighted, passes: str) -> tuple[nn.Module, list[float]]:
    """Full-batch passes: "-" maximises on the removed records, "+" minimises on what is left."""
    teacher, student, lengths = copy.deepcopy(model), copy.deepcopy(model), []
    for kind in passes:
        if kind == "-":
            lengths.append(step_(student, -divergence(teacher, student, given.forget.tensors[0])))
        else:
            x, y = given.retain.tensors
            loss = GAMMA * functional.cross_entropy(student(x), y) + ALPHA * divergence(teacher, student, x)
            step_(student, loss)
    return student, lengths


def assert_equal_weights(a: nn.Module, b: nn.Module) -> None:
    for mine, theirs in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def distance(a: nn.Module, b: nn.Module) -> float:
    return max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({"epochs": 2}, "+-+"),
        ({"epochs": 4, "forget_epochs": 2}, "+-+-++"),
        ({"epochs": 3, "forget_epochs": 5}, "+-+-+"),
        ({"epochs": 2, "disobey_at_once": True}, "-++"),
        ({"epochs": 2, "forget_epochs": 2, "disobey_at_once": True}, "-+-+"),
    ],
)
def test_equals_the_algorithm_written_by_hand(changes, passes):
    model, given = in_float64(world())
    result = unlearn(model, given, config(**changes))
    expected, _ = by_hand(model, given, passes)
    assert_equal_weights(result.model, expected)
    assert len(result.trace.facts["forget_divergence"]) == passes.count("-")


def test_the_first_maximising_pass_would_do_nothing_where_student_and_teacher_are_equal():
    model, given = in_float64(world())
    at_once = unlearn(model, given, config(disobey_at_once=True))
    assert at_once.trace.facts["forget_divergence"] == [0.0]
    _, lengths = by_hand(model, given, "-++")
    assert lengths[0] < 1e-15
    without, _ = by_hand(model, given, "++")
    assert distance(at_once.model, without) < 1e-15  # the trap: as if there had been no such pass


def test_by_default_every_maximising_pass_moves_the_student_away_from_the_teacher_on_the_removed_records():
    model, given = in_float64(world())
    settings = config(epochs=4, forget_epochs=3)
    result = unlearn(model, given, settings)
    assert all(mean > 1e-9 for mean in result.trace.facts["forget_divergence"])
    _, lengths = by_hand(model, given, "+-+-+-+")
    assert min(lengths) > 1e-6
    without, _ = by_hand(model, given, "++++")
    assert distance(result.model, without) > 1e-6
    x = given.forget.tensors[0]
    assert divergence(model, result.model, x) > divergence(model, without, x)


@pytest.mark.parametrize("kind", ["plain", "batch-norm"])
def test_the_teacher_is_a_frozen_copy_that_nothing_moves(kind, monkeypatch):
    here, pairs = world(kind), []
    original = scrub_module.teacher

    def spied(model: nn.Module) -> nn.Module:
        pairs.append((model, original(model)))
        return pairs[0][1]

    monkeypatch.setattr(scrub_module, "teacher", spied)
    result = unlearn(here.model, here.sighted(), Scrub(recipe=Recipe(epochs=2, lr=0.01, batch_size=16)))
    ((student, teacher),) = pairs
    assert student is result.model
    mine, theirs = ({t.data_ptr() for t in m.state_dict().values()} for m in (student, teacher))
    assert not mine & theirs
    assert same(state(teacher), state(here.model))
    assert not same(state(student), state(here.model))
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


def test_rewinds_to_the_epoch_with_the_nearest_forget_error_the_later_of_two():
    here, states = world(), {}
    recipe = Recipe(epochs=8, lr=0.05, batch_size=4, optimizer="adamw", schedule="constant")
    base = {"recipe": recipe, "forget_epochs": 4, "loss_weight": 0.1, "obey_weight": 0.1, "loss_bound": 50.0}

    def watch(moment: str, model: nn.Module) -> None:
        states[moment] = state(model)

    errors = unlearn(here.model, here.sighted(), Scrub(**base, rewind_to=0.0)).trace.facts["forget_errors"]
    assert len(errors) == 8
    assert len(set(errors)) > 2
    for target in (0.0, 1.0, sorted(errors)[4] + 1e-3):
        result = unlearn(here.model, here.sighted(), Scrub(**base, rewind_to=target), watch=watch)
        gaps = [abs(error - target) for error in errors]
        epoch = max(number for number, gap in enumerate(gaps, 1) if gap == min(gaps))
        assert result.trace.facts["rewound_to"] == epoch
        assert same(state(result.model), states[f"epoch {epoch}"])
        inputs, labels = here.forget.tensors
        wrong = result.model.eval()(inputs).argmax(1) != labels
        assert float(wrong.double().mean()) == errors[epoch - 1]
    plain = unlearn(here.model, here.sighted(), Scrub(**base))
    assert same(state(plain.model), states["epoch 8"])
    assert "rewound_to" not in plain.trace.facts


def test_rewinds_to_the_error_of_the_final_model_on_validation_records_of_the_removed_classes():
    here, states = world(), {}
    zeros = here.original.positions[here.original.tensors[1] == 0][:4]
    forget, retain = here.original.only(zeros), here.original.without(zeros)
    generator = torch.Generator().manual_seed(3)
    inputs, labels = here.original.tensors
    noisy = inputs + torch.randn(inputs.shape, generator=generator)
    recipe = Recipe(epochs=8, lr=0.05, batch_size=4, optimizer="adamw", schedule="constant")
    base = {"recipe": recipe, "forget_epochs": 4, "loss_weight": 0.1, "obey_weight": 0.1, "loss_bound": 50.0}

    def watch(moment: str, model: nn.Module) -> None:
        states[moment] = copy.deepcopy(model).eval()

    given = here.sighted(retain=retain, forget=forget, validation=Examples(noisy, labels), full=None)
    result = unlearn(here.model, given, Scrub(**base, rewind=True), watch=watch)
    final, own = states["epoch 8"], labels == 0  # of the validation records, only those of the removed class count
    reference = float((final(noisy[own]).argmax(1) != 0).double().mean())
    assert 0 < reference < 1
    assert reference != float((final(noisy).argmax(1) != labels).double().mean())
    errors = [float((states[f"epoch {e}"](forget.tensors[0]).argmax(1) != 0).double().mean()) for e in range(1, 9)]
    gaps = [abs(error - reference) for error in errors]
    facts = result.trace.facts
    assert (facts["rewind_reference"], facts["forget_errors"]) == (reference, errors)
    assert facts["rewound_to"] == max(number for number, gap in enumerate(gaps, 1) if gap == min(gaps))
    assert same(state(result.model), state(states[f"epoch {facts['rewound_to']}"]))


def test_rewinding_without_validation_records_of_the_removed_classes_is_refused():
    here = world()
    with pytest.raises(ConfigError, match=r"rewind=True needs validation records .* validation=None. Give Sighted"):
        unlearn(here.model, here.sighted(), Scrub(rewind=True))
    inputs, labels = here.original.tensors
    zeros = labels[here.forget.positions] == 0
    forget = here.original.only(here.forget.positions[zeros])
    others = Examples(inputs[labels > 0], labels[labels > 0])
    with pytest.raises(ConfigError, match=r"validation records are of classes \[1, 2\], the removed ones of \[0\]"):
        unlearn(here.model, here.sighted(forget=forget, validation=others), Scrub(rewind=True))


def test_a_loss_that_calls_the_model_twice_is_refused():
    here = world()

    def twice(model: nn.Module, batch: Any) -> Tensor:
        return (cross_entropy(model, batch) + cross_entropy(model, batch)) / 2

    given = Sighted(retain=here.retain, forget=here.forget, loss_terms=twice, fresh=here.fresh)
    with pytest.raises(UnsupportedModule, match=r"calls the model once .* called it 2 times and returned"):
        unlearn(here.model, given, Scrub())


def test_an_epoch_that_destroys_the_model_is_taken_back():
    here, states = world("batch-norm"), {}
    recipe = Recipe(epochs=6, lr=1.0, batch_size=8, schedule="constant")

    def watch(moment: str, model: nn.Module) -> None:
        states[moment] = state(model)

    result = unlearn(here.model, here.sighted(), Scrub(recipe=recipe, loss_bound=0.6), watch=watch)
    assert "passed the bound 0.6; the epoch was taken back" in result.trace.stopped
    last = len(result.trace.epoch_ends)
    assert last < 6
    assert same(state(result.model), states[f"epoch {last - 1}"] if last > 1 else state(here.model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, r"temperature=0.0: must be a positive number"),
        ({"loss_bound": math.nan}, r"loss_bound=nan: must be a positive number"),
        ({"obey_weight": -1.0}, r"obey_weight=-1.0: must be 0 or more"),
        ({"obey_weight": 0.0, "loss_weight": 0.0}, r"nothing would keep what is left"),
        ({"forget_epochs": 0}, r"forget_epochs=0: must be at least 1"),
        ({"epochs": 1}, r"recipe.epochs=1: must be at least 2"),
        ({"epochs": 0, "disobey_at_once": True}, r"recipe.epochs=0: must be at least 1"),
        ({"rewind_to": 12.0}, r"rewind_to=12.0: must be in \[0, 1\]"),
        ({"rewind_to": 0.1, "rewind": True}, r"rewind=True, rewind_to=0.1: give one reference"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_what_is_no_classifier_is_refused():
    here = world()
    x = here.original.tensors[0]
    regression = Examples(x, torch.zeros(len(x), 3))
    given = Sighted(retain=regression, forget=regression, loss_terms=squared_error, fresh=here.fresh)
    with pytest.raises(UnsupportedModule, match="scrub works on classifiers"):
        unlearn(here.model, given, config())


def test_the_defaults_are_those_of_the_paper_for_small_models():
    recipe = Scrub().recipe
    assert (recipe.optimizer, recipe.lr, recipe.weight_decay, recipe.epochs) == ("adamw", 5e-4, 0.1, 10)
    assert (Scrub().loss_weight, Scrub().obey_weight, Scrub().forget_epochs, Scrub().temperature) == (1, 0.5, 3, 2)
