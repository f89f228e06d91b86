"""What the commands refuse: the mistake is said with its cure, and nothing is written."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from expunge import Examples, gradient
from expunge.cli import main, own_model
from expunge.errors import ConfigError
from tests.cli import RELOAD, SETUP, cached, unlearned


def test_a_loss_that_is_no_function_is_refused(folder, capsys):
    Path("setup.py").write_text(SETUP + "cached_loss = 'logit_margin'\n", encoding="utf-8")
    assert cached() == 2
    said = capsys.readouterr().err
    assert "setup.py: cached_loss is 'logit_margin', no function. Write def cached_loss(model, batch)" in said


def test_a_criterion_of_torch_is_no_loss_of_terms(folder, capsys):
    text = Path("setup.py").read_text(encoding="utf-8")
    criterion = 'loss_terms = nn.CrossEntropyLoss(reduction="none")'
    Path("setup.py").write_text(text.replace("loss_terms = cross_entropy", criterion), encoding="utf-8")
    assert cached() == 2
    said = "setup.py: loss_terms: CrossEntropyLoss() takes outputs and targets, and loss terms are called with (model"
    assert said in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"MSELoss\(\) takes outputs and targets"):
        gradient(nn.Linear(2, 1), nn.MSELoss(), Examples(torch.zeros(3, 2), torch.zeros(3, 1)))


def test_a_cache_of_what_was_removed_before_is_a_matter_of_care(folder, capsys):
    assert cached() == 0
    unlearned(*RELOAD)
    again = ["cache", "setup.py", "--weights", "u.safetensors", "--out", "d.safetensors"]
    capsys.readouterr()
    assert main(again) == 0
    said = "u.safetensors was unlearned to 54 records, and original() returns 60. Cache the gradient of what was left"
    assert said in capsys.readouterr().err
    text = Path("setup.py").read_text(encoding="utf-8")
    Path("setup.py").write_text(text.replace("    return data\n", "    return retain()\n"), encoding="utf-8")
    assert main([*again, "--replace"]) == 0
    assert "was unlearned to" not in capsys.readouterr().err


def test_weights_replaced_while_they_are_loaded_are_named_and_nothing_is_written(folder, monkeypatch, capsys):
    load = own_model.trained_model

    def replaced(setup, weights, device):
        model = load(setup, weights, device)
        weights.write_bytes(Path("start.safetensors").read_bytes())
        return model

    monkeypatch.setattr(own_model, "trained_model", replaced)
    assert unlearned("retrain", cache=None) == 2
    assert re.search(r"w\.safetensors was changed while", capsys.readouterr().err)
    assert not Path("u.safetensors").exists()


def test_a_checkpoint_that_could_run_code_is_refused(folder, capsys):
    torch.save({"model": Path("x")}, "w.pt")
    cached()
    assert unlearned(*RELOAD, weights="w.pt") == 2
    assert "files that could run code are not opened" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["cache", "nowhere.py", "--weights", "w.safetensors", "--out", "o"], "no such setup file. Write one"),
        (["cache", "setup.py", "--weights", "nowhere", "--out", "o"], "no such weights"),
        (["cache", "setup.py", "--weights", "setup.py", "--out", "o"], "cannot be read as weights"),
        (["cache", "setup.py", "--weights", "w.safetensors", "--out", "o", "--dtype", "int7"], "int7"),
        (["cache", "setup.py", "--weights", "w.safetensors", "--out", "o", "--device", "tpu9"], "device='tpu9'"),
        (["show", "w.safetensors"], "not a gradient cache"),
        (
            ["show", "nowhere"],
            "no such cache. Make one with gradient() and cache.save(), or `expunge cache`: of all data, at",
        ),
        (["unlearn", "setup.py", "--weights", "w.safetensors", "--out", "o", "reload"], "--cache"),
        (["unlearn", "setup.py", "--weights", "w.safetensors", "--out", "o", "gradient-ascent"], "defines no forget()"),
        (
            ["unlearn", "setup.py", "--weights", "w.safetensors", "--out", "o", "reload", "--reset-fraction", "1"],
            "reset_fraction=1.0",
        ),
        (
            ["unlearn", "setup.py", "--weights", "w.safetensors", "--out", "o", "reload", "--fine-tune.lr", "0"],
            "lr=0.0",
        ),
        (["unlearn", "setup.py", "--weights", "w.safetensors", "--out", "o", "reload", "--forget", "f"], "--forget"),
    ],
)
def test_a_mistake_of_the_user_is_said_ends_with_2_and_writes_nothing(folder, capsys, arguments, said):
    before = sorted(folder.iterdir())
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert said in " ".join((captured.err + captured.out).replace("│", " ").split())
    assert sorted(path for path in folder.iterdir() if path.name != "__pycache__") == before


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("def model(seed):", "def modell(seed):", "does not define model"),
        ("loss_terms =", "loss =", "does not define loss_terms"),
        ("def original():", "def originals():", "does not define original"),
        ("return data\n", "return 1 / 0\n", "original() failed with ZeroDivisionError"),
        ("import torch\n", "import torhc\n", "failed when it was run, with ModuleNotFoundError"),
        ("nn.Linear(8, 3)", "nn.Linear(8, 4)", "has shape"),
        (
            "nn.Linear(8, 3))",
            "nn.Linear(8, 3)).half()",
            "as torch.float32, and the model as torch.float16. Build the model in",
        ),
        ("return nn.Sequential(", "return list(", "model(0)"),
    ],
)
def test_a_mistake_in_a_setup_file_is_said(folder, capsys, old, new, said):
    text = Path("setup.py").read_text(encoding="utf-8")
    assert old in text
    Path("setup.py").write_text(text.replace(old, new, 1), encoding="utf-8")
    assert cached() == 2
    assert said in capsys.readouterr().err


def test_batches_of_three_need_a_function_that_says_what_to_measure(folder, capsys):
    text = Path("setup.py").read_text(encoding="utf-8")
    three = text + "\n\ndef retain():\n    return Examples(data.tensors[0], data.tensors[0], data.tensors[1])\n"
    Path("setup.py").write_text(three.replace("import torch\n", "import torch\nfrom expunge import Examples\n", 1))
    assert main(["evaluate", "setup.py", "--weights", "w.safetensors"]) == 2
    said = capsys.readouterr().err
    assert "a batch is a tuple of 3, and not (inputs, labels)" in said
    assert "logits(model, batch)" in said


def test_a_cache_of_other_weights_is_refused_and_nothing_is_written(folder, capsys):
    cached()
    assert unlearned(*RELOAD, weights="start.safetensors") == 2
    assert "taken at weights" in capsys.readouterr().err
    assert not Path("u.safetensors").exists()


def test_ctrl_c_writes_nothing_and_ends_with_130(folder, capsys, monkeypatch):
    cached()
    shutil.copy("w.safetensors", "u.safetensors")
    before = Path("u.safetensors").read_bytes()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("expunge.cli.own_model.unlearn_model", interrupted)
    assert unlearned("--replace", *RELOAD) == 130
    assert "interrupted" in capsys.readouterr().err
    assert Path("u.safetensors").read_bytes() == before


def test_weights_that_exist_are_not_written_over_unless_told_so(folder, capsys):
    cached()
    assert unlearned(*RELOAD) == 0
    before = Path("u.safetensors").read_bytes(), Path("u.trace.json").read_bytes()
    assert unlearned("--seed", "5", *RELOAD) == 2
    assert "u.safetensors exists, and evidence of it may too" in capsys.readouterr().err
    assert (Path("u.safetensors").read_bytes(), Path("u.trace.json").read_bytes()) == before
    assert unlearned("--seed", "5", "--replace", *RELOAD) == 0
    assert Path("u.safetensors").read_bytes() != before[0]


def test_a_mistake_of_ours_ends_with_1_and_a_traceback(folder, capsys, monkeypatch):
    monkeypatch.setattr("expunge.cli.own_model.unlearn_model", None)  # to call it is a mistake in a file of ours
    cached()
    assert unlearned(*RELOAD) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "this is a mistake of ours" in said


def test_a_cache_that_exists_is_not_written_over_unless_told_so(folder, capsys):
    cached()
    before = Path("c.safetensors").read_bytes()
    assert cached() == 2
    assert "the old one cannot be made again" in capsys.readouterr().err
    assert Path("c.safetensors").read_bytes() == before
    assert cached("--replace") == 0


@pytest.mark.parametrize("out", ["w.safetensors", "c.safetensors", "setup.py", "new.pt", "."])
def test_no_command_writes_over_what_it_reads_or_what_cannot_be_read_back(folder, capsys, out):
    cached()
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert unlearned(*RELOAD, out=out) == 2
    assert "--out" in (said := capsys.readouterr().err) or "name the file" in said or ".safetensors" in said
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_labels_that_do_not_fit_are_a_mistake_of_the_user(folder, capsys):
    with Path("setup.py").open("a", encoding="utf-8") as file:
        file.write("\nlabels[50] = 7\n")
    assert cached() == 2
    said = capsys.readouterr().err
    assert "labels int64 (60,) do not fit logits float32 (60, 3)" in said
    assert "Traceback" not in said


def test_a_mistake_in_a_setup_file_shows_its_own_lines_and_no_others(folder, capsys):
    cached()
    with Path("setup.py").open("a", encoding="utf-8") as file:
        file.write("\ndef loss_terms(model, batch):\n    return model(batch[0]).no_such_method()\n")
    capsys.readouterr()
    assert cached("--replace") == 2
    said = capsys.readouterr().err
    assert "AttributeError in your own code or data" in said
    assert said.count("File ") == 1
    assert "no_such_method" in said
    assert "with a few examples, in the form of your data: tuple (float32 (8, 6), int64 (8,)).\n" in said


def test_a_mistake_in_what_a_setup_file_imports_is_the_user_s_too(folder, capsys):
    text = Path("setup.py").read_text(encoding="utf-8")
    refusing = "\ndef loss_terms(model, batch):\n    raise ValueError('no such size')\n"
    Path("mine.py").write_text(text + refusing, encoding="utf-8")
    Path("setup.py").write_text("from mine import *\n", encoding="utf-8")
    assert cached() == 2
    said = capsys.readouterr().err
    assert "expunge: ValueError in your own code or data: no such size\n" in said
    assert said.count("File ") == 1
    assert f'mine.py", line {len((text + refusing).splitlines())}' in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--groups", "2", "--dtype", "float32"], "a cache with 2 groups is stored in torch.float64"),
        (["--groups", "0"], "groups=0: the number of groups is at least 1"),
        (["--groups", "500"], "groups=500: there are 1 micro-batches of 128 positions"),
        (["--max-shard", "0"], "--max-shard 0: gigabytes a file, more than 0. The default is 5"),
        (["--max-shard", "-2.5"], "--max-shard -2.5: gigabytes a file, more than 0"),
        (["--max-shard", "nan"], "--max-shard nan: gigabytes a file, more than 0"),
        (["--out", "setup.py/c.safetensors"], "cannot be written: "),
        (["--out", "c.index.json"], "c.index.json is the name of an index"),
    ],
)
def test_options_of_a_cache_that_cannot_be_are_refused_before_the_first_loss(folder, capsys, more, said):
    with Path("setup.py").open("a", encoding="utf-8") as file:
        file.write("\ndef loss_terms(model, batch):\n    raise AssertionError('computed')\n")
    before = sorted(folder.iterdir())
    assert cached(*more) == 2
    assert said in capsys.readouterr().err
    assert sorted(path for path in folder.iterdir() if path.name != "__pycache__") == before


@pytest.mark.parametrize("more", [["--out", "setup.py/u.safetensors"], ["--snapshots", "setup.py/steps"]])
def test_folders_that_cannot_be_written_are_refused_before_unlearning(folder, capsys, monkeypatch, more):
    cached()
    monkeypatch.delattr(own_model, "unlearn_model")
    assert unlearned(*more, *RELOAD) == 2
    assert "setup.py takes no new file (Not a directory). Give another folder" in capsys.readouterr().err


def test_settings_that_are_not_there_are_named_with_their_cure(folder, capsys):
    assert unlearned("--settings", "nope.json", *RELOAD, cache=None) == 2
    assert capsys.readouterr().err == (
        "expunge: nope.json: no such file of settings. `expunge rehearse` writes one; or leave --settings out.\n"
    )
