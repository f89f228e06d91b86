import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from expunge.bench import tuning
from expunge.bench.tuning import Trial, propose, tune
from expunge.errors import ConfigError, CorruptData, MissingExtra, NotFinite
from expunge.methods import METHODS
from expunge.space import Choice, Range

SPACE = {"lr": Range(1e-4, 1.0, log=True), "k": Range(1, 7), "schedule": Choice(("cosine", "one-cycle"))}


def bowl(settings):
    """Lowest at lr = 0.01, k = 3, cosine."""
    wrong = settings["schedule"] != "cosine"
    return abs(math.log10(settings["lr"]) + 2) + abs(settings["k"] - 3) / 3 + wrong


def searched(journal, trials=16, objective=bowl, **options):
    return tune(SPACE, objective, trials=trials, seed=options.pop("seed", 0), journal=journal, **options)


def without_times(trials):
    return [(t.number, t.settings, t.score, t.failure) for t in trials]


def test_an_interrupted_search_goes_on_to_the_same_trials(tmp_path):
    unbroken = searched(tmp_path / "a.jsonl")
    tried = []

    def interrupted(settings):
        if len(tried) == 12:  # behind the ten random ones, so that the sampler has begun to learn
            raise KeyboardInterrupt
        tried.append(settings)
        return bowl(settings)

    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path / "b.jsonl", objective=interrupted)
    again = []
    resumed = searched(tmp_path / "b.jsonl", objective=lambda settings: again.append(settings) or bowl(settings))
    assert len(again) == 4
    assert without_times(resumed) == without_times(unbroken)


def test_a_process_killed_in_the_middle_loses_the_running_trial_only(tmp_path):
    program = (
        "import os, sys; from pathlib import Path\n"
        "from expunge.bench.tuning import tune; from expunge.space import Range\n"
        "count = []\n"
        "def objective(settings):\n"
        "    count.append(1)\n"
        "    if len(count) == 3: os._exit(9)\n"
        "    return settings['x']\n"
        "tune({'x': Range(0.0, 1.0)}, objective, trials=5, seed=0, journal=Path(sys.argv[1]))"
    )
    journal = tmp_path / "j.jsonl"
    done = subprocess.run([sys.executable, "-c", program, str(journal)], check=False, env=os.environ)
    assert done.returncode == 9
    assert len(journal.read_text(encoding="utf-8").splitlines()) == 1 + 2
    calls = []
    space = {"x": Range(0.0, 1.0)}
    found = tune(space, lambda s: calls.append(s) or s["x"], trials=5, seed=0, journal=journal)
    assert len(calls) == 3
    assert sorted(trial.number for trial in found) == [0, 1, 2, 3, 4]


def test_a_write_that_fails_leaves_the_journal_as_it_was(tmp_path, monkeypatch):
    journal = tmp_path / "j.jsonl"
    searched(journal, trials=2)
    before = journal.read_bytes()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        searched(journal, trials=3)
    assert journal.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["j.jsonl"]


def test_the_best_comes_first_and_the_search_learns(tmp_path):
    found = searched(tmp_path / "j.jsonl", trials=40)
    assert [t.score for t in found] == sorted(t.score for t in found)
    by_number = sorted(found, key=lambda t: t.number)
    at_random, learned = by_number[:10], by_number[20:]
    assert len({t.settings["lr"] for t in at_random}) == 10
    assert np.mean([t.score for t in learned]) < 0.7 * np.mean([t.score for t in at_random])
    assert found[0].score < 0.5


def test_another_seed_tries_other_settings(tmp_path):
    ones, others = searched(tmp_path / "a", trials=4), searched(tmp_path / "b", trials=4, seed=1)
    assert {t.settings["lr"] for t in ones}.isdisjoint(t.settings["lr"] for t in others)


def test_a_budget_is_the_same_for_all_who_ask_for_the_same(tmp_path):
    journal, calls = tmp_path / "j.jsonl", []
    searched(journal, trials=6)
    fewer = searched(journal, trials=4, objective=lambda s: calls.append(s) or bowl(s))
    assert not calls
    assert sorted(t.number for t in fewer) == [0, 1, 2, 3]
    assert len(searched(journal, trials=6, objective=lambda s: calls.append(s) or bowl(s))) == 6
    assert not calls


def test_no_trial_begins_when_the_time_is_over(tmp_path):
    assert searched(tmp_path / "j.jsonl", seconds=0.0) == []


def test_a_trial_that_fails_comes_last_and_the_search_goes_on(tmp_path):
    def breaks(settings):
        if settings["schedule"] == "cosine":
            raise NotFinite("the loss became nan")
        return math.nan if settings["k"] > 5 else bowl(settings)

    found = searched(tmp_path / "j.jsonl", trials=14, objective=breaks)
    assert len(found) == 14
    failed = [t for t in found if t.score == math.inf]
    assert found[-len(failed) :] == failed
    assert {t.failure for t in failed} == {"the loss became nan", "the score is NaN."}
    assert found == searched(tmp_path / "j.jsonl", trials=14, objective=bowl)  # read back as they were
    for line in (tmp_path / "j.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_optuna_draws_from_the_space_that_a_method_declares(method):
    for name, values in method.space.items():
        found = tuning.distribution(name, values)
        if isinstance(values, Choice):
            assert set(found.choices) == set(values.options)
            continue
        assert (found.low, found.high, found.log) == (values.low, values.high, values.log)
        drawn = values.draw(random.Random(0))
        assert found._contains(found.to_internal_repr(drawn))
        assert isinstance(drawn, int) == (type(found).__name__ == "IntDistribution")


def test_proposals_stay_inside_the_bounds_and_have_three_digits():
    space = {"x": Range(0.12345, 0.12346), "y": Range(1e-5, 1e-2, log=True), "whole": Range(1, 2)}
    done = []
    for number in range(15):
        settings = propose(space, done, 0)
        assert 0.12345 <= settings["x"] <= 0.12346
        assert settings["y"] == float(f"{settings['y']:.3g}")
        assert settings["whole"] in (1, 2)
        assert isinstance(settings["whole"], int)
        done.append(Trial(number, settings, settings["y"], 0.0))


def test_proposals_spread_as_random_search_does_before_they_learn():
    drawn = [propose({"x": Range(1e-4, 1.0, log=True)}, [], seed)["x"] for seed in range(100)]
    exponents = np.log10(drawn)
    assert abs(exponents.mean() + 2) < 3 * (4 / math.sqrt(12)) / math.sqrt(100)


def test_the_global_generators_are_left_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    propose(SPACE, [], 0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


@pytest.mark.parametrize("damage", [b"", b"not json\n", b"[]\n", b'{"a": 1}\n{"number": 0}\n', b"\xff\xfe\n"])
def test_a_damaged_journal_is_named_with_the_cure(damage, tmp_path):
    journal = tmp_path / "j.jsonl"
    journal.write_bytes(damage)
    with pytest.raises(CorruptData, match=r"j\.jsonl is no journal of trials, or damaged .*delete it"):
        searched(journal, trials=1)


@pytest.mark.parametrize("damage", ["cut", "a trial is missing", "a setting is missing"])
def test_a_journal_that_lacks_a_part_is_refused(damage, tmp_path):
    journal = tmp_path / "j.jsonl"
    searched(journal, trials=3)
    text = journal.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    damaged = {
        "cut": text[:-9],
        "a trial is missing": "".join(lines[:1] + lines[2:]),
        "a setting is missing": lines[0] + "".join(lines[1:]).replace('"k": ', '"kk": '),
    }
    journal.write_text(damaged[damage], encoding="utf-8")
    with pytest.raises(CorruptData, match="damaged"):
        searched(journal, trials=3)


def test_a_journal_of_another_search_is_refused(tmp_path):
    journal = tmp_path / "j.jsonl"
    searched(journal, trials=1, about={"weights": "abc"})
    same = {"weights": "abc"}
    for options, apart in (
        ({"seed": 1, "about": same}, "seed: 0 there, 1 here"),
        ({"about": {"weights": "x"}}, 'weights: "abc" there, "x" here'),
        ({"about": same | {"settings": {"fine_tune.epochs": 8}}}, "fine_tune.epochs: nothing there, 8 here"),
        ({"about": {}}, 'weights: "abc" there, nothing here'),
        ({"about": dict.fromkeys("abcde", 1)}, "a: nothing there, 1 here; b: .*; d: nothing there, 1 here; and 2 more"),
        ({"about": {"weights": "x" * 30}}, 'weights: "abc" there, "x{22}… here'),
        (
            {"about": same, "first": {"lr": 0.1, "k": 2, "schedule": "cosine"}},
            "lr: nothing there, 0.1 here; k: nothing",
        ),
    ):
        with pytest.raises(ConfigError, match=rf"another search, which .*\({apart}.*\)\. Name another journal"):
            searched(journal, trials=1, **options)


@pytest.mark.parametrize("learning_rate", [0.01, 5.0])  # inside the space, and outside
def test_the_settings_in_use_are_tried_first_and_the_best_is_never_worse(learning_rate, tmp_path):
    given = {"lr": learning_rate, "k": 3, "schedule": "cosine", "epochs": 9}
    found = searched(tmp_path / "j", trials=12, first=given)
    assert len(found) == 12
    trial = next(t for t in found if t.number == 0)
    assert trial.settings == {"lr": learning_rate, "k": 3, "schedule": "cosine"}
    assert found[0].score <= bowl(given)
    assert (found[0] == trial) == (learning_rate == 0.01)  # bowl(given) is 0
    again = searched(tmp_path / "j", trials=12, first=given, objective=lambda _: pytest.fail("tried again"))
    assert again == found


@pytest.mark.parametrize(
    ("values", "inside", "outside"),
    [
        (Range(0.1, 2.0), (0.1, 1, 2.0), (0.09, 2.1, None, "1", True)),
        (Range(1, 7), (1, 7), (0, 8, 1.5, None)),
        (Choice(("a", None)), ("a", None), ("b", 0)),
    ],
)
def test_a_space_knows_what_it_holds(values, inside, outside):
    assert all(values.holds(value) for value in inside)
    assert not any(values.holds(value) for value in outside)


def test_what_is_near_an_end_of_a_range_is_told():
    wide = Range(0.01, 1.0, log=True)
    assert [wide.near_an_end(value) for value in (0.0101, 0.0125, 0.013, 0.1, 0.75, 0.8, 1.0)] == [
        True, True, False, False, False, True, True,
    ]  # fmt: skip
    assert not wide.near_an_end(2.0)  # none of them
    assert not Range(1, 3).near_an_end(3)
    assert not Range(0.5, 0.5).near_an_end(0.5)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (lambda: Range(0.1, 0.01), r"Range\(0.1, 0.01\): give the smaller of two finite numbers first"),
        (lambda: Range(0.1, math.inf), r"Range\(0.1, inf\): give the smaller of two finite numbers"),
        (lambda: Range(0.0, 0.1, log=True), r"Range\(0.0, 0.1, log=True\): only numbers above 0 have a logarithm"),
        (lambda: Choice(()), r"Choice\(\(\)\): give a tuple of one value or more, as Choice\(\(1, 2\)\)"),
    ],
)
def test_a_space_of_nothing_is_refused(values, said):
    with pytest.raises(ConfigError, match=said):
        values()


def test_what_cannot_be_searched_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="trials=0: tuning needs at least one"):
        searched(tmp_path / "j", trials=0)
    with pytest.raises(ConfigError, match="search space is empty"):
        tune({}, bowl, trials=1, seed=0, journal=tmp_path / "j")
    with pytest.raises(ConfigError, match=r"x: \(1, 2\) cannot be tuned over"):
        propose({"x": Choice(((1, 2), (3,)))}, [], 0)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtra, match=r"expunge\[search\]"):
        searched(tmp_path / "j")
