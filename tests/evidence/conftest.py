from pathlib import Path

import pytest
from safetensors.torch import save_file

from expunge.cli import main
from expunge.metrics import membership
from tests.cli import RELOAD
from tests.evidence import EVALUATED, evaluate


@pytest.fixture(scope="session")
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
