"""What is said of a latent that tells nothing."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.sparse as sp
from anndata import AnnData

from cellstill import AmbientRegularizedSCVI
from cellstill.errors import CellstillWarning
from cellstill.vi.collapse import warn_if_collapsed

HOW = {"accelerator": "cpu", "progress": False, "batch_size": 64, "lr": 3e-3}


def model_of(adata: AnnData) -> AmbientRegularizedSCVI:
    AmbientRegularizedSCVI.setup_anndata(adata)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The share of ambient RNA", category=CellstillWarning)
        return AmbientRegularizedSCVI(adata, n_hidden=16, n_latent=4)


@pytest.fixture
def alike() -> AnnData:
    """Cells that differ by depth alone."""
    rng = np.random.default_rng(0)
    mean = rng.gamma(2.0, 1.0, 60) * rng.lognormal(0, 0.3, (400, 1))
    return AnnData(sp.csr_matrix(rng.poisson(mean).astype(np.float32)))


def test_a_latent_without_anything_to_tell_is_said_once_training_had_time(alike):
    model = model_of(alike)
    with pytest.warns(CellstillWarning, match=r"The latent tells next to nothing of the cells \(0\.\d+ nats each\)"):
        model.train(max_epochs=25, **HOW)
    assert model.history_["kl_z_validation"].iloc[-1, 0] < 0.05


def test_few_epochs_are_no_collapse(alike):
    model_of(alike).train(max_epochs=19, early_stopping=False, **HOW)


def test_a_latent_that_tells_two_types_is_not_said_to_be_empty(two_types, trained):
    cells = trained._cells()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_collapsed(trained.module, cells, 60)
    types = two_types.obs["cell_type"].to_numpy()
    z = trained.get_latent_representation()
    between = np.linalg.norm(z[types == types[0]].mean(axis=0) - z[types != types[0]].mean(axis=0))
    assert between > 0.5
