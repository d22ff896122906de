"""Factors per gene between batches are told from background, from cell types, and from noise."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from cellstill.data import simulate_counts
from cellstill.errors import CellstillWarning
from cellstill.vi.multiplicative import SPREAD, multiplicative_spread, warn_if_multiplicative


def simulate(batch_sd, n_obs=1500, n_batches=3):
    adata = simulate_counts(n_obs=n_obs, n_vars=600, n_batches=n_batches, n_cell_types=4, batch_sd=batch_sd, seed=11)
    return sp.csr_matrix(adata.X), adata.obs["batch"].cat.codes.to_numpy(), adata.obs["cell_type"].to_numpy()


@pytest.fixture(scope="module")
def same():
    return simulate(0.0)


def largest(counts, codes):
    return max(multiplicative_spread(counts, codes).values())


def with_soup(counts, cells, share, profile, rng):
    """Additive background in some of the cells."""
    total = np.asarray(counts.sum(axis=1)).ravel() * share / (1 - share)
    return sp.csr_matrix(counts + rng.poisson(np.outer(total * cells, profile / profile.sum())))


@pytest.mark.parametrize("sd", [0.3, 0.6])
def test_the_spread_is_that_of_the_factors(same, sd):
    counts, codes, _ = same
    rng = np.random.default_rng(3)
    factor = np.exp(rng.normal(0, sd, counts.shape[1]))
    scaled = sp.csr_matrix(counts.multiply(np.where(codes[:, None] == 1, factor, 1)))
    scaled.data = rng.poisson(scaled.data).astype(float)
    scaled.eliminate_zeros()
    spreads = multiplicative_spread(scaled, codes)
    assert set(spreads) == {0, 1, 2}
    # The smaller of the two sides of the closest of many groups: a little below the truth.
    assert 0.75 * sd < spreads[1] < 1.1 * sd


def test_batches_of_one_technology_do_not_differ(same):
    assert largest(*same[:2]) < 0.1


@pytest.mark.parametrize("share", [0.05, 0.2, 0.4])
def test_background_is_not_taken_for_factors(same, share):
    counts, codes, kinds = same
    profile = np.asarray(counts[kinds == kinds[0]].sum(axis=0)).ravel()
    soupy = with_soup(counts, codes == 1, share, profile, np.random.default_rng(0))
    assert largest(soupy, codes) < SPREAD / 2


def test_other_proportions_of_cell_types_are_not_taken_for_factors(same):
    counts, codes, kinds = same
    rare = (codes == 1) & (kinds != kinds[0]) & (np.random.default_rng(0).random(len(codes)) < 0.8)
    assert largest(counts[~rare], codes[~rare]) < 0.2


def test_few_counts_tell_nothing():
    counts = sp.csr_matrix(np.eye(40))
    assert multiplicative_spread(counts, np.arange(40) % 2) == {}
    assert warn_if_multiplicative(counts, np.arange(40) % 2, ["a", "b"], "lane") == 0
    assert multiplicative_spread(counts, np.zeros(40, dtype=int)) == {}


def test_the_warning_names_the_arguments_to_add_and_the_batch(same):
    counts, codes, _ = simulate(0.8)
    with pytest.warns(CellstillWarning, match=r"'tech' differ .* nn_conditioning_covariate_keys=\['tech'\], and "):
        spread = warn_if_multiplicative(counts, codes, ["p", "q", "r"], "tech")
    assert spread > 0.8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert warn_if_multiplicative(*same[:2], ["p", "q", "r"], "tech") < 0.1


def test_two_calls_agree(same):
    assert multiplicative_spread(*same[:2]) == multiplicative_spread(*same[:2])


@pytest.mark.parametrize(
    ("name", "column", "low", "high"),
    [
        ("cellbench_3cl_3tech.h5ad", "batch", 0.6, 1.0),
        ("cellbench_3cl.h5ad", "batch", 0.5, 1.0),
        ("kang_pbmc.h5ad", "sample", 0.0, 0.4),
        ("kang_pbmc.h5ad", "donor", 0.0, 0.25),
        ("onek1k_subset.h5ad", "batch", 0.0, 0.3),
    ],
)
def test_real_technologies_are_told_from_real_samples(real_data, name, column, low, high):
    adata = ad.read_h5ad(real_data(name))
    adata = adata[adata.obs[column].notna().to_numpy()]
    codes = adata.obs[column].astype("category").cat.codes.to_numpy()
    spread = largest(sp.csr_matrix(adata.X), codes)
    assert low < spread < high
    assert (spread > SPREAD) == name.startswith("cellbench")
