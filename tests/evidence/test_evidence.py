"""Evidence: hashes of records, what was asked, done and not shown, and that nothing was changed since."""

import json
import re
from pathlib import Path

import pytest
import torch

from expunge import Examples
from expunge.cli import main
from expunge.errors import ConfigError, MismatchError, MissingExtra
from expunge.provenance import file_hash, position_hashes, record_hashes, sources, together
from expunge.report.evidence import digest, verify, write_evidence
from expunge.rows import read_rows, write_rows
from tests.evidence import EVALUATED, SALT, SECRET, evaluate
from tests.reported import Page


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# Hashes


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


# Evidence


def test_tokens_are_not_called_records(folder):
    inputs = json.loads(Path("run/inputs.json").read_text(encoding="utf-8"))
    for entry in inputs["data"]:
        entry["records"] //= 6  # as many documents, of six tokens each
    Path("run/inputs.json").write_text(json.dumps(inputs), encoding="utf-8")
    (asked,) = json.loads(write_evidence("run").read_text(encoding="utf-8"))["asked"]
    assert asked["measured_on"] == "54 retained, 6 removed and 60 test labels, of which a record has several"


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
