"""Threads are pinned before torch and BLAS start; real data are found here, and missed aloud."""

from __future__ import annotations

import os

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pathlib import Path

import pytest

DATA_DIR = Path(os.environ.get("CELLSTILL_DATA_DIR", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def real_data():
    """Path of a real data set by file name; the test is skipped, with a line saying so, where it is absent."""

    def path(name: str) -> Path:
        file = DATA_DIR / name
        if not file.is_file():
            pytest.skip(f"real data set {name} not found in {DATA_DIR}; set CELLSTILL_DATA_DIR to its folder")
        return file

    return path


@pytest.fixture(params=["cpu", "gpu"])
def accelerator(request):
    """Where a test trains; the GPU's part is skipped, with a line saying so, where torch finds none."""
    import torch

    if request.param == "gpu" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device: training on a GPU is not tested")
    return request.param


@pytest.fixture
def device(accelerator):
    """Name of that device in torch."""
    return {"cpu": "cpu", "gpu": "cuda"}[accelerator]
