"""The audits on the command line: what they say, write, and end with; and the digits on which Lemma 1 fails."""

import dataclasses
import io
import json
import statistics
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import image
from safetensors.torch import load_file, save_file

from expunge import Examples, Recipe, cross_entropy, gradient, seeded, stream, train
from expunge.audit.finding import Finding, Truth, evidence
from expunge.audit.layers import layer_inputs, linear_layers
from expunge.audit.leakage import CacheAudit, audit_cache
from expunge.audit.page import write_audit
from expunge.audit.pictures import is_picture, picture
from expunge.audit.ratio import with_bias
from expunge.cli import main
from expunge.data.digits import digits
from expunge.methods.difference import NOTHING_REMOVED
from expunge.models.mlp import MLP
from expunge.weights import save_weights

SETUP = """
import torch
from expunge import Examples, cross_entropy
from expunge.models.mlp import MLP

generator = torch.Generator().manual_seed(0)
images, labels = torch.rand(60, 1, 4, 4, generator=generator), torch.randint(3, (60,), generator=generator)
others = Examples(torch.rand(30, 1, 4, 4, generator=generator), torch.randint(3, (30,), generator=generator))
loss_terms = cross_entropy
data = Examples(images, labels)
removed = torch.arange(REMOVED)

def model(seed):
    return MLP((16, 12, 3))

def original():
    return data

def retain():
    return data.without(removed)
"""
KNOWN = """
def forget():
    return data.only(removed)

def test():
    return others
"""
BACKDOOR = """
def triggered():
    return others
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with weights, their cache, and setup files: blind, with the truth, and with nothing removed."""
    monkeypatch.chdir(tmp_path)
    for name, removed, more in (
        ("blind", 1, ""),
        ("setup", 1, KNOWN + BACKDOOR),
        ("many", 40, KNOWN),
        ("some", 40, ""),
        ("none", 0, ""),
    ):
        Path(f"{name}.py").write_text(SETUP.replace("REMOVED", str(removed)) + more, encoding="utf-8")
    names: dict = {}
    exec(SETUP.replace("REMOVED", "1"), names)
    with seeded(0, "test"):
        model = names["model"](0)
    save_weights("fresh.safetensors", model)
    train(model, names["data"], cross_entropy, Recipe(epochs=8, lr=0.05, batch_size=16), seed=0)
    save_weights("w.safetensors", model)
    assert cached() == 0
    return tmp_path


def cached(*more, out="c.safetensors"):
    return main(["cache", "blind.py", "--weights", "w.safetensors", "--out", out, *more])


def audited(*more, setup="setup.py", cache="c.safetensors", weights="w.safetensors"):
    return main(["audit", "cache", cache, "--setup", setup, "--weights", weights, *more])


def preflown(*more, setup="setup.py", weights="w.safetensors", cache="c.safetensors"):
    return main(["audit", "preflight", setup, "--weights", weights, "--cache", cache, *more])


def residual(*more, setup="setup.py", weights="fresh.safetensors"):
    return main(["audit", "residual", setup, "--weights", weights, *more])


def nearly(weights: str) -> str:
    """Another file with weights that differ by rounding: a model is no reference for itself."""
    moved = {name: t * (1 + 1e-6) if t.is_floating_point() else t for name, t in load_file(weights).items()}
    save_file(moved, "nearly.safetensors")
    return "nearly.safetensors"


class Reader(HTMLParser):
    """Collects what a page refers to, and whether its elements are closed."""

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_deletion_of_one_record_is_recoverable_ends_with_3_and_is_drawn(folder, capsys):
    assert audited("--out", "found") == 3
    assert "Recoverable: A removed record, or what it puts into a layer, can be recovered" in " ".join(
        capsys.readouterr().out.split()
    )
    names = {path.name for path in Path("found").iterdir()}
    assert {"audit.json", "audit.html", "ratio-with-bias-layers-linear1-the-model-s-input.png"} <= names
    stored = json.loads(Path("found/audit.json").read_text(encoding="utf-8"))
    assert stored["verdict"] == "recoverable"
    assert {f["attack"] for f in stored["findings"]} >= {"ratio with bias", "label of one record", "list of candidates"}
    reader = Reader()
    reader.feed(Path("found/audit.html").read_text(encoding="utf-8"))
    assert reader.open == []
    assert reader.sources
    assert all(source.startswith("data:image/png;base64,") for source in reader.sources)
    assert "proves nothing" in reader.text
    before = Path("found/audit.html").read_bytes()
    assert audited("--out", "found") == 3
    assert Path("found/audit.html").read_bytes() == before


def test_an_audit_works_without_the_removed_records_and_says_so(folder, capsys):
    assert audited(setup="blind.py") == 3
    assert "judged by their own consistency" in " ".join(capsys.readouterr().out.split())


def test_the_json_of_an_audit_is_for_programs(folder, capsys):
    capsys.readouterr()
    assert audited("--json") == 3
    assert json.loads(capsys.readouterr().out)["removed_terms"] == 1


def test_names_on_the_page_are_escaped(tmp_path):
    found = Finding(attack="<b>attack", place="<script>", verdict="not shown", words="<i>", numbers={"<u>": "<s>"})
    reader = Reader()
    reader.feed(write_audit(tmp_path, CacheAudit(1, 0.0, [found])).read_text(encoding="utf-8"))
    assert "<script>" in reader.text
    assert reader.open == []


@pytest.mark.parametrize(
    ("shape", "drawn"), [((4, 4), True), ((1, 4, 4), True), ((3, 4, 4), True), ((16,), False), ((2, 4, 4), False)]
)
def test_only_images_are_drawn(shape, drawn):
    flat = torch.zeros(1, torch.Size(shape).numel())
    found = Finding(attack="a", place="b", verdict="not shown", words="", recovered=flat, shape=shape)
    assert is_picture(found) == drawn


def test_a_picture_has_the_removed_records_above_what_was_recovered_on_the_scale_of_the_records():
    truth = torch.tensor([[0.0, 2.0], [1.0, 2.0]])  # two records of one pixel above another
    recovered = torch.tensor([[0.0, 1.0], [5.0, -1.0]])
    found = Finding(
        attack="a", place="b", verdict="not shown", words="", truth=truth, recovered=recovered, shape=(2, 1)
    )
    pixels = image.imread(io.BytesIO(picture(found)), format="png")[..., 0]
    white = [1.0] * 5  # lines between the records, 48 times enlarged like these
    expected = [white, [1, 0, 1, 0.5, 1], white, white, [1, 0, 1, 1, 1], [1, 0.5, 1, 0, 1], white]
    assert pixels[24::48, 24::48] == pytest.approx(np.array(expected), abs=0.01)
    alone = dataclasses.replace(found, truth=None)
    assert len(image.imread(io.BytesIO(picture(alone)), format="png")) < len(pixels)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"cache": "x"}, "no such cache"),
        ({"cache": "w.safetensors"}, "not a gradient cache"),
        ({"weights": "fresh.safetensors"}, "taken at weights"),
        ({"setup": "none.py"}, "one made after it shows nothing of what was removed: retrain then"),
        ({"setup": "x.py"}, "no such setup file"),
    ],
)
def test_a_mistake_in_an_audit_of_a_cache_is_said_and_ends_with_2(folder, capsys, arguments, said):
    assert audited("--out", "found", **arguments) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not Path("found").exists()


def test_a_preflight_says_go_with_care_for_one_record_and_ends_with_0(folder, capsys):
    assert preflown() == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Go with care." in out
    assert "rehearse" in out
    assert preflown("--json", setup="some.py") == 0
    looked_at = json.loads(capsys.readouterr().out)["checks"]
    not_looked_at = ["alignment", "something to forget"]  # all micro-batches lost a record; there is no test()
    assert [check["name"] for check in looked_at if check["advice"] != "go"] == not_looked_at
    assert (
        preflown("--reset-fraction", "0", setup="many.py") == 0
    )  # has test(), and labels by chance: nothing is learned
    out = " ".join(capsys.readouterr().out.split())
    assert "something to forget" in out
    assert "stability" not in out


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"weights": "fresh.safetensors"}, "MismatchError"),
        ({"setup": "none.py"}, "NotInformative"),
        ({"cache": "w.safetensors"}, "CorruptCache"),
    ],
)
def test_a_preflight_says_do_not_and_ends_with_3(folder, capsys, arguments, error):
    capsys.readouterr()
    assert preflown("--json", **arguments) == 3
    report = json.loads(capsys.readouterr().out)
    assert report["advice"] == "do not"
    assert report["checks"][0]["numbers"]["error"] == error
    assert preflown(**arguments) == 3
    assert "Do not." in capsys.readouterr().out


def test_a_cache_made_after_the_deletion_is_said_to_be_one_by_audits_as_by_unlearning(folder, capsys):
    late = ["--weights", "w.safetensors", "--cache", "late.safetensors"]
    data = "\ndef original():\n    return retain()\n"
    Path("late.py").write_text(Path("setup.py").read_text(encoding="utf-8") + data, encoding="utf-8")
    assert main(["cache", "late.py", "--weights", "w.safetensors", "--out", "late.safetensors"]) == 0
    capsys.readouterr()
    assert main(["unlearn", "late.py", *late, "--out", "u.safetensors", "reload"]) == 2
    assert NOTHING_REMOVED in capsys.readouterr().err
    assert audited(setup="late.py", cache="late.safetensors") == 2
    assert NOTHING_REMOVED in (said := capsys.readouterr().err)
    assert "Delete records first" not in said
    assert preflown("--json", setup="late.py", cache="late.safetensors") == 3
    assert NOTHING_REMOVED in json.loads(capsys.readouterr().out)["checks"][0]["words"]


def test_a_preflight_without_a_cache_is_a_mistake_of_the_user(folder, capsys):
    assert preflown(cache="x") == 2
    assert "no such cache" in capsys.readouterr().err


def test_a_residual_audit_compares_with_retrained_models(folder, capsys):
    capsys.readouterr()
    assert (
        residual("--retrained", nearly("fresh.safetensors"), "--original", "w.safetensors", "--json", setup="many.py")
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert [test["test"] for test in report["tests"]] == ["membership by loss", "relearning", "quantisation"]
    assert report["verdict"] != "a trace was found"


def test_without_unseen_records_a_residual_audit_says_that_membership_was_not_tried(folder, capsys):
    text = Path("many.py").read_text(encoding="utf-8")
    Path("no_test.py").write_text(f"{text}\ndel test\n", encoding="utf-8")
    capsys.readouterr()
    assert residual("--json", setup="no_test.py") == 0
    first = json.loads(capsys.readouterr().out)["tests"][0]
    assert (first["test"], first["verdict"]) == ("membership by loss", "cannot tell")
    assert "let the setup file define test()" in first["words"]


def test_a_trace_that_is_left_ends_with_3(folder, capsys):
    names: dict = {}
    exec(SETUP.replace("REMOVED", "40"), names)
    model = names["model"](0)
    train(model, names["data"], cross_entropy, Recipe(epochs=150, lr=0.1, batch_size=16, weight_decay=0.0), seed=0)
    save_weights("heart.safetensors", model)  # has learned by heart what was removed
    heart, before = "heart.safetensors", ("--original", "heart.safetensors")
    assert residual("--retrained", "fresh.safetensors", *before, setup="many.py", weights=heart) == 3
    assert "It never left" in " ".join(capsys.readouterr().out.split())


def test_a_residual_audit_tries_the_trigger_where_there_is_one(folder, capsys):
    capsys.readouterr()
    residual("--retrained", nearly("fresh.safetensors"), "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["tests"][-1]["test"] == "trigger"
    assert report["tests"][-1]["verdict"] == "no trace found"


def test_a_residual_audit_without_the_removed_records_is_refused(folder, capsys):
    assert residual(setup="blind.py") == 2
    assert "neither forget() nor triggered()" in capsys.readouterr().err


def test_parts_of_a_cache_are_left_out_and_other_types_stored(folder, capsys):
    assert cached("--leave-out", "layers.linear1.*", "--dtype", "bfloat16", out="part.safetensors") == 0
    totals = {n: t for n, t in load_file("part.safetensors").items() if n.startswith("total/")}
    assert set(totals) == {"total/layers.linear2.weight", "total/layers.linear2.bias"}
    assert all(total.dtype == torch.bfloat16 for total in totals.values())
    assert cached("--leave-out", "head.*", out="x.safetensors") == 2
    assert "'head.*' matches no trainable parameter" in capsys.readouterr().err
    assert not Path("x.safetensors").exists()


def test_lemma_1_does_not_protect_a_single_deletion_from_digits():
    data = digits(600, seed=0).train
    with seeded(0, "lemma"):
        model = MLP()
    train(model, data, cross_entropy, Recipe(epochs=5, lr=0.05, batch_size=64), seed=0)
    full = gradient(model, cross_entropy, data)
    psnr = []
    for position in torch.randperm(600, generator=stream(0, "deleted"))[:20]:
        gone = position[None]
        has = evidence(model, cross_entropy, data.without(gone), full)
        first = linear_layers(has)[0]
        kept, own = (layer_inputs(model, cross_entropy, each)[first.name] for each in (has.retain, data.only(gone)))
        blind = with_bias(first, kept, None, 1)
        assert blind.verdict == "recoverable"
        image = data.only(gone).tensors[0].flatten(1).double()
        psnr.append(float(-10 * torch.log10((blind.recovered - image).square().mean().clamp(min=1e-20))))
        assert with_bias(first, kept, own, 1).verdict == "recoverable"
    assert statistics.median(psnr) > 40
    whole = audit_cache(has, Truth(forget=Examples(*data.only(gone).tensors)))
    assert whole.verdict == "recoverable"
    assert "holds the deleted data" in whole.summary
