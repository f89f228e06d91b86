"""Does the test suite see mistakes? Plant one bug at a time in a copy of the source; the named tests must fail.

Run ``python tools/mutants.py`` for all of them, or name some. A bug that no test sees is printed as SURVIVED, and
the exit status is 1. The checkout itself is never changed. The bugs are in ``mutants.toml``.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_name("mutants.toml")
AT_ONCE = 2
LIMIT = 180  # seconds; a mutant that hangs is caught, too
PASSED, FAILED, WRONG_COPY = 0, 1, 99  # pytest's exit statuses, and that of the guard

# pytest loads this first: the tests must import the copy, not the installed package.
GUARD = f"""
import importlib.util, os, pathlib
spec = importlib.util.find_spec("expunge")
if not pathlib.Path(spec.origin).is_relative_to(pathlib.Path(__file__).parent):
    print("the tests would import", spec.origin, flush=True)
    os._exit({WRONG_COPY})
"""


@dataclass(frozen=True)
class Mutant:
    """A bug to plant."""

    name: str
    file: str  # under src/expunge
    old: str  # must occur exactly once
    new: str
    tests: str  # what of tests/ must see it


MUTANTS = [Mutant(**fields) for fields in tomllib.loads(LIST.read_text(encoding="utf-8"))["mutant"]]


def snapshot(folder: Path) -> None:
    """Copy the source and its tests, so that they stay as they are while someone edits the checkout."""
    for name in ("src", "tests", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "src" / "mutant_guard.py").write_text(GUARD)


def run_tests(folder: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Run tests in a copy: pytest's exit status, and what it printed."""
    paths = [f"tests/{each}" for each in tests]
    command = [sys.executable, "-m", "pytest", *paths, "-p", "mutant_guard", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [*command, "-x", "--no-header", "-q"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return FAILED, "FAILED (timed out)"
    return done.returncode, done.stdout + done.stderr


def require_clean(clean: Path, mutants: Sequence[Mutant]) -> None:
    """Stop unless every bug can be planted, and every test passes without one."""
    for mutant in mutants:
        found = (clean / "src" / "expunge" / mutant.file).read_text(encoding="utf-8").count(mutant.old)
        if found != 1:
            sys.exit(f"{mutant.name!r}: {mutant.file} has {mutant.old!r} {found} times, not once. Adapt the mutant.")
    status, output = run_tests(clean, sorted({mutant.tests for mutant in mutants}))
    if status != PASSED:
        sys.exit(f"{output}\nThe tests must pass without a mutant first (pytest's exit status was {status}).")


def verdict(clean: Path, mutant: Mutant) -> tuple[str, float, str]:
    """Whether the tests see a bug, in how many seconds, and which test did."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        shutil.copytree(clean, folder)
        path = folder / "src" / "expunge" / mutant.file
        path.write_text(path.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8")
        status, output = run_tests(folder, [mutant.tests])
    spent = time.perf_counter() - start
    saw = next((line.split(" - ")[0] for line in output.splitlines() if line.startswith("FAILED")), "")
    if status == PASSED:
        return "SURVIVED", spent, ""
    if status == FAILED and saw:
        return "caught", spent, saw.removeprefix("FAILED ").removeprefix("tests/")
    sys.exit(f"{output}\n{mutant.name!r}: pytest ended with status {status}, so the tests said nothing.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="words of the names of some mutants; all by default")
    words = parser.parse_args().names
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    if not chosen:
        parser.error(f"no mutant has {' or '.join(words)} in its name")
    start, survivors = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as clean, ThreadPoolExecutor(AT_ONCE) as pool:
        snapshot(Path(clean))
        require_clean(Path(clean), chosen)
        print(f"{'verdict':<9} {'s':>4}  {'planted bug':<58} {'file':<26} seen first by")
        found = pool.map(partial(verdict, Path(clean)), chosen)
        for mutant, (said, spent, saw) in zip(chosen, found, strict=True):
            survivors += said == "SURVIVED"
            print(f"{said:<9} {spent:4.0f}  {mutant.name:<58} {mutant.file:<26} {saw or mutant.tests}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} caught in {time.perf_counter() - start:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
