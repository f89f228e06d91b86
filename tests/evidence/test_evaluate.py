"""What `expunge evaluate` measures and stores beside its rows, and what it refuses."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expunge import Examples
from expunge.bench.inputs import salt_of
from expunge.cli import evaluation, main
from expunge.errors import ConfigError
from expunge.provenance import file_hash, record_hashes
from expunge.report.stored import read_run
from expunge.rows import read_rows
from tests.cli import RELOAD, SETUP
from tests.evidence import SALT, evaluate
from tests.reported import Page


def test_retrained_models_are_a_distribution_of_pairs_and_distances(folder):
    rows = read_rows("run/rows.csv")
    seeds = {}
    for row in rows:
        seeds.setdefault((row.method, row.metric), []).append(row.seed)
    assert seeds["reload", "ΔFA"] == seeds["original", "NSKL"] == [0, 1, 2]
    assert seeds["retrain again", "NSKL"] == [0, 1, 2]  # the three pairs of three models
    assert seeds["reload", "FA"] == [0]
    value = {(row.method, row.metric, row.seed): row.value for row in rows}
    for k in range(3):
        assert value["reload", "ΔFE", k] == pytest.approx(abs(value["reload", "FE", 0] - value["retrain", "FE", k]))
    pairs = [(0, 1), (0, 2), (1, 2)]
    for number, (a, b) in enumerate(pairs):
        gap = abs(value["retrain", "FA", a] - value["retrain", "FA", b])
        assert value["retrain again", "ΔFA", number] == pytest.approx(gap)


def test_a_run_folder_of_evaluate_makes_every_kind_of_report(folder, capsys):
    for form, name in {"html": "html", "markdown": "md", "latex": "tex", "csv": "csv"}.items():
        assert main(["report", "run", "--format", form]) == 0
        assert Path(capsys.readouterr().out.strip()) == Path(f"run/report.{name}")
    text = Path("run/report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert "3 retrained models, the noise floor over 3 pairs of them" in text
    assert "over seeds with 95 % intervals" not in text


def test_json_of_evaluate_holds_means_intervals_and_verdicts(folder, capsys):
    assert evaluate("--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert {"u.safetensors", "w.safetensors (original)", "noise floor", "r2.safetensors (reference)"} < report.keys()
    found = {each["metric"]: each for each in report["u.safetensors"]}
    rows = [row.value for row in read_rows("run/rows.csv") if (row.method, row.metric) == ("reload", "NSKL")]
    assert found["NSKL"]["value"] == pytest.approx(sum(rows) / 3)
    assert found["NSKL"]["state"] in ("within", "beyond", "open")
    assert found["NSKL"]["models"] == 3
    assert "state" not in found["NA"]


def test_evaluate_takes_the_trace_along_and_the_salt_stays_outside(folder, made):
    run = read_run("run")
    assert {fact.fact for fact in run.facts} >= {"removed_count", "reset_count", "stopped"}
    assert {reset.parameter for reset in run.resets} == {
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "3.weight",
        "3.bias",
    }
    assert run.trace["method"] == "reload"
    salt = Path("run.salt").read_text(encoding="utf-8").strip()
    assert len(bytes.fromhex(salt)) == 32
    assert (made / "run.salt").stat().st_mode & 0o077 == 0
    assert not [path for path in Path("run").iterdir() if salt in path.read_text(encoding="utf-8")]
    losses = [loss.loss for loss in run.losses if (loss.method, loss.split) == ("reload", "forget")]
    assert len(losses) == 6
    assert losses == sorted(losses)


def test_one_retrained_model_is_said_to_be_no_reference(folder, capsys):
    assert evaluate(retrained=("r0.safetensors",)) == 0
    assert "One retrained model is no reference" in capsys.readouterr().out


def test_models_that_were_not_retrained_are_no_reference(folder, capsys):
    options = ["evaluate", "setup.py", "--weights", "u.safetensors", "--retrained", "r0.safetensors"]
    unlearned = ["unlearn", "setup.py", "--weights", "w.safetensors", "--cache", "c.safetensors"]
    assert main([*unlearned, "--out", "other.safetensors", "--seed", "5", *RELOAD]) == 0
    capsys.readouterr()
    assert main([*options, "other.safetensors"]) == 2
    assert "other.safetensors was made by reload and not retrained" in capsys.readouterr().err
    assert main([*options, "w.safetensors"]) == 2  # though it was trained from scratch, on what has been removed since
    assert "w.safetensors was not retrained: it is the model that u.safetensors was unlearned from" in (
        capsys.readouterr().err
    )
    save_file(load_file("other.safetensors"), "silent.safetensors")  # of another program: it says nothing of itself
    assert main([*options, "silent.safetensors"]) == 0


def test_evaluate_refuses_a_folder_that_exists_or_whose_salt_does(folder, capsys):
    assert evaluate("--out", "run") == 2
    assert "run exists, and evidence of it may too" in capsys.readouterr().err
    Path("other.salt").write_text(SALT)
    assert evaluate("--out", "other") == 2
    assert "other.salt exists" in capsys.readouterr().err
    assert not Path("other").exists()


def test_a_trace_of_other_weights_is_refused(folder, capsys):
    changed = load_file("u.safetensors")
    changed["0.bias"] += 1
    save_file(changed, "u.safetensors")
    assert evaluate("--out", "other") == 2
    assert "tells of weights with another hash than u.safetensors" in capsys.readouterr().err
    Path("u.trace.json").write_text("{")
    assert evaluate("--out", "other") == 2
    assert "u.trace.json cannot be read as a trace" in capsys.readouterr().err
    Path("u.trace.json").unlink()
    assert evaluate("--out", "other") == 0
    assert not read_run("other").trace
    assert {row.method for row in read_rows("other/rows.csv")} == {"u", "original", "retrain", "retrain again"}


def test_another_original_than_was_unlearned_is_refused(folder, capsys):
    Path("w.safetensors").write_bytes(Path("start.safetensors").read_bytes())
    assert evaluate("--out", "other") == 2
    assert "other weights than w.safetensors were unlearned" in capsys.readouterr().err


def test_an_evaluation_that_fails_leaves_nothing(folder, monkeypatch):
    monkeypatch.setattr("expunge.bench.evaluation.write_rows", lambda *_: (_ for _ in ()).throw(OSError("full")))
    before = sorted(folder.iterdir())
    assert evaluate("--out", "other") == 2
    assert sorted(path for path in folder.iterdir() if path.name != "__pycache__") == before


def test_files_that_change_while_they_are_measured_are_named_and_nothing_is_written(folder, monkeypatch, capsys):
    before, load = sorted(folder.iterdir()), evaluation.trained_model

    def replaced(loaded, path, device):
        model = load(loaded, path, device)
        Path("r1.safetensors").write_bytes(Path("r0.safetensors").read_bytes())
        return model

    monkeypatch.setattr(evaluation, "trained_model", replaced)
    assert evaluate("--out", "other") == 2
    assert re.search(r"r1\.safetensors was changed while .* leave its files alone", capsys.readouterr().err, re.S)
    assert sorted(path for path in folder.iterdir() if path.name != "__pycache__") == before


def test_the_hashed_records_are_those_that_were_measured(folder):
    records = "Examples(torch.full((6, 6), float(next(calls))), labels[:6])"
    code = f"def forget():\n    return {records}\n\ndef test():"
    varying = SETUP.replace("def test():", code).replace("loss_terms =", "calls = itertools.count()\nloss_terms =")
    Path("setup.py").write_text(f"import itertools\n{varying}", encoding="utf-8")
    Path("u.trace.json").unlink()
    assert evaluate("--out", "other") == 0
    salt = Path("other.salt").read_text().strip()
    split = next(
        each for each in json.loads(Path("other/inputs.json").read_text())["data"] if each["split"] == "forget"
    )
    names: dict = {}
    exec(SETUP, names)
    first = Examples(torch.zeros(6, 6), names["labels"][:6])  # the first call gave zeros, a second one would give ones
    assert split["salted_records"] == record_hashes(first, salt)


def test_of_a_model_without_a_trace_nobody_says_whether_it_was_made_blind(folder, capsys):
    Path("u.trace.json").unlink()
    assert evaluate("--out", "other") == 0
    rows = read_rows("other/rows.csv")
    assert {row.blind for row in rows if row.method == "u"} == {None}
    assert {row.blind for row in rows if row.method in ("retrain", "retrain again")} == {True}
    assert {row.blind for row in read_rows("run/rows.csv") if row.method == "reload"} == {True}
    assert main(["report", "other", "--format", "markdown"]) == 0
    assert re.search(r"^\| u +\| \? ", Path("other/report.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("salt", ["", "5a", "5a" * 31, "5a" * 33, "z" * 64])
def test_what_is_no_salt_of_256_bits_is_refused(tmp_path, salt):
    (tmp_path / "run.salt").write_text(f"{salt}\n")
    with pytest.raises(ConfigError, match=rf"run\.salt is no salt: it holds {len(salt)} characters.* Restore it"):
        salt_of(tmp_path / "run")
    (tmp_path / "run.salt").write_text(f"{SALT}\n")
    assert salt_of(tmp_path / "run") == SALT


def test_the_same_model_does_not_count_twice(folder, capsys):
    Path("copy.safetensors").write_bytes(Path("r0.safetensors").read_bytes())
    models = ["--retrained", "r0.safetensors", "r1.safetensors", "copy.safetensors"]
    assert main(["evaluate", "setup.py", "--weights", "u.safetensors", *models]) == 2
    assert "copy.safetensors and r0.safetensors are the same weights" in capsys.readouterr().err
    assert main(["evaluate", "setup.py", "--weights", "r1.safetensors", *models[:-1]]) == 2
    assert "r1.safetensors and r1.safetensors are the same weights" in capsys.readouterr().err
    assert evaluate(retrained=("r0.safetensors", "w.safetensors")) == 2
    assert "w.safetensors and w.safetensors are the same weights" in capsys.readouterr().err


def test_what_the_setup_file_imports_from_beside_it_is_a_part_of_evidence(folder, capsys):
    text = Path("setup.py").read_text(encoding="utf-8")
    (folder / "company").mkdir()
    (folder / "company" / "losses.py").write_text("from expunge import cross_entropy as ours\n", encoding="utf-8")
    Path("setup.py").write_text(f"from company.losses import ours\n{text}", encoding="utf-8")
    unlearned = ["--weights", "w.safetensors", "--out", "u.safetensors", "--replace", "fine-tune"]
    assert main(["unlearn", "setup.py", *unlearned]) == 0
    noted = json.loads(Path("u.trace.json").read_text(encoding="utf-8"))["provenance"]["files"]
    assert noted["imported company/losses.py"] == file_hash(folder / "company" / "losses.py")
    assert evaluate("--out", "again") == 0
    assert main(["evidence", "again"]) == 0
    evidence = json.loads(Path("again/evidence.json").read_text(encoding="utf-8"))
    files = {entry["path"]: entry["role"] for entry in evidence["files"]}
    assert files["../company/losses.py"] == "imported by the setup file"
    assert main(["evidence", "again", "--verify"]) == 0
    (folder / "company" / "losses.py").write_text("ours = None\n", encoding="utf-8")
    capsys.readouterr()
    assert main(["evidence", "again", "--verify"]) == 3
    assert "../company/losses.py: SHA-256 is" in capsys.readouterr().err


def test_models_of_another_deletion_are_refused(folder, capsys):
    text = Path("setup.py").read_text(encoding="utf-8")
    more = text + "\n\nearlier = retain\n\ndef retain():\n    return earlier().without(torch.arange(6, 9))\n"
    Path("setup.py").write_text(more, encoding="utf-8")
    assert evaluate() == 2
    assert "u.safetensors was made when 54 records were left, and retain() has 51" in capsys.readouterr().err
    Path("u.trace.json").unlink()
    assert evaluate() == 2
    assert "r0.safetensors was made when 54 records were left" in capsys.readouterr().err
    for number in range(3):
        Path(f"r{number}.trace.json").unlink()
    capsys.readouterr()
    assert evaluate("--out", "foreign") == 0  # models of other programs say nothing
    said = "r0.safetensors has no trace beside it: nothing tells on which records it was trained."
    assert said in capsys.readouterr().err
    assert any(said in gap for gap in not_shown("foreign"))


def not_shown(run):
    assert main(["evidence", run]) == 0
    return json.loads(Path(run, "evidence.json").read_text(encoding="utf-8"))["not_shown"]


def test_models_of_another_deletion_of_as_many_are_refused_as_long_as_their_salt_is_there(folder, capsys):
    text = Path("setup.py").read_text(encoding="utf-8")
    others = "\n\nfrom expunge import Examples\n\ndef retain():\n    return data.without(torch.arange(7, 13))\n"
    Path("setup.py").write_text(text + others, encoding="utf-8")
    for name in ("u", *(f"r{number}" for number in range(3))):
        assert evaluate() == 2
        told = f"{name}.safetensors was made when other records were left than those of retain(), as many"
        assert told in capsys.readouterr().err
        Path(f"{name}.safetensors.salt").unlink()
    assert evaluate("--out", "unsalted") == 0
    gaps = " ".join(not_shown("unsalted"))
    assert gaps.count("records of retain() were left: its salt, ") == 4
    assert "setup.py is not the setup file that u.safetensors was made with: its SHA-256 was " in gaps


def test_of_a_deletion_as_it_was_nothing_is_doubted(folder):
    assert evaluate("--out", "again") == 0
    assert not any("nothing tells" in gap or "is not the setup file" in gap for gap in not_shown("again"))
    known = [gap for gap in not_shown_of_facts("again", compared=0) if "model code, loss and preprocessing" in gap]
    assert len(known) == 1


def not_shown_of_facts(run, **facts):
    path = Path(run, "trace.json")
    trace = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(trace | {"facts": trace["facts"] | facts}), encoding="utf-8")
    assert main(["evidence", run, "--replace"]) == 0
    return json.loads(Path(run, "evidence.json").read_text(encoding="utf-8"))["not_shown"]


def test_an_original_that_was_trained_by_retraining_may_be_measured(folder):
    trace = json.loads(Path("w.trace.json").read_text(encoding="utf-8"))
    Path("w.trace.json").write_text(json.dumps(trace | {"retained": 60}), encoding="utf-8")
    assert main(["evaluate", "setup.py", "--weights", "w.safetensors", "--retrained", "r0.safetensors"]) == 0


@pytest.mark.parametrize(
    ("split", "said"),
    [
        (
            "def forget():\n    return retain().only(torch.arange(6, 10))",
            "4 of 4 records of forget() are in retain() as",
        ),
        ("def test():\n    return retain()", "54 of 54 records of test() are in retain() as well, number for number"),
        ("def test():\n    return Examples(*forget().tensors)", "6 of 6 records of test() are in forget() as well"),
    ],
)
def test_records_that_are_in_two_splits_are_said_and_stand_in_evidence(folder, capsys, split, said):
    text = Path("setup.py").read_text(encoding="utf-8")
    Path("setup.py").write_text(f"{text}\nfrom expunge import Examples\n\n{split}\n", encoding="utf-8")
    assert evaluate("--out", "twice") == 0
    assert said in capsys.readouterr().err
    assert main(["evidence", "twice"]) == 0
    not_shown = json.loads(Path("twice/evidence.json").read_text(encoding="utf-8"))["not_shown"]
    assert any(said in gap for gap in not_shown)


def test_of_a_correction_forget_has_what_is_left(folder, capsys):
    trace = json.loads(Path("u.trace.json").read_text(encoding="utf-8"))
    trace["facts"]["removed_count"] = 0
    Path("u.trace.json").write_text(json.dumps(trace), encoding="utf-8")
    text = Path("setup.py").read_text(encoding="utf-8")
    Path("setup.py").write_text(f"{text}\n\ndef forget():\n    return retain().only(torch.arange(6, 10))\n")
    assert evaluate("--out", "corrected") == 0
    assert "of forget() are in retain()" not in capsys.readouterr().err
    assert main(["unlearn", "setup.py", "--weights", "w.safetensors", "--out", "f.safetensors", "fine-tune"]) == 0
    capsys.readouterr()
    command = ["evaluate", "setup.py", "--weights", "f.safetensors"]  # which does not know what was corrected
    assert main(command) == 0
    assert "4 of 4 records of forget() are in retain() as well, number for number. If they were corrected and not" in (
        capsys.readouterr().err
    )


def test_what_the_unlearning_warned_of_stands_in_evidence(folder):
    trace = json.loads(Path("u.trace.json").read_text(encoding="utf-8")) | {"warnings": ["reload: it means nothing."]}
    Path("u.trace.json").write_text(json.dumps(trace), encoding="utf-8")
    assert evaluate("--out", "doubted") == 0
    assert main(["evidence", "doubted"]) == 0
    evidence = json.loads(Path("doubted/evidence.json").read_text(encoding="utf-8"))
    assert evidence["unlearning"]["warnings"] == ["reload: it means nothing."]
    assert evidence["unlearning"]["seed"] == 0
    assert any("It warned: reload: it means nothing." in gap for gap in evidence["not_shown"])
    assert "It warned: reload: it means nothing." in Path("doubted/evidence.html").read_text(encoding="utf-8")
