"""A cache in several files: the same gradient, read part by part, written whole or not at all."""

import copy
import json
import multiprocessing
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from expunge import cache, params
from expunge.errors import ConfigError, CorruptCache, MismatchError
from expunge.gradient import gradient
from expunge.losses import cross_entropy
from expunge.second_pass import second_pass
from tests.test_cache import equal
from tests.test_files import no_file_larger_than
from tests.zoo import classification, network

MODEL, DATA = network("batch-norm"), classification(60)
PLAIN = gradient(MODEL, cross_entropy, DATA, micro_batch=4)
GROUPED = gradient(MODEL, cross_entropy, DATA, micro_batch=4, groups=5)
LIMIT = 300  # bytes: most tensors get a file of their own


def files(folder: Path) -> set[str]:
    return set(os.listdir(folder))


def index_of(path: Path) -> dict:
    return json.loads(path.with_name(path.name + ".index.json").read_text())


def load(path: Path):
    return cache.load(path, MODEL, cross_entropy)


def test_parts_hold_what_one_file_holds(tmp_path):
    path = tmp_path / "cache.safetensors"
    cache.save(path, PLAIN, max_shard_bytes=LIMIT)
    assert equal(load(path), PLAIN)
    index = index_of(path)
    assert set(index) == {"metadata", "weight_map"}
    assert files(tmp_path) == {"cache.safetensors.index.json", *index["weight_map"].values()}
    total = 0
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / file, "pt") as opened:
            inside = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        size = sum(tensor.numel() * tensor.element_size() for tensor in inside.values())
        assert size <= LIMIT or len(inside) == 1
        assert all(index["weight_map"][name] == file for name in inside)
        total += size
    assert index["metadata"]["total_size"] == total
    header = cache.read_header(path)
    assert (header.count, header.files, header.groups) == (60, len(set(index["weight_map"].values())), 0)
    cache.save(tmp_path / "one", PLAIN)
    one = cache.read_header(tmp_path / "one")
    assert vars(one) | {"files": header.files, "created": header.created} == vars(header)


def test_a_gradient_below_the_limit_stays_in_one_file(tmp_path):
    cache.save(tmp_path / "cache", PLAIN)
    assert files(tmp_path) == {"cache"}
    assert cache.read_header(tmp_path / "cache").files == 1


def test_groups_come_back_and_only_touched_ones_are_read(tmp_path):
    path = tmp_path / "cache.safetensors"
    cache.save(path, GROUPED)
    loaded = load(path)
    assert equal(loaded, GROUPED)
    assert (cache.read_header(path).groups, cache.read_header(path).files) == (5, 6)
    assert [
        params.norm(params.subtract(a, b)) for a, b in zip(loaded.groups.totals, GROUPED.groups.totals, strict=True)
    ] == [0] * 5
    left = DATA.without(torch.tensor([14]))
    expected = GROUPED - second_pass(GROUPED, MODEL, cross_entropy, left)[0]
    for name, file in index_of(path)["weight_map"].items():
        if name.startswith("groups/total/") and not name.startswith("groups/total/1/"):
            (tmp_path / file).unlink(missing_ok=True)  # nobody will miss them
    found = loaded - second_pass(loaded, MODEL, cross_entropy, left)[0]
    assert all(torch.equal(found.total[name], expected.total[name]) for name in found.total)
    with pytest.raises(CorruptCache, match=r"which cache.safetensors.index.json names, cannot be read.*missing"):
        second_pass(loaded, MODEL, cross_entropy, DATA.without(torch.tensor([40])))
    with pytest.raises(CorruptCache, match="cannot be read"):
        cache.read_header(path)


def test_groups_in_less_than_float64_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"dtype=torch.float32: a cache with 5 groups is stored in torch.float64"):
        cache.save(tmp_path / "cache", GROUPED, dtype=torch.float32)
    assert not files(tmp_path)


def test_no_room_in_a_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="max_shard_bytes=0: a file has room for at least one byte"):
        cache.save(tmp_path / "cache", PLAIN, max_shard_bytes=0)


def test_a_type_of_lower_precision_may_be_in_parts(tmp_path):
    cache.save(tmp_path / "cache", PLAIN, dtype=torch.float32, max_shard_bytes=LIMIT)
    assert load(tmp_path / "cache").storage_roundoff == 2**-24


def damage(change):
    def apply(path: Path):
        index = path.with_name(path.name + ".index.json")
        content = json.loads(index.read_text())
        change(content)
        index.write_text(json.dumps(content))

    return apply


def cut(path: Path):
    file = path.with_name(next(iter(index_of(path)["weight_map"].values())))
    file.write_bytes(file.read_bytes()[:-1])


def flip(path: Path):
    file = path.with_name(index_of(path)["weight_map"]["total/0.bias"])
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def swap(path: Path):
    names = index_of(path)["weight_map"]
    one, other = (path.with_name(names[name]) for name in ("total/0.bias", "total/1.bias"))
    one.write_bytes(other.read_bytes())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, "cannot be read as safetensors"),
        (flip, "does not match its fingerprint .*altered"),
        (swap, "does not match its fingerprint .*another cache"),
        (damage(lambda c: c["metadata"]["header"].update(count="59")), "does not match its checksum"),
        (damage(lambda c: c["metadata"]["header"].pop("checksum")), "does not match its checksum none"),
        (damage(lambda c: c["weight_map"].pop("total/0.bias")), "does not match its (checksum|fingerprint)"),
        (damage(lambda c: c["weight_map"].update({"total/0.bias": "../other"})), "does not match its checksum"),
        (damage(lambda c: c["metadata"]["fingerprints"].clear()), "does not match its checksum"),
        (damage(lambda c: c.pop("weight_map")), "cannot be read as the index of a cache .KeyError"),
        (damage(lambda c: c.update(metadata=3)), "cannot be read as the index of a cache .TypeError"),
        (lambda path: path.with_name(path.name + ".index.json").write_text("{"), "cannot be read as the index"),
    ],
)
def test_damage_is_found(change, message, tmp_path):
    path = tmp_path / "cache"
    cache.save(path, PLAIN, max_shard_bytes=LIMIT)
    change(path)
    for read in (load, cache.read_header):
        with pytest.raises(CorruptCache, match=message):
            read(path)


def test_another_model_is_refused(tmp_path):
    cache.save(tmp_path / "cache", GROUPED)
    with pytest.raises(MismatchError, match="taken at weights"):
        cache.load(tmp_path / "cache", network("batch-norm", 1), cross_entropy)


@pytest.mark.parametrize(
    ("first", "then"),
    [({}, {"max_shard_bytes": LIMIT}), ({"max_shard_bytes": LIMIT}, {}), ({"max_shard_bytes": LIMIT},) * 2],
)
def test_saving_again_replaces_everything(first, then, tmp_path):
    path = tmp_path / "cache"
    old = gradient(MODEL, cross_entropy, DATA.without(torch.tensor([3])), micro_batch=4)
    cache.save(path, old, **first)
    cache.save(path, PLAIN, **then)
    assert load(path).count == 60
    expected = {"cache.index.json", *index_of(path)["weight_map"].values()} if then else {"cache"}
    assert files(tmp_path) == expected


@pytest.mark.parametrize("first", [{}, {"max_shard_bytes": 5000}])
@pytest.mark.parametrize("limit", [0, 1500, 4200, 6500])
def test_a_full_disk_leaves_the_old_cache_and_nothing_else(first, limit, tmp_path):
    model = nn.Sequential(nn.Linear(5, 100), nn.Linear(100, 3)).double()
    path = tmp_path / "cache"
    cache.save(path, gradient(model, cross_entropy, DATA, micro_batch=4), **first)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    grouped = gradient(model, cross_entropy, DATA.without(torch.tensor([3])), micro_batch=4, groups=3)
    with pytest.raises(OSError), no_file_larger_than(limit):  # noqa: PT011 - the index is written by the system
        cache.save(path, grouped)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    assert cache.load(path, model, cross_entropy).count == 60


def write_often(path: Path, count: int, number: int, start) -> None:
    torch.set_num_threads(1)
    found = gradient(MODEL, cross_entropy, DATA.only(torch.arange(count)), micro_batch=4, groups=2)
    start.wait()
    for _ in range(number):
        cache.save(path, found)


def test_two_processes_may_write_the_same_cache(tmp_path):
    path, context = tmp_path / "cache", multiprocessing.get_context("fork")
    start = context.Barrier(2)
    writers = [context.Process(target=write_often, args=(path, count, 15, start)) for count in (40, 50)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    loaded = load(path)
    assert loaded.count in (40, 50)
    expected = gradient(MODEL, cross_entropy, DATA.only(torch.arange(loaded.count)), micro_batch=4, groups=2)
    assert equal(loaded, expected)
    assert files(tmp_path) == {"cache.index.json", *index_of(path)["weight_map"].values()}


def test_names_say_what_belongs_together(tmp_path):
    cache.save(tmp_path / "cache.safetensors", GROUPED)
    names = sorted(files(tmp_path) - {"cache.safetensors.index.json"})
    assert [name[:6] + name[14:] for name in names] == [f"cache--0000{k}-of-00006.safetensors" for k in range(1, 7)]
    assert cache.exists(tmp_path / "cache.safetensors")
    assert not cache.exists(tmp_path / "other")
    assert cache.file_of(tmp_path / "cache.safetensors").name == "cache.safetensors.index.json"


def test_the_index_stands_for_the_cache(tmp_path):
    path = tmp_path / "cache.safetensors"
    cache.save(path, GROUPED)
    index = tmp_path / "cache.safetensors.index.json"
    assert equal(load(index), GROUPED)
    assert cache.read_header(index) == cache.read_header(path)
    assert cache.exists(index)
    listed = cache.files_of(path)
    assert listed == cache.files_of(index)
    assert listed[0] == index
    assert {file.name for file in listed} == files(tmp_path)
    cache.save(tmp_path / "one", PLAIN)
    assert cache.files_of(tmp_path / "one") == [tmp_path / "one"]
    with pytest.raises(FileNotFoundError, match=r"other.index.json: no such cache"):
        load(tmp_path / "other.index.json")


def test_nothing_is_saved_under_the_name_of_an_index(tmp_path):
    cache.save(tmp_path / "cache", GROUPED)
    before = files(tmp_path)
    with pytest.raises(ConfigError, match=r"cache.index.json is the name of an index.*Name the cache: .*/cache\.$"):
        cache.save(tmp_path / "cache.index.json", PLAIN)
    assert files(tmp_path) == before


def test_a_piece_is_told_from_weights_and_names_its_cache(tmp_path):
    path = tmp_path / "cache.safetensors"
    cache.save(path, GROUPED)
    cache.save(tmp_path / "another.safetensors", PLAIN, max_shard_bytes=LIMIT)
    for piece in cache.files_of(path)[1:]:
        for read in (load, cache.read_header):
            with pytest.raises(CorruptCache, match=rf"is one piece of the cache {path}, .* Give {path}\.$"):
                read(piece)
    (tmp_path / "cache.safetensors.index.json").unlink()
    with pytest.raises(CorruptCache, match=r"no index beside it names it. Restore the whole cache"):
        load(piece)


def test_every_file_of_a_cache_is_its_owner_s_alone(tmp_path):
    cache.save(tmp_path / "cache", GROUPED)
    cache.save(tmp_path / "one", PLAIN)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in files(tmp_path)} == {0o600}


def test_the_library_works_where_the_system_has_no_locks_and_opens_no_folders(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.delattr(os, "O_DIRECTORY")
    opened, real = [], os.open
    monkeypatch.setattr(os, "open", lambda path, *how: opened.append(Path(path)) or real(path, *how))
    cache.save(tmp_path / "cache", PLAIN)
    cache.save(tmp_path / "cache", GROUPED)
    assert equal(load(tmp_path / "cache"), GROUPED)
    assert opened
    assert tmp_path not in opened


def test_importing_the_library_needs_no_locks():
    without = "import sys; sys.modules['fcntl'] = None; import expunge.cli, expunge.cache"
    subprocess.run([sys.executable, "-c", without], check=True, timeout=120)


def test_a_deep_copy_of_a_loaded_gradient_still_reads_its_groups(tmp_path):
    cache.save(tmp_path / "cache", GROUPED)
    copied = copy.deepcopy(load(tmp_path / "cache"))
    assert torch.equal(copied.groups.totals[4]["0.bias"], GROUPED.groups.totals[4]["0.bias"])
