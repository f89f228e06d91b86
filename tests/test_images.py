"""Images in memory: what they may be, their normalisation, and the examples that a model trains on."""

import numpy as np
import pytest
import torch

from expunge.data.images import ImageData, Images, Normalisation, from_arrays, normalisation, to_examples
from expunge.errors import ConfigError, MismatchError
from tests.tiny_images import some


def test_tensors_of_ones_own_are_images_too():
    images = from_arrays(torch.from_numpy(some(2, (4, 5))), torch.tensor([1, 0], dtype=torch.int32))
    assert (images.pixels.shape, images.labels.dtype, len(images)) == ((2, 1, 4, 5), torch.int64, 2)
    for pixels, labels, message in (
        (torch.rand(2, 4, 4), [0, 1], r"pixels float32 \(2, 4, 4\): give uint8"),
        (some(2, (4,)), [0, 1], r"pixels uint8 \(2, 4\)"),
        (some(2), [0.0, 1.0], r"labels float64 \(2,\): give one whole number an image"),
        (some(2), [[0, 1], [1, 0]], r"labels int64 \(2, 2\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_arrays(torch.as_tensor(pixels), torch.as_tensor(np.array(labels)))
    with pytest.raises(MismatchError, match="2 images and 3 labels"):
        from_arrays(some(2), np.arange(3))


def test_a_dataset_whose_parts_do_not_fit_is_refused():
    good = from_arrays(some(2), np.array([0, 1]))
    with pytest.raises(MismatchError, match="training labels of x go from 0 to 1, and there are 1 classes"):
        ImageData("x", ("a",), good)
    with pytest.raises(MismatchError, match=r"training images of \(3, 32, 32\) and test images of \(3, 4, 4\)"):
        ImageData("x", ("a", "b"), good, from_arrays(some(1, (3, 4, 4)), np.array([0])))
    with pytest.raises(ConfigError, match=r"pixels float32 \(2, 3, 4, 4\), labels int64 \(2,\): pixels are uint8"):
        Images(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64))


def test_normalisation_is_mean_and_deviation_of_each_channel_over_all_pixels():
    pixels = some(7, (3, 5, 6), seed=2)
    found = normalisation(from_arrays(pixels, np.zeros(7, np.int64)))
    shares = pixels / 255
    np.testing.assert_allclose(found.mean, shares.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(found.deviation, shares.std((0, 2, 3)), rtol=1e-12)
    with pytest.raises(ConfigError, match="channel 0 of 2 images has the same value everywhere"):
        normalisation(from_arrays(np.full((2, 3, 3), 7, np.uint8), np.zeros(2, np.int64)))


def test_examples_are_float32_in_the_unit_range_or_normalised_with_positions_from_0():
    pixels = some(7, (3, 5, 6), seed=2)
    images = from_arrays(pixels, np.arange(7))
    plain = to_examples(images)
    assert plain.tensors[0].dtype == torch.float32
    np.testing.assert_allclose(plain.tensors[0], pixels / 255, rtol=1e-6)
    assert plain.tensors[1].tolist() == plain.positions.tolist() == list(range(7))
    scale = Normalisation((0.5, 0.25, 0.0), (0.5, 2.0, 1.0))
    scaled = to_examples(images, scale).tensors[0]
    expected = (pixels / 255 - np.array([0.5, 0.25, 0])[:, None, None]) / np.array([0.5, 2, 1])[:, None, None]
    np.testing.assert_allclose(scaled, expected, atol=1e-6)
    assert torch.equal(images.pixels, torch.from_numpy(pixels))
    assert scale.black.flatten().tolist() == [-1.0, -0.125, 0.0]
    assert scale.white.flatten().tolist() == [1.0, 0.375, 1.0]
    with pytest.raises(MismatchError, match="the normalisation has 3 channels and the images 1"):
        to_examples(from_arrays(pixels[:, 0], np.arange(7)), scale)
