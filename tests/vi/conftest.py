from __future__ import annotations

import warnings

import numpy as np
import pytest
import scipy.sparse as sp
from anndata import AnnData

from cellstill import AmbientRegularizedSCVI
from cellstill.data import simulate_counts
from cellstill.errors import CellstillWarning


@pytest.fixture(scope="session")
def two_types() -> AnnData:
    """Cells of two types in two batches, two conditions that do not differ, and eight donors."""
    return simulate_counts(
        n_obs=800,
        n_vars=200,
        n_batches=2,
        n_cell_types=2,
        library_size_median=3000,
        batch_sd=0.4,
        de_fraction=0.0,
        marker_fraction=0.15,
        marker_log2fc_mean=0.0,
        marker_log2fc_sd=1.5,
        seed=11,
    )


@pytest.fixture(scope="session")
def trained(two_types) -> AmbientRegularizedSCVI:
    """A model of them that has settled."""
    adata = two_types.copy()
    AmbientRegularizedSCVI.setup_anndata(adata, batch_key="batch", nn_conditioning_covariate_keys=["batch"])
    with warnings.catch_warnings():
        # Two types that share most genes do not tell soup, and there is none.
        warnings.filterwarnings("ignore", message="The share of ambient RNA", category=CellstillWarning)
        # Seeds 0 to 4 all find the two types; with seed 1 a marker of 1.7-fold is called or not as rounding has it.
        model = AmbientRegularizedSCVI(adata, n_hidden=32, n_latent=5, seed=2)
    how = {"accelerator": "cpu", "early_stopping": False, "progress": False}
    return model.train(max_epochs=60, batch_size=64, lr=8e-3, **how)


@pytest.fixture(scope="session")
def blocks():
    """Make cells of types that lack some genes."""

    def blocks(n_obs: int, n_types: int, seed: int, *, n_vars: int = 200, absent: float = 0.3, library: int = 3000):
        """Cells of types that lack a share of the genes, and express the rest within a factor of 2 of each other."""
        rng = np.random.default_rng(seed)
        expression = rng.gamma(2.0, 1.0, n_vars) * rng.uniform(0.7, 1.4, (n_types, n_vars))
        for kind in range(n_types):
            expression[kind, rng.permutation(n_vars)[: round(absent * n_vars)]] = 0.0
        expression /= expression.sum(axis=1, keepdims=True)
        kind = rng.integers(0, n_types, n_obs)
        mean = library * rng.lognormal(0, 0.4, n_obs)[:, None] * expression[kind]
        return sp.csr_matrix(rng.poisson(mean * rng.gamma(3.0, 1 / 3, mean.shape)).astype(np.float32)), kind

    return blocks
