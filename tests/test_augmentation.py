import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from expunge import Examples, Recipe, cross_entropy, gradient, train
from expunge.augmentation import augmentation
from expunge.errors import ConfigError
from expunge.metrics.outputs import outputs
from expunge.models.convnet import ConvNet
from expunge.seeds import stream
from expunge.training import mean_loss
from tests.contract import same, state

CPU = torch.device("cpu")


def pictures(count: int = 40, channels: int = 3, height: int = 8, width: int = 6) -> Tensor:
    return torch.randint(1, 256, (count, channels, height, width), dtype=torch.uint8, generator=stream(0, "pictures"))


def of(crop: int = 0, flip: bool = False, cutout: int = 0, seed: int = 3, epoch: int = 2) -> Callable[[object], object]:
    found = augmentation(crop=crop, flip=flip, cutout=cutout, seed=seed, epoch=epoch, device=CPU)
    assert found is not None
    return found


def one_by_one(images: Tensor, crop: int, flip: bool, cutout: int, seed: int = 3, epoch: int = 2) -> Tensor:
    """Pixel by pixel, with the draws of the named streams."""
    count, _, height, width = images.shape
    crops, flips, cuts = (stream(seed, name, epoch) for name in ("crop", "flip", "cutout"))
    down, right = (torch.randint(2 * crop + 1, (count,), generator=crops) for _ in range(2))
    mirrored = torch.randint(2, (count,), generator=flips)
    row, column = (torch.randint(size, (count,), generator=cuts) for size in (height, width))
    result = torch.zeros_like(images)
    for n in range(count):
        for y in range(height):
            for x in range(width):
                from_y = y + int(down[n]) - crop
                from_x = (width - 1 - x if flip and mirrored[n] else x) + int(right[n]) - crop
                if cutout:
                    top, left = int(row[n]) - cutout // 2, int(column[n]) - cutout // 2
                    if top <= y < top + cutout and left <= x < left + cutout:
                        continue
                if 0 <= from_y < height and 0 <= from_x < width:
                    result[n, :, y, x] = images[n, :, from_y, from_x]
    return result


@pytest.mark.parametrize(
    ("crop", "flip", "cutout"), [(2, False, 0), (0, True, 0), (0, False, 3), (0, False, 4), (3, True, 5), (9, True, 1)]
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_batch_at_once_equals_a_loop_over_pixels(crop, flip, cutout, dtype):
    images = pictures().to(dtype)
    labels = torch.arange(40)
    before = images.clone()
    found, same_labels = of(crop, flip, cutout)((images, labels))
    assert torch.equal(found, one_by_one(images, crop, flip, cutout))
    assert found.dtype == dtype
    assert found.is_contiguous()
    assert torch.equal(images, before)
    assert torch.equal(same_labels, labels)


def test_what_is_off_does_not_change_what_the_others_draw():
    images, alone, all_three = pictures(), of(cutout=3), of(crop=1, flip=True, cutout=3)
    zeros = alone(torch.full_like(images, 1)) == 0
    assert torch.equal(all_three(torch.full_like(images, 1))[zeros], torch.zeros(int(zeros.sum()), dtype=torch.uint8))


def test_epochs_seeds_and_batches_draw_anew_and_the_same_seed_the_same():
    images = pictures()
    first = of(crop=2, flip=True)
    a, b = first(images), first(images)
    assert not torch.equal(a, b)
    again = of(crop=2, flip=True)
    assert torch.equal(a, again(images))
    assert torch.equal(b, again(images))
    assert not torch.equal(a, of(crop=2, flip=True, epoch=3)(images))
    assert not torch.equal(a, of(crop=2, flip=True, seed=4)(images))


def test_half_of_the_images_are_mirrored_and_windows_are_uniform():
    marked = torch.zeros(4000, 1, 5, 5, dtype=torch.uint8)
    marked[:, :, 2, 1] = 1
    flipped = of(flip=True)(marked)[:, 0, 2, 3].float().mean()
    assert abs(float(flipped) - 0.5) < 4 * 0.5 / math.sqrt(4000)
    marked[:] = 0
    marked[:, :, 2, 2] = 1
    where = of(crop=1)(marked)[:, 0].float().mean(0)[1:4, 1:4]
    assert torch.allclose(where, torch.full((3, 3), 1 / 9), atol=4 * math.sqrt(8 / 81 / 4000))


def test_nothing_wanted_is_nothing():
    assert augmentation(crop=0, flip=False, cutout=0, seed=0, epoch=0, device=CPU) is None


def test_data_without_images_is_refused():
    with pytest.raises(ConfigError, match=r"crop=0, flip=True, cutout=0: .* a batch has tensors of \[2, 1\] dimension"):
        train(
            nn.Linear(3, 2),
            Examples(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)),
            cross_entropy,
            Recipe(epochs=1, lr=0.1, flip=True),
            seed=0,
        )


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        ((pictures(4), pictures(4)), 2),  # an image and what it was before noise
        ({"image": pictures(4), "mask": torch.zeros(4, 8, 6, dtype=torch.int64)}, 2),  # a class for each pixel
        ((None, (pictures(4), pictures(4), torch.zeros(4))), 2),
    ],
)
def test_targets_that_would_have_to_move_with_their_images_are_refused(batch, count):
    with pytest.raises(ConfigError, match=rf"an example has {count} of 8 x 6 pixels: inputs and targets would no lon"):
        of(crop=1)(batch)


def test_images_of_two_sizes_and_pairs_of_examples_are_drawn_one_by_one():
    small, pair = pictures(4, height=5), (pictures(4), torch.zeros(4))
    first, second = of(crop=1)((pair, (small, torch.zeros(4))))
    assert torch.equal(first[0], one_by_one(pair[0], 1, False, 0))
    assert second[0].shape == small.shape
    assert isinstance(of(flip=True)(pictures(4)), Tensor)


def images(count: int = 48) -> Examples:
    inputs = pictures(count, 1, 8, 8).float() / 255
    return Examples(inputs, torch.arange(count) % 4)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ConvNet(classes=4, widths=(4, 8))


AUGMENTED = Recipe(epochs=2, lr=0.05, batch_size=16, crop=1, flip=True, cutout=2)


def test_training_sees_augmented_images_and_its_result_is_that_of_its_seed():
    seen = []

    def loss(model, batch):
        seen.append(batch[0])
        return cross_entropy(model, batch)

    models = [network(), network(), network()]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        train(model, images(), loss, AUGMENTED, seed=seed)
    assert same(state(models[0]), state(models[1]))
    assert not same(state(models[0]), state(models[2]))
    order = torch.randperm(48, generator=stream(1, "shuffle", 1))
    first_of_second_epoch = images().tensors[0][order[:16]]
    assert torch.equal(seen[3], one_by_one(first_of_second_epoch, 1, True, 2, seed=1, epoch=1))


def test_a_data_loader_gives_the_bits_of_data_in_memory():
    models = [network(), network()]
    loader = DataLoader(TensorDataset(*images().tensors), batch_size=16, num_workers=0)
    for model, data in zip(models, (images(), loader), strict=True):
        train(model, data, cross_entropy, AUGMENTED, seed=1)
    assert same(state(models[0]), state(models[1]))


def test_gradients_and_measurements_see_images_as_they_are():
    model, seen = network(), []
    train(model, images(), cross_entropy, AUGMENTED, seed=0)

    def loss(model, batch):
        seen.append(batch[0])
        return cross_entropy(model, batch)

    mean_loss(model, images(), loss)
    assert torch.equal(torch.cat(seen), images().tensors[0])
    seen.clear()
    gradient(model, loss, images())
    assert all(bool((batch[:, None] == images().tensors[0][None]).flatten(2).all(2).any(1).all()) for batch in seen)
    assert len(outputs(model, images()).labels) == 48
