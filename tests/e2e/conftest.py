from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Two processes run at a time, on what may be two cores.
ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS", "NUMBA")}


@pytest.fixture(scope="session")
def cellstill():
    """Run the application as its users do: another process."""

    def call(*args: object, cwd) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cellstill", *map(str, args)]
        return subprocess.run(
            command, cwd=cwd, env=os.environ | ONE_THREAD, capture_output=True, text=True, timeout=600
        )

    return call
