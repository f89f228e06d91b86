"""The commands and the example under torchrun."""

import os
import re
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from expunge import (
    cache,
    cross_entropy,
    gradient,
)
from expunge.cli import main
from expunge.setup import load_setup
from expunge.weights import save_weights
from tests.processes import all_well, network, records, require_same

SETUP = """
import torch
from torch import nn
from expunge import Examples, cross_entropy

images = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
loss_terms = cross_entropy

def model(seed):
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()

def original():
    return Examples(images.double(), images[:, :3].argmax(1))

def retain():
    return original().without(torch.arange(6))
"""
RELOAD = ("reload", "--reset-fraction", "0.2", "--fine-tune.epochs", "1")


def command(port: int, arguments: list[str], code: int) -> None:
    """What torchrun sets, and a command."""
    rank = os.environ["RANK"]
    os.environ |= {"LOCAL_RANK": rank, "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    out_file, error_file = (Path(f"{name}.{rank}") for name in ("out", "err"))
    with (
        out_file.open("w") as out,
        error_file.open("w") as errors,
        redirect_stdout(out),
        redirect_stderr(errors),
    ):
        assert main(arguments) == code


def on_the_command_line(name: str) -> list[list[str]]:
    given = ["setup.py", "--weights", "w.safetensors"]
    cached, out = f"{name}.c.safetensors", f"{name}.u.safetensors"
    return [
        ["cache", *given, "--out", cached, "--micro-batch", "8"],
        ["unlearn", *given, "--cache", cached, "--out", out, *RELOAD],
    ]


def test_the_command_line_works_under_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("setup.py").write_text(SETUP, encoding="utf-8")
    model = load_setup("setup.py").model(0)
    save_weights("w.safetensors", model)
    for alone, together in zip(on_the_command_line("one"), on_the_command_line("two"), strict=True):
        assert main(alone) == 0
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        all_well(2, command, tmp_path, port, together, 0)
    one, two = (cache.load(f"{name}.c.safetensors", model, cross_entropy) for name in ("one", "two"))
    require_same(one, two)
    reset = load_file("one.u.safetensors")
    for name, tensor in load_file("two.u.safetensors").items():
        torch.testing.assert_close(tensor, reset[name], rtol=0, atol=1e-12)
    assert "weights: two.u.safetensors" in Path("out.0").read_text()
    assert Path("out.1").read_text() == ""
    all_well(2, command, tmp_path, 0, ["show", "one.c.safetensors"], 2)
    said = "expunge: show runs in one process; cache and unlearn run under torchrun"
    assert Path("err.1").read_text().startswith(said)


def torchrun(script: Path, folder: Path, *arguments: str) -> str:
    command = [sys.executable, *arguments[:-1], str(script), *arguments[-1:]]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_example_gives_the_same_alone_and_in_four_processes(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "examples" / "torchrun" / "unlearn.py"
    said = {}
    for name, arguments in {
        "alone": (),
        "four": ("-m", "torch.distributed.run", "--nproc-per-node", "4"),
        "sharded": ("-m", "torch.distributed.run", "--nproc-per-node", "4"),
    }.items():
        (tmp_path / name).mkdir()
        said[name] = torchrun(script, tmp_path / name, *arguments, "--shard" if name == "sharded" else "")
        assert re.search(r"removed 40 of 2000, reset 13\d weights", said[name])
    one = load_file(tmp_path / "alone" / "unlearned.safetensors")
    for name in ("four", "sharded"):
        for key, tensor in load_file(tmp_path / name / "unlearned.safetensors").items():
            assert float((tensor - one[key]).abs().max()) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raise", "kill"])
def test_torchrun_ends_within_seconds_with_the_cause_and_the_job_can_be_run_again(how: str, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(JOB, encoding="utf-8")
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    failed = subprocess.run([*run, how], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert failed.returncode != 0
    if how == "raise":
        assert "ProcessFailed" in failed.stderr
        assert "no such label" in failed.stderr
    else:  # torchrun may end the other one before it can say anything
        assert re.search(r"exitcode\s*: -9 .*SIGKILL", failed.stderr.partition("Root Cause")[2])
    assert not list(tmp_path.glob("*.safetensors*")) + list(tmp_path.glob(".*.tmp"))
    subprocess.run([*run, "well"], cwd=tmp_path, capture_output=True, timeout=120, check=True)
    model = network()
    require_same(
        gradient(model, cross_entropy, records(), micro_batch=8),
        cache.load(tmp_path / "cache.safetensors", model, cross_entropy),
    )


JOB = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import torch.distributed as dist
from expunge import cache, cross_entropy, gradient
from tests.processes import Failing, network, records

dist.init_process_group("gloo")
loss = cross_entropy if sys.argv[1] == "well" else Failing(sys.argv[1])
cache.save("cache.safetensors", gradient(network(), loss, records(), micro_batch=8))
"""
