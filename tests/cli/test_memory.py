"""The peak of a process is its own."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from cellstill.cli._memory import peak_mb, used_mb


def test_the_peak_remembers_what_was_given_back():
    before = used_mb()
    block = np.ones(200 << 17)  # 200 MB
    held = used_mb()
    del block
    assert held - before > 180
    assert peak_mb() >= held - 1
    assert used_mb() < held - 150


def test_the_peak_is_not_that_of_the_process_that_started_this_one():
    block = np.ones(400 << 17)
    code = "from cellstill.cli._memory import peak_mb, used_mb; print(used_mb(), peak_mb())"
    child = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    used, peak = map(float, child.stdout.split())
    assert used_mb() > 400 > 200 > peak >= used - 1 > 5
    assert block.all()
