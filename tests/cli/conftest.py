from pathlib import Path

import pytest

from expunge.cli import main
from tests.cli import SETUP, weights_of_nobody


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a setup file and trained weights; also the current one."""
    monkeypatch.chdir(tmp_path)
    Path("setup.py").write_text(SETUP, encoding="utf-8")
    assert main(["unlearn", *weights_of_nobody(tmp_path), "--out", "w.safetensors", "retrain"]) == 0
    return tmp_path
