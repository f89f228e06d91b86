import contextlib
import hashlib
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from expunge.errors import ConfigError, CorruptData
from expunge.rows import Row, read_rows, write_rows
from expunge.seeds import derive, seeded, stream

ROW = Row(
    run="8f3a",
    experiment="digits",
    dataset="digits",
    model="mlp",
    scenario="random 10%",
    method="reload",
    blind=True,
    seed=3,
    split="forget",
    metric="accuracy",
    value=0.1 + 0.2,
    unit="%",
    n=150,
    seconds=1e-9,
)


def test_a_derived_seed_is_what_its_definition_says():
    digest = hashlib.sha256(b"7\0shuffle\0003").digest()
    assert derive(7, "shuffle", 3) == int.from_bytes(digest[:8], "big") // 2
    assert 0 <= derive(7, "shuffle", 3) < 2**63


def test_streams_of_different_purposes_are_unrelated():
    names = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", 0), (0, "a", 1), (0, "ab"), (10, "a"), (1, "0a"), (-1,)]
    draws = {tuple(torch.randint(2**40, (3,), generator=stream(*name)).tolist()) for name in names}
    assert len(draws) == len(names)
    assert torch.equal(torch.rand(5, generator=stream(0, "a")), torch.rand(5, generator=stream(0, "a")))


def test_a_stream_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    torch.rand(5, generator=stream(1, "x"))
    assert torch.equal(before, torch.get_rng_state())


def test_a_seeded_block_repeats_and_restores():
    before = torch.get_rng_state()
    weights = []
    for _ in range(2):
        with seeded(1, "fresh"):
            weights.append(nn.Linear(3, 3).weight)
        torch.rand(3)
    with seeded(2, "fresh"):
        assert not torch.equal(nn.Linear(3, 3).weight, weights[0])
    assert torch.equal(*weights)
    torch.set_rng_state(before)
    with contextlib.suppress(RuntimeError), seeded(1):
        torch.rand(1)
        raise RuntimeError
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_seeded_block_covers_the_generator_of_a_gpu():
    torch.cuda.init()
    before = torch.cuda.get_rng_state()
    draws = []
    for _ in range(2):
        with seeded(1, "dropout"):
            draws.append(torch.rand(3, device="cuda"))
    assert torch.equal(*draws)
    assert torch.equal(before, torch.cuda.get_rng_state())


@given(
    value=st.floats(allow_nan=False),
    text=st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0\r")),
    seed=st.integers(),
    blind=st.sampled_from([True, False, None]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_rows_come_back_as_they_were_written(value, text, seed, blind, tmp_path_factory):
    rows = [ROW, replace(ROW, value=value, scenario=text, seed=seed, blind=blind, source="paper, Table 3")]
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    write_rows(path, rows)
    assert read_rows(path) == rows
    assert path.read_bytes().startswith(b"run,experiment,dataset,model,scenario,method,blind,seed,split,metric,")


def test_no_rows_are_rows_too(tmp_path):
    write_rows(tmp_path / "rows.csv", iter([]))
    assert read_rows(tmp_path / "rows.csv") == []


def test_a_table_with_other_columns_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("run,value\na,1\n")
    with pytest.raises(ConfigError, match=r"has the columns \['run', 'value'\]; rows have \['run', 'experiment'"):
        read_rows(path)
    path.write_text("")
    with pytest.raises(ConfigError, match="has the columns None"):
        read_rows(path)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (",True,", ",yes,", "blind is 'yes'"),
        ("nats", "", "there are more, or fewer"),
        ("measured", "measured,more", "there are more, or fewer"),
        (",0.5,", ",half,", "could not convert string to float: 'half'"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, old, new, reason):
    path = tmp_path / "rows.csv"
    write_rows(path, [ROW, replace(ROW, value=0.5, blind=True, unit="nats")])
    lines = path.read_text(encoding="utf-8").splitlines()
    assert old in lines[2]
    lines[2] = lines[2][: lines[2].index(old)] if not new else lines[2].replace(old, new)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(CorruptData, match=rf"rows\.csv, line 3: no row of 15 values \({reason}\)\. Correct it"):
        read_rows(path)


def test_rows_that_fail_halfway_leave_the_old_file(tmp_path):
    path = tmp_path / "rows.csv"
    write_rows(path, [ROW])
    with pytest.raises(ZeroDivisionError):
        write_rows(path, (replace(ROW, value=1 / number) for number in (1, 0)))
    assert read_rows(path) == [ROW]
    assert [field.name for field in fields(Row)][-1] == "source"
