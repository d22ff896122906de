from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cellstill.cli.app import app
from cellstill.data import simulate_counts

QUICK = ["--n-latent", "5", "--epochs-encoder", "2", "--epochs-decoder", "1"]


@pytest.fixture
def cells():
    """A small data set: 2 batches, 2 conditions in each, 3 cell types."""
    return simulate_counts(n_obs=240, n_vars=60, n_batches=2, n_cell_types=3, n_donors_per_group=1, seed=3)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write(here):
    """Write an AnnData as ``in.h5ad`` of the working directory."""

    def to_file(adata) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adata.write_h5ad(here / "in.h5ad")
        return here / "in.h5ad"

    return to_file


@pytest.fixture
def cellstill():
    """Run the application in this process."""

    def call(*args: object, quick: bool = False):
        return CliRunner().invoke(app, [*map(str, args), *(QUICK if quick else [])])

    return call
