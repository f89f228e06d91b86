import collections
import math
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from expunge import Examples, Recipe, cross_entropy, train
from expunge.errors import ConfigError, MismatchError, NotFinite, UnsupportedModule
from expunge.exact import sisa
from expunge.exact.sisa import Sisa, assign, epochs_per_slice, expected_share
from expunge.metrics.outputs import outputs
from expunge.seeds import derive, seeded
from tests import zoo
from tests.contract import without_type_checks

RECIPE = Recipe(epochs=3, lr=0.1, batch_size=8)
CONFIG = Sisa(recipe=RECIPE, shards=2, slices=2)
SEED = 7


def data(count: int = 40) -> Examples:
    return zoo.classification(count)


def network(kind: str) -> Any:
    def fresh(seed: int) -> nn.Module:
        return zoo.network(kind, seed % 1000)

    return fresh


def fitted(examples: Examples, config: Sisa = CONFIG, kind: str = "mlp", **options: Any) -> sisa.Ensemble:
    return sisa.fit(network(kind), examples, cross_entropy, config, seed=SEED, **options)


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def place(examples: Examples, shard: int, number: int, config: Sisa = CONFIG) -> Tensor:
    shards, slices = assign(examples.positions, config, SEED)
    return examples.positions[(shards == shard) & (slices == number)]


# Where records go


def test_a_place_depends_on_the_position_and_the_seed_only():
    config = Sisa(recipe=RECIPE, shards=3, slices=4)
    everything = torch.arange(100)
    some = everything[torch.randperm(100, generator=torch.Generator().manual_seed(0))[:60]].sort().values
    for all_, few in zip(assign(everything, config, 1), assign(some, config, 1), strict=True):
        assert torch.equal(all_[some], few)
    assert not torch.equal(assign(everything, config, 1)[0], assign(everything, config, 2)[0])


def test_places_are_even_and_not_the_positions_in_order():
    shard, part = assign(torch.arange(120), Sisa(recipe=RECIPE, shards=3, slices=4), 5)
    assert set(collections.Counter((shard * 4 + part).tolist()).items()) == {(cell, 10) for cell in range(12)}
    first_of_each_block = (shard * 4 + part)[::12]
    assert len(set(first_of_each_block.tolist())) > 3


@pytest.mark.parametrize("epochs", [1, 3, 10, 37])
@pytest.mark.parametrize("slices", [1, 2, 5, 6])
def test_slices_together_cost_what_the_epochs_do(epochs, slices):
    if 2 * epochs < slices + 1:
        with pytest.raises(ConfigError, match=f"slices={slices} with epochs={epochs}.*at most {2 * epochs - 1} slices"):
            epochs_per_slice(epochs, slices)
        return
    counts = epochs_per_slice(epochs, slices)
    cost = sum(count * number / slices for number, count in enumerate(counts, 1))
    assert min(counts) >= 1
    assert abs(cost - epochs) <= 0.5
    assert all(abs(count - 2 * epochs / (slices + 1)) <= 1 for count in counts)


def test_whole_numbers_of_epochs_are_those_of_the_paper():
    assert epochs_per_slice(15, 5) == (5,) * 5  # 2 R / (R + 1) · e / R
    assert epochs_per_slice(15, 1) == (15,)


def test_a_slice_gets_its_share_of_the_milestones():
    recipe = Recipe(epochs=30, lr=0.1, schedule="step", milestones=(15, 24))
    assert Sisa(recipe=recipe, shards=1, slices=5).slice_recipe(2) == Recipe(
        epochs=10, lr=0.1, schedule="step", milestones=(5, 8)
    )


# What is trained


def test_the_fit_is_each_slice_in_turn_written_by_hand():
    examples = data()
    ensemble = fitted(examples)
    for shard in range(2):
        number = derive(SEED, "sisa", shard)
        with seeded(number, "fresh"):
            model = network("mlp")(number)
        train(model, examples.only(place(examples, shard, 0)), cross_entropy, Recipe(epochs=2, lr=0.1, batch_size=8),
              seed=derive(SEED, "sisa", shard, 0))  # fmt: skip
        both = torch.cat([place(examples, shard, 0), place(examples, shard, 1)])
        train(model, examples.only(both), cross_entropy, Recipe(epochs=2, lr=0.1, batch_size=8),
              seed=derive(SEED, "sisa", shard, 1))  # fmt: skip
        assert same_bits(ensemble.models[shard], model)
    assert ensemble.trace.backwarded == 2 * (2 * 10 + 2 * 20)
    assert not same_bits(ensemble.models[0], ensemble.models[1])


@pytest.mark.parametrize("kind", ["mlp", "batch-norm", "dropout", "tied", "frozen"])
@pytest.mark.parametrize("where", ["memory", "folder"])
@pytest.mark.parametrize(
    "gone", [[5], [0, 1, 2, 3, 4, 5], "first slice", [39, 17, 30]], ids=["one", "many", "a whole slice", "unordered"]
)
def test_a_removal_equals_training_without_the_records_bit_for_bit(kind, where, gone, tmp_path):
    examples = data()
    removed = place(examples, 1, 0) if gone == "first slice" else torch.tensor(gone)
    ensemble = fitted(examples, kind=kind, folder=tmp_path if where == "folder" else None)
    before = [value.clone() for value in ensemble.state_dict().values()]
    ensemble.remove(removed)
    assert same_bits(ensemble, fitted(examples.without(removed), kind=kind))
    assert any(not torch.equal(a, b) for a, b in zip(before, ensemble.state_dict().values(), strict=True))
    assert not torch.isin(ensemble.data.positions, removed).any()


def test_removals_one_after_the_other_equal_training_without_all_of_them():
    examples = data()
    ensemble = fitted(examples, config := Sisa(recipe=RECIPE, shards=3, slices=4), "batch-norm")
    for gone in ([3], [20, 21], [8]):
        ensemble.remove(torch.tensor(gone))
    assert same_bits(ensemble, fitted(examples.without(torch.tensor([3, 8, 20, 21])), config, "batch-norm"))


def test_only_the_shard_is_retrained_and_only_from_the_slice():
    examples = data()
    for shard in range(2):
        for number in range(2):
            ensemble = fitted(examples)
            others = {name: value.clone() for name, value in ensemble.models[1 - shard].state_dict().items()}
            removal = ensemble.remove(place(examples, shard, number)[:1])
            assert removal.retrained == {shard: number}
            assert all(
                torch.equal(others[name], value) for name, value in ensemble.models[1 - shard].state_dict().items()
            )
            passes = {0: 2 * 9 + 2 * 19, 1: 2 * 19}[number]
            assert removal.trace.backwarded == passes
            assert removal.share == pytest.approx(passes / (2 * (10 if number else 9) + 2 * 19 + 2 * 10 + 2 * 20))


# What it costs


def test_the_mean_share_over_all_records_is_the_papers():
    config = Sisa(recipe=Recipe(epochs=2, lr=0.1, batch_size=64), shards=2, slices=3)
    examples = data(36)
    shares = []
    for position in examples.positions:
        ensemble = fitted(examples, config)
        removal = ensemble.remove(position[None])
        shares.append(removal.share)
        assert removal.expected == pytest.approx((2 / 3 + 1 / 9) / 2)
    assert np.mean(shares) == pytest.approx((2 / 3 + 1 / 9) / 2, rel=0.05)  # 35 records in place of 36


@pytest.mark.parametrize("removed", [1, 3, 20])
def test_the_expected_share_is_that_of_random_draws(removed):
    config = Sisa(recipe=Recipe(epochs=9, lr=0.1), shards=4, slices=6)
    epochs = np.array(epochs_per_slice(9, 6))
    assert len(set(epochs)) > 1
    passes = epochs * np.arange(1, 7)
    source = np.random.default_rng(0)
    shares = []
    for _ in range(4000):
        shard, number = source.integers(4, size=removed), source.integers(6, size=removed)
        again = sum(passes[number[shard == k].min() :].sum() for k in range(4) if (shard == k).any())
        shares.append(again / (4 * passes.sum()))
    error = np.std(shares) / math.sqrt(len(shares))
    assert expected_share(config, removed) == pytest.approx(np.mean(shares), abs=4 * error)


def test_the_expected_share_without_slices_is_the_chance_that_a_shard_is_hit():
    config = Sisa(recipe=RECIPE, shards=5, slices=1)
    assert expected_share(config, 3) == pytest.approx(1 - 0.8**3)
    assert expected_share(config, 0) == 0


# Checkpoints


class Interrupts:
    """A loss that is interrupted after some calls."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return cross_entropy(model, batch)


def keys(folder: Any) -> dict[str, str]:
    found = {}
    for path in sorted(folder.iterdir()):
        with safe_open(path, framework="pt") as file:
            found[path.name] = file.metadata()["key"]
    return found


def test_an_interrupted_fit_goes_on_with_the_same_bits(tmp_path):
    whole = sisa.fit(network("mlp"), data(), loss := Interrupts(10**6), CONFIG, seed=SEED)
    calls = 10**6 - loss.calls
    for done in (calls // 3, calls - 2):
        folder = tmp_path / str(done)
        with pytest.raises(KeyboardInterrupt):
            sisa.fit(network("mlp"), data(), Interrupts(done), CONFIG, seed=SEED, folder=folder)
        assert not list(folder.glob("*.tmp")) and 0 < len(list(folder.iterdir())) < 4  # noqa: PT018
        resumed = sisa.fit(network("mlp"), data(), Interrupts(10**6), CONFIG, seed=SEED, folder=folder)
        assert same_bits(whole, resumed)
        assert 0 < resumed.trace.backwarded < whole.trace.backwarded
    again = sisa.fit(network("mlp"), data(), Interrupts(0), CONFIG, seed=SEED, folder=folder)
    assert same_bits(whole, again) and again.trace.backwarded == 0  # noqa: PT018


def test_an_interrupted_removal_leaves_no_checkpoint_that_saw_the_records_and_can_be_finished(tmp_path):
    examples = data()
    gone = torch.cat([place(examples, 0, 1)[:1], place(examples, 1, 0)[:1]])
    loss = Interrupts(10**6)
    ensemble = sisa.fit(network("mlp"), examples, loss, CONFIG, seed=SEED, folder=tmp_path)
    before = keys(tmp_path)
    loss.calls = 1
    with pytest.raises(KeyboardInterrupt):
        ensemble.remove(gone)
    assert set(keys(tmp_path).items()) == {
        ("shard-000-slice-000.safetensors", before["shard-000-slice-000.safetensors"])
    }
    resumed = sisa.fit(network("mlp"), examples.without(gone), Interrupts(10**6), CONFIG, seed=SEED, folder=tmp_path)
    loss.calls = 10**6
    ensemble.remove(gone[:0])
    expected = fitted(examples.without(gone))
    assert same_bits(resumed, expected) and same_bits(ensemble, expected)  # noqa: PT018


def test_a_damaged_checkpoint_is_trained_again(tmp_path):
    ensemble = fitted(data(), folder=tmp_path)
    damaged = tmp_path / "shard-001-slice-000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:20])
    again = fitted(data(), folder=tmp_path)
    assert same_bits(ensemble, again)
    assert again.trace.backwarded == 2 * 10 + 2 * 20


@pytest.mark.parametrize("change", ["recipe", "seed", "architecture", "loss", "shards"])
def test_checkpoints_of_other_settings_are_refused(change, tmp_path):
    fitted(data(), folder=tmp_path)
    before = keys(tmp_path)
    config = {
        "recipe": Sisa(recipe=Recipe(epochs=3, lr=0.2, batch_size=8), shards=2, slices=2),
        "shards": Sisa(recipe=RECIPE, shards=3, slices=2),
    }.get(change, CONFIG)
    with pytest.raises(MismatchError, match="another architecture, loss, seed or configuration"):
        sisa.fit(
            network("tied" if change == "architecture" else "mlp"),
            data(),
            Interrupts(10**6) if change == "loss" else cross_entropy,
            config,
            seed=8 if change == "seed" else SEED,
            folder=tmp_path,
        )
    assert keys(tmp_path) == before


def test_checkpoints_of_other_data_are_not_used(tmp_path):
    fitted(data(), folder=tmp_path)
    inputs, labels = data().tensors
    changed = inputs.clone()
    changed[place(data(), 0, 1)[0], 2] += 1e-9
    other = fitted(Examples(changed, labels), folder=tmp_path)
    assert same_bits(other, fitted(Examples(changed, labels)))
    assert other.trace.backwarded == 2 * 20


# What it says


class Says(nn.Module):
    """A model with fixed answers."""

    def __init__(self, probabilities: list[list[float]]) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(probabilities, dtype=torch.float64).log())

    def forward(self, inputs: Tensor) -> Tensor:
        return 3 + self.log[inputs]  # logits are log-probabilities up to a constant


def answers(aggregation: str) -> np.ndarray:
    config = Sisa(recipe=RECIPE, shards=3, slices=1, aggregation=aggregation)
    ensemble = sisa.Ensemble(lambda _: Says([[1.0]]), data(), cross_entropy, config, 0, None)
    ensemble.models = nn.ModuleList([Says(each) for each in PROBABILITIES])
    return outputs(ensemble, Examples(torch.arange(3), torch.tensor([0, 1, 1]))).logits


TINY = 1e-40
PROBABILITIES = [  # model, example, class
    [[0.50, 0.40, 0.10], [0.6, 0.4, TINY], [0.9, 0.1, TINY]],
    [[0.50, 0.30, 0.20], [0.2, 0.7, 0.10], [0.4, 0.6, TINY]],
    [[TINY, 1.00, TINY], [0.1, 0.3, 0.60], [0.4, 0.6, TINY]],
]


def test_mean_probabilities():
    np.testing.assert_allclose(np.exp(answers("mean")), np.mean(PROBABILITIES, 0), atol=1e-12)
    assert answers("mean").argmax(1).tolist() == [1, 1, 0]


def test_votes_count_first_and_mean_probabilities_break_ties():
    assert answers("vote").argmax(1).tolist() == [0, 1, 1]
    votes = [[2, 1, 0], [1, 1, 1], [1, 2, 0]]
    np.testing.assert_allclose(np.exp(answers("vote")), np.array(votes) + np.mean(PROBABILITIES, 0), atol=1e-12)


def test_the_ensemble_is_evaluated_like_a_model_and_learns():
    examples = zoo.classification(120)
    inputs = examples.tensors[0]
    labels = inputs[:, :3].argmax(1)
    config = Sisa(recipe=Recipe(epochs=30, lr=0.1, batch_size=16), shards=3, slices=3, aggregation="vote")
    ensemble = fitted(Examples(inputs, labels), config)
    result = outputs(ensemble, Examples(inputs, labels))
    assert result.logits.shape == (120, 3)
    assert result.correct.mean() > 0.8


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shards": 0}, "shards=0, slices=2: there must be at least 1"),
        ({"slices": 0}, "slices=0: there must be at least 1"),
        ({"slices": 6}, "slices=6 with epochs=3: .* at most 5 slices"),
        ({"aggregation": "median"}, r"aggregation='median': must be one of \('mean', 'vote'\)"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with without_type_checks(), pytest.raises(ConfigError, match=message):
        Sisa(**({"recipe": RECIPE, "shards": 2, "slices": 2} | settings))


def test_data_that_forgets_its_positions_is_refused():
    batches = [data().tensors]
    with pytest.raises(ConfigError, match=r"data is a list: SISA has to know which record is which.*Examples"):
        sisa.fit(network("mlp"), batches, cross_entropy, CONFIG, seed=0)


def test_a_shard_without_records_is_refused_before_anything_happens():
    with pytest.raises(ConfigError, match=r"shard \d+ of 50 has none of the 40 records.*fewer shards"):
        fitted(data(), Sisa(recipe=RECIPE, shards=50, slices=1))
    ensemble = fitted(data())
    before = {name: value.clone() for name, value in ensemble.state_dict().items()}
    all_of_one = torch.cat([place(data(), 1, 0), place(data(), 1, 1)])
    with pytest.raises(ConfigError, match="shard 1 of 2 has none of the 20 records"):
        ensemble.remove(all_of_one)
    with pytest.raises(ConfigError, match="position 40 is not among these 40"):
        ensemble.remove(torch.tensor([40]))
    assert len(ensemble.data) == 40
    assert all(torch.equal(before[name], value) for name, value in ensemble.state_dict().items())


def test_a_shard_of_one_record_is_trained_with_its_statistics_as_they_are():
    ensemble = fitted(data(), kind="batch-norm")
    own = torch.cat([place(data(), 1, 0), place(data(), 1, 1)])
    ensemble.remove(own[1:])
    assert len(ensemble.data) == 21
    assert same_bits(ensemble, fitted(data().without(own[1:]), kind="batch-norm"))


def test_a_state_that_is_not_all_tensors_is_refused():
    class Noted(nn.Linear):
        def get_extra_state(self):
            return {"version": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(UnsupportedModule, match="'_extra_state' of Noted is no tensor"):
        sisa.fit(lambda _: Noted(4, 3), data(), cross_entropy, CONFIG, seed=0)


def test_a_loss_that_is_not_finite_is_reported():
    with pytest.raises(NotFinite, match="sisa: the loss became"):
        fitted(data(), Sisa(recipe=Recipe(epochs=3, lr=1e200), shards=2, slices=2))


def test_global_randomness_is_left_alone():
    state = torch.get_rng_state()
    fitted(data(), kind="dropout").remove(torch.tensor([1]))
    assert torch.equal(state, torch.get_rng_state())
