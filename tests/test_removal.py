import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from expunge.errors import ConfigError, NotFinite
from expunge.scenarios.removal import class_removal, in_class_removal, neighbour_removal, random_removal

quick = settings(deadline=None, derandomize=True, max_examples=30)


def some_labels(seed: int, count: int = 60, classes: int = 4) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).permutation(np.arange(count) % classes))


@quick
@given(count=st.integers(3, 200), fraction=st.floats(0.05, 0.9), seed=st.integers(0, 1000))
def test_a_random_removal_has_its_size_and_distinct_positions(count, fraction, seed):
    expected = round(fraction * count)
    if not 0 < expected < count:
        return
    removed = random_removal(count, fraction, seed).tolist()
    assert removed == sorted(set(removed))
    assert len(removed) == expected
    assert set(removed) <= set(range(count))
    assert removed == random_removal(count, fraction, seed).tolist()


@quick
@given(seed=st.integers(0, 1000), label=st.integers(0, 3), count=st.integers(1, 14))
def test_an_in_class_removal_takes_that_many_records_of_the_class_and_no_other(seed, label, count):
    labels = some_labels(seed)
    removed = in_class_removal(labels, label, count=count, seed=seed)
    assert len(set(removed.tolist())) == count
    assert removed.tolist() == sorted(removed.tolist())
    assert set(labels[removed].tolist()) == {label}
    assert torch.equal(removed, in_class_removal(labels, label, count=count, seed=seed))


def test_a_fraction_is_one_of_the_class():
    labels = torch.tensor([0] * 30 + [1] * 70)
    assert len(in_class_removal(labels, 0, fraction=0.2, seed=0)) == 6
    assert len(in_class_removal(labels, 1, fraction=0.2, seed=0)) == 14


def test_every_record_of_the_class_may_be_the_one_removed():
    labels = some_labels(0, 20, 4)
    drawn = {int(in_class_removal(labels, 2, count=1, seed=seed)) for seed in range(100)}
    assert drawn == set((labels == 2).nonzero()[:, 0].tolist())


@pytest.mark.parametrize(("count", "fraction"), [(None, None), (3, 0.1)])
def test_one_size_is_needed(count, fraction):
    with pytest.raises(ConfigError, match=f"count={count}, fraction={fraction}: give one of them"):
        in_class_removal(some_labels(0), 1, count=count, fraction=fraction, seed=0)


@pytest.mark.parametrize("sizes", [{"count": 0}, {"count": 15}, {"fraction": 0.01}, {"fraction": 1.0}, {"count": -2}])
def test_a_removal_that_leaves_or_takes_none_of_the_class_is_refused(sizes):
    with pytest.raises(ConfigError, match=r"of the 15 records of class 1: it must .* use class_removal"):
        in_class_removal(some_labels(0), 1, seed=0, **sizes)


def test_a_class_that_does_not_occur_is_refused_and_those_that_do_are_named():
    for refused in (
        lambda: class_removal(some_labels(0), 7),
        lambda: in_class_removal(some_labels(0), 7, count=1, seed=0),
    ):
        with pytest.raises(ConfigError, match=r"label=7: no record is of this class\. Classes here: 0, 1, 2, 3"):
            refused()
    with pytest.raises(ConfigError, match=r"Classes here: 0, 1, 2, .*11 …\."):
        class_removal(torch.arange(100), 100)


def test_a_class_removal_takes_the_whole_class():
    assert class_removal(torch.tensor([3, 1, 3, 2, 1]), 3).tolist() == [0, 2]
    with pytest.raises(ConfigError, match="all 4 records are of class 1: removing it leaves nothing"):
        class_removal(torch.ones(4, dtype=torch.int64), 1)


@quick
@given(seed=st.integers(0, 1000), fraction=st.floats(0.03, 0.9))
def test_a_neighbourhood_is_that_of_scikit_learn(seed, fraction):
    inputs = np.random.default_rng(seed).normal(size=(40, 2, 3)).astype(np.float32)
    removed = set(neighbour_removal(torch.from_numpy(inputs), fraction, seed).tolist())
    flat = inputs.reshape(40, -1).astype(np.float64)
    _, neighbourhoods = NearestNeighbors(n_neighbors=round(fraction * 40)).fit(flat).kneighbors(flat)
    middles = [m for m in range(40) if set(neighbourhoods[m].tolist()) == removed]
    assert middles, "no record has this neighbourhood"


def test_any_record_may_be_in_the_middle_and_alone_is_removed_itself():
    inputs = torch.arange(10.0)[:, None]
    assert {int(neighbour_removal(inputs, 0.1, seed)) for seed in range(80)} == set(range(10))


def test_distances_of_bytes_do_not_wrap_around():
    inputs = torch.tensor([[0], [250], [5], [255]], dtype=torch.uint8)
    pairs = {tuple(neighbour_removal(inputs, 0.5, seed).tolist()) for seed in range(20)}
    assert pairs == {(0, 2), (1, 3)}


def test_of_copies_the_record_itself_then_the_first_is_nearest():
    inputs = torch.zeros(6, 2)
    drawn = {tuple(neighbour_removal(inputs, 2 / 6, seed).tolist()) for seed in range(60)}
    assert drawn == {(0, 1), (0, 2), (0, 3), (0, 4), (0, 5)}


def test_distances_in_pieces_are_those_in_one(monkeypatch):
    inputs = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    whole = [neighbour_removal(inputs, 0.2, seed) for seed in range(5)]
    monkeypatch.setattr("expunge.scenarios.removal._PIECE", 20)
    assert all(torch.equal(neighbour_removal(inputs, 0.2, seed), whole[seed]) for seed in range(5))


@pytest.mark.parametrize("fraction", [0.0, 0.01, 1.0])
def test_a_neighbourhood_of_nothing_or_everything_is_refused(fraction):
    with pytest.raises(ConfigError, match=f"fraction={fraction} of 20 records removes"):
        neighbour_removal(torch.zeros(20, 1), fraction, seed=0)


@pytest.mark.parametrize("seed", range(8))
def test_the_record_without_a_finite_distance_is_named(seed):
    inputs = torch.zeros(3, 2)
    inputs[1, 0] = torch.nan
    with pytest.raises(NotFinite, match="record 1 has an input that is NaN or infinite"):
        neighbour_removal(inputs, 0.4, seed)
