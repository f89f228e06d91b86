from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook
from threadpoolctl import threadpool_limits

import tests.typecheck  # noqa: F401 - jaxtyping looks the checker up by this name

torch.set_num_threads(1)  # five times faster on tiny models, and the same bits everywhere
# Only modules that say shapes: to check every call of every function doubled the time of the methods' tests.
SOURCE = Path(__file__).parent.parent / "src"
SHAPED = [
    ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    for path in sorted(SOURCE.rglob("*.py"))
    if "from jaxtyping import" in path.read_text(encoding="utf-8")
]
install_import_hook(SHAPED, "tests.typecheck.check")


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory):
    """The run folder of a small experiment that nothing happened to."""
    from tests.tiny_bench import TINY, run  # after the hook

    return run(TINY, tmp_path_factory.mktemp("unbroken"), seeds=(0, 1))


@pytest.fixture
def one_thread():
    """Scikit-learn's threads wait for each other on a busy machine."""
    with threadpool_limits(1):
        yield


@pytest.fixture
def few(monkeypatch):
    """The official layouts of CIFAR with few records a file."""
    from expunge.data import cifar  # after the hook
    from tests.tiny_images import TEST, TRAIN

    for name in ("CIFAR10", "CIFAR100"):
        small = tuple(replace(each, train_records=TRAIN, test_records=TEST) for each in getattr(cifar, name))
        monkeypatch.setattr(cifar, name, small)


@pytest.fixture
def one_removed():
    """What an attacker of a difference of one record has, and that record."""
    return _removed(torch.tensor([7]))


@pytest.fixture
def five_removed():
    """The same of five."""
    return _removed(torch.arange(5))


def _removed(gone):
    from tests.attacked import seen  # after the hook
    from tests.zoo import classification, network

    return seen(network("mlp"), classification(40), gone)


@pytest.fixture
def pictures(monkeypatch):
    """A task on 40 of 60 images of two classes, with 30 for testing."""
    from expunge.bench import records  # after the hook
    from expunge.data.images import ImageData, Images
    from tests.tiny_bench import DIGITS

    generator = torch.Generator().manual_seed(0)

    def some(count):
        labels = torch.arange(count) % 2
        pixels = torch.randint(128, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
        return Images(pixels + 100 * labels[:, None, None, None].to(torch.uint8), labels)

    found = ImageData(name="some", train=some(60), test=some(30), classes=("a", "b"))
    monkeypatch.setattr(records, "images", lambda *_: found)
    records.records_of.cache_clear()
    yield replace(DIGITS, dataset="cifar10", train=40)
    records.records_of.cache_clear()
