"""Figures say in numbers what they show, and nothing where there is no data."""

import re
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
from sklearn.metrics import roc_curve

from expunge.report import summarise
from expunge.report.attack import roc, true_positives
from expunge.report.curves import steps
from expunge.report.figures import distances, histograms, resets
from expunge.report.samples import samples
from expunge.report.stored import Loss
from expunge.report.tradeoff import tradeoff
from tests.reported import RESETS, some_losses, some_points, some_rows


def test_figures_state_their_finding_in_numbers():
    drawn = distances(summarise(some_rows()), "removal", "reload")
    assert drawn.finding == "RELOAD: ΔFA 3.00 (noise floor 4.00)."
    assert ">91.67 →<" in drawn.svg  # gradient ascent, off the scale
    drawn = steps(some_points(), some_losses(), "removal", "reload")
    assert drawn.finding == (
        "Loss on the removed records: 0.01 trained, 0.1 ascended, 4 re-initialised, 0.38 at the end; retraining gives "
        "1 nats."  # 0.38: the mean of 0.25 and of 0.5, where the second seed had ended
    )
    drawn = resets(RESETS, "removal", "reload")  # (0.3 * 90 + 0.6 * 10) / 100
    assert drawn.finding == (
        "33.0 % of all entries were re-initialised: most of head.weight (60.0 %), least of conv.weight (30.0 %)."
    )
    drawn = histograms(some_losses(), "removal", "reload")
    assert drawn.finding == (
        "The losses of removed and of test records overlap by 0 % for original, 50 % for RELOAD, 100 % for retrain "
        "(reference)."
    )


def test_roc_curves_are_those_of_scikit_learn():
    generator = np.random.default_rng(0)
    members, unseen = generator.exponential(1.0, 40), np.round(generator.exponential(2.0, 200), 1)  # with ties
    fpr, tpr, _ = roc_curve(np.repeat([1, 0], [40, 200]), -np.concatenate([members, unseen]), drop_intermediate=False)
    rates = np.array([0.0, 0.005, 0.01, 0.1, 0.5, 0.999, 1.0])
    expected = [tpr[fpr <= rate + 1e-9].max() for rate in rates]
    found = true_positives(members, unseen, rates)
    assert (found >= np.array(expected) - 1e-12).all()  # between two thresholds a tie may be cut more finely
    assert found[-1] == 1
    untied = generator.exponential(2.0, 200)
    fpr, tpr, _ = roc_curve(np.repeat([1, 0], [40, 200]), -np.concatenate([members, untied]), drop_intermediate=False)
    assert true_positives(members, untied, rates) == pytest.approx([tpr[fpr <= rate + 1e-9].max() for rate in rates])


def test_the_roc_figure_states_how_many_are_found():
    losses = [
        Loss("removal", m, 0, "test", 0.1 + k / 100) for m in ("original", "reload", "retrain") for k in range(200)
    ]
    for method, low in {"original": 25, "reload": 5, "retrain": 1}.items():
        values = [0.01] * low + [5.0] * (50 - low)
        losses += [Loss("removal", method, 0, "forget", value) for value in values]
    assert roc(losses, "removal", "reload").finding == (
        "At a false-positive rate of 10 %, the loss alone gives away removed records: 50.0 % for original, 10.0 % for "
        "RELOAD, 2.0 % for retrain (reference)."
    )
    assert roc(losses[:10], "removal", "reload") is None
    few = [loss for loss in losses if loss.split == "forget" or round(100 * loss.loss) < 109]
    assert roc(few, "removal", "reload").finding == ""


def test_the_tradeoff_numbers_every_method_once_a_panel():
    many = [replace(r, method=f"method {k}") for k in range(18) for r in some_rows() if r.method == "reload"]
    drawn = tradeoff(summarise([*some_rows(), *many]), "removal", "reload")
    assert drawn.finding == "RELOAD: ΔFA 3.00 points, TA 90.00 %, Cost 0.250 ratio."
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawn.svg)
    listed = [text.split(maxsplit=1) for text in texts if re.fullmatch(r"\d+ +\D.*", text)]
    assert [name for _, name in listed][:2] == ["original", "RELOAD"]
    assert len(listed) == 22
    costless = sum(name.startswith("original") for _, name in listed)
    numbers = [text for text in texts if text in {number for number, _ in listed}]
    assert len(numbers) >= 2 * len(listed) - costless
    assert tradeoff(summarise(some_rows()), "label-correction", "reload") is None


def test_there_is_no_figure_without_data():
    assert distances(summarise(some_rows()), "label-correction", "reload") is None
    assert steps([], [], "removal", "reload") is None
    assert resets(RESETS, "removal", "fine-tune") is None
    assert histograms([], "removal", "reload") is None


def test_samples_are_a_picture_each_with_its_class_above_its_correction():
    grey, coloured = np.zeros((3, 1, 4, 4), np.uint8), np.zeros((2, 3, 4, 4), np.uint8)
    stored = {
        "class/forget": grey, "class/forget labels": np.array([7, 7, 7]),
        "labels corrected/forget": coloured, "labels corrected/forget labels": np.array([1, 2]),
        "labels corrected/corrected": coloured, "labels corrected/corrected labels": np.array([3, 4]),
    }  # fmt: skip
    drawn = samples(stored, "class")
    assert drawn.heading == "Some of the removed records"
    assert (drawn.svg.count("<image"), drawn.svg.count("class 7")) == (3, 3)
    drawn = samples(stored, "labels corrected")
    assert drawn.svg.count("<image") == 4
    assert re.findall(r"class (\d)<", drawn.svg) == ["1", "2", "3", "4"]
    assert "above as the original was trained on them, below as they are after the correction" in drawn.caption
    assert samples(stored, "removal") is None


def test_figures_leave_matplotlib_alone_and_ignore_its_settings():
    before = dict(mpl.rcParams)
    plain = resets(RESETS, "removal", "reload").svg
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "pink"}):
        assert resets(RESETS, "removal", "reload").svg == plain
    assert dict(mpl.rcParams) == before
    assert "var(--ink)" in plain
    assert not re.search(r"#[0-9a-f]{6}\b", plain.replace("url(#", "").replace('href="#', "").replace('id="', ""))
