"""Signs of evidence and errors are those of scvi-tools, and of the history."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from scvi.model import SCVI

from cellstill import AmbientRegularizedSCVI
from cellstill.data import simulate_counts
from cellstill.errors import InvalidArgumentError
from cellstill.vi.noise import CellNoise


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


def evidence(model, **how):
    error = model.get_reconstruction_error(return_mean=False, **how)["reconstruction_loss"]
    bound = model.get_elbo(return_mean=False, **how)
    return np.stack([bound, error, model.get_marginal_ll(n_mc_samples=3, return_mean=False, **how)])


def test_draws_do_not_depend_on_how_many_cells_are_visited_at_a_time(ours):
    expected = evidence(ours, batch_size=300)
    for batch_size in (1, 7, 128, 200):
        np.testing.assert_allclose(evidence(ours, batch_size=batch_size), expected, rtol=2e-5)
    # Another seed is further off than rounding, in nearly all cells.
    other = np.abs(evidence(ours, batch_size=300, seed=1) / expected - 1)
    assert (np.quantile(other, 0.05, axis=1) > 1e-4).all()
    with pytest.raises(InvalidArgumentError, match="seed=-1 has to be an integer of at least 0"):
        ours.get_elbo(seed=-1)


def test_noise_of_cells_is_standard_normal_and_independent():
    mean, variance = torch.full((300, 40), 2.0), torch.full((300, 40), 9.0)
    draws = {
        (seed, what): CellNoise(seed).draw(slice(0, 300), mean, variance, *what)
        for seed in (0, 1)
        for what in ((0, 0), (0, 1), (1, 0))
    }
    for draw in draws.values():
        assert stats.kstest((draw.flatten() - 2) / 3, "norm").pvalue > 1e-3
    # No row is another one, of the same draw or of any other.
    rows = torch.cat(list(draws.values()))
    assert np.abs(np.corrcoef(rows) - np.eye(1800)).max() < 0.95
    each = np.stack([draw.flatten() for draw in draws.values()])
    assert np.abs(np.corrcoef(each) - np.eye(6)).max() < 5 / np.sqrt(each.shape[1])
    part = CellNoise(0).draw(slice(100, 270), mean[100:270], variance[100:270], 0, 1)
    torch.testing.assert_close(part, draws[0, (0, 1)][100:270], rtol=0, atol=0)
