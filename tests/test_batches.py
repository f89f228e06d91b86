from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from expunge.batches import (
    Examples,
    Indexed,
    indexed,
    map_tensors,
    micro_batches,
    require_reiterable,
    shuffled,
    tensors_of,
    to_device,
)
from expunge.errors import ConfigError, MismatchError
from tests.contract import without_type_checks
from tests.zoo import in_form, tensors

positions_sets = st.sets(st.integers(0, 60), min_size=1, max_size=40).map(sorted).map(torch.tensor)


def numbered(positions) -> Examples:
    """Examples whose only feature is their position."""
    positions = torch.as_tensor(positions)
    return Examples(positions.float(), positions=positions)


class Stream(IterableDataset):
    def __len__(self) -> int:
        return 20

    def __iter__(self):
        yield from (tensors(5, seed) for seed in range(4))


@given(positions=positions_sets, size=st.integers(1, 70))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_example_is_in_the_micro_batch_of_its_position(positions, size):
    count, batches = micro_batches(numbered(positions), size)
    seen = [(number, batch[0]) for number, batch in batches]
    assert count == len(seen)
    assert torch.equal(torch.cat([rows for _, rows in seen]).long(), positions)
    assert [number for number, _ in seen] == sorted({int(position) // size for position in positions})
    assert all((rows.long() // size == number).all() for number, rows in seen)


@given(positions=positions_sets, size=st.integers(2, 70), seed=st.integers(0, 3))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_shuffled_epoch_has_every_example_once_and_no_batch_of_one(positions, size, seed):
    count, batches = shuffled(numbered(positions), size, torch.Generator().manual_seed(seed))
    seen = [batch[0].long() for batch in batches]
    assert count == len(seen)
    assert torch.equal(torch.cat(seen).sort().values, positions)
    assert len(seen) == 1 or min(map(len, seen)) > 1
    assert all(len(rows) == size for rows in seen[:-1])


def test_the_order_of_an_epoch_comes_from_the_generator():
    def order(seed):
        return torch.cat([b[0] for b in shuffled(numbered(range(50)), 8, torch.Generator().manual_seed(seed))[1]])

    assert torch.equal(order(1), order(1))
    assert not torch.equal(order(1), order(2))


def test_data_without_positions_keeps_its_own_batches_in_order():
    batches = [torch.zeros(3), torch.ones(1)]
    count, stream = shuffled(batches, 2, torch.Generator())
    assert (count, list(stream)) == (2, batches)
    count, numbered_ = micro_batches(batches, 1)
    assert (count, list(numbered_)) == (2, [(0, batches[0]), (1, batches[1])])
    assert micro_batches(DataLoader(Stream(), batch_size=None), 1)[0] is not None
    assert micro_batches(type("Endless", (), {"__iter__": lambda self: iter(batches)})(), 1)[0] is None


def test_positions_stay_with_their_records():
    data = Examples(torch.arange(10.0), torch.arange(10) * 2)
    left = data.without(torch.tensor([7, 0, 3]))
    assert left.positions.tolist() == [1, 2, 4, 5, 6, 8, 9]
    assert left.tensors[1].tolist() == [2, 4, 8, 10, 12, 16, 18]
    again = left.without(torch.tensor([4]))
    assert again.positions.tolist() == [1, 2, 5, 6, 8, 9]
    assert again.only(torch.tensor([9, 5])).tensors[0].tolist() == [5.0, 9.0]
    assert (len(data), len(again)) == (10, 6)
    assert torch.equal(again.to("cpu").positions, again.positions)
    assert len(data.without(torch.tensor([]))) == 10


@pytest.mark.parametrize("method", ["only", "without"])
@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (torch.tensor([2, 10, 11]), r"position 10 is not among these 10 examples \(2 such\)"),
        (torch.tensor([-1]), "position -1 is not among"),
        (torch.arange(10) < 3, r"whole numbers, not torch.bool.*mask.nonzero\(\)"),
        (torch.tensor([1.7]), "whole numbers, not torch.float32"),
    ],
)
def test_records_that_do_not_exist_cannot_be_deleted(method, positions, message):
    with pytest.raises(ConfigError, match=message):
        getattr(Examples(torch.zeros(10)), method)(positions)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (torch.tensor([0, 2, 1]), "ascending order without repetition"),
        (torch.tensor([0, 1, 1]), "ascending"),
        (torch.tensor([-1, 0, 1]), "positions start at -1: they count from 0"),
        (torch.tensor([0.0, 1.0, 2.0]), r"whole numbers.*torch.float32, shape \(3,\), starting \[0.0, 1.0, 2.0\]"),
        (torch.tensor([3, 2, 1], dtype=torch.uint8), "ascending"),
        (torch.tensor([False, True, True]), "whole numbers.*torch.bool"),
        (torch.tensor([[0], [1], [2]]), r"whole numbers.*shape \(3, 1\)"),
    ],
)
def test_positions_that_do_not_ascend_are_refused(positions, message):
    with pytest.raises(ConfigError, match=message):
        Examples(torch.zeros(3), positions=positions)


def test_examples_need_a_row_each_in_every_tensor():
    with pytest.raises(MismatchError, match=r"have \[3, 4, 3\] rows; every example needs one row in each"):
        Examples(torch.zeros(3), torch.zeros(4))
    with pytest.raises(MismatchError, match=r"have \[3, 2\] rows"):
        Examples(torch.zeros(3), positions=torch.arange(2))
    for nothing in ((), (torch.tensor(1.0),)):
        with pytest.raises(ConfigError, match=r"at least one tensor.*\(x, y\)"):
            Examples(*nothing)


def test_a_slice_of_rows_is_a_view_and_scattered_rows_a_copy():
    data = Examples(torch.arange(12.0).reshape(6, 2))
    view, copy = (batch[0] for batch in data.fetch([slice(1, 4), torch.tensor([4, 1, 3, 2])]))
    assert view.data_ptr() == data.tensors[0][1].data_ptr()
    assert view.tolist() == [[2, 3], [4, 5], [6, 7]]
    assert copy[:, 0].tolist() == [8, 2, 6, 4]


@pytest.mark.parametrize("form", ["examples", "dataset", "loader"])
def test_positions_are_those_in_the_whole_dataset(form):
    data, kept = tensors(20), torch.tensor([3, 4, 9, 17])
    known = indexed(in_form(form, data, kept, 2))
    assert isinstance(known, Indexed)
    assert torch.equal(known.positions, kept)
    (inputs, labels), second = known.fetch([slice(3), torch.tensor([3])])
    assert torch.equal(inputs, data[0][kept[:3]])
    assert torch.equal(labels, data[1][kept[:3]])
    assert torch.equal(second[0], data[0][kept[3:]])


def test_a_subset_of_a_subset_keeps_the_positions_of_the_whole():
    whole = TensorDataset(torch.arange(20))
    train = Subset(whole, [19, 3, 8, 11, 0])
    assert indexed(train).positions.tolist() == [0, 3, 8, 11, 19]
    left = indexed(Subset(train, torch.tensor([0, 2, 3])))
    assert left.positions.tolist() == [8, 11, 19]
    assert next(left.fetch([torch.arange(3)]))[0].tolist() == [8, 11, 19]


def test_a_subset_that_repeats_a_record_is_refused():
    with pytest.raises(ConfigError, match="without repetition"):
        indexed(Subset(TensorDataset(torch.arange(5)), [1, 1]))


def test_a_loader_is_read_with_its_own_collate_function():
    loader = DataLoader(TensorDataset(torch.arange(6)), batch_size=4, collate_fn=lambda rows: {"rows": len(rows)})
    assert list(indexed(loader).fetch([torch.arange(3), torch.arange(2)])) == [{"rows": 3}, {"rows": 2}]


def test_a_loader_that_leaves_out_examples_is_refused():
    with pytest.raises(ConfigError, match=r"drop_last=True\) leaves out examples.*use drop_last=False"):
        indexed(DataLoader(TensorDataset(torch.arange(6)), batch_size=4, drop_last=True))


@pytest.mark.parametrize(
    "loader",
    [
        lambda data: DataLoader(data, sampler=WeightedRandomSampler([1.0] * 6, 6)),
        lambda data: DataLoader(data, sampler=RandomSampler(data, num_samples=3)),
        lambda data: DataLoader(data, sampler=RandomSampler(data, replacement=True)),
        lambda data: DataLoader(data, batch_sampler=[[0, 1], [2, 3], [4, 5]]),
        lambda data: DataLoader(data, batch_size=None),
        lambda data: Stream(),
        lambda data: DataLoader(Stream(), batch_size=None),
        lambda data: [data[:3], data[3:]],
    ],
)
def test_data_that_draws_its_own_samples_has_no_positions(loader):
    assert indexed(loader(TensorDataset(torch.arange(6)))) is None


def test_a_loader_with_a_plain_batch_sampler_has_positions():
    data = TensorDataset(torch.arange(6))
    loader = DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 4, drop_last=False))
    assert indexed(loader).positions.tolist() == list(range(6))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: (batch for batch in [1]), "retain is a generator that can be read only once.*Give Examples"),
        (lambda: iter([torch.zeros(2)]), "list_iterator that can be read only once"),
        (list, "retain is empty: there is nothing left"),
        (lambda: Examples(torch.zeros(0)), "retain is empty"),
        (lambda: TensorDataset(torch.zeros(0)), "retain is empty"),
        (lambda: DataLoader(TensorDataset(torch.zeros(0))), "retain is empty"),
    ],
)
def test_data_that_cannot_be_read_again_and_again_is_refused(data, message):
    with pytest.raises(ConfigError, match=message):
        require_reiterable(data(), "retain")


def test_data_that_can_be_read_again_is_accepted():
    for data in (Examples(torch.zeros(1)), [torch.zeros(1)], Stream(), DataLoader(TensorDataset(torch.zeros(3)))):
        require_reiterable(data, "retain")


def test_tensors_are_found_and_changed_inside_any_structure():
    pair = namedtuple("pair", "x y")
    batch = {"a": torch.tensor(1), "b": [torch.tensor(2), (torch.tensor(3), "text")], "c": pair(torch.tensor(4), None)}
    assert [int(tensor) for tensor in tensors_of(batch)] == [1, 2, 3, 4]
    doubled = map_tensors(batch, lambda tensor: tensor * 2)
    assert [int(tensor) for tensor in tensors_of(doubled)] == [2, 4, 6, 8]
    assert doubled["b"][1][1] == "text"
    assert isinstance(doubled["b"][1], tuple)
    assert isinstance(doubled["c"], pair)
    assert tensors_of(to_device(batch, torch.device("meta")))[0].device.type == "meta"
    assert int(batch["a"]) == 1


@pytest.mark.parametrize("parts", [([1, 2], [3, 4]), (torch.zeros(2), [0, 1]), ()])
def test_what_is_no_tensor_is_refused_with_the_cure(parts):
    with without_type_checks(), pytest.raises(ConfigError, match=r"needs at least one tensor .* torch.as_tensor"):
        Examples(*parts)


def test_rows_go_to_the_device_of_the_tensors_in_one_copy(monkeypatch):
    """With the device that holds no numbers in the place of a GPU."""
    copies = []
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *where: copies.append(where) or to(self, *where))
    data = Examples(torch.zeros(6, 2, device="meta"), torch.arange(6))
    copies.clear()
    batches = list(data.fetch([torch.tensor([5, 0]), slice(1, 4), torch.tensor([3])]))
    assert [(a.device.type, tuple(a.shape), b.tolist()) for a, b in batches] == [
        ("meta", (2, 2), [5, 0]), ("meta", (3, 2), [1, 2, 3]), ("meta", (1, 2), [3])
    ]  # fmt: skip
    assert len(copies) == 1
