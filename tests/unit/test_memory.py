"""What becomes of freed memory, in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qdist import memory

pytestmark = pytest.mark.skipif(
    memory._libc is None or not hasattr(memory._libc, "mallopt"), reason="needs glibc"
)

N_ROUNDS = 40
COUNTED = f"""
import resource
import numpy as np
from qdist.memory import keep_freed

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range({N_ROUNDS}):
        # Below 4 MB NumPy asks for no huge pages, which are few faults.
        one = np.ones(500_000, np.float32)
        other = one + one
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""


def run(code: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", COUNTED + code], capture_output=True, check=True)
    return [int(word) for word in done.stdout.split()]


def test_memory_that_is_kept_is_not_faulted_in_again() -> None:
    usual = run("faults(); print(faults())")[0]
    kept = run("keep_freed(); faults(); print(faults())")[0]
    assert kept < N_ROUNDS * 500_000 * 4 / 4096 / 20
    assert kept <= usual


def test_memory_that_is_given_back_leaves_the_process() -> None:
    code = """
from qdist.memory import give_back, resident_bytes
keep_freed()
held = [np.ones(500_000, np.float32) for _ in range(40)]
full = resident_bytes()
del held
kept = resident_bytes()
give_back()
print(full, kept, resident_bytes())
"""
    full, kept, left = run(code)
    assert kept > full - (8 << 20)
    assert left < full - (64 << 20)
