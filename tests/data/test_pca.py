from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import scipy.sparse as sp

from cellstill.data import fit_pca, simulate_counts
from cellstill.data.pca import log2_cpm
from cellstill.errors import InvalidArgumentError


@pytest.fixture(scope="module")
def counts() -> sp.csr_matrix:
    return simulate_counts(n_obs=600, n_vars=300, seed=1).X


def transformed(counts: sp.csr_matrix, method: str) -> np.ndarray:
    """The textbook transform, dense and in float64."""
    x = counts.toarray().astype(np.float64)
    library = x.sum(axis=1, keepdims=True)
    if method == "standard":
        return np.log2(1 + 1e6 * x / library)
    mean = library * x.sum(axis=0) / x.sum()
    with np.errstate(invalid="ignore"):
        residuals = (x - mean) / np.sqrt(mean + mean**2 / 100)
    return np.clip(np.nan_to_num(residuals), -np.sqrt(len(x)), np.sqrt(len(x)))


def test_log2_cpm_is_the_formula_and_shares_indices(counts):
    ours = log2_cpm(counts)
    np.testing.assert_allclose(ours.toarray(), transformed(counts, "standard"), rtol=2e-6)
    assert np.shares_memory(ours.indices, counts.indices)


@pytest.mark.parametrize("method", ["standard", "pearson_residuals"])
def test_agrees_with_a_dense_singular_value_decomposition(counts, method):
    pca = fit_pca(counts, 10, method=method)
    x = transformed(counts, method)
    centred = x - x.mean(axis=0)
    _, singular, rows = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(pca.explained_variance, singular[:10] ** 2 / 599, rtol=1e-4)
    overlap = np.abs(np.sum(pca.components.T * rows[:10], axis=1))
    np.testing.assert_allclose(overlap, 1, atol=1e-3)
    expected = centred @ pca.components.astype(np.float64)
    np.testing.assert_allclose(pca.transform(counts), expected, atol=2e-4 * np.abs(expected).max())


def test_pearson_residuals_agree_with_scanpy(counts):
    import scanpy as sc

    theirs = sc.experimental.pp.normalize_pearson_residuals(sc.AnnData(counts.copy()), inplace=False)["X"]
    pca = fit_pca(counts, 5, method="pearson_residuals")
    centred = np.asarray(theirs) - np.asarray(theirs).mean(axis=0)
    np.testing.assert_allclose(pca.transform(counts), centred @ pca.components, atol=2e-3)


@pytest.mark.parametrize("method", ["standard", "pearson_residuals"])
def test_depths_that_span_a_factor_of_a_thousand(method):
    rng = np.random.default_rng(0)
    depth = np.exp(rng.uniform(np.log(30), np.log(30_000), 400))
    profile = rng.dirichlet(np.full(200, 0.5), size=2)[rng.integers(0, 2, 400)]
    counts = sp.csr_matrix(rng.poisson(depth[:, None] * profile).astype(np.float32))
    pca = fit_pca(counts, 5, method=method)
    centred = transformed(counts, method)
    centred = centred - centred.mean(axis=0)
    singular = np.linalg.svd(centred, compute_uv=False)
    np.testing.assert_allclose(pca.explained_variance, singular[:5] ** 2 / 399, rtol=1e-4)


@pytest.mark.parametrize("method", ["standard", "pearson_residuals"])
def test_new_cells_are_projected_by_the_fitted_map_alone(counts, method):
    pca = fit_pca(counts, 5, method=method)
    whole = pca.transform(counts)
    np.testing.assert_allclose(pca.transform(counts[37:41]), whole[37:41], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("method", ["standard", "pearson_residuals"])
def test_never_dense(method):
    counts = sp.random(4000, 3000, 0.02, format="csr", dtype=np.float32, random_state=0)
    counts.data = np.ceil(counts.data * 3)
    dense_bytes = 4000 * 3000 * 4
    tracemalloc.start()
    fit_pca(counts, 10, method=method)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < dense_bytes / 4


def test_bad_arguments(counts):
    with pytest.raises(InvalidArgumentError, match="pca_method='tsne'.*'standard', 'pearson_residuals'"):
        fit_pca(counts, 5, method="tsne")
    with pytest.raises(InvalidArgumentError, match="n_latent=300 .*600 cells x 300 genes"):
        fit_pca(counts, 300)
