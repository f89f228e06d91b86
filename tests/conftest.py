from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401 - jaxtyping looks the checker up by this name

torch.set_num_threads(1)  # five times faster on tiny models, and the same bits everywhere
# Only modules that say shapes: to check every call of every function doubled the time of the methods' tests.
SOURCE = Path(__file__).parent.parent / "src"
SHAPED = [
    ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    for path in sorted(SOURCE.rglob("*.py"))
    if "from jaxtyping import" in path.read_text(encoding="utf-8")
]
install_import_hook(SHAPED, "tests.typecheck.check")


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory):
    """The run folder of a small experiment that nothing happened to."""
    from tests.tiny_bench import TINY, run  # after the hook

    return run(TINY, tmp_path_factory.mktemp("unbroken"), seeds=(0, 1))
