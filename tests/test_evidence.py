import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expunge import Examples
from expunge.bench.inputs import salt_of
from expunge.cli import evaluation, main
from expunge.errors import ConfigError, MismatchError, MissingExtra
from expunge.metrics import membership
from expunge.provenance import file_hash, position_hashes, record_hashes, sources, together
from expunge.report.evidence import digest, verify, write_evidence
from expunge.report.stored import read_run
from expunge.rows import read_rows, write_rows
from tests.cli import RELOAD, SETUP
from tests.reported import Page

SECRET = 0.31415926  # in every removed record
SALT = "5a" * 32
EVALUATED = SETUP.replace(
    "loss_terms = cross_entropy",
    f"images[:6, 0] = {SECRET}\nloss_terms = cross_entropy",
).replace(
    "def test():",
    "def forget():\n    return data.only(torch.arange(6))\n\ndef test():",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in which a model was trained, unlearned and retrained three times, and all of it evaluated."""
    folder = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(membership, "DRAWS", 1)
        Path("setup.py").write_text(EVALUATED, encoding="utf-8")
        names: dict = {}
        exec(EVALUATED, names)
        save_file(names["model"](0).state_dict(), "start.safetensors")
        base = ["unlearn", "setup.py", "--weights"]
        assert main([*base, "start.safetensors", "--out", "w.safetensors", "retrain"]) == 0
        assert main(["cache", "setup.py", "--weights", "w.safetensors", "--out", "c.safetensors"]) == 0
        unlearned = ["--cache", "c.safetensors", "--out", "u.safetensors", *RELOAD]
        assert main([*base, "w.safetensors", *unlearned]) == 0
        for seed in range(3):
            assert (
                main([*base, "w.safetensors", "--seed", str(seed + 1), "--out", f"r{seed}.safetensors", "retrain"]) == 0
            )
        assert evaluate("--out", "run") == 0
    return folder


def evaluate(*more, retrained=("r0.safetensors", "r1.safetensors", "r2.safetensors")):
    command = ["evaluate", "setup.py", "--weights", "u.safetensors", "--original", "w.safetensors"]
    return main([*command, *(["--retrained", *retrained] if retrained else []), *more])


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """A copy of it, as the current folder."""
    for path in made.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            copy = tmp_path / path.relative_to(made)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(membership, "DRAWS", 1)
    return tmp_path


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# ── evaluate ─────────────────────────────────────────────────────────────────────────────────────────────────────────


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


# ── hashes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_record_has_the_same_hash_wherever_it_is_stored_and_another_with_another_salt():
    images = torch.arange(12.0).reshape(4, 3)
    data = Examples(images, torch.arange(4))
    hashes = record_hashes(data, SALT)
    assert len(set(hashes)) == 4
    assert record_hashes(data.without(torch.tensor([0, 2])), SALT) == [hashes[1], hashes[3]]
    batches = [(images[:3], torch.arange(3)), (images[3:], torch.arange(3, 4))]
    assert record_hashes(batches, SALT) == hashes
    assert not set(record_hashes(data, "00" * 32)) & set(hashes)
    assert together(hashes, SALT) == together(hashes[::-1], SALT) != together(hashes[1:], SALT)
    assert position_hashes(data.only(torch.tensor([2])), SALT) == [position_hashes(data, SALT)[2]]
    assert position_hashes(batches, SALT) == []


def test_records_that_differ_in_type_or_shape_alone_have_other_hashes():
    flat, square = torch.zeros(1, 4), torch.zeros(1, 2, 2)
    assert record_hashes([(flat,)], SALT) != record_hashes([(square,)], SALT)
    assert record_hashes([(flat,)], SALT) != record_hashes([(flat.to(torch.int32),)], SALT)


@pytest.mark.parametrize("batch", [(torch.zeros(2, 3), torch.zeros(3)), (torch.zeros(2), torch.tensor(1.0))])
def test_batches_without_single_records_are_refused(batch):
    with pytest.raises(ConfigError, match="single records cannot be told apart"):
        record_hashes([batch], SALT)


# ── evidence ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_evidence_says_what_was_asked_done_and_measured(folder):
    evidence = json.loads(write_evidence("run").read_text(encoding="utf-8"))
    (asked,) = evidence["asked"]
    assert asked["counts"] == [{"seed": 0, "removed_count": 6, "cached_count": 60, "said": "6 of 60"}]
    assert asked["measured_on"] == "54 retained, 6 removed and 60 test records"
    forget = next(entry for entry in evidence["data"] if entry["split"] == "forget")
    salt = Path("run.salt").read_text(encoding="utf-8").strip()
    names: dict = {}
    exec(EVALUATED, names)
    assert forget["salted_records"] == record_hashes(names["forget"](), salt)
    assert forget["salted_positions"] == position_hashes(names["forget"](), salt)
    roles = {entry["role"]: entry for entry in evidence["files"]}
    assert roles["weights before"]["sha256"] == file_hash("w.safetensors")
    assert roles["weights after"]["path"] == "../u.safetensors"
    assert evidence["code"]["unlearned_with"] == evidence["code"]["measured_with"] == sources()
    assert evidence["hashes_at_unlearning"]["cache"] == file_hash("c.safetensors")
    assert evidence["digest"] == digest(evidence)
    measured = {(line["method"], line["metric"]): line for line in evidence["measured"]}
    assert measured["reload", "NSKL"]["verdict"] in ("within", "beyond", "open")


def test_the_page_of_evidence_is_whole_and_stands_alone(folder):
    write_evidence("run")
    text = Path("run/evidence.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not re.search(r"https?://|<script|<link|@import", text)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert all(link.startswith("#") for link in page.links)
    assert "It is not proof of deletion" in text
    assert "6 of 60" in text


def test_evidence_holds_no_record(folder):
    write_evidence("run")
    names: dict = {}
    exec(EVALUATED, names)
    value = names["images"][0, 0]
    assert value == pytest.approx(SECRET)
    for name in ("evidence.json", "evidence.html", "inputs.json"):
        data = Path("run", name).read_bytes()
        assert b"31415" not in data
        assert value.numpy().tobytes() not in data
        assert value.numpy().tobytes().hex().encode() not in data


def test_what_was_not_shown_follows_from_what_was_measured(folder):
    def said(run):
        return " ".join(json.loads(write_evidence(run).read_text(encoding="utf-8"))["not_shown"])

    full = said("run")
    assert "not proof of deletion" in full
    assert "nothing was measured on them" not in full
    assert "noise floor. With one" not in full
    assert "an attack stronger than a regression on losses" in full
    assert "One unlearned model was measured" in full

    assert evaluate("--out", "one", retrained=("r0.safetensors",)) == 0
    assert "a noise floor. With one retrained model" in said("one")
    assert evaluate("--out", "none", retrained=()) == 0
    assert "No retrained model was measured" in said("none")

    blind = EVALUATED.replace("def forget():", "def gone():")
    Path("setup.py").write_text(blind, encoding="utf-8")
    assert evaluate("--out", "blind") == 0
    text = said("blind")
    assert "nothing was measured on them" in text
    assert "a membership attack finds. None was run" in text
    assert "The run stores no hashes of them" in text

    bare = Path("bare")
    bare.mkdir()
    for name in ("config.json", "env.json"):
        (bare / name).write_text("{}")
    write_rows(bare / "rows.csv", [row for row in read_rows("run/rows.csv") if row.method == "reload"])
    text = said("bare")
    assert "The run holds no trace of it" in text
    assert "The run does not say which files they are" in text
    assert "The model before it was not measured" in text


def test_evidence_that_fits_is_verified_again_and_again(folder, capsys):
    assert main(["evidence", "run"]) == 0
    first = capsys.readouterr().out
    assert file_hash("run/evidence.json") in first
    assert main(["report", "run", "--format", "csv"]) == 0  # drawn from the rest: no part of the evidence
    assert main(["evidence", "run", "--verify"]) == 0
    assert "verified" in capsys.readouterr().out


def test_what_was_not_checked_is_said(folder, capsys):
    write_evidence("run")
    assert main(["evidence", "run", "--verify"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not checked")]
    assert len(lines) == 1  # weights and setup file of the unlearning are among the files of the evaluation
    hashed = file_hash("c.safetensors")
    assert lines[0].startswith(f"not checked: the cache of the unlearning, SHA-256 {hashed}: no listed file has it. If")


def test_a_cache_that_was_destroyed_is_no_difference_and_said(folder, capsys):
    inputs = json.loads(Path("run/inputs.json").read_text(encoding="utf-8"))
    hashed = file_hash("c.safetensors")
    inputs["files"].append({"role": "gradient cache", "path": "../c.safetensors", "sha256": hashed, "bytes": 1})
    Path("run/inputs.json").write_text(json.dumps(inputs), encoding="utf-8")
    write_evidence("run")
    assert main(["evidence", "run", "--verify"]) == 0
    assert "not checked" not in capsys.readouterr().out
    Path("c.safetensors").unlink()
    assert main(["evidence", "run", "--verify"]) == 0
    assert f"not checked: ../c.safetensors, the gradient cache: it is not there, its SHA-256 was {hashed}" in (
        capsys.readouterr().out
    )
    Path("c.safetensors").write_bytes(b"another")
    assert main(["evidence", "run", "--verify"]) == 3


@pytest.mark.parametrize(
    "name",
    [
        "run/rows.csv", "run/config.json", "run/env.json", "run/losses.csv", "run/facts.csv", "run/reset.csv",
        "run/inputs.json", "run/trace.json", "run/evidence.json", "run/evidence.html", "u.safetensors", "w.safetensors",
        "r1.safetensors", "setup.py",
    ],
)  # fmt: skip
def test_a_flipped_byte_is_found_and_ends_with_3(folder, capsys, name):
    write_evidence("run")
    flip(Path(name))
    assert main(["evidence", "run", "--verify"]) == 3
    said = capsys.readouterr().err
    assert "run is not as it was when its evidence was written" in said
    assert Path(name).name in said
    assert "Restore what differs" in said


def test_a_changed_statement_a_missing_and_a_new_file_are_found(folder):
    path = write_evidence("run")
    text = path.read_text(encoding="utf-8")
    evidence = json.loads(text)
    evidence["not_shown"].pop()
    path.write_text(json.dumps(evidence))
    assert verify("run") == ["evidence.json: its contents do not have the digest that it states"]
    path.write_text(text)
    Path("r0.safetensors").unlink()
    Path("run/more.csv").write_text("")
    missing, new = verify("run")
    assert missing.startswith("../r0.safetensors: missing, its SHA-256 was")
    assert new == "more.csv: was not there"


def test_evidence_is_not_written_over_unless_told_so(folder, capsys):
    before = write_evidence("run").read_bytes()
    assert main(["evidence", "run"]) == 2
    assert "run/evidence.json exists. --verify compares" in capsys.readouterr().err
    assert Path("run/evidence.json").read_bytes() == before
    assert main(["evidence", "run", "--replace"]) == 0


def test_weights_that_are_not_those_measured_make_no_evidence(folder):
    flip(Path("r1.safetensors"))
    with pytest.raises(MismatchError, match=r"r1.safetensors, the retrained weights, is not what was measured"):
        write_evidence("run")
    Path("r1.safetensors").unlink()
    with pytest.raises(
        ConfigError, match=r"r1.safetensors, the retrained weights of this run, is missing. Put it back"
    ):
        write_evidence("run")
    assert not Path("run/evidence.json").exists()


@pytest.mark.parametrize("command", [["report", "nowhere"], ["evidence", "nowhere"], ["evidence", "run", "--verify"]])
def test_a_folder_that_is_no_run_or_has_no_evidence_is_said_with_the_cure(folder, capsys, command):
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "is missing" in said
    assert "`expunge evaluate --out`" in said or "Write it with `expunge evidence run`" in said


def test_a_missing_library_comes_with_its_cure(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(MissingExtra, match=re.escape("pip install 'expunge[report]'")):
        write_evidence("run")
    assert not Path("run/evidence.json").exists()


def test_the_same_model_does_not_count_twice(folder, capsys):
    Path("copy.safetensors").write_bytes(Path("r0.safetensors").read_bytes())
    models = ["--retrained", "r0.safetensors", "r1.safetensors", "copy.safetensors"]
    assert main(["evaluate", "setup.py", "--weights", "u.safetensors", *models]) == 2
    assert "copy.safetensors and r0.safetensors are the same weights" in capsys.readouterr().err
    assert main(["evaluate", "setup.py", "--weights", "r1.safetensors", *models[:-1]]) == 2
    assert "r1.safetensors and r1.safetensors are the same weights" in capsys.readouterr().err
    assert evaluate(retrained=("r0.safetensors", "w.safetensors")) == 2
    assert "w.safetensors and w.safetensors are the same weights" in capsys.readouterr().err
