"""The figure over scenarios that differ in one number."""

import pytest

from expunge.report.page import write_page
from expunge.report.series import axis_of, series
from expunge.report.summaries import Summary
from expunge.rows import Row, write_rows

DELETIONS = [f"deletion {number} of 2 % each" for number in (1, 2, 10)]
LOSSES = {"retrain": (6.0, 6.1), "reload": (1.0, 3.0), "fine-tune": (2.0, 2.0)}


def summaries(scenarios=DELETIONS, metric="ΔFE"):
    return [
        Summary(
            scenario=scenario,
            method=method,
            blind=True,
            metric=metric,
            unit="nats",
            values=tuple(value * (place + 1) for value in values),
            seeds=(0, 1),
        )
        for place, scenario in enumerate(scenarios)
        for method, values in LOSSES.items()
    ]


@pytest.mark.parametrize(
    ("scenarios", "title", "values"),
    [
        (DELETIONS, "deletion … of 2 % each", [1, 2, 10]),
        ([f"{n} % known" for n in (10, 2.5, 50)], "… % known", [10, 2.5, 50]),
    ],
)
def test_scenarios_that_differ_in_one_number_are_a_series(scenarios, title, values):
    assert axis_of(scenarios) == (title, dict(zip(scenarios, values, strict=True)))


@pytest.mark.parametrize(
    "scenarios",
    [
        DELETIONS[:2],  # two points are no line
        [*DELETIONS, "random 10 %"],
        ["1 of 2 %", "2 of 2 %", "2 of 3 %"],  # two numbers differ
        ["removal", "class removal", "correction"],
    ],
)
def test_others_are_not(scenarios):
    assert axis_of(scenarios) is None
    assert series(summaries(scenarios)) is None


def test_points_stand_in_the_order_of_the_number_with_their_means():
    drawing = series(summaries(DELETIONS[::-1]))
    assert drawing.heading == "Deletion … of 2 % each"
    assert drawing.finding == "ΔFE of RELOAD goes from 6.000 at 1 to 2.000 at 10."
    assert "RELOAD" in drawing.svg
    assert drawing.svg.count("<svg") == 1
    assert drawing.svg == series(summaries(DELETIONS[::-1])).svg


def test_where_only_standards_have_values_there_is_nothing_to_draw():
    only = [each for each in summaries() if each.method == "retrain"]
    assert series(only) is None
    others = [each for each in summaries() if each.method != "reload"]
    assert series(others).finding.startswith("ΔFE of fine-tune goes from")


def test_a_page_of_a_series_begins_with_it_and_others_have_none(tmp_path):
    def page(scenarios):
        rows = [
            Row(
                run=f"{s}/{seed}",
                experiment="x",
                dataset="d",
                model="m",
                scenario=s,
                method=method,
                blind=True,
                seed=seed,
                split="forget",
                metric="ΔFE",
                value=value,
                unit="nats",
                n=5,
                seconds=0.0,
            )
            for s in scenarios
            for method, values in LOSSES.items()
            for seed, value in enumerate(values)
        ]
        write_rows(tmp_path / "rows.csv", rows)
        for name in ("config.json", "env.json"):
            (tmp_path / name).write_text("{}", encoding="utf-8")
        return write_page(tmp_path).read_text(encoding="utf-8")

    assert page(DELETIONS).index("All scenarios") < page(DELETIONS).index('id="scenario-')
    assert "All scenarios" not in page(DELETIONS[:2])
