"""What is freed stays at hand inside the block, however many are nested in it, and goes back at its end."""

from __future__ import annotations

import subprocess
import sys

import pytest

MEASURE = """
import resource, sys
import numpy as np
from cellstill._compat.malloc import keeping_freed_memory

def faults(function):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    function()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def steps():
    for _ in range(20):
        kept = [np.ones(40 << 17) for _ in range(3)]  # three times 40 MB

usual = faults(steps)
with keeping_freed_memory():
    with keeping_freed_memory():
        steps()
    kept = faults(steps)
    held = int(open("/proc/self/statm").read().split()[1])
after = int(open("/proc/self/statm").read().split()[1])
page = resource.getpagesize() / 2**20
print(usual, kept, held * page, after * page)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is that of Linux")
def test_blocks_are_reused_inside_and_given_back_at_the_end():
    child = subprocess.run([sys.executable, "-c", MEASURE], check=True, capture_output=True, text=True)
    usual, kept, held, after = map(float, child.stdout.split())
    assert usual > 1000
    assert kept < 0.05 * usual
    assert after < held - 100


def test_without_glibc_nothing_happens(monkeypatch):
    from cellstill._compat import malloc

    monkeypatch.setattr(sys, "platform", "darwin")
    malloc._glibc.cache_clear()
    try:
        mallopt, trim = malloc._glibc()
        assert (mallopt(1, 2), trim(0)) == (0, 0)
        with malloc.keeping_freed_memory():
            pass
    finally:
        malloc._glibc.cache_clear()
