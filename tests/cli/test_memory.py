"""The peak of a process is its own, and it is remembered."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

MEASURE = """
import numpy as np
from cellstill.cli._memory import peak_mb, used_mb
before = used_mb()
block = np.ones(200 << 17)  # 200 MB
held = used_mb()
del block
print(before, held, used_mb(), peak_mb())
"""


def measure() -> tuple[float, ...]:
    """MB of a new process before, with and without 200 MB, and its peak."""
    child = subprocess.run([sys.executable, "-c", MEASURE], check=True, capture_output=True, text=True)
    return tuple(map(float, child.stdout.split()))


def test_the_peak_remembers_what_was_given_back():
    before, held, after, peak = measure()
    assert held - before > 180
    assert after < held - 150
    assert peak >= held - 1


def test_the_peak_is_not_that_of_the_process_that_started_this_one():
    block = np.ones(600 << 17)
    peak = measure()[-1]
    assert block.nbytes > 600e6 > 400e6 > peak * 2**20 > 200e6
