"""The commands for a model of one's own do what Python does, and say what they wrote."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from expunge import Blind, Reload, cache, cross_entropy, unlearn
from expunge.cli import main, own_model
from expunge.methods import METHODS
from expunge.provenance import file_hash
from expunge.setup import load_setup
from expunge.weights import load_weights
from tests.cli import RELOAD, SETUP, cached, unlearned, weights_of_nobody


def test_a_setup_file_may_cache_another_loss_than_it_trains_with(folder, capsys):
    assert cached() == 0
    before = Path("c.safetensors").read_bytes()
    Path("setup.py").write_text(SETUP + "from expunge import logit_margin as cached_loss\n", encoding="utf-8")
    ascent = ("orthogonal-ascent", "--step", "0.1", "--fine-tune.epochs", "2")
    assert unlearned(*ascent) == 2  # that cache is of the loss of training
    assert "of the loss 'cross_entropy', and now 'logit_margin' is used" in capsys.readouterr().err
    assert cached("--replace") == 0
    assert Path("c.safetensors").read_bytes() != before
    assert unlearned(*ascent) == 0
    trace = json.loads(Path("u.trace.json").read_text(encoding="utf-8"))
    assert trace["facts"]["removed_count"] == 6
    assert main(["audit", "preflight", "setup.py", "--weights", "w.safetensors", "--cache", "c.safetensors"]) == 0


def test_cache_unlearn_evaluate_and_show_work_together(folder, capsys):
    assert cached() == 0
    assert unlearned(*RELOAD) == 0
    before, after = load_file("w.safetensors"), load_file("u.safetensors")
    assert before.keys() == after.keys()
    assert not torch.equal(before["0.weight"], after["0.weight"])
    trace = json.loads(Path("u.trace.json").read_text(encoding="utf-8"))
    assert trace["method"] == "reload"
    assert trace["config"]["fine_tune"]["epochs"] == 2
    assert unlearned("--seed", "1", "retrain", cache=None, out="r.safetensors") == 0
    capsys.readouterr()
    assert main(["evaluate", "setup.py", "--weights", "u.safetensors", "--retrained", "r.safetensors", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {each["metric"] for each in report["u.safetensors"]} == {"NA", "TA", "NSKL", "ECE", "Brier"}
    assert main(["show", "c.safetensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["count"] == 60


def test_human_output_names_what_was_written_and_warns_of_the_cache(folder, capsys):
    cached()
    assert capsys.readouterr().out.endswith("personal data: encrypt it, and destroy it after use:\n  c.safetensors\n")
    unlearned(*RELOAD)
    out = capsys.readouterr().out
    assert "u.safetensors" in out
    assert out.endswith("and destroy it now:\n  c.safetensors\n")
    assert main(["evaluate", "setup.py", "--weights", "w.safetensors"]) == 0
    assert "defines no forget()" in capsys.readouterr().out
    text = Path("setup.py").read_text(encoding="utf-8")
    Path("setup.py").write_text(text.replace("def test():", "def tested():"), encoding="utf-8")
    assert main(["evaluate", "setup.py", "--weights", "w.safetensors"]) == 0
    out = capsys.readouterr().out
    assert "defines no forget()" in out
    assert "defines no test(): nothing was measured on unseen records.\n" in out


LOOP = """

def train_from_scratch(model, data, seed):
    with open("calls.txt", "a") as file:
        print(seed, len(data), model.training, file=file)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data.tensors), batch_size=16, shuffle=True)
    for _ in range(2):
        for batch in loader:
            optimizer.zero_grad()
            loss_terms(model, batch).mean().backward()
            optimizer.step()
"""


def test_retraining_takes_a_loop_of_ones_own(folder, capsys):
    text = Path("setup.py").read_text(encoding="utf-8").replace("recipe = Recipe(epochs=3, lr=0.05)", "")
    Path("setup.py").write_text(text + LOOP, encoding="utf-8")
    for out in ("a", "b"):
        assert unlearned("retrain", cache=None, out=f"{out}.safetensors") == 0
    assert unlearned("--seed", "1", "retrain", cache=None, out="c.safetensors") == 0
    calls = Path("calls.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split() for line in calls] == [[seed, "54", "True"] for seed in "001"]
    a, b, c = (load_file(f"{out}.safetensors") for out in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)  # global generators are seeded
    assert not all(torch.equal(a[name], c[name]) for name in a)
    trace = json.loads(Path("a.trace.json").read_text(encoding="utf-8"))
    assert (trace["method"], trace["config"]["recipe"]) == ("retrain", None)
    assert unlearned("retrain", "--resume", "r.safetensors", cache=None, out="d.safetensors") == 2
    assert "a loop of your own keeps its own state" in capsys.readouterr().err
    Path("setup.py").write_text(text + "train_from_scratch = 3", encoding="utf-8")
    assert unlearned("retrain", cache=None, out="d.safetensors") == 2
    assert "train_from_scratch is a int, no function" in capsys.readouterr().err


FURTHER = """

def train_further(model, data, recipe, seed):
    with open("calls.txt", "a") as file:
        print(len(data), recipe.epochs, recipe.lr, file=file)
"""


def test_fine_tuning_takes_a_loop_of_ones_own(folder, capsys):
    text = Path("setup.py").read_text(encoding="utf-8").replace("epochs=3, lr=0.05", "epochs=3, lr=0.05, batch_size=20")
    Path("setup.py").write_text(text + FURTHER, encoding="utf-8")
    cached()
    assert unlearned("fine-tune", "--recipe.epochs", "2", "--recipe.lr", "0.25", cache=None) == 0
    assert Path("calls.txt").read_text(encoding="utf-8") == "54 2 0.25\n"
    a, b = (load_file(f"{name}.safetensors") for name in "uw")
    assert all(torch.equal(a[name], b[name]) for name in a)  # a loop that does nothing
    trace = json.loads(Path("u.trace.json").read_text(encoding="utf-8"))
    assert (trace["stopped"], trace["warnings"]) == ("the loop of one's own ended", [])
    assert unlearned("--replace", "reload", "--reset-fraction", "0.2") == 0
    warned = json.loads(Path("u.trace.json").read_text(encoding="utf-8"))["warnings"]
    assert not any("its default" in each for each in warned)  # which train_further does not follow
    assert unlearned("cf-k", "--k", "1", cache=None, out="d.safetensors") == 0
    assert "cf-k: it trained by its own recipe" in capsys.readouterr().err
    Path("setup.py").write_text(text + "train_further = 3", encoding="utf-8")
    assert unlearned("fine-tune", cache=None, out="e.safetensors") == 2
    assert "train_further is a int, no function. Write def train_further(model, data, recipe, seed)" in (
        capsys.readouterr().err
    )


def test_the_trace_is_where_the_output_says_it_is(folder, capsys):
    assert main(["unlearn", *weights_of_nobody(folder), "--out", "model.v2", "retrain"]) == 0
    named = re.search(r"^trace:\s+(\S+)$", capsys.readouterr().out, re.M)
    assert named
    assert json.loads(Path(named[1]).read_text(encoding="utf-8"))["method"] == "retrain"


def test_retraining_takes_the_recipe_of_the_setup_file_and_goes_on_where_it_was(folder, capsys):
    assert unlearned("retrain", "--resume", "unfinished.safetensors", cache=None) == 0
    config = json.loads(Path("u.trace.json").read_text(encoding="utf-8"))["config"]
    assert (config["recipe"]["epochs"], config["recipe"]["lr"]) == (3, 0.05)
    assert config["resume"] == "unfinished.safetensors"
    Path("setup.py").write_text(SETUP.replace("recipe = ", "other = "), encoding="utf-8")
    assert unlearned("--replace", "retrain", cache=None) == 2
    assert "setup.py does not define recipe. Add: recipe = expunge.Recipe(epochs=…, lr=…)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("trained", "more", "doubted"),
    [
        ("epochs=3, lr=0.05", (), False),
        ("epochs=3, lr=0.001, optimizer='adamw', batch_size=20", (), True),
        ("epochs=3, lr=0.05, batch_size=20", (), True),
        ("epochs=3, lr=0.05, batch_size=20", ("--fine-tune.batch-size", "20"), False),
        ("epochs=3, lr=0.05, batch_size=20", ("--fine-tune.lr", "0.01"), False),  # it was chosen
    ],
)
def test_a_default_that_trains_otherwise_than_the_model_was_is_told(folder, capsys, trained, more, doubted):
    Path("setup.py").write_text(SETUP.replace("epochs=3, lr=0.05", trained), encoding="utf-8")
    cached()
    assert unlearned("reload", "--reset-fraction", "0.2", *more) == 0
    told = [w for w in json.loads(Path("u.trace.json").read_text(encoding="utf-8"))["warnings"] if "its default" in w]
    assert len(told) == doubted
    assert all("--fine-tune.batch-size 20" in each and each in capsys.readouterr().err for each in told)


def test_the_hashes_of_a_trace_are_those_of_what_was_read(folder, monkeypatch):
    run, before = own_model.unlearn_model, file_hash("w.safetensors")

    def replaced(*given, **more):
        Path("w.safetensors").write_bytes(Path("start.safetensors").read_bytes())
        return run(*given, **more)

    monkeypatch.setattr(own_model, "unlearn_model", replaced)
    assert unlearned("retrain", cache=None) == 0
    hashes = json.loads(Path("u.trace.json").read_text(encoding="utf-8"))["provenance"]["files"]
    assert hashes["weights before"] == before != file_hash("w.safetensors")
    assert hashes["weights after"] == file_hash("u.safetensors")


def test_a_cache_with_groups_is_made_shown_and_used_like_any_other(folder, capsys):
    more = [
        "--micro-batch",
        "4",
        "--groups",
        "3",
        "--accumulate-on",
        "cpu",
        "--checkpoint",
        "0",
        "3",
        "--max-shard",
        "1",
    ]
    assert cached(*more) == 0
    assert cached(*more) == 2
    assert "c.safetensors.index.json exists. A cache made now" in capsys.readouterr().err
    assert main(["show", "c.safetensors", "--json"]) == 0
    header = json.loads(capsys.readouterr().out)
    assert (header["groups"], header["files"], header["micro_batch"]) == (3, 4, 4)
    assert set(header["paths"]) == {path.name for path in folder.glob("c*.safetensors*")}
    assert unlearned(*RELOAD) == 0
    out = capsys.readouterr().out
    assert "groups of the cache: 1 of 3 computed again" in out
    destroy = "".join(f"\n  {path}" for path in header["paths"])
    assert out.endswith(f"destroy it now:{destroy}\n")
    assert main(["show", "c.safetensors.index.json"]) == 0
    assert unlearned("--replace", *RELOAD, cache="c.safetensors.index.json") == 0
    assert capsys.readouterr().out.endswith(f"destroy it now:{destroy}\n")
    piece = header["paths"][1]
    assert main(["show", piece]) == 2
    assert f"{piece} is one piece of the cache c.safetensors" in capsys.readouterr().err
    assert unlearned("--replace", *RELOAD, out=piece) == 2
    assert f"{piece} is read by this command" in capsys.readouterr().err
    trace = json.loads(Path("u.trace.json").read_text(encoding="utf-8"))
    assert trace["provenance"]["files"]["cache"] == file_hash("c.safetensors.index.json")
    assert trace["facts"]["removed_count"] == 6
    assert (trace["facts"]["groups_computed"], trace["facts"]["groups"]) == (1, 3)
    assert trace["backwarded"] == 20 - 6 + 54 * len(trace["epoch_ends"])  # the first group, and the epochs


def test_the_command_line_gives_the_bits_that_python_gives(folder):
    cached()
    assert unlearned("--seed", "3", *RELOAD) == 0
    names: dict = {}
    exec(SETUP, names)
    model = load_weights(names["model"](0), "w.safetensors")
    full = cache.load("c.safetensors", model, cross_entropy)
    given = Blind(retain=names["retain"](), loss_terms=cross_entropy, fresh=names["model"], full=full)
    config = Reload(reset_fraction=0.2, fine_tune=replace(Reload().fine_tune, epochs=2, lr=0.05))
    state = unlearn(model, given, config, seed=3).model.state_dict()
    stored = load_file("u.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in state.items())


def test_the_same_seed_gives_the_same_file(folder):
    cached()
    unlearned("--seed", "3", *RELOAD, out="a.safetensors")
    unlearned("--seed", "3", *RELOAD, out="b.safetensors")
    unlearned("--seed", "4", *RELOAD, out="d.safetensors")
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()
    assert not torch.equal(load_file("a.safetensors")["0.weight"], load_file("d.safetensors")["0.weight"])


def test_snapshots_are_the_weights_after_each_stage(folder):
    cached()
    unlearned("--snapshots", "steps", *RELOAD)
    names = [path.stem.split(" ", 1)[1] for path in sorted(Path("steps").iterdir())]
    assert names[:5] == ["difference", "ascend", "select", "re-initialise", "epoch 1"]
    assert names[-1] == "fine-tune"
    last = load_file(sorted(Path("steps").iterdir())[-1])
    assert all(torch.equal(last[name], tensor) for name, tensor in load_file("u.safetensors").items())


def test_a_foreign_checkpoint_of_tensors_is_read(folder):
    torch.save(load_file("w.safetensors"), "w.pt")
    cached()
    assert unlearned(*RELOAD, weights="w.pt") == 0


def test_methods_lists_every_method(capsys):
    assert main(["methods"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in METHODS)
    assert main(["methods", "--json"]) == 0
    listed = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert listed["reload"]["blind"]
    assert listed["reload"]["settings"]["reset_fraction"] == 0.1


def test_no_command_for_a_blind_method_can_name_a_forget_set(capsys):
    for name, method in METHODS.items():
        if method.blind:
            assert main(["unlearn", name, "--help"]) == 0
            options = [word for word in capsys.readouterr().out.split() if word.startswith("--")]
            assert options
            assert not [option for option in options if "forget" in option]


def test_a_blind_method_never_calls_forget(folder):
    with Path("setup.py").open("a", encoding="utf-8") as file:
        file.write("\ndef forget():\n    raise AssertionError('looked at the removed records')\n")
    cached()
    assert unlearned(*RELOAD) == 0
    assert unlearned("gradient-ascent", cache=None, out="g.safetensors") == 2


def test_scrub_rewinds_to_the_validation_records_of_the_setup_file(folder, capsys):
    scrub = ("scrub", "--rewind", "--recipe.epochs", "3", "--loss-bound", "50")
    with Path("setup.py").open("a", encoding="utf-8") as file:
        file.write("\ndef forget():\n    return data.only(torch.arange(6))\n")
    assert unlearned(*scrub, cache=None, out="s.safetensors") == 2
    assert "on the command line validation() in the setup file" in " ".join(capsys.readouterr().err.split())
    with Path("setup.py").open("a", encoding="utf-8") as file:
        file.write("\ndef validation():\n    return Examples(images.flip(1), labels)\n")
    assert unlearned(*scrub, cache=None, out="s.safetensors") == 0
    trace = json.loads(Path("s.trace.json").read_text(encoding="utf-8"))
    assert len(trace["facts"]["forget_errors"]) == 3
    assert 0 <= trace["facts"]["rewind_reference"] <= 1


def test_a_second_setup_file_of_two_lines_caches_another_loss(folder, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("setup.py").write_text(f"import expunge\n{SETUP}", encoding="utf-8")
    Path("corrections.py").write_text("from setup import *\ncached_loss = expunge.logit_margin\n", encoding="utf-8")
    weights = ["--weights", "w.safetensors"]
    assert main(["cache", "corrections.py", *weights, "--out", "margins.safetensors"]) == 0
    settings = ["--out", "u.safetensors", "natural-ascent", "--fine-tune.epochs", "2"]
    own = ["--cache", "margins.safetensors"]
    assert main(["unlearn", "corrections.py", *weights, *own, *settings]) == 0
    assert main(["unlearn", "setup.py", *weights, *own, "--replace", *settings]) == 2
    sys.modules.pop("setup", None)


def test_what_lies_beside_a_setup_file_can_be_imported(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (folder / "own_network_of_a_test.py").write_text("LAYERS = 2\n", encoding="utf-8")
    Path("setup.py").write_text(f"from own_network_of_a_test import LAYERS\n{SETUP}", encoding="utf-8")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    weights = ["--weights", str(folder / "w.safetensors"), "--out", "c.safetensors"]
    assert main(["cache", str(folder / "setup.py"), *weights]) == 0


def test_setup_files_of_two_folders_have_modules_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "parts_of_a_test.py").write_text(f"NAME = {name!r}\n", encoding="utf-8")
        (tmp_path / name / "setup.py").write_text("from parts_of_a_test import NAME\n", encoding="utf-8")
    names = [load_setup(tmp_path / name / "setup.py").module.NAME for name in ("one", "two", "one")]
    assert names == ["one", "two", "one"]


def test_a_warning_is_printed_as_a_line(folder, capsys):
    with Path("setup.py").open("a", encoding="utf-8") as file:
        file.write("\nimages[:, 1:] = 0\n")
    cached()
    assert unlearned("reload", "--reset-fraction", "0.9", "--fine-tune.epochs", "1") == 0
    assert "expunge: warning: only" in capsys.readouterr().err


def test_how_much_was_removed_and_how_long_the_ascent_was_is_said(folder, capsys):
    cached()
    unlearned(*RELOAD)
    said = capsys.readouterr().out
    assert "removed or corrected: 6 of 60 cached loss terms\nlength of the ascent: " in said
    unlearned("class-orthogonal-ascent", "--step", "0.125", out="n.safetensors")  # a tenth was removed
    said = capsys.readouterr().out
    assert "length of each ascent, 2 in turns with fine-tuning: 0.125 of the norm of the weights, for what was" in said
    unlearned("natural-ascent", "--growth", "0", "--step", "0.125", out="same.safetensors")
    assert "0.125 of the norm of the weights\n" in capsys.readouterr().out


def test_many_files_of_a_cache_are_listed_as_a_pattern(folder, capsys):
    assert cached("--micro-batch", "4", "--groups", "11") == 0
    listed = capsys.readouterr().out.partition("destroy it after use:\n  ")[2].split()
    assert listed[0] == "c.safetensors.index.json"
    assert len(listed) == 2
    assert len(list(folder.glob(listed[1]))) == 12


@pytest.mark.parametrize("command", ["cache", "unlearn", "rehearse", "evaluate"])
def test_help_shows_what_an_option_takes_and_not_that_it_may_be_left_out(capsys, command):
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"--\S+ (PATH|INT)\b", shown)
    assert "None}" not in shown
    assert "{None" not in shown
