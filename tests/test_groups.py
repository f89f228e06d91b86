"""A cache with the gradient of each group: what a deletion costs, and that it changes nothing else."""

import copy
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from expunge import params
from expunge.access import Blind
from expunge.batches import Examples
from expunge.errors import ConfigError, MismatchError
from expunge.gradient import gradient
from expunge.losses import cross_entropy
from expunge.methods.reload import Reload
from expunge.second_pass import second_pass
from expunge.training import Recipe
from expunge.unlearn import unlearn
from tests.zoo import classification, flat, network, summed_by_autograd, tensors

COUNT, SIZE, GROUPS = 90, 4, 5  # 23 micro-batches: groups of 4 or 5 of them
MODEL, DATA = network("batch-norm"), classification(COUNT)
FULL = gradient(MODEL, cross_entropy, DATA, micro_batch=SIZE, groups=GROUPS)


def counting(model):
    """A loss that counts the examples that went forward with a gradient."""
    seen = []

    def loss_terms(model, batch):
        if torch.is_grad_enabled():
            seen.append(len(batch[0]))
        return cross_entropy(model, batch)

    loss_terms.__qualname__ = "cross_entropy"
    return loss_terms, seen


def test_groups_are_ranges_of_micro_batches_and_add_up_to_the_whole():
    assert FULL.groups.starts.tolist() == [0, 4, 9, 13, 18]
    assert FULL.groups.examples.tolist() == [16, 20, 16, 20, 18]
    plain = gradient(MODEL, cross_entropy, DATA, micro_batch=SIZE)
    assert torch.allclose(flat(FULL.total), flat(plain.total), rtol=1e-13, atol=1e-15)
    assert torch.allclose(flat(FULL.noise), flat(plain.noise), rtol=1e-5)
    assert FULL.micro_batches.touched_by(plain.micro_batches) == (0, 0)
    assert (FULL.count, FULL.loss) == (plain.count, plain.loss)
    for group, start in enumerate(FULL.groups.starts.tolist()):
        stop = [*FULL.groups.starts.tolist(), 23][group + 1]
        mine = tuple(tensor[start * SIZE : stop * SIZE] for tensor in DATA.tensors)
        expected = summed_by_autograd(copy.deepcopy(MODEL), list(FULL.total), mine)
        assert torch.allclose(flat(FULL.groups.totals[group]), flat(expected), rtol=1e-11, atol=1e-13)


@given(st.sets(st.integers(0, COUNT - 1), min_size=1, max_size=COUNT - 1), st.sampled_from([None, 2, 3]))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_a_deletion_equals_the_full_second_pass_and_computes_touched_groups_only(removed, corrected):
    rows = torch.tensor(sorted(removed))
    left = DATA.without(rows)
    touched = set((torch.searchsorted(FULL.groups.starts, rows // SIZE, right=True) - 1).tolist())
    if corrected is not None and len(left.positions[left.positions // SIZE == FULL.groups.starts[corrected]]):
        labels = left.tensors[1].clone()
        at = int((left.positions // SIZE == FULL.groups.starts[corrected]).nonzero()[0])
        labels[at] = (labels[at] + 1) % 3
        left = Examples(left.tensors[0], labels, positions=left.positions)
        touched.add(corrected)
    loss_terms, seen = counting(MODEL)
    mine, computed, looked_at, again, compared = second_pass(FULL, MODEL, loss_terms, left)
    assert again == len(touched)
    groups = torch.searchsorted(FULL.groups.starts, left.positions // SIZE, right=True) - 1
    untouched = [number for number in FULL.micro_batches.numbers.tolist() if FULL.groups.of(number) not in touched]
    asked = int((left.positions // SIZE == untouched[0]).sum()) if untouched else 0  # to see that the loss is the same
    assert computed == sum(seen) == sum(int((groups == group).sum()) for group in touched)
    assert looked_at == asked
    assert compared >= bool(untouched)
    plain = gradient(MODEL, cross_entropy, left, micro_batch=SIZE)
    assert torch.allclose(flat(mine.total), flat(plain.total), rtol=1e-12, atol=1e-14)
    assert (mine.count, mine.loss) == (plain.count, pytest.approx(plain.loss, rel=1e-13))
    for a, b in zip(vars(mine.micro_batches).values(), vars(plain.micro_batches).values(), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    assert bool((flat(mine.noise) >= flat(plain.noise) * (1 - 1e-6)).all())
    difference, expected = FULL - mine, FULL - plain
    assert difference.groups is None
    assert torch.allclose(flat(difference.total), flat(expected.total), rtol=1e-9, atol=1e-13)
    assert torch.allclose(flat(difference.noise), flat(expected.noise), rtol=1e-6)


def test_nothing_removed_computes_nothing_but_a_loss_and_differs_by_nothing():
    loss_terms, seen = counting(MODEL)
    again, computed, looked_at, groups, compared = second_pass(FULL, MODEL, loss_terms, DATA)
    assert (computed, seen, looked_at, groups, compared) == (0, [], SIZE, 0, 1)
    assert torch.equal(flat(FULL.total), flat(again.total))
    assert params.norm((FULL - again).total) == 0


def test_untouched_groups_cancel_whatever_computed_them():
    moved = copy.deepcopy(FULL.groups.totals)
    for group in (0, 1, 3, 4):
        for tensor in moved[group].values():
            tensor.fill_(torch.nan)  # never looked at
    full = FULL.__class__(**{**vars(FULL), "groups": type(FULL.groups)(**{**vars(FULL.groups), "totals": moved})})
    inside = torch.tensor([int(FULL.groups.starts[2]) * SIZE])
    difference = full - second_pass(full, MODEL, cross_entropy, DATA.without(inside))[0]
    expected = summed_by_autograd(copy.deepcopy(MODEL), list(FULL.total), tuple(t[inside] for t in DATA.tensors))
    assert torch.allclose(flat(difference.total), flat(expected), rtol=1e-10, atol=1e-13)


def test_an_untouched_group_whose_loss_is_another_is_refused():
    def smoothed(model, batch):
        return functional.cross_entropy(model(batch[0]), batch[1], reduction="none", label_smoothing=0.1)

    smoothed.__qualname__ = "cross_entropy"  # the name is all that the cache has of it
    with pytest.raises(MismatchError, match=r"micro-batch 4 reads as it did .* loss is .*, where it was .* another"):
        second_pass(FULL, MODEL, smoothed, DATA.without(torch.tensor([0])))


class Pairs(Dataset):
    """Records as dictionaries, with a note; counts what is read."""

    def __init__(self, notes=None):
        self.notes, self.read = notes or [""] * COUNT, []

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        self.read.append(index)
        return {"x": DATA.tensors[0][index], "y": DATA.tensors[1][index], "note": self.notes[index]}


def on_pairs(model, batch):
    return cross_entropy(model, (batch["x"], batch["y"]))


def test_groups_with_a_record_missing_are_not_read_for_their_hash_and_texts_count_as_content():
    pairs = Pairs()
    full = gradient(MODEL, on_pairs, DataLoader(pairs, batch_size=7), micro_batch=SIZE, groups=GROUPS)
    assert torch.equal(flat(full.total), flat(FULL.total))
    assert second_pass(full, MODEL, on_pairs, pairs)[1] == 0
    pairs.read.clear()
    left = Subset(pairs, [index for index in range(COUNT) if index != 3])
    assert second_pass(full, MODEL, on_pairs, left)[1] == 15
    assert (pairs.read.count(50), pairs.read.count(15)) == (1, 3)  # for its hash; for the pass, and twice by the probe
    noted = Pairs(["", "changed", *[""] * (COUNT - 2)])
    assert second_pass(full, MODEL, on_pairs, noted)[1] == 16


def test_reload_takes_groups_by_itself_and_counts_what_it_computed():
    model = network("mlp").float()
    data = classification(COUNT, dtype=torch.float32)
    left = data.without(torch.tensor([20, 21]))
    results = []
    for groups in (None, GROUPS):
        full = gradient(model, cross_entropy, data, micro_batch=SIZE, groups=groups)
        given_ = Blind(retain=left, loss_terms=cross_entropy, fresh=lambda seed: network("mlp", 9).float(), full=full)
        results.append(unlearn(model, given_, Reload(reset_fraction=0.2, fine_tune=Recipe(epochs=0, lr=1))))
    plain, grouped = results
    assert (plain.trace.backwarded, grouped.trace.backwarded) == (88, 18)
    for name, value in plain.model.state_dict().items():
        assert torch.allclose(value, grouped.model.state_dict()[name], rtol=1e-5, atol=1e-7)
    assert grouped.trace.reset == plain.trace.reset


def test_positions_that_were_not_in_the_cached_data_are_refused():
    more = Examples(*(torch.cat([t, t[:1]]) for t in DATA.tensors), positions=torch.tensor([*range(COUNT), 400]))
    for data in (more, more.without(torch.tensor([0, 1]))):
        with pytest.raises(MismatchError, match="positions 400 to 403, where the cached data had none"):
            second_pass(FULL, MODEL, cross_entropy, data)


def test_other_weights_are_refused():
    with pytest.raises(MismatchError, match="the cached gradient was taken at weights"):
        second_pass(FULL, network("batch-norm", 1), cross_entropy, DATA)


def test_data_without_positions_is_computed_as_a_whole():
    again, computed, looked_at, groups, compared = second_pass(FULL, MODEL, cross_entropy, [DATA.tensors])
    assert (computed, looked_at, groups, compared) == (COUNT, 0, GROUPS, 0)
    assert again.micro_batches is None


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "groups=0: the number of groups is at least 1"),
        (-1, "groups=-1: the number of groups is at least 1"),
        (24, "groups=24: there are 23 micro-batches of 4 positions.*Take fewer"),
    ],
)
def test_numbers_of_groups_that_cannot_be_are_refused_before_anything_is_computed(count, said):
    def never(*_):
        raise AssertionError

    with pytest.raises(ConfigError, match=said):
        gradient(MODEL, never, DATA, micro_batch=SIZE, groups=count)


def test_data_without_positions_has_no_groups():
    with pytest.raises(ConfigError, match=r"groups=2: data without positions has no groups. Give Examples"):
        gradient(MODEL, cross_entropy, [tensors(8)], groups=2)


def test_a_group_may_be_empty_from_the_start():
    gap = DATA.without(torch.arange(16, 36))
    full = gradient(MODEL, cross_entropy, gap, micro_batch=SIZE, groups=GROUPS)
    assert full.groups.examples.tolist() == [16, 0, 16, 20, 18]
    assert params.norm(full.groups.totals[1]) == 0
    assert second_pass(full, MODEL, cross_entropy, gap)[1:] == (0, SIZE, 0, 1)


def test_groups_that_could_not_cancel_are_not_kept_and_that_is_said(monkeypatch):
    module = sys.modules["expunge.gradient"]  # `expunge.gradient` is the function
    sweep = module.sweep
    monkeypatch.setattr(module, "sweep", lambda *args, **named: replace(sweep(*args, **named), repeats=False))
    with pytest.warns(UserWarning, match="groups=5: a second backward pass gave other bits on this device"):
        full = gradient(MODEL, cross_entropy, DATA, micro_batch=SIZE, groups=GROUPS)
    assert full.groups is None
    assert full.micro_batches is None


class Opaque:
    """A batch that prints its shapes only, as those of graph libraries do."""

    def __init__(self, inputs, labels):
        self.inputs, self.labels = inputs, labels

    def __repr__(self):
        return f"Opaque({list(self.inputs.shape)})"


def corrected(kind):
    """A gradient with groups over batches of some kind, the same loss, and the data with some labels corrected."""
    inputs, labels = DATA.tensors
    other = labels.clone()
    other[:3] = (other[:3] + 1) % 3

    def loader(labels):
        return DataLoader(
            TensorDataset(inputs, labels),
            collate_fn=lambda items: kind(*map(torch.stack, zip(*items, strict=True))),
        )

    return loader(labels), loader(other)


def test_arrays_of_numpy_are_compared_entry_by_entry():
    # NumPy prints only the first and last rows of an array as large as that of the labels.
    before, after = corrected(
        lambda inputs, labels: (inputs.numpy(), functional.pad(labels[None], (0, 0, 999, 999)).numpy())
    )

    def loss_terms(model, batch):
        return cross_entropy(model, (torch.from_numpy(batch[0]), torch.from_numpy(batch[1][999])))

    full = gradient(MODEL, loss_terms, before, micro_batch=SIZE, groups=GROUPS)
    assert full.groups.touched(before, SIZE) == set()
    assert full.groups.touched(after, SIZE) == {0}


def test_batches_that_cannot_be_compared_are_refused():
    before, _ = corrected(Opaque)

    def loss_terms(model, batch):
        return cross_entropy(model, (batch.inputs, batch.labels))

    with pytest.raises(ConfigError, match="a batch holds a Opaque"):
        gradient(MODEL, loss_terms, before, micro_batch=SIZE, groups=GROUPS)
