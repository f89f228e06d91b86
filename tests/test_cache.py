import copy
import dataclasses
import hashlib
import json
import math
import re
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from expunge import cache, params
from expunge.errors import ConfigError, CorruptCache, ExpungeError, MismatchError, NotFinite
from expunge.gradient import Gradient, gradient
from expunge.losses import cross_entropy, squared_error
from tests.zoo import NETWORKS, classification, flat, network

DATA = classification(20)


def small() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(5, 3).double()


def take(model: nn.Module, **options) -> Gradient:
    return gradient(model, cross_entropy, DATA, micro_batch=8, **options)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[nn.Module, bytes]:
    """A model and the bytes of its cache."""
    path = tmp_path_factory.mktemp("written") / "cache"
    model = small()
    cache.save(path, take(model))
    return model, path.read_bytes()


def equal(a: Gradient, b: Gradient) -> bool:
    """Bit for bit, but for the noise of storage."""
    for x, y in ((a.total, b.total), (a.noise, b.noise), (vars(a.micro_batches or 0), vars(b.micro_batches or 0))):
        assert list(x) == list(y)
        assert all(torch.equal(x[n], y[n]) if isinstance(x[n], torch.Tensor) else x[n] == y[n] for n in x)
    return (a.count, a.loss, a.roundoff, a.origin) == (b.count, b.loss, b.roundoff, b.origin)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_cache_comes_back_bit_for_bit(kind, tmp_path):
    model = network(kind).float()
    full = gradient(model, cross_entropy, classification(20, dtype=torch.float32), micro_batch=8)
    cache.save(tmp_path / "cache", full)
    loaded = cache.load(tmp_path / "cache", copy.deepcopy(model), cross_entropy)
    assert {name: (t.dtype, t.shape) for name, t in loaded.total.items()} == {
        name: (torch.float64, t.shape) for name, t in full.total.items()
    }
    full = dataclasses.replace(full, noise={name: full.noise[name] for name in loaded.noise})  # in any order
    assert equal(full, loaded)
    assert loaded.storage_roundoff == 0


def test_a_cache_of_a_lambda_warns_that_it_cannot_be_told_from_another(tmp_path):
    model = small()
    full = gradient(model, lambda model, batch: cross_entropy(model, batch) * 2, classification(20))
    with pytest.warns(UserWarning, match=r"<lambda>: a cache knows a loss by its name.*Define it by def"):
        cache.save(tmp_path / "cache", full)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 2**-24), (torch.bfloat16, 2**-8)])
def test_a_cache_of_lower_precision_is_rounded_once(dtype, unit, tmp_path):
    model = small()
    full = take(model)
    cache.save(tmp_path / "cache", full, dtype=dtype)
    loaded = cache.load(tmp_path / "cache", model, cross_entropy)
    assert loaded.storage_roundoff == unit
    for name, total in full.total.items():
        assert torch.equal(loaded.total[name], total.to(dtype).double())
        assert bool(((loaded.total[name] - total).abs() <= unit * total.abs()).all())
    difference = loaded - take(model)
    assert not flat(difference.informative()).any()


def test_a_pass_that_is_not_aligned_stays_so(tmp_path):
    model = small()
    full = gradient(model, cross_entropy, [DATA.tensors])
    cache.save(tmp_path / "cache", full)
    assert cache.load(tmp_path / "cache", model, cross_entropy).micro_batches is None
    assert cache.read_header(tmp_path / "cache").micro_batch is None


def test_a_cache_of_a_subset_loads_as_that_subset(tmp_path):
    model = network("frozen")
    cache.save(tmp_path / "cache", take(model, parameters=["0.weight", "3.bias"]))
    loaded = cache.load(tmp_path / "cache", model, cross_entropy)
    assert set(loaded.total) == {"0.weight", "3.bias"}
    assert params.norm((loaded - take(model, parameters=loaded.total)).total) == 0


def test_a_compiled_model_shares_its_cache_with_the_model_inside(tmp_path):
    model = small()
    cache.save(tmp_path / "cache", take(model))
    assert cache.load(tmp_path / "cache", torch.compile(model, backend="eager"), cross_entropy).count == 20


def test_the_header_says_what_the_cache_is(tmp_path):
    model = network("batch-norm")
    full = take(model)
    cache.save(tmp_path / "cache", full)
    header = cache.read_header(tmp_path / "cache")
    assert datetime.now(UTC) - datetime.fromisoformat(header.created) < timedelta(minutes=5)
    assert dataclasses.replace(header, created="") == cache.Header(
        version=1,
        count=20,
        loss=full.loss,
        loss_terms="cross_entropy",
        weights=params.weights_fingerprint(model),
        buffers=params.buffers_fingerprint(model),
        roundoff=2**-53,
        micro_batch=8,
        expunge=version("expunge"),
        torch=torch.__version__,
        created="",
        parameters=6,
        entries=params.size(full.total),
    )
    assert json.loads(json.dumps(dataclasses.asdict(header)))["entries"] == 5 * 6 + 6 + 6 + 6 + 6 * 3 + 3


def accepted(path: Path, content: bytes, model: nn.Module) -> bool:
    path.write_bytes(content)
    try:
        cache.load(path, model, cross_entropy)
    except ExpungeError:
        return False
    return True


def test_no_byte_can_be_altered(written, tmp_path):
    model, content = written
    assert accepted(tmp_path / "cache", content, model)
    for at in range(len(content)):
        for flip in (0x01, 0xFF):
            damaged = content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :]
            assert not accepted(tmp_path / "cache", damaged, model), f"byte {at} ^ {flip}"


def test_no_byte_can_be_missing_or_added(written, tmp_path):
    model, content = written
    for length in [*range(0, len(content), 17), *range(len(content) - 9, len(content))]:
        assert not accepted(tmp_path / "cache", content[:length], model), f"the first {length} bytes"
    assert not accepted(tmp_path / "cache", content + b"\0", model)
    assert not accepted(tmp_path / "cache", content + content, model)


def specified_checksum(header: dict[str, str], tensors: dict[str, torch.Tensor]) -> str:
    """As docs/cache-format.md says it, without the library."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        kind = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name}\0{kind}\0{list(tensor.shape)}\0".encode())
        digest.update(bytes(tensor.contiguous().flatten().view(torch.uint8).tolist()))
    lines = "".join(f"{key}={value}\n" for key, value in sorted(header.items()) if key != "checksum")
    return hashlib.sha256(f"{lines}{digest.hexdigest()}\n".encode()).hexdigest()


def rewrite(content: bytes, path: Path, change) -> None:
    """Change the header and the tensors of a cache, and write it with the checksum that belongs to that."""
    path.write_bytes(content)
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert header["checksum"] == specified_checksum(header, tensors)
    change(header, tensors)
    save_file(tensors, path, {**header, "checksum": specified_checksum(header, tensors)})


def says(**fields):
    return lambda header, tensors: header.update({key: json.dumps(value) for key, value in fields.items()})


def holds(**changes):
    return lambda header, tensors: tensors.update(
        {name.replace("__", "/"): change(tensors[name.replace("__", "/")]) for name, change in changes.items()}
    )


def lacks(*names):
    return lambda header, tensors: [part.pop(name) for name in names for part in (header, tensors) if name in part]


def raw(**fields):
    return lambda header, tensors: header.update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (says(count=19), "it counts 19 terms, its micro-batches 20"),
        (says(count=0), "it counts 0 terms"),
        (says(count="20"), "its header has count = '20'"),
        (says(loss=3.5), r"its loss is 3.5, that of its micro-batches \d"),
        (says(loss=math.nan), "its loss is nan"),
        (says(loss="low"), "its header has loss = 'low'"),
        (says(roundoff=0.0), "its roundoff is 0.0"),
        (says(roundoff=None), "its header has roundoff = None"),
        (says(weights=7), "its header has weights = 7"),
        (says(micro_batch=0), "its micro-batches have 0 positions"),
        (says(micro_batch="8"), "its header has micro_batch = '8'"),
        (says(version=2), "format version 2, this library reads 1"),
        (says(version=None), "format version None"),
        (says(format="other"), 'not a gradient cache .*names the format "other".*weights instead of the cache'),
        (lacks("version"), "format version None"),
        (lacks("format"), "its header names the format nowhere"),
        (lacks("weights"), "its header is incomplete .*'weights'"),
        (says(surprise=1), "its header is incomplete .*'surprise'"),
        (raw(loss="{"), "its header cannot be read"),
        (lacks("noise/bias"), "totals and rounding floors have different names"),
        (lacks("total/bias", "total/weight"), "it holds no gradient"),
        (lacks("micro_batches/losses"), "micro-batches are incomplete or out of order"),
        (
            lacks(*(f"micro_batches/{name}" for name in ("numbers", "counts", "losses", "magnitudes"))),
            "its micro-batches 0",
        ),
        (holds(micro_batches__counts=lambda t: t + 1), "it counts 20 terms, its micro-batches 23"),
        (holds(micro_batches__counts=lambda t: t[:1] * 0 + 20), "micro-batches are incomplete"),
        (holds(micro_batches__losses=lambda t: t * 1.001), "that of its micro-batches"),
        (holds(micro_batches__numbers=lambda t: t.flip(0).contiguous()), "out of order"),
        (holds(micro_batches__numbers=lambda t: t[0].clone()), "micro-batches are incomplete"),
        (holds(noise__bias=lambda t: t[:2].clone()), "totals and rounding floors have different names or shapes"),
        (holds(total__bias=lambda t: t / 0), "its gradient is not finite"),
        (holds(total__bias=lambda t: t.long()), "its totals are of"),
        (holds(total__bias=lambda t: t.half()), "its totals are of"),
    ],
)
def test_a_header_that_lies_is_caught_although_its_checksum_is_right(change, message, written, tmp_path):
    model, content = written
    rewrite(content, tmp_path / "cache", lambda header, tensors: None)
    assert cache.load(tmp_path / "cache", model, cross_entropy).count == 20
    rewrite(content, tmp_path / "cache", change)
    for read in (
        lambda: cache.load(tmp_path / "cache", model, cross_entropy),
        lambda: cache.read_header(tmp_path / "cache"),
    ):
        with pytest.raises(CorruptCache, match=message):
            read()


def test_another_program_may_write_a_whole_number_without_a_fraction(written, tmp_path):
    def change(header, tensors):
        header["loss"] = "6"
        tensors["micro_batches/losses"] = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    rewrite(written[1], tmp_path / "cache", change)
    assert cache.load(tmp_path / "cache", written[0], cross_entropy).loss == 6


def test_an_altered_file_is_refused_with_its_checksum(written, tmp_path):
    model, content = written
    (tmp_path / "cache").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(
        CorruptCache, match=r"does not match its checksum [0-9a-f]{12}….*altered.*Restore it from a copy"
    ):
        cache.load(tmp_path / "cache", model, cross_entropy)


def test_what_is_not_a_cache_is_refused(tmp_path):
    model = small()
    save_file(model.state_dict(), tmp_path / "weights")
    (tmp_path / "text").write_text("a gradient of 20 records\n" * 100)
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    torch.save(model.state_dict(), tmp_path / "zip")
    cases = dict.fromkeys(("text", "empty", "folder", "zip"), "cannot be read as safetensors .*another kind of file")
    for name, message in {**cases, "weights": "names the format nowhere.*Did you give the weights"}.items():
        for read in (lambda path: cache.load(path, model, cross_entropy), cache.read_header):
            with pytest.raises(CorruptCache, match=message):
                read(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    for read in (lambda path: cache.load(path, small(), cross_entropy), cache.read_header):
        with pytest.raises(FileNotFoundError, match=r"gone: no such cache. Make one with gradient\(\)"):
            read(tmp_path / "gone")


class Renamed(nn.Module):
    def __init__(self, **shapes) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=torch.float64)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Renamed(weight=(3, 5), offset=(3,)), "holds gradients of 'bias', which the model does not have; .* 'offset'"),
        (Renamed(weight=(3, 5)), "holds gradients of 'bias'"),
        (Renamed(weight=(5, 3), bias=(3,)), r"'weight' has shape \(3, 5\) in the cache and \(5, 3\) in the model"),
        (Renamed(weight=(3, 5), bias=(3,)), "taken at weights .*the model has"),
        (Renamed(weight=(3, 5), bias=(3,), more=(1,)), "taken at weights"),
    ],
)
def test_another_model_is_refused(model, message, written, tmp_path):
    (tmp_path / "cache").write_bytes(written[1])
    with pytest.raises(MismatchError, match=message):
        cache.load(tmp_path / "cache", model, cross_entropy)


def test_other_weights_buffers_or_loss_are_refused(tmp_path):
    model = network("batch-norm")
    cache.save(tmp_path / "cache", take(model))
    with pytest.raises(MismatchError, match="of the loss 'cross_entropy', and now 'squared_error'"):
        cache.load(tmp_path / "cache", model, squared_error)
    moved = copy.deepcopy(model)
    moved.train()(DATA.tensors[0])
    with pytest.raises(MismatchError, match=f"the gradient in {re.escape(str(tmp_path))}.*taken with buffers"):
        cache.load(tmp_path / "cache", moved, cross_entropy)
    updated = copy.deepcopy(model)
    updated[0].weight.data[0, 0] *= 1 + 1e-15
    with pytest.raises(MismatchError, match=r"taken at weights .*bit for bit"):
        cache.load(tmp_path / "cache", updated, cross_entropy)
    assert cache.load(tmp_path / "cache", model, cross_entropy).count == 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.complex64])
def test_a_type_that_cannot_hold_a_gradient_is_refused(dtype, tmp_path):
    with pytest.raises(ConfigError, match=f"dtype={dtype}: .*one of torch.float64, torch.float32, torch.bfloat16"):
        cache.save(tmp_path / "cache", take(small()), dtype=dtype)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "dtype"), [(math.nan, torch.float64), (math.inf, torch.float64), (1e39, torch.float32)]
)
def test_a_gradient_that_is_not_finite_is_not_written(value, dtype, tmp_path):
    full = take(small())
    full.total["bias"][1] = value
    with pytest.raises(NotFinite, match=f"saving the cache as {dtype}: tensor 'total/bias' has 1 of 3"):
        cache.save(tmp_path / "cache", full, dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_a_gradient_without_its_floor_is_not_written(tmp_path):
    with pytest.raises(ConfigError, match=r"no rounding floor. Save what gradient"):
        cache.save(tmp_path / "cache", dataclasses.replace(take(small()), noise=None))


def test_saving_again_replaces_the_file(written, tmp_path):
    (tmp_path / "cache").write_text("something old")
    cache.save(tmp_path / "cache", take(written[0]))
    assert cache.load(tmp_path / "cache", written[0], cross_entropy).count == 20
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
