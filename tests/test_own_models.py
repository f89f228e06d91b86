"""Models of one's own that are not plain: frozen parts, weights computed from others, other types, odd losses."""

import copy
import re
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from expunge import (
    Blind,
    CFk,
    EUk,
    Examples,
    FineTune,
    Recipe,
    Retrain,
    cross_entropy,
    train,
    unlearn,
)
from expunge.errors import ConfigError, MismatchError, UnsupportedModule
from expunge.losses import name_of
from expunge.methods.guard import note_what_was_lost
from expunge.params import named_parameters
from expunge.trace import Trace
from expunge.training import until_converged

ONCE = Recipe(epochs=1, lr=0.1)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def records(count: int = 40) -> Examples:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 4, generator=draw)
    return Examples(inputs, inputs[:, :3].argmax(1))


def given(fresh=network, data=None) -> Blind:
    return Blind(retain=data or records(), loss_terms=cross_entropy, fresh=fresh)


@pytest.mark.parametrize("method", [CFk, EUk])
def test_a_layer_whose_weight_is_computed_counts_as_a_layer(method):
    def normed(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), weight_norm(nn.Linear(8, 3)))

    model = normed(0)
    found = unlearn(model, given(normed), method(k=1, recipe=ONCE))
    moved = {
        name for (name, p), q in zip(model.named_parameters(), found.model.parameters(), strict=True) if not p.equal(q)
    }
    assert found.trace.facts == {"weight_layers": 2, "trained_layers": ["2"]}
    assert moved == {"2.bias", "2.parametrizations.weight.original0", "2.parametrizations.weight.original1"}


def test_one_step_of_one_cycle_moves_the_weights():
    model = network()
    before = model[0].weight.detach().clone()
    train(model, records(), cross_entropy, Recipe(epochs=1, lr=0.1, schedule="one-cycle"), seed=0)
    assert not model[0].weight.equal(before)


def test_a_frozen_normalisation_keeps_its_statistics():
    model = network()
    model[1].requires_grad_(False)
    found = unlearn(model, given(), FineTune(recipe=ONCE)).model
    assert found[1].running_mean.equal(model[1].running_mean)
    model[1].requires_grad_(True)
    assert not unlearn(model, given(), FineTune(recipe=ONCE)).model[1].running_mean.equal(model[1].running_mean)


def test_retraining_freezes_what_is_frozen_and_refuses_other_values():
    model = network()
    model[0].requires_grad_(False)
    with pytest.raises(MismatchError, match=r"'0\.weight' is frozen"):
        unlearn(model, given(), Retrain(recipe=ONCE))

    def loading(seed: int) -> nn.Module:
        untrained = network(seed)
        untrained[0].load_state_dict(model[0].state_dict())
        return untrained

    found = unlearn(model, given(loading), Retrain(recipe=ONCE)).model
    assert found[0].weight.equal(model[0].weight)
    assert not found[3].weight.equal(model[3].weight)


def test_retraining_has_the_types_of_the_model():
    data = records()
    found = unlearn(network().double(), given(data=Examples(data.tensors[0].double(), data.tensors[1])),
                    Retrain(recipe=ONCE))  # fmt: skip
    assert {p.dtype for p in found.model.parameters()} == {torch.float64}


def test_a_negative_loss_may_stay_above_its_target():
    def shifted(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1], reduction="none") - 10

    model, trace = network(), Trace("test", 0)
    reached = float(shifted(model.eval(), records().tensors).mean().detach())
    stop = until_converged(records(), shifted, target=reached * 1.01, tolerance=0.05, patience=0, trace=trace)
    assert "reached the original's" in stop(model, reached)
    stop = until_converged(records(), shifted, target=reached * 1.1, tolerance=0.05, patience=0, trace=trace)
    assert stop(model, reached) is None


def test_losses_with_other_arguments_have_other_names():
    one, other = (partial(cross_entropy, weight=torch.tensor([1.0, w])) for w in (1, 50))
    assert name_of(one) != name_of(other)
    assert name_of(one) == name_of(partial(cross_entropy, weight=torch.tensor([1.0, 1.0])))
    assert name_of(partial(cross_entropy, 3, smoothing=0.1)) == "cross_entropy(3, smoothing=0.1)"
    long, longer = np.zeros(2000), np.zeros(2000)
    longer[1000] = 1  # which NumPy does not print
    assert name_of(partial(cross_entropy, weight=long)) != name_of(partial(cross_entropy, weight=longer))


class Scale:
    """An object that prints where it is."""


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (functional.mse_loss, "mse_loss"),
        (abs, "abs"),
        (Scale(), "Scale"),
        ([abs, {"of": Scale()}, 2], "[abs, {'of': Scale}, 2]"),
        (np.float64(0.5), "0.5"),
        (np.array(["a", "b"]), "['a', 'b']"),
        (nn.Linear(2, 1), None),
    ],
)
def test_the_name_of_a_loss_is_the_same_in_every_process(value, named):
    name = name_of(partial(cross_entropy, by=value))
    assert " at 0x" not in name
    if named is not None:
        assert name == f"cross_entropy(by={named})"
        return
    assert name == name_of(partial(cross_entropy, by=copy.deepcopy(value)))
    assert name != name_of(partial(cross_entropy, by=nn.Linear(2, 1)))


def test_a_comparison_that_fails_loses_nothing():
    def failing(seed: int) -> nn.Module:
        raise RuntimeError("no weights here")

    trained, worse = network(), network(1)
    train(trained, records(), cross_entropy, Recipe(epochs=60, lr=0.1), seed=0)
    trace = Trace("test", 0)
    with pytest.warns(UserWarning, match=r"fresh\(\) failed \(no weights here\)"):
        note_what_was_lost(trained, worse, given(failing), trace)
    assert len(trace.warnings) == 1


def test_sparse_gradients_are_refused_before_anything_is_computed():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten())
    with pytest.raises(UnsupportedModule, match=r"0 has sparse=True.*0.sparse = False"):
        unlearn(model, given(), FineTune(recipe=ONCE))


def test_a_model_with_one_logit_is_told_which_loss_to_write():
    one = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
    with pytest.raises(ConfigError, match=r"logits .*one for each class.*binary_cross_entropy_with_logits"):
        cross_entropy(one, records().tensors)


def test_a_printed_trace_is_short():
    trace = unlearn(network(), given(), FineTune(recipe=ONCE)).trace
    assert re.fullmatch(
        r"fine-tune, seed 0: train [\d.e-]+ s; 1 steps of training\nstopped: all 1 epochs done", str(trace)
    )
    trace.losses += [0.5] * 1000
    trace.facts["reset_count"] = 7
    trace.warnings.append("Careful.")
    assert str(trace).endswith("reset_count: 7\nwarning: Careful.")
    assert len(str(trace)) < 200


def test_complex_parameters_are_refused():
    model = nn.Linear(3, 2, dtype=torch.complex64)
    with pytest.raises(ConfigError, match=r"'weight'.*complex64"):
        named_parameters(model)


def test_frozen_parameters_may_have_any_type():
    model = network()
    model.register_parameter("codes", nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False))
    model.register_parameter("phases", nn.Parameter(torch.zeros(3, dtype=torch.complex64), requires_grad=False))

    def fresh(seed: int) -> nn.Module:
        built = network(seed)
        built.codes, built.phases = model.codes, model.phases
        return built

    unlearn(model, given(fresh), Retrain(recipe=ONCE))


def test_a_module_of_one_s_own_may_be_called_sparse():
    model = network()
    model[0].sparse = True
    unlearn(model, given(), FineTune(recipe=ONCE))


def test_statistics_of_frozen_normalisations_that_moved_are_said():
    model = network()
    model[1].requires_grad_(False)
    model[1].running_mean += 1
    with pytest.warns(UserWarning, match=r"'1' has frozen scales, and other running statistics than fresh\(\) builds"):
        unlearn(model, given(), Retrain(recipe=ONCE))


def test_types_are_those_of_the_model_where_a_part_is_compiled():
    model = network().bfloat16()
    model[0] = torch.compile(model[0], backend="eager")
    assert {p.dtype for p in given().fresh_model(1, model).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("name", "value"), [("epochs", 1.5), ("batch_size", 16.0)])
def test_counts_are_whole_numbers(name, value):
    recipe = Recipe(epochs=1, lr=0.1)
    object.__setattr__(recipe, name, value)  # the tests' own type checks refuse it earlier
    with pytest.raises(ConfigError, match="must be a whole number"):
        recipe.__post_init__()


def test_steps_without_milestones_are_refused_before_anything_is_computed():
    recipe = Recipe(epochs=4, lr=0.1, schedule="step")
    with pytest.raises(ConfigError, match=r"schedule='step', milestones=\(\): .*milestones=\(2,\)"):
        train(network(), records(), cross_entropy, recipe, seed=0)

    def never(model: nn.Module, batch: object) -> torch.Tensor:
        raise AssertionError

    with pytest.raises(ConfigError, match=r"schedule='step'"):
        unlearn(network(), Blind(retain=records(), loss_terms=never, fresh=network), FineTune(recipe=recipe))
