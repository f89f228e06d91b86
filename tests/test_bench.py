"""The runner of experiments: stages done once, whatever kills them, and rows that do not depend on who made them."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from expunge.bench import experiments, judging, stages, steps, tasks, workers
from expunge.bench.printed import printed
from expunge.bench.runner import Serial, carry_out
from expunge.bench.stages import STANDARDS, Contender, tuning_of
from expunge.bench.store import Store, read_json, write_json
from expunge.bench.tasks import Scenario
from expunge.bench.workers import RayCluster
from expunge.cli import main
from expunge.errors import ConfigError, IncompleteRun, MissingExtra, NotFinite
from expunge.files import write_text
from expunge.report import tables
from expunge.rows import read_rows, write_rows
from tests.tiny_bench import CROSS, DIGITS, FILE, RECIPE, TINY, TWO, run, tiny, values


def test_an_experiment_on_digits_leaves_rows_settings_and_facts_of_everyone(unbroken):
    rows = read_rows(unbroken / "rows.csv")
    assert {row.method for row in rows} == {"original", "retrain", "retrain again", "reload", "ssd"}
    assert {row.seed for row in rows} == {0, 1}
    attacks = {"FMIA", "AUC", "ΔFMIA", "ΔAUC"}  # four removed records are too few to attack
    assert {row.metric for row in rows if row.method == "reload"} == set(judging.metrics_of(DIGITS.scenario)) - attacks
    assert {(row.method, row.blind) for row in rows if row.method in ("reload", "ssd")} == {
        ("reload", True),
        ("ssd", False),
    }
    found = {(row.method, row.metric, row.seed): row.value for row in rows}
    for seed in (0, 1):
        assert found["reload", "ΔFE", seed] == pytest.approx(
            abs(found["reload", "FE", seed] - found["retrain", "FE", seed])
        )
        assert found["retrain", "Work", seed] == 1
        assert ("retrain", "NSKL", seed) not in found
        assert found["retrain again", "NSKL", seed] > 0
    chosen = read_json(unbroken / "settings.json")["settings"]["random 10 %"]
    assert set(chosen) == {"reload", "ssd"}
    assert 0.05 <= chosen["reload"]["settings"]["reset_fraction"] <= 0.8
    assert "reset_count" in (unbroken / "facts.csv").read_text(encoding="utf-8")
    assert read_json(unbroken / "config.json")["seeds"] == [0, 1]


def test_every_search_of_an_entry_has_its_settings(tmp_path):
    ways = ({}, {"cached_loss": "logit_margin"}, {"tuned": "blind"})
    contenders = tuple(Contender(name=f"{way}", entry="natural-ascent", **way) for way in ways)
    several = replace(TINY, tasks=(replace(TINY.tasks[0], dataset="cifar10", train=3000),), contenders=contenders)
    store = Store(tmp_path)
    for number, stage in enumerate(several.evaluations([0])[-3:]):
        folder = store.folder(tuning_of(stage))
        write_json(folder / "trials.json", {"best": {"step": number}, "trials": [{"score": number}]})
        (folder / "DONE").touch()
    (found,) = experiments.settings(several, store)["settings"].values()
    names = ("natural-ascent", "natural-ascent, logit_margin", "natural-ascent, blind")
    assert found == {name: {"settings": {"step": n}, "score": n} for n, name in enumerate(names)}


def test_the_work_of_reload_counts_both_gradients(unbroken):
    """By hand: 40 records cached, 36 passed for the difference, then the epochs of fine-tuning with their looks."""
    root = unbroken.parent
    stage = next(e for e in TINY.evaluations([0]) if e.contender.name == "reload")
    trace = read_json(Store(root).folder(stage.needs["model"]) / "trace.json")
    steps_taken = len(trace["epoch_ends"]) * 36
    assert trace["backwarded"] == 36 + steps_taken
    work = next(
        row.value
        for row in read_rows(unbroken / "rows.csv")
        if (row.method, row.metric, row.seed) == ("reload", "Work", 0)
    )
    assert work == pytest.approx((3 * (40 + 36 + steps_taken) + trace["forwarded"]) / (3 * RECIPE.epochs * 36))


def but_for_ssd(error):
    """Unlearning as it is, in which one method raises an error."""
    real = steps.unlearn

    def raises(model, given, config, *, seed):
        if type(config).__name__ == "SSD":
            raise error
        return real(model, given, config, seed=seed)

    return raises


def test_a_method_that_breaks_down_is_a_fact_and_not_a_row_and_the_run_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(steps, "unlearn", but_for_ssd(NotFinite("the loss became nan in epoch 1")))
    folder = run(TINY, tmp_path)
    assert "ssd" not in {row.method for row in read_rows(folder / "rows.csv")}
    assert "random 10 %,ssd,0,failed,the loss became nan in epoch 1" in (folder / "facts.csv").read_text(
        encoding="utf-8"
    )
    write_text(tmp_path / "mine.py", FILE)
    for command in ("run", "table"):
        assert main(["bench", command, str(tmp_path / "mine.py"), "--seeds", "2", "--out", str(tmp_path)]) == 0
        said = capsys.readouterr().out
        assert "ssd on random 10 %, seed 0, 1: no rows: the loss became nan in epoch 1\n" in said


def test_finite_weights_whose_outputs_are_not_are_a_fact_too(tmp_path, monkeypatch):
    real = steps.unlearn

    def wrecks(model, given, config, *, seed):
        done = real(model, given, config, seed=seed)
        if type(config).__name__ == "SSD":
            for p in done.model.parameters():
                p.data.fill_(1e30)
        return done

    monkeypatch.setattr(steps, "unlearn", wrecks)
    folder = run(TINY, tmp_path)
    assert "ssd" not in {row.method for row in read_rows(folder / "rows.csv")}
    said = (folder / "facts.csv").read_text(encoding="utf-8")
    assert "random 10 %,ssd,0,failed,the model's logits are NaN or infinite for" in said


def test_a_mistake_of_which_all_trials_fail_ends_the_search_and_not_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "unlearn", but_for_ssd(ConfigError("ssd returned None. Return the model.")))
    with pytest.raises(IncompleteRun, match=r"(?s)tune ssd .*: ssd returned None. Return the model"):
        run(TINY, tmp_path)
    done = experiments.evaluated(TINY, [0], Store(tmp_path))
    assert {stage.contender.name for stage in done} == {"original", "retrain", "retrain again", "reload"}


def test_a_run_says_whose_model_is_destroyed(tmp_path):
    far = Contender(name="too far", entry="reload", settings=(("priming_lr", 1e9),), tuned=False)
    folder = run(tiny(contenders=(far,)), tmp_path)
    assert "too far" in {row.method for row in read_rows(folder / "rows.csv")}
    store = Store(tmp_path)
    done = experiments.evaluated(tiny(contenders=(far,)), [0], store)
    assert experiments.failures(done, store) == ["too far on random 10 %, seed 0: the model is destroyed"]


def test_a_correction_is_judged_by_accuracies_with_and_without_the_trigger(tmp_path):
    task = replace(DIGITS, scenario=CROSS)
    folder = run(replace(TINY, tasks=(task,), contenders=TWO[:1], shown=("NSKL",)), tmp_path)
    found = {row.metric for row in read_rows(folder / "rows.csv") if row.method == "reload"}
    assert {"TA", "TA with trigger", "Acc_corr", "Accuracy on corrected", "NSKL", "FSKL", "Cost", "Work"} <= found
    assert found == set(judging.metrics_of(CROSS))


def test_the_figures_of_the_paper_stand_beside_the_measured_ones(unbroken, capsys):
    rows = printed("table1", "random 10 %")
    found = {(row.method, row.metric): (row.value, row.unit) for row in rows}
    assert found["reload", "ΔFA"] == (0.3, "points")
    assert found["salun", "ΔFMIA"] == (7.39, "%")
    assert found["retrain", "FA"] == (74.89, "%")
    assert ("retrain", "ΔFA") not in found
    (shown,) = experiments.shown(replace(TINY, printed=rows), read_rows(unbroken / "rows.csv"))
    assert (shown.scenario, shown.metrics) == ("random 10 %", ("ΔFE", "NSKL"))
    assert {row.source for row in shown.rows} == {"measured", "paper, Table 1"}
    assert "FE" in {row.metric for row in shown.rows}  # which ΔFE is tested by
    with pytest.raises(ConfigError, match=r"table='table9': printed.toml has table1, table2, table3"):
        printed("table9", "x")


def test_the_commands_run_show_and_compare(tmp_path, monkeypatch, capsys, unbroken):
    file = tmp_path / "tiny.py"
    file.write_text(FILE, encoding="utf-8")
    out = str(unbroken.parent)
    named = [str(file), "--seeds", "2", "--out", out]
    assert main(["bench", "status", *named]) == 0
    assert "all" in capsys.readouterr().out
    assert main(["bench", "run", *named]) == 0
    assert "RELOAD" in capsys.readouterr().out
    assert main(["bench", "table", *named, "--format", "markdown"]) == 0
    assert "| RELOAD" in capsys.readouterr().out
    kept = {path: path.read_bytes() for path in unbroken.iterdir()}
    assert "Missing" not in capsys.readouterr().out
    assert main(["bench", "table", str(file), "--seeds", "1", "--out", out]) == 0
    assert "Missing" not in capsys.readouterr().out
    assert main(["bench", "table", str(file), "--seeds", "4", "--out", out]) == 0
    assert "Missing: seed 2 (5 of 5 evaluations), seed 3 (5 of 5 evaluations). `expunge" in capsys.readouterr().out
    assert kept == {path: path.read_bytes() for path in unbroken.iterdir()}  # a table is only looked at
    capsys.readouterr()
    assert main(["bench", "diff", str(unbroken), str(unbroken)]) == 0
    assert "identical of" in capsys.readouterr().out
    other = tmp_path / "rows.csv"
    write_rows(other, [replace(each, value=each.value + 1) for each in read_rows(unbroken / "rows.csv")])
    assert main(["bench", "diff", str(unbroken), str(other)]) == 0
    assert " changed of " in capsys.readouterr().out


def test_without_ray_its_absence_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'expunge\[cluster\]'.*--jobs N"):
        RayCluster(Store(tmp_path))


@pytest.mark.slow
def test_ray_gives_the_same_rows_and_a_killed_worker_costs_nothing(tmp_path, unbroken, monkeypatch):
    pytest.importorskip("ray")
    marker = tmp_path / "killed"

    def killed_once(text):
        if not marker.exists() and '"step": "tune"' in text:
            marker.write_text("", encoding="utf-8")
            os.kill(os.getpid(), signal.SIGKILL)
        from expunge.bench import workers as there  # in a process of Ray: nothing is patched there

        return there.serve_one(text)

    monkeypatch.setattr(workers, "serve_one", killed_once)
    said = []
    store = Store(tmp_path / "out")
    carry_out(TINY.evaluations([0]), store, RayCluster(store, jobs=2), said.append)
    assert values(experiments.gather(TINY, [0], store)) == values(unbroken)
    assert sum(line.startswith("begun again: tune") for line in said) == 1


def test_of_several_tasks_the_leading_metric_is_put_into_one_table(tmp_path, capsys, monkeypatch):
    more = replace(DIGITS, scenario=Scenario(kind="random", amount=0.2))
    experiment = replace(tiny(DIGITS, more, contenders=()), leading="ΔFE")
    folder = run(experiment, tmp_path)
    *single, together = experiments.shown(experiment, read_rows(folder / "rows.csv"))
    assert [each.scenario for each in single] == ["random 10 %", "random 20 %"]
    assert (together.scenario, together.metrics) == ("all scenarios", ("ΔFE, random 10 %", "ΔFE, random 20 %"))
    assert {each.metric.partition(",")[0] for each in together.rows} == {"FE", "ΔFE"}
    assert len(tables(*together)[0].metrics) == 2
    assert len(list(experiments.shown(TINY, read_rows(folder / "rows.csv")))) == 2  # no leading metric, no such table


def test_images_of_ones_own_take_part_from_a_file(tmp_path):
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 2
    pixels = (generator.integers(0, 128, (60, 8, 8, 3)) + 100 * labels[:, None, None, None]).astype(np.uint8)
    parts = {"train_images": pixels[:40], "train_labels": labels[:40], "test_images": pixels[40:]}
    np.savez(tmp_path / "pets.npz", **parts, test_labels=labels[40:])
    own = tiny(replace(DIGITS, dataset="pets.npz", train=0), contenders=())
    with pytest.raises(ConfigError, match=r"pets\.npz is read from files\. Say where .* EXPUNGE_DATA\.$"):
        tasks.images(own.tasks[0], None)
    store = Store(tmp_path / "out", tmp_path)
    planned = replace(own, tasks=(tasks.located(own.tasks[0], tmp_path),))
    carry_out(planned.evaluations([0]), store, Serial(store))
    rows = read_rows(experiments.gather(planned, [0], store) / "rows.csv")
    assert {(row.dataset, row.method) for row in rows} == {("pets.npz", name) for name in STANDARDS}
    assert next(row.n for row in rows if row.split == "retain") == 36


def test_other_seeds_and_an_edited_method_leave_the_rows_of_before_alone(unbroken, monkeypatch):
    store = Store(unbroken.parent)
    kept = (unbroken / "rows.csv").read_bytes()
    fewer = experiments.gather(TINY, [0], store)
    assert {row.seed for row in read_rows(fewer / "rows.csv")} == {0}
    stages._key.cache_clear()
    monkeypatch.setattr(stages, "_source", lambda entry: "edited")
    edited = experiments.gather(TINY, [0, 1], store)
    stages._key.cache_clear()
    assert {row.method for row in read_rows(edited / "rows.csv")} == {*STANDARDS}
    assert len({unbroken, fewer, edited}) == 3
    assert kept == (unbroken / "rows.csv").read_bytes()


def test_before_anything_is_done_the_table_says_so(tmp_path, capsys):
    file = tmp_path / "tiny.py"
    file.write_text(FILE, encoding="utf-8")
    assert main(["bench", "table", str(file), "--out", str(tmp_path)]) == 0
    assert "Nothing of tiny is done yet" in capsys.readouterr().out


def test_paths_of_results_are_short_and_say_what_they_are(tmp_path):
    stage = TINY.evaluations([0])[3]
    assert Store(Path("x")).folder(stage).name.startswith("evaluate-")
    assert len(Store(Path("x")).folder(stage).name) < 32
