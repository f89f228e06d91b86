import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from expunge import Examples, Recipe, cross_entropy, train
from expunge.errors import ConfigError, NotFinite
from expunge.trace import Trace
from expunge.training import Step, mean_loss, until_converged
from tests.contract import architecture, examples, same, state, without_type_checks

ONE = Recipe(epochs=1, lr=0.1, batch_size=16)


def built(kind: str = "plain") -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return architecture(kind)


def batches(size: int = 20) -> list[Any]:
    return list(examples().fetch(torch.arange(60).split(size)))


class Recorder:
    """A loss that remembers the batches and the training flags it saw."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.flags: list[dict[str, bool]] = []

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.seen.append(batch[0])
        self.flags.append({name: module.training for name, module in model.named_modules()})
        return cross_entropy(model, batch)


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        ("constant", {0: 1, 5: 1, 9.9: 1}),
        ("cosine", {0: 1, 2.5: 0.5 + math.sqrt(0.5) / 2, 5: 0.5, 10: 0}),
        ("one-cycle", {0: 0, 1.5: 0.5, 3: 1, 6.5: 0.5, 10: 0}),
        ("step", {0: 1, 3.999: 1, 4: 0.1, 7.999: 0.1, 8: 0.01, 9.9: 0.01}),
    ],
)
def test_schedules_at_known_points(schedule, points):
    recipe = Recipe(epochs=10, lr=0.3, schedule=schedule, milestones=(4, 8))
    for position, factor in points.items():
        assert recipe.factor(position) == pytest.approx(factor, abs=1e-12)


class Slope(nn.Module):
    """Its loss has gradient 1 everywhere, so that a weight counts the learning rates."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))


def slope(model: nn.Module, batch: Any) -> Tensor:
    return model.weight.expand(len(batch[0]))


@pytest.mark.parametrize(
    ("data", "positions"),
    [
        (Examples(torch.zeros(4)), [0, 0.5, 1, 1.5, 2, 2.5]),
        ([(torch.zeros(2),), (torch.zeros(2),)], [0, 0.5, 1, 1.5, 2, 2.5]),
    ],
)
def test_the_schedule_moves_within_an_epoch(data, positions):
    model = Slope()
    recipe = Recipe(epochs=3, lr=0.2, batch_size=2, momentum=0.0, weight_decay=0.0)
    train(model, data, slope, recipe, seed=0)
    assert model.weight.item() == pytest.approx(-0.2 * sum((1 + math.cos(math.pi * p / 3)) / 2 for p in positions))


class Stream:
    """Batches of unknown number."""

    def __iter__(self) -> Iterator[Any]:
        yield from ((torch.zeros(2),), (torch.zeros(2),))


def test_the_schedule_moves_by_epochs_where_their_length_is_unknown():
    model = Slope()
    recipe = Recipe(epochs=2, lr=0.2, momentum=0.0, weight_decay=0.0, schedule="step", milestones=(1,))
    train(model, Stream(), slope, recipe, seed=0)
    assert model.weight.item() == pytest.approx(-0.2 * 2 * 1.1)


@pytest.mark.parametrize("optimizer", ["sgd", "sgd without momentum", "adamw"])
def test_training_equals_a_loop_by_hand(optimizer):
    momentum = 0.9 if optimizer == "sgd" else 0.0
    name = "adamw" if optimizer == "adamw" else "sgd"
    recipe = Recipe(
        epochs=3, lr=0.05, optimizer=name, momentum=momentum, weight_decay=0.01, schedule="step", milestones=(2,)
    )
    model, by_hand = built(), built()
    trace = train(model, batches(), cross_entropy, recipe, seed=0)
    if optimizer == "adamw":
        reference: torch.optim.Optimizer = torch.optim.AdamW(by_hand.parameters(), lr=0.05, weight_decay=0.01)
    else:
        reference = torch.optim.SGD(
            by_hand.parameters(), lr=0.05, momentum=momentum, weight_decay=0.01, nesterov=momentum > 0
        )
    losses = []
    for epoch in range(3):
        for inputs, labels in batches():
            reference.param_groups[0]["lr"] = 0.05 if epoch < 2 else 0.005
            reference.zero_grad()
            loss = functional.cross_entropy(by_hand(inputs), labels)
            loss.backward()
            reference.step()
            losses.append(float(loss.detach()))
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert trace.losses == pytest.approx(losses, rel=1e-5)


def test_trace_counts_steps_epochs_and_examples():
    trace = train(built(), examples(), cross_entropy, Recipe(epochs=3, lr=0.01, batch_size=16), seed=0)
    assert len(trace.losses) == 12
    assert trace.epoch_ends == [4, 8, 12]
    assert trace.backwarded == 180
    assert trace.stopped == "all 3 epochs done"


def test_no_epochs_change_nothing():
    model = built("batch-norm")
    before = state(model)
    trace = train(model, examples(), cross_entropy, Recipe(epochs=0, lr=0.1), seed=0)
    assert same(state(model), before)
    assert (trace.losses, trace.stopped) == ([], "all 0 epochs done")


@pytest.mark.parametrize("kind", ["plain", "batch-norm"])  # the latter has dropout, too
def test_same_seed_same_bits_and_another_seed_others(kind):
    models = [built(kind) for _ in range(3)]
    for number, (model, seed) in enumerate(zip(models, (1, 1, 2), strict=True)):
        with torch.random.fork_rng():
            torch.manual_seed(number)
            train(model, examples(), cross_entropy, ONE, seed=seed)
    assert same(state(models[0]), state(models[1]))
    assert not same(state(models[0]), state(models[2]))


def test_dropout_alone_differs_by_seed_but_not_within_one():
    models = [built("batch-norm") for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        train(model, batches(), cross_entropy, ONE, seed=seed)  # data without positions is not shuffled
    assert same(state(models[0]), state(models[1]))
    assert not same(state(models[0]), state(models[2]))


def test_global_randomness_is_left_alone():
    before = torch.get_rng_state()
    train(built("batch-norm"), examples(), cross_entropy, ONE, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_epoch_visits_every_example_once_in_another_order():
    loss = Recorder()
    train(built(), examples(), loss, Recipe(epochs=2, lr=0.01, batch_size=16), seed=0)
    first, second = torch.cat(loss.seen[:4]), torch.cat(loss.seen[4:])
    rows = examples().tensors[0]
    for epoch in (first, second):
        assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, rows.tolist()))
        assert not torch.equal(epoch, rows)
    assert not torch.equal(first, second)


def test_a_last_batch_of_one_example_works_with_batch_norm():
    loss, inputs, labels = Recorder(), *(tensor[:9] for tensor in examples().tensors)
    train(built("batch-norm"), Examples(inputs, labels), loss, Recipe(epochs=1, lr=0.1, batch_size=4), seed=0)
    assert [len(batch) for batch in loss.seen] == [4, 5]


@pytest.mark.parametrize("kind", ["vectors", "images"])
def test_one_example_alone_trains_the_weights_and_the_statistics_that_it_is_enough_for(kind):
    layers = (nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2)) if kind == "images" else (nn.Linear(9, 2), nn.BatchNorm1d(2))
    model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))
    one = Examples(torch.randn((2, 1, 3, 3) if kind == "images" else (2, 9)), torch.tensor([0, 2]))
    model.eval()(one.tensors[0])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, one.only(torch.tensor([1])), cross_entropy, Recipe(epochs=2, lr=0.1), seed=0)
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, state[name])}
    assert same == (set() if kind == "images" else {"1.running_mean", "1.running_var", "1.num_batches_tracked"})


def test_a_data_loader_gives_the_bits_of_examples():
    models = [built(), built()]
    loader = DataLoader(TensorDataset(*examples().tensors), batch_size=7, shuffle=True)
    for model, data in zip(models, (examples(), loader), strict=True):
        train(model, data, cross_entropy, ONE, seed=4)
    assert same(state(models[0]), state(models[1]))


def test_a_list_of_batches_keeps_its_batches_and_their_order():
    loss = Recorder()
    train(built(), batches(25), loss, Recipe(epochs=2, lr=0.01, batch_size=7), seed=0)
    assert [len(batch) for batch in loss.seen] == [25, 25, 10] * 2
    assert torch.equal(torch.cat(loss.seen[:3]), examples().tensors[0])


def test_training_runs_in_train_mode_and_flags_are_restored():
    model, loss = built("batch-norm").eval(), Recorder()
    next(iter(model.children())).train()
    before = [module.training for module in model.modules()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    train(model, examples(), loss, ONE, seed=0)
    assert all(all(flags.values()) for flags in loss.flags)
    assert [module.training for module in model.modules()] == before
    assert not torch.equal(buffers[0], next(iter(model.buffers())))


def test_frozen_statistics_stay_bit_identical_while_all_else_trains():
    model, loss = built("batch-norm"), Recorder()
    buffers, weights = [b.clone() for b in model.buffers()], [p.detach().clone() for p in model.parameters()]
    train(model, examples(), loss, ONE, seed=0, freeze_statistics=True)
    assert all(torch.equal(now, before) for now, before in zip(model.buffers(), buffers, strict=True))
    assert not any(torch.equal(now, before) for now, before in zip(model.parameters(), weights, strict=True))
    evaluating = {name for flags in loss.flags for name, training in flags.items() if not training}
    assert [type(model.get_submodule(name)) for name in evaluating] == [nn.BatchNorm1d]


def test_flags_are_restored_when_training_fails():
    model = built().eval()
    with pytest.raises(NotFinite):
        train(model, examples(), cross_entropy, Recipe(epochs=2, lr=1e30, batch_size=16), seed=0)
    assert not any(module.training for module in model.modules())


def test_a_loss_that_is_not_finite_names_the_epoch_and_the_step():
    calls: list[int] = []

    def breaks(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return cross_entropy(model, batch) * (math.nan if len(calls) == 6 else 1.0)

    with pytest.raises(NotFinite, match=r"train: the loss became nan in epoch 2, step 3 of 3. Lower the learning rate"):
        train(built(), batches(), breaks, Recipe(epochs=4, lr=0.01), seed=0)


def test_a_batch_without_a_loss_term_changes_nothing():
    def some(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model, batch)[: 0 if len(batch[0]) == 7 else None]

    with_it, without = built(), built()
    inputs, labels = examples().tensors
    one, none, other = zip(inputs[:40].split([20, 7, 13]), labels[:40].split([20, 7, 13]), strict=True)
    trace = train(with_it, [one, none, other], some, Recipe(epochs=1, lr=0.1, schedule="constant"), seed=0)
    train(without, [one, other], some, Recipe(epochs=1, lr=0.1, schedule="constant"), seed=0)
    assert same(state(with_it), state(without))
    assert (len(trace.losses), trace.backwarded) == (2, 33)
    with pytest.raises(ConfigError, match="epoch 1 had no loss term"):
        train(built(), [none], some, ONE, seed=0)


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match="MLP has nothing trainable"):
        train(built().requires_grad_(False), examples(), cross_entropy, ONE, seed=0)


def test_frozen_parameters_stay():
    model = built()
    frozen = next(model.parameters()).requires_grad_(False)
    before = frozen.clone()
    train(model, examples(), cross_entropy, ONE, seed=0)
    assert torch.equal(frozen, before)


def test_a_stop_rule_is_asked_after_each_epoch_with_its_mean_loss():
    asked, model = [], built()

    def stop(seen: nn.Module, loss: float) -> str | None:
        assert seen is model
        asked.append(loss)
        return "enough" if len(asked) == 2 else None

    trace = train(model, examples(), cross_entropy, Recipe(epochs=9, lr=0.01, batch_size=20), seed=0, stop=stop)
    assert trace.stopped == "enough"
    assert trace.epoch_ends == [3, 6]
    assert asked == pytest.approx([sum(trace.losses[:3]) / 3, sum(trace.losses[3:]) / 3])


def test_mean_loss_is_that_of_a_loop_by_hand_in_eval_mode():
    model, trace = built("batch-norm"), Trace("x", 0)
    train(model, examples(), cross_entropy, ONE, seed=0)
    model.train()
    before = state(model)
    value = mean_loss(model, batches(7), cross_entropy, trace)
    assert model.training
    assert same(state(model), before)
    by_hand = copy.deepcopy(model).eval()
    terms = [
        functional.cross_entropy(by_hand(x[None]), y[None]).item() for x, y in zip(*examples().tensors, strict=True)
    ]
    assert value == pytest.approx(sum(terms) / 60, rel=1e-5)
    assert mean_loss(model, examples(), cross_entropy) == pytest.approx(value, rel=1e-6)
    assert (trace.forwarded, trace.backwarded) == (60, 0)


def rule(target: float, *, tolerance: float = 0.0, patience: int = 0) -> tuple[Any, nn.Module, float, Trace]:
    model, trace = built(), Trace("x", 0)
    at = mean_loss(model, examples(), cross_entropy)
    found = until_converged(
        examples(), cross_entropy, target=target * at, tolerance=tolerance, patience=patience, trace=trace
    )
    return found, model, at, trace


def test_the_stop_rule_measures_on_the_data_once_the_training_loss_is_near():
    stop, model, at, trace = rule(1.001)
    assert stop(model, 4.1 * at) is None
    assert trace.forwarded == 0  # far away: not even looked
    assert stop(model, 3.9 * at) == f"loss {at:.4g} reached the original's {1.001 * at:.4g} (tolerance 0%)"
    assert trace.forwarded == 60


def test_the_stop_rule_measures_every_fifth_epoch_however_high_the_training_loss_is():
    stop, model, at, trace = rule(1.001)
    assert [stop(model, 100 * at) for _ in range(4)] == [None] * 4
    assert trace.forwarded == 0
    assert "reached the original's" in stop(model, 100 * at)
    assert trace.forwarded == 60


def test_after_every_step_its_positions_and_its_optimizer_are_handed_over():
    model, loss, steps = built(), Recorder(), []
    weights = []

    def after(step: Step) -> None:
        steps.append(step)
        weights.append(next(model.parameters()).detach().clone())

    data = Examples(*examples().tensors, positions=torch.arange(0, 120, 2))
    train(model, data, loss, Recipe(epochs=2, lr=0.01, batch_size=16), seed=0, after_step=after)
    rows = examples().tensors[0]
    assert [len(step.positions) for step in steps] == [16, 16, 16, 12] * 2
    assert all(torch.equal(rows[step.positions // 2], batch) for step, batch in zip(steps, loss.seen, strict=True))
    assert len({id(step.optimizer) for step in steps}) == 1
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(weights))
    assert torch.equal(weights[-1], next(model.parameters()))
    train(model, batches(), loss, ONE, seed=0, after_step=after)
    assert [step.positions for step in steps[-3:]] == [None] * 3


@pytest.mark.parametrize(("tolerance", "ends"), [(0.04, False), (0.06, True)])
def test_the_stop_rule_allows_a_tolerance_above_the_target(tolerance, ends):
    stop, model, at, _ = rule(1 / 1.05, tolerance=tolerance)
    assert (stop(model, at) is not None) == ends


def test_the_stop_rule_ends_on_a_plateau_of_the_training_loss():
    stop, model, _, _ = rule(1e-9, patience=2)
    assert [stop(model, loss) for loss in (3.0, 2.0, 2.5, 1.9, 1.9)] == [None] * 5
    assert stop(model, 1.95) == "plateau: no lower loss for 2 epochs"


def test_patience_zero_never_ends():
    stop, model, _, _ = rule(1e-9, patience=0)
    assert [stop(model, 3.0) for _ in range(20)] == [None] * 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": -1}, "epochs=-1: must be a whole number, 0 or more"),
        ({"lr": 0.0}, "lr=0.0: must be a positive number"),
        ({"lr": -0.1}, "lr=-0.1: must be a positive number"),
        ({"lr": math.nan}, "lr=nan: must be a positive number"),
        ({"lr": math.inf}, "lr=inf: must be a positive number"),
        ({"batch_size": 0}, "batch_size=0: must be a whole number, at least 1"),
        ({"momentum": 1.0}, r"momentum=1.0: must be in \[0, 1\)"),
        ({"momentum": -0.1}, r"momentum=-0.1: must be in \[0, 1\)"),
        ({"weight_decay": -1e-4}, "weight_decay=-0.0001: must be 0 or more"),
        ({"weight_decay": math.inf}, "weight_decay=inf: must be 0 or more"),
        ({"optimizer": "adam"}, "optimizer='adam': must be one of .*'adamw'"),
        ({"schedule": "linear"}, "schedule='linear': must be one of .*'one-cycle'"),
        ({"crop": -1}, "crop=-1: must be 0 or more"),
        ({"cutout": -2}, "cutout=-2: must be 0 or more"),
        ({"precision": "half"}, "precision='half': must be one of .*'fastest'"),
    ],
)
def test_recipes_that_cannot_work_are_refused(settings, message):
    with without_type_checks(), pytest.raises(ConfigError, match=message):
        Recipe(**({"epochs": 1, "lr": 0.1} | settings))


def test_recipes_at_the_edge_of_what_works_are_accepted_and_settings_have_names():
    recipe = Recipe(epochs=0, lr=1e-300, batch_size=1, momentum=0.0, weight_decay=0.0)
    assert recipe.factor(0) == 1
    assert all(field.kw_only for field in fields(Recipe))
