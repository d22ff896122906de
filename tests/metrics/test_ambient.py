from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from scipy import stats

from cellstill.data import simulate_counts
from cellstill.data.soup import add_soup
from cellstill.errors import InvalidArgumentError
from cellstill.metrics.ambient import (
    _theta_within_types,
    absent_genes,
    denoising_error,
    marker_leak,
    oracle_denoise,
    profile_agreement,
    rate_error,
    removed_share,
    subtract_soup,
)


@pytest.fixture(scope="module")
def cells():
    return simulate_counts(
        n_obs=600, n_vars=300, n_cell_types=4, marker_log2fc_mean=6.0, library_size_median=2000, n_batches=1, seed=4
    )


@pytest.fixture(scope="module")
def dirty(cells):
    return add_soup(cells.X, 0.2, seed=4)


def triple(rng: np.random.Generator) -> list[np.ndarray]:
    clean = rng.poisson(0.7, (30, 12)).astype(float)
    contaminated = clean + rng.poisson(0.3, clean.shape)
    return [contaminated * rng.random(clean.shape), contaminated, clean]


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix, sp.csc_array], ids=["dense", "csr", "csc"])
def test_denoising_error_is_the_ratio_of_root_mean_squares(form):
    d, x, c = triple(np.random.default_rng(0))
    expected = np.sqrt(((d - c) ** 2).mean()) / np.sqrt(((x - c) ** 2).mean())
    assert denoising_error(form(d), form(x), form(c)) == pytest.approx(expected, rel=1e-12)
    assert denoising_error(form(c), form(x), form(c)) == 0
    assert denoising_error(form(x), form(x), form(c)) == 1


def test_denoising_error_refuses_cells_without_soup():
    _, _, c = triple(np.random.default_rng(0))
    with pytest.raises(InvalidArgumentError, match="no soup"):
        denoising_error(c, c, c)


def test_removed_share_is_of_all_counts():
    d, x, _ = triple(np.random.default_rng(1))
    assert removed_share(d, x) == pytest.approx(1 - d.sum() / x.sum())
    assert removed_share(x, x) == 0


def test_absent_genes_by_hand():
    #   gene 0: marker of a, absent from b and c; 1: everywhere; 2: of a and a little (10 %) of b; 3: too rare
    a, b, c = [40, 50, 10, 0.0], [0, 99, 1, 0.0], [1, 98, 0, 1.0]
    x = np.array([a, a, b, b, b, c])
    absent, types = absent_genes(x, list("aabbbc"), max_share=0.05, min_mean=1.5)
    assert types == ["a", "b", "c"]
    np.testing.assert_array_equal(absent, [[0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0]])
    absent, _ = absent_genes(x, list("aabbbc"), max_share=0.1, min_mean=0.5)
    np.testing.assert_array_equal(absent, [[0, 0, 0, 1], [1, 0, 1, 1], [1, 0, 1, 0]])


def test_absent_genes_does_not_see_depth():
    x = np.array([[40.0, 60], [0, 100]])
    one, _ = absent_genes(x, ["a", "b"])
    deep, _ = absent_genes(x * [[1], [30]], ["a", "b"])
    np.testing.assert_array_equal(one, deep)


def test_marker_leak_counts_what_is_left_cell_by_cell(cells, dirty):
    labels = cells.obs["cell_type"].to_numpy()
    absent, types = absent_genes(cells.X, labels)
    assert absent.sum() > 20
    denoised = dirty.counts.multiply(0.5).tocsr()
    left = before = 0.0
    for cell, label in enumerate(labels):
        genes = absent[types.index(label)]
        left += cells.X[cell].toarray()[0, genes].sum()
        before += dirty.counts[cell].toarray()[0, genes].sum()
    assert marker_leak(cells.X, dirty.counts, labels, absent, types) == pytest.approx(left / before)
    assert marker_leak(denoised, dirty.counts, labels, absent, types) == pytest.approx(0.5)


def test_marker_leak_leaves_out_types_without_known_genes():
    absent = np.array([[True, False]])
    x = np.array([[4.0, 1], [7, 1]])
    assert marker_leak(x * [[0.25], [1]], x, ["a", "b"], absent, ["a"]) == 0.25
    with pytest.raises(InvalidArgumentError, match="no count of an absent gene"):
        marker_leak(x, x, ["a", "b"], absent, ["z"])


def test_rate_error_is_relative():
    np.testing.assert_allclose(rate_error([0.06, 0.08], [0.05, 0.1]), [0.2, -0.2])
    with pytest.raises(InvalidArgumentError, match="positive"):
        rate_error([0.01], [0.0])


def test_profile_agreement_with_and_beyond_the_mean():
    rng = np.random.default_rng(3)
    mean = rng.gamma(1, 1, 400)
    true = mean * np.exp(rng.normal(0, 0.5, 400))
    estimated = true * np.exp(rng.normal(0, 0.5, 400))
    found = profile_agreement(3 * estimated, true, 7 * mean)
    assert found.correlation == pytest.approx(stats.pearsonr(estimated, true).statistic)
    kept = true / true.sum() >= 1e-5
    expected = stats.pearsonr(np.log(estimated / mean)[kept], np.log(true / mean)[kept]).statistic
    assert found.log_ratio_correlation == pytest.approx(expected)
    assert found.n_genes == kept.sum()
    assert 0.5 < found.log_ratio_correlation < 0.9
    assert profile_agreement(mean, true, mean).log_ratio_correlation == 0
    assert profile_agreement(true, true, mean).log_ratio_correlation == pytest.approx(1)


def test_profile_agreement_leaves_out_rare_genes():
    true = np.array([0.5, 0.3, 0.2 - 1e-6, 1e-6, 0.0])
    assert profile_agreement(true + 0.01, true, np.ones(5)).n_genes == 3
    with pytest.raises(InvalidArgumentError, match="leaves 1 genes"):
        profile_agreement(true, true, np.ones(5), min_true=0.4)


def test_subtraction_is_the_formula(cells, dirty):
    rate = np.linspace(0.1, 0.3, cells.n_obs)
    x = dirty.counts.toarray()
    expected = np.maximum(x - (rate * x.sum(axis=1))[:, None] * dirty.profile[0], 0)
    np.testing.assert_allclose(subtract_soup(dirty.counts, rate, dirty.profile[0]).toarray(), expected, atol=1e-9)
    per_cell = np.tile(dirty.profile[0], (cells.n_obs, 1))
    np.testing.assert_allclose(subtract_soup(dirty.counts, rate, per_cell).toarray(), expected, atol=1e-9)


@pytest.mark.parametrize(
    ("rate", "profile"), [(np.ones(3), np.ones(300)), (0.1, np.ones(4))], ids=["cells_of_rate", "genes_of_profile"]
)
def test_subtraction_refuses_shapes_that_do_not_fit(dirty, rate, profile):
    with pytest.raises(InvalidArgumentError, match="they must be"):
        subtract_soup(dirty.counts, rate, profile)


def test_the_poisson_oracle_is_the_share_of_the_type(cells, dirty):
    labels = cells.obs["cell_type"].to_numpy()
    x, c, rate = dirty.counts.toarray(), cells.X.toarray().astype(float), dirty.cell_rate
    expected = np.zeros_like(c)
    for label in np.unique(labels):
        mine = labels == label
        native = ((1 - rate[mine]) * x[mine].sum(axis=1))[:, None] * (c[mine].sum(axis=0) / c[mine].sum())
        soup = (rate[mine] * x[mine].sum(axis=1))[:, None] * dirty.profile[0]
        expected[mine] = x[mine] * native / np.maximum(native + soup, 1e-300)
    found = oracle_denoise(dirty.counts, cells.X, labels, rate, dirty.profile[0], overdispersed=False)
    np.testing.assert_allclose(found.toarray(), expected, atol=1e-9)


def test_what_more_is_known_the_better(cells, dirty):
    labels = cells.obs["cell_type"].to_numpy()
    known = (labels, dirty.cell_rate, dirty.profile[0])
    oracle = oracle_denoise(dirty.counts, cells.X, *known)
    share = oracle_denoise(dirty.counts, cells.X, *known, overdispersed=False)
    subtracted = subtract_soup(dirty.counts, dirty.cell_rate, dirty.profile[0])
    errors = [denoising_error(d, dirty.counts, cells.X) for d in (oracle, share, subtracted)]
    assert errors[0] < 0.98 * errors[1]
    assert errors[0] < 0.98 * errors[2]
    assert max(errors) < 1
    assert (oracle > dirty.counts).nnz == 0
    absent, types = absent_genes(cells.X, labels)
    leak = [marker_leak(d, dirty.counts, labels, absent, types) for d in (oracle, subtracted, cells.X)]
    assert leak[0] == pytest.approx(leak[2], abs=0.05)
    assert leak[0] < leak[1]


def test_dispersion_of_the_oracle_is_that_within_types():
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2, 1500)
    theta = np.repeat([0.5, 2.0, 8.0], 100)
    expression = rng.dirichlet(np.full(300, 20.0), size=2)
    library = rng.uniform(2000, 6000, len(codes))
    mean = library[:, None] * expression[codes]
    x = rng.poisson(rng.gamma(theta, 1 / theta, mean.shape) * mean).astype(float)
    sums = np.stack([x[codes == k].sum(axis=0) for k in (0, 1)])
    found = sums / sums.sum(axis=1, keepdims=True)
    predicted = x.sum(axis=1)[:, None] * found[codes]
    by_moments = (predicted**2).sum(axis=0) / ((x - predicted) ** 2 - predicted).sum(axis=0)
    ours = _theta_within_types(sp.csr_matrix(x), codes, found)
    np.testing.assert_allclose(ours, by_moments, rtol=1e-8)
    for value in (0.5, 2.0, 8.0):
        assert np.median(ours[theta == value]) == pytest.approx(value, rel=0.1)
