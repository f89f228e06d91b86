"""Two runs compared: bench diff."""

import math
from dataclasses import replace

import pytest

from expunge.bench import difference
from expunge.cli import main
from expunge.errors import ConfigError
from expunge.rows import Row, write_rows


def row(value, *, seed=0, metric="ΔFE", method="reload"):
    return Row(
        run="r", experiment="e", dataset="d", model="m", scenario="s", method=method, blind=True, seed=seed,
        split="forget", metric=metric, value=value, unit="nats", n=4, seconds=0.0,
    )  # fmt: skip


def test_a_difference_of_runs_tells_identical_changed_and_beyond_noise():
    one = [row(value, seed=seed) for seed, value in enumerate([1.0, 1.1, 0.9, 1.0])]
    moved = [row(value, seed=seed) for seed, value in enumerate([2.0, 2.11, 1.9, 2.0])]
    noisy = [row(value, seed=seed) for seed, value in enumerate([1.5, 0.6, 1.4, 0.5])]
    assert [cell.state for cell in difference.compare(one, one)] == ["identical"]
    assert [cell.state for cell in difference.compare(one, moved)] == ["beyond noise"]
    cell = difference.compare(one, noisy)[0]
    assert (cell.state, cell.seeds, cell.before, cell.after) == ("changed", 4, 1.0, 1.0)
    lone = difference.compare([row(1.0), row(2.0, metric="NSKL")], [row(1.5), row(3.0, method="ssd")])
    assert [cell.state for cell in lone] == ["changed", "only in A", "only in B"]
    apart = difference.compare([row(1.0, seed=0)], [row(1.0, seed=1)])
    assert [(cell.state, cell.seeds, cell.alone) for cell in apart] == [("no seed in both", 0, ((0,), (1,)))]


def test_what_is_not_finite_is_compared_and_not_tested():
    one = [row(value, seed=seed) for seed, value in enumerate([1.0, math.nan, math.inf])]
    assert [cell.state for cell in difference.compare(one, one)] == ["identical"]
    other = [replace(one[0], value=2.0), *one[1:]]
    assert [(cell.state, cell.p) for cell in difference.compare(one, other)] == [("changed", None)]


def test_two_values_of_a_seed_are_refused():
    with pytest.raises(ConfigError, match="reload has two values of ΔFE for seed 0"):
        difference.compare([row(1.0), row(2.0)], [row(1.0)])


def test_seeds_that_one_run_alone_has_are_said(tmp_path, capsys):
    write_rows(tmp_path / "a.csv", [row(1.0, seed=seed) for seed in (0, 1, 2)])
    write_rows(tmp_path / "b.csv", [row(1.0, seed=seed) for seed in (0, 3)])
    assert main(["bench", "diff", str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "1 identical of 1 cells.",
        "Only A has seed 1, 2, in 1 of them: not compared.",
        "Only B has seed 3, in 1 of them: not compared.",
    ]
