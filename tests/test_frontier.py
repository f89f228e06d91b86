"""The figure of quality against cost."""

import pytest

from expunge.errors import ConfigError
from expunge.report.frontier import drawable, frontier, kinds_of, lowest
from expunge.report.summaries import Summary

POINTS = {
    "reload, 1 epoch": (0.1, 4.0),
    "reload, 3 epochs": (0.2, 5.0),
    "reload, 5 epochs": (0.3, 2.0),
    "fine-tune, 5 epochs": (0.25, 6.0),
    "retrain": (1.0, 0.0),
}


def summaries():
    for method, (work, distance) in POINTS.items():
        for metric, value in (("Work", work), ("FSKL", distance)):
            yield summary(method, metric, (value, value))
    yield summary("retrain again", "FSKL", (0.5, 0.7))


def summary(method, metric, values):
    unit = "nats" if metric == "FSKL" else "ratio"
    return Summary(
        scenario="s",
        method=method,
        blind=True,
        metric=metric,
        unit=unit,
        values=values,
        seeds=tuple(range(len(values))),
    )


def test_settings_are_grouped_by_kind_and_the_frontier_is_what_nothing_cheaper_beats():
    kinds = kinds_of({(s.method, s.metric): s for s in summaries()}, "FSKL")
    assert list(kinds) == ["reload", "fine-tune"]
    assert [name for *_, name in lowest(kinds["reload"])] == ["reload, 1 epoch", "reload, 5 epochs"]


def test_the_figure_says_who_is_lowest_and_has_a_band_for_the_noise_floor():
    drawing = frontier(summaries(), "s", ["FSKL"])
    assert drawing.finding == "FSKL is lowest (2.000) for reload, 5 epochs at a work of 0.300."
    assert "noise floor" in drawing.svg
    assert drawing.svg.count("<svg") == 1
    assert drawing.svg == frontier(summaries(), "s", ["FSKL"]).svg


def test_there_is_a_frontier_only_where_methods_come_in_several_settings():
    assert drawable(summaries()) == ["FSKL"]
    assert drawable(s for s in summaries() if "," not in s.method) == []
    assert drawable(s for s in summaries() if s.method != "reload, 3 epochs") == []  # two are no grid


def test_however_many_kinds_there_are_each_has_a_style():
    many = [
        summary(f"kind {k}, {n}", metric, (0.1 * (n + 1), 0.1))
        for k in range(90)
        for n in range(3)
        for metric in ("Work", "FSKL")
    ]
    assert "kind 89" in frontier(many, "s", ["FSKL"]).svg


def test_a_metric_that_nobody_has_is_refused():
    with pytest.raises(ConfigError, match=r"nobody has NSKL and Work in 's'"):
        frontier(summaries(), "s", ["NSKL"])
