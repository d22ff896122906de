"""Signs of evidence and errors are those of scvi-tools, and of the history."""

from __future__ import annotations

import numpy as np
import pytest
from scvi.model import SCVI

from cellstill import AmbientRegularizedSCVI
from cellstill.data import simulate_counts


@pytest.fixture(scope="module")
def cells():
    adata = simulate_counts(n_obs=300, n_vars=60, n_batches=2, library_size_median=800, batch_sd=0.0, seed=5)
    adata.obs["batch"] = adata.obs["batch"].astype(str)
    return adata


@pytest.fixture(scope="module")
def ours(cells):
    adata = cells.copy()
    AmbientRegularizedSCVI.setup_anndata(adata, batch_key="batch")
    return AmbientRegularizedSCVI(adata, n_hidden=16, n_latent=4, ambient_rate=0.05).train(max_epochs=1, train_size=0.5)


def test_signs_are_those_of_scvi_tools(cells, ours):
    adata = cells.copy()
    SCVI.setup_anndata(adata, batch_key="batch")
    theirs = SCVI(adata, n_hidden=16, n_latent=4)
    theirs.is_trained_ = True

    def signs(model):
        evidence = [model.get_elbo(), model.get_marginal_ll(n_mc_samples=5)]
        errors = model.get_reconstruction_error()
        assert set(errors) == {"reconstruction_loss"}
        return [float(np.sign(float(value))) for value in (*evidence, *errors.values())]

    assert signs(ours) == signs(theirs) == [-1.0, -1.0, 1.0]


def test_evidence_is_the_negative_of_the_history(ours):
    watched = ours.validation_indices_
    assert -ours.get_elbo(indices=watched) == pytest.approx(ours.history_["elbo_validation"].iloc[-1, 0], rel=0.01)
    error = ours.get_reconstruction_error(indices=watched)["reconstruction_loss"]
    assert error == pytest.approx(ours.history_["reconstruction_loss_validation"].iloc[-1, 0], rel=0.01)
    # At the same draws, what is left are the divergences.
    divergence = -ours.get_elbo(indices=watched) - error
    terms = sum(ours.history_[f"{term}_validation"].iloc[-1, 0] for term in ("kl_z", "kl_l"))
    assert divergence == pytest.approx(terms, rel=0.01)
