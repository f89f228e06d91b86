import ctypes
import subprocess
import sys

import pytest

from expunge import allocator
from expunge.allocator import keep_freed_memory

FAULTS = """
import resource, sys, torch
from expunge.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
for _ in range(3):
    torch.ones(1 << 24)  # 64 MB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages_cleared(how: str) -> int:
    run = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_large_tensors_no_longer_cost_their_pages_anew():
    usual, kept = pages_cleared("usual"), pages_cleared("kept")
    assert usual > 100  # otherwise there is nothing to save here
    assert kept < usual / 20


def test_a_c_library_without_the_setting_says_so(monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: object())
    assert not keep_freed_memory()
