"""The documentation is run, not only read."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from expunge.bench import experiments
from expunge.cli import main

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def run(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("page", ["README.md", "docs/own-model.md"])
def test_the_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)
    assert (tmp_path / "cache.safetensors").exists()
    assert any(hasattr(value, "trace") and hasattr(value, "model") for value in names.values())


def test_the_commands_for_ones_own_model_run_in_an_empty_folder(tmp_path, monkeypatch, capsys):
    """Those of expunge in this process: to import torch again takes longer than what they do."""
    monkeypatch.chdir(tmp_path)
    commands = blocks("docs/own-model.md", "bash")[0].replace("EXAMPLE", str(ROOT / "examples" / "digits"))
    for line in commands.splitlines():
        program, *arguments = line.split()
        if program == "expunge":
            assert main(arguments) == 0, line
        else:
            done = run(program, *arguments, folder=tmp_path)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert {"cache.safetensors", "unlearned.safetensors", "unlearned.trace.json"} <= {
        p.name for p in tmp_path.iterdir()
    }
    assert "NSKL" in capsys.readouterr().out


@pytest.mark.slow
def test_the_commands_of_a_rehearsal_run_after_a_deletion(tmp_path):
    before = blocks("docs/own-model.md", "bash")[0].splitlines()[:3]
    commands = "\n".join([*before, *blocks("docs/rehearse.md", "bash")[0].splitlines()])
    commands = commands.replace(" reload --fine", " --trials 2 --sets 2 reload --fine")
    for line in commands.replace("EXAMPLE", str(ROOT / "examples" / "digits")).splitlines():
        done = run(*line.split(), folder=tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert (tmp_path / "unlearned.safetensors").exists()


def test_the_documentation_agrees_with_the_code():
    done = run(sys.executable, "tools/check_docs.py", folder=ROOT)
    assert done.returncode == 0, done.stdout


def test_the_experiments_of_a_page_are_planned_as_they_stand_there(tmp_path, capsys):
    files = []
    for number, block in enumerate(blocks("docs/experiments.md", "python")):
        files.append(tmp_path / f"experiment{number}.py")
        files[-1].write_text(block, encoding="utf-8")
    profiled, own = files
    found = experiments.defined(profiled, "cpu")
    assert (found.tasks[0].scenario.name, found.effort.budget.epochs) == ("random 30 %", 5)
    assert main(["bench", "status", str(own), "--out", str(tmp_path)]) == 0
    assert re.search(r"evaluate\W+0\W+15\b", capsys.readouterr().out)


def test_the_page_of_experiments_names_every_file():
    text = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    for path in (ROOT / "experiments").glob("*.py"):
        assert f"`{path.name}`" in text, path.name


@pytest.mark.parametrize("profile", ["cpu", "paper"])
def test_every_experiment_can_be_planned_for_every_profile(profile):
    texts = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "experiments").glob("*.py"))}
    planned = [experiments.defined(path, profile) for path, text in texts.items() if "def experiment(profile" in text]
    assert len(planned) >= 10


@pytest.mark.parametrize("page", ["docs/data.md", "docs/scenarios.md"])
def test_the_python_of_a_page_about_data_runs(page):
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)
    if page == "docs/data.md":
        assert len(names["train"]) == 100
    else:
        assert (len(names["known"]), len(names["left"])) == (12, 188)
        assert names["pictures"].startswith(b"\x89PNG")


def test_functions_that_a_page_about_data_names_exist():
    for page, package in (("docs/data.md", "expunge.data"), ("docs/scenarios.md", "expunge.scenarios")):
        text = (ROOT / page).read_text(encoding="utf-8")
        found = re.findall(r"`(\w+)\.(\w+)\((?=[\w\"])", text)
        named = [
            (module, name)
            for module, name in found
            if (ROOT / "src" / package.replace(".", "/") / f"{module}.py").exists()
        ]
        assert len(named) >= 5
        for module, name in named:
            assert hasattr(importlib.import_module(f"{package}.{module}"), name), (page, module, name)
