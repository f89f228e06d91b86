import sys
from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import chisquare, kstest

from expunge import Examples
from expunge.errors import ConfigError, MismatchError, MissingExtra
from expunge.scenarios.backdoors import cross_backdoor, distributed_backdoor, feature_backdoor
from expunge.scenarios.corruption import Corruption, corrected, identified
from expunge.scenarios.covariates import noisy_inputs
from expunge.scenarios.labels import CIFAR10_PAIRS, flipped_labels, randomly_labelled
from expunge.scenarios.sheet import as_png, contact_sheet

quick = settings(deadline=None, derandomize=True, max_examples=15)
SHAPE = (3, 6, 7)


def images(count: int = 40, shape: tuple[int, ...] = SHAPE, seed: int = 0, classes: int = 10) -> Examples:
    """Inputs in [0, 1], labels in turn, and positions with gaps, as after a deletion."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(count, *shape, generator=generator)
    return Examples(inputs, torch.arange(count) % classes, positions=3 * torch.arange(count) + 1)


def of_bytes() -> Examples:
    return Examples(torch.zeros(2, 12, dtype=torch.uint8), torch.tensor([0, 1]))


CORRUPTIONS: dict[str, Callable[[Examples, int], Corruption]] = {
    "cross": lambda data, seed: cross_backdoor(data, (3, 7), value=1.0),
    "distributed": lambda data, seed: distributed_backdoor(data, (3, 7), value=1.0, seed=seed),
    "feature": lambda data, seed: feature_backdoor(data, (3, 7), value=1.0, seed=seed),
    "labels": lambda data, seed: randomly_labelled(data, 10, 0.2, seed),
    "flips": lambda data, seed: flipped_labels(data, CIFAR10_PAIRS, 0.5, seed),
    "noise": lambda data, seed: noisy_inputs(data, 0.2, seed),
}
BACKDOORS = ("cross", "distributed", "feature")


# What all of them keep


@pytest.mark.parametrize("name", CORRUPTIONS)
@quick
@given(seed=st.integers(0, 10_000), count=st.integers(20, 60))
def test_exactly_the_named_records_differ_and_the_dataset_is_untouched(name, seed, count):
    data = images(count, seed=seed)
    before = [tensor.clone() for tensor in data.tensors]
    corruption = CORRUPTIONS[name](data, seed)
    assert all(torch.equal(a, b) for a, b in zip(data.tensors, before, strict=True))
    assert torch.equal(corruption.data.positions, data.positions)
    changed_inputs = (corruption.data.tensors[0] != data.tensors[0]).flatten(1).any(1)
    changed_labels = corruption.data.tensors[1] != data.tensors[1]
    in_labels = name in ("labels", "flips")
    assert not (changed_inputs if in_labels else changed_labels).any()
    assert torch.equal(data.positions[changed_labels if in_labels else changed_inputs], corruption.corrupted)
    assert (corruption.on_test is None) == in_labels


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_same_seed_gives_the_same_digest_and_another_seed_another(name):
    before = torch.get_rng_state()
    first, again, other = (CORRUPTIONS[name](images(), seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.digest == again.digest
    assert (first.digest == other.digest) == (name == "cross")  # a cross has nothing random
    assert CORRUPTIONS[name](images(seed=5), 0).digest != first.digest


def test_the_digest_sees_positions_and_what_is_called_corrupted():
    data = images(20)
    one = cross_backdoor(data, (3,), value=1.0)
    moved = Examples(*one.data.tensors, positions=data.positions + 1)
    digests = {one.digest, Corruption(moved, one.corrupted).digest, Corruption(one.data, one.corrupted[:1]).digest}
    assert len(digests) == 3


# Backdoors


@pytest.mark.parametrize("name", BACKDOORS)
def test_a_backdoor_is_in_every_record_of_its_classes(name):
    data = images()
    corruption = CORRUPTIONS[name](data, 0)
    assert corruption.corrupted.tolist() == data.positions[(data.tensors[1] == 3) | (data.tensors[1] == 7)].tolist()


def test_a_cross_is_on_both_diagonals_of_the_bottom_right_corner():
    data = images(10)
    where = torch.tensor(
        [
            [0, 0, 0, 0, 0, 0, 0],
            [0, 0, 1, 0, 0, 0, 1],
            [0, 0, 0, 1, 0, 1, 0],
            [0, 0, 0, 0, 1, 0, 0],
            [0, 0, 0, 1, 0, 1, 0],
            [0, 0, 1, 0, 0, 0, 1],
        ],
        dtype=torch.bool,
    )
    before, after = data.tensors[0][3], cross_backdoor(data, (3,), value=1.0).data.tensors[0][3]
    assert bool((after[:, where] == 1).all())
    assert torch.equal(after[:, ~where], before[:, ~where])


@quick
@given(seed=st.integers(0, 10_000), pixels=st.integers(1, 42))
def test_a_distributed_backdoor_writes_the_same_pixels_in_all_channels_of_every_image(seed, pixels):
    data = images(20, seed=seed)
    corruption = distributed_backdoor(data, (2, 5), value=7.0, seed=seed, pixels=pixels)
    written = corruption.data.only(corruption.corrupted).tensors[0] == 7
    assert torch.equal(written, written[:1, :1].expand_as(written))
    assert int(written[0, 0].sum()) == pixels


@quick
@given(seed=st.integers(0, 10_000), entries=st.integers(1, 30))
def test_a_feature_backdoor_writes_the_same_entries_of_inputs_of_any_shape(seed, entries):
    data = images(20, (30,), seed)
    corruption = feature_backdoor(data, (2, 5), value=7.0, seed=seed, entries=entries)
    written = corruption.data.only(corruption.corrupted).tensors[0] == 7
    assert torch.equal(written, written[:1].expand_as(written))
    assert int(written[0].sum()) == entries


def test_every_pixel_and_every_entry_is_drawn_equally_often():
    pixels = sum(distributed_backdoor(images(10), (0,), value=7.0, seed=s).on_test.where[0] for s in range(400))
    entries = sum(feature_backdoor(images(10), (0,), value=7.0, seed=s).on_test.where for s in range(400))
    assert (int(pixels.sum()), int(entries.sum())) == (4000, 4000)
    assert chisquare(pixels.flatten()).pvalue > 0.01
    assert chisquare(entries.flatten()).pvalue > 0.01


@pytest.mark.parametrize("name", BACKDOORS)
def test_the_trigger_does_to_test_images_what_was_done_to_training_images(name):
    data, test = images(), images(30, seed=9).tensors[0]
    corruption, kept = CORRUPTIONS[name](data, 4), test.clone()
    triggered = corruption.on_test(test)
    assert torch.equal(test, kept)
    changed = triggered != test
    where = (corruption.data.tensors[0] != data.tensors[0])[3]
    assert torch.equal(changed, where.expand_as(changed))
    planted = corruption.data.only(corruption.corrupted).tensors[0]
    assert torch.equal(corruption.on_test(data.only(corruption.corrupted).tensors[0]), planted)


def test_each_channel_may_have_a_value_of_its_own():
    value = torch.tensor([2.0, 3.0, 4.0])[:, None, None]
    after = cross_backdoor(images(10), (3,), value=value).data.tensors[0][3]
    assert after[:, -1, -1].tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (lambda: cross_backdoor(images(shape=(3, 4, 9)), (0,), value=1.0), "images of 4 x 9: a cross needs 5 x 5"),
        (lambda: cross_backdoor(images(shape=(9,)), (0,), value=1.0), r"shape \(40, 9\): this backdoor needs images"),
        (lambda: cross_backdoor(images(), (), value=1.0), "classes is empty"),
        (lambda: cross_backdoor(images(), (3, 12), value=1.0), "label=12: no record is of this class"),
        (lambda: cross_backdoor(images(), (3,), value=torch.ones(2, 1, 1)), r"value has shape \(2, 1, 1\)"),
        (lambda: distributed_backdoor(images(), (0,), value=1.0, seed=0, pixels=43), "pixels=43: an input has 42"),
        (lambda: feature_backdoor(images(), (0,), value=1.0, seed=0, entries=0), "entries=0: an input has 126"),
        (lambda: feature_backdoor(Examples(torch.rand(4, 3)), [0], value=1.0, seed=0), r"shapes \[\(4, 3\)\]"),
        (lambda: feature_backdoor(of_bytes(), (0,), value=1.0, seed=0), "inputs of torch.uint8: convert them to floa"),
    ],
)  # fmt: skip
def test_backdoors_that_cannot_be_planted_are_refused(plant, message):
    with pytest.raises(ConfigError, match=message):
        plant()


# Labels


@quick
@given(seed=st.integers(0, 10_000), fraction=st.floats(0.1, 1.0))
def test_flipped_labels_go_both_ways_within_their_pairs_and_nowhere_else(seed, fraction):
    data = images(100, seed=seed)
    if round(fraction * 10) == 0:
        return
    corruption = flipped_labels(data, CIFAR10_PAIRS, fraction, seed)
    before, after = data.tensors[1], corruption.data.tensors[1]
    partner = {0: 2, 2: 0, 3: 5, 5: 3, 1: 9, 9: 1}
    changed = before != after
    assert all(partner[int(a)] == int(b) for a, b in zip(before[changed], after[changed], strict=True))
    counts = torch.bincount(before[changed], minlength=10)
    assert counts.tolist() == [round(fraction * 10) if label in partner else 0 for label in range(10)]
    assert torch.bincount(after, minlength=10).tolist() == [10] * 10


def test_with_fraction_1_the_classes_of_a_pair_change_their_names():
    data = images(50)
    after = flipped_labels(data, ((4, 6),), 1.0, 0).data.tensors[1]
    names = torch.tensor([0, 1, 2, 3, 6, 5, 4, 7, 8, 9])
    assert torch.equal(after, names[data.tensors[1]])


@pytest.mark.parametrize(
    ("pairs", "fraction", "message"),
    [
        ((), 0.5, r"pairs=\[\]: give at least one pair"),
        (((1, 1),), 0.5, r"pairs=\[\(1, 1\)\]: .* every class in one place only"),
        (((0, 1), (1, 2)), 0.5, "every class in one place only"),
        (((0, 12),), 0.5, "label=12: no record is of this class"),
        (((0, 1),), 0.01, "fraction=0.01 mislabels 0 of the 4 records of class 0"),
        (((0, 1),), 1.2, "fraction=1.2 mislabels 5 of the 4 records of class 0"),
    ],
)
def test_flips_that_cannot_be_made_are_refused(pairs, fraction, message):
    with pytest.raises(ConfigError, match=message):
        flipped_labels(images(), pairs, fraction, 0)


def test_random_wrong_labels_are_uniform_over_the_wrong_classes():
    data = Examples(torch.zeros(9000, 1), torch.arange(9000) % 4)
    corruption = randomly_labelled(data, 4, 0.5, seed=1)
    faulty = corruption.data.only(corruption.corrupted).tensors[1]
    shifts = (faulty - data.only(corruption.corrupted).tensors[1]) % 4
    counts = torch.bincount(shifts, minlength=4)
    assert counts[0] == 0
    assert chisquare(counts[1:]).pvalue > 0.01
    with pytest.raises(ConfigError, match="classes=1: a wrong label needs at least two classes"):
        randomly_labelled(data, 1, 0.5, seed=1)


# Noise


def test_noise_is_normal_with_a_deviation_of_a_share_of_the_span_of_each_channel():
    data = images(200, seed=3)
    span = torch.tensor([1.0, 2.0, 0.5])[:, None, None]
    corruption = noisy_inputs(data, 0.25, 0, span=span)
    noise = (corruption.data.tensors[0] - data.tensors[0])[torch.isin(data.positions, corruption.corrupted)]
    assert len(noise) == 50
    for channel, deviation in enumerate((0.4, 0.8, 0.2)):
        assert kstest(noise[:, channel].flatten().double() / deviation, "norm").pvalue > 0.01


def test_noise_on_test_images_is_other_noise_and_the_same_every_time():
    data = images(40)
    corruption = noisy_inputs(data, 0.5, 0)
    noisy = corruption.on_test(data.tensors[0])
    assert torch.equal(noisy, corruption.on_test(data.tensors[0]))
    on_test = noisy - data.tensors[0]
    on_training = (corruption.data.tensors[0] - data.tensors[0])[torch.isin(data.positions, corruption.corrupted)]
    assert abs(float(on_test.std()) - 0.4) < 0.02
    correlation = np.corrcoef(on_test[:20].flatten(), on_training.flatten())[0, 1]
    assert abs(correlation) < 0.08  # 4 standard errors of 2,520 pairs


@pytest.mark.parametrize(("sigma", "span"), [(0.0, 1.0), (-1.0, 1.0), (0.4, 0.0), (0.4, float("nan"))])
def test_noise_without_a_positive_deviation_is_refused(sigma, span):
    with pytest.raises(ConfigError, match=f"sigma={sigma} of span={span}: both must be above 0"):
        noisy_inputs(images(), 0.5, 0, span=span, sigma=sigma)


# Partly identified


@quick
@given(seed=st.integers(0, 10_000), small=st.floats(0.1, 1.0), large=st.floats(0.1, 1.0))
def test_what_a_smaller_gamma_identifies_a_larger_one_does_too(seed, small, large):
    corrupted = 5 * torch.arange(30) + 2
    known = {gamma: identified(corrupted, gamma, seed).tolist() for gamma in (small, large)}
    for gamma, positions in known.items():
        assert positions == sorted(set(positions))
        assert len(positions) == round(gamma * 30)
        assert set(positions) <= set(corrupted.tolist())
    assert set(known[min(known)]) <= set(known[max(known)])


def test_gamma_1_identifies_all_and_every_fault_may_be_the_one_known():
    corrupted = torch.tensor([2, 3, 5, 7, 11])
    assert identified(corrupted, 1.0, 0).tolist() == corrupted.tolist()
    assert {int(identified(corrupted, 0.2, seed)) for seed in range(60)} == set(corrupted.tolist())


@pytest.mark.parametrize("gamma", [0.0, 0.01, 1.2, -0.5])
def test_a_gamma_that_identifies_nothing_or_too_much_is_refused(gamma):
    with pytest.raises(ConfigError, match=f"gamma={gamma} identifies .* of 20 corrupted records"):
        identified(torch.arange(20), gamma, 0)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_correcting_known_faults_leaves_the_unknown_ones_and_correcting_all_gives_the_clean_data(name):
    data = images(60)
    corruption = CORRUPTIONS[name](data, 0)
    known = identified(corruption.corrupted, 0.5, 0)
    partly = corrected(corruption, data, known)
    is_known = torch.isin(data.positions, known)
    for now, clean, faulty in zip(partly.tensors, data.tensors, corruption.data.tensors, strict=True):
        assert torch.equal(now[is_known], clean[is_known])
        assert torch.equal(now[~is_known], faulty[~is_known])
    whole = corrected(corruption, data, corruption.corrupted)
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors, data.tensors, strict=True))
    assert torch.equal(whole.positions, data.positions)
    assert len(corruption.data.without(known)) == 60 - len(known)


def test_correcting_with_other_records_is_refused():
    data = images(20)
    corruption = cross_backdoor(data, (3,), value=1.0)
    moved = Examples(*data.tensors)
    for clean in (images(19), moved, Examples(data.tensors[0][:, :1], data.tensors[1], positions=data.positions)):
        with pytest.raises(MismatchError, match="both must be the same records at the same positions"):
            corrected(corruption, clean, corruption.corrupted)
    with pytest.raises(ConfigError, match="position 0 is not among these 20 examples"):
        corrected(corruption, data, torch.tensor([0]))


# Pictures


def test_a_contact_sheet_has_every_image_in_its_place_between_white_lines():
    pictures = images(5, (3, 2, 4)).tensors[0]
    sheet = contact_sheet(pictures, columns=3)
    assert sheet.shape == (2 * 3 + 1, 3 * 5 + 1, 3)
    for number, image in enumerate(pictures):
        top, left = 3 * (number // 3) + 1, 5 * (number % 3) + 1
        expected = np.rint(255 * image.permute(1, 2, 0).numpy())
        assert np.array_equal(sheet[top : top + 2, left : left + 4], expected)
        sheet[top : top + 2, left : left + 4] = 255
    assert (sheet == 255).all()


def test_a_contact_sheet_maps_low_to_black_and_high_to_white_and_clips():
    grey = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0]).reshape(1, 1, 1, 5)
    sheet = contact_sheet(grey, columns=1, low=-1.0, high=torch.ones(1, 1, 1), enlarge=2)
    assert sheet.shape == (6, 14, 3)
    assert sheet[2, 2:12:2, 0].tolist() == sheet[3, 3:13:2, 2].tolist() == [0, 0, 128, 255, 255]


def test_a_contact_sheet_is_the_same_as_a_png():
    sheet = contact_sheet(images(4).tensors[0], columns=2)
    assert np.array_equal(np.asarray(Image.open(BytesIO(as_png(sheet))).convert("RGB")), sheet)


@pytest.mark.parametrize(
    ("shape", "columns", "message"),
    [
        ((0, 3, 2, 2), 1, "at least one"),
        ((1, 2, 2, 2), 1, "1 or 3 channels"),
        ((1, 1, 2, 2), 0, "columns=0, enlarge=1"),
    ],
)
def test_sheets_that_cannot_be_drawn_are_refused(shape, columns, message):
    with pytest.raises(ConfigError, match=message):
        contact_sheet(torch.zeros(shape), columns=columns)


def test_without_matplotlib_the_cure_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"pip install 'expunge\[report\]'"):
        as_png(contact_sheet(torch.zeros(1, 1, 2, 2), columns=1))
