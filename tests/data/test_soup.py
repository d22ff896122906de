from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy import stats
from scipy.special import softmax

from cellstill.data import simulate_counts
from cellstill.data.soup import add_soup, draw_native, expected_native
from cellstill.errors import InvalidArgumentError, InvalidCountsError

RATES = [0.05, 0.1, 0.2]


@pytest.fixture(scope="module")
def cells():
    return simulate_counts(n_obs=900, n_vars=200, n_batches=3, library_size_median=1000, seed=3)


def test_counts_are_the_clean_ones_plus_the_soup(cells):
    dirty = add_soup(cells.X, RATES, batch=cells.obs["batch"], seed=1)
    difference = dirty.counts - dirty.soup - cells.X
    assert difference.nnz == 0 or not difference.data.any()
    assert sp.issparse(dirty.soup)
    assert dirty.counts.dtype == cells.X.dtype
    assert dirty.counts.has_canonical_format
    assert dirty.soup.data.min() >= 1
    np.testing.assert_array_equal(dirty.soup.data, np.round(dirty.soup.data))


def test_rates_are_those_asked_for_batch_by_batch(cells):
    dirty = add_soup(cells.X, RATES, batch=cells.obs["batch"], spread=0.0, seed=1)
    assert dirty.batches == ("batch_0", "batch_1", "batch_2")
    np.testing.assert_array_equal(dirty.rate, RATES)
    # 300 cells of 1,000 counts: at least 15,000 soup counts per batch, so 1 % is one standard deviation.
    np.testing.assert_allclose(dirty.realised_rate, RATES, rtol=0.03)
    np.testing.assert_allclose(dirty.cell_rate, np.array(RATES)[dirty.batch_codes], rtol=1e-12)
    per_batch = [
        dirty.soup[(cells.obs["batch"] == name).to_numpy()].sum()
        / dirty.counts[(cells.obs["batch"] == name).to_numpy()].sum()
        for name in dirty.batches
    ]
    np.testing.assert_allclose(dirty.realised_rate, per_batch)


def test_the_profile_is_the_pooled_expression_of_the_batch(cells):
    dirty = add_soup(cells.X, RATES, batch=cells.obs["batch"], seed=1)
    for name, profile in zip(dirty.batches, dirty.profile, strict=True):
        pooled = cells.X[(cells.obs["batch"] == name).to_numpy()].toarray().astype(float).sum(axis=0)
        np.testing.assert_allclose(profile, pooled / pooled.sum(), rtol=1e-12)


def test_soup_counts_are_poisson_around_rate_times_profile(cells):
    draws = np.stack([add_soup(cells.X, 0.2, spread=0.0, seed=seed).soup.toarray() for seed in range(40)])
    library = np.asarray(cells.X.sum(axis=1)).ravel()
    profile = np.asarray(cells.X.sum(axis=0)).ravel() / cells.X.sum()
    mean = 0.25 * library[:, None] * profile
    z = (draws - mean) / np.sqrt(mean)
    assert abs(z.mean()) < 4 / np.sqrt(z.size)
    # The variance of a squared standardised Poisson count is 2 + 1 / mean.
    assert abs((z**2).mean() - 1) < 4 * np.sqrt((2 + 1 / mean).mean() / z.size)
    gene_total = draws.sum(axis=(0, 1))
    expected = 40 * mean.sum(axis=0)
    assert np.abs((gene_total - expected) / np.sqrt(expected)).max() < 4.5


def test_spread_moves_cells_around_the_rate_of_their_batch(cells):
    dirty = add_soup(cells.X, 0.1, spread=0.4, seed=5)
    log_odds = np.log(dirty.cell_rate / (1 - dirty.cell_rate))
    assert log_odds.std() == pytest.approx(0.4, rel=0.1)
    assert (dirty.cell_rate / (1 - dirty.cell_rate)).mean() == pytest.approx(1 / 9, rel=0.05)
    share = np.asarray(dirty.soup.sum(axis=1)).ravel() / np.asarray(dirty.counts.sum(axis=1)).ravel()
    assert np.corrcoef(share, dirty.cell_rate)[0, 1] > 0.8


def test_same_seed_same_counts_another_seed_others(cells):
    one, again, other = (add_soup(cells.X, 0.1, seed=seed).counts for seed in (7, 7, 8))
    assert (one != again).nnz == 0
    assert (one != other).nnz > 0


@pytest.mark.parametrize("form", [np.asarray, sp.csc_matrix, sp.csr_array], ids=["dense", "csc", "csr_array"])
def test_the_container_does_not_matter(cells, form):
    container = form(cells.X.toarray())
    expected = add_soup(cells.X, 0.1, seed=2)
    found = add_soup(container, 0.1, seed=2)
    assert (found.counts != expected.counts).nnz == 0
    assert isinstance(found.counts, sp.csr_matrix)


def test_no_rate_adds_nothing(cells):
    dirty = add_soup(cells.X, [0.0, 0.0, 0.3], batch=cells.obs["batch"], seed=1)
    clean = (cells.obs["batch"] != "batch_2").to_numpy()
    assert dirty.soup[clean].nnz == 0
    assert dirty.soup[~clean].nnz > 0


def test_a_given_profile_is_followed_and_its_zeros_stay_zero(cells):
    profile = np.zeros(cells.n_vars)
    profile[[3, 5]] = [1.0, 3.0]
    dirty = add_soup(cells.X, 0.2, profile=profile, seed=1)
    total = np.asarray(dirty.soup.sum(axis=0)).ravel()
    assert set(np.flatnonzero(total)) == {3, 5}
    assert total[5] / total[3] == pytest.approx(3, rel=0.05)


def test_rates_follow_first_appearance_or_the_categories(cells):
    names = np.where(np.arange(cells.n_obs) % 2, "a", "b")
    plain = add_soup(cells.X, [0.1, 0.3], batch=names, seed=1)
    assert plain.batches == ("b", "a")
    categorical = add_soup(cells.X, [0.1, 0.3], batch=pd.Categorical(names, categories=["a", "unused", "b"]), seed=1)
    assert categorical.batches == ("a", "b")
    assert plain.realised_rate[1] > plain.realised_rate[0]
    assert categorical.realised_rate[1] > categorical.realised_rate[0]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"rate": 1.0}, InvalidArgumentError, "rate=1.0 must lie in"),
        ({"rate": -0.1}, InvalidArgumentError, "must lie in"),
        ({"rate": float("nan")}, InvalidArgumentError, "must lie in"),
        ({"rate": [0.1, 0.2]}, InvalidArgumentError, "one for each of the 1 batches"),
        ({"rate": 0.1, "spread": -1}, InvalidArgumentError, "spread=-1"),
        ({"rate": 0.1, "batch": ["a"]}, InvalidArgumentError, "one category for each of the 4 cells"),
        ({"rate": 0.1, "batch": ["a", "a", None, "a"]}, InvalidArgumentError, "1 of them missing"),
        ({"rate": 0.1, "profile": np.ones(2)}, InvalidArgumentError, "profile has shape"),
        ({"rate": 0.1, "profile": -np.ones(3)}, InvalidArgumentError, "non-negative"),
        ({"rate": 0.1, "counts": np.full((4, 3), 0.5)}, InvalidCountsError, "integers"),
        ({"rate": 0.1, "batch": list("aaab"), "counts": np.diag([1, 1, 1, 0])[:, :3]}, InvalidCountsError, "'b'"),
    ],
    ids=lambda value: "" if isinstance(value, type) else None,
)
def test_bad_input_names_the_argument(kwargs, error, message):
    kwargs = {"counts": np.ones((4, 3)), **kwargs}
    with pytest.raises(error, match=message):
        add_soup(kwargs.pop("counts"), kwargs.pop("rate"), **kwargs)


@pytest.mark.parametrize("theta", [0.05, 1.0, 30.0, np.inf])
def test_expected_native_is_the_posterior_mean_of_the_sum(theta):
    for x in (1, 2, 7, 60, 400):
        for native in (1e-4, 0.3, 20.0):
            for soup in (1e-4, 0.2, 5.0, 90.0):
                k = np.arange(x + 1)
                if np.isinf(theta):
                    log_native = stats.poisson.logpmf(x - k, native)
                else:
                    log_native = stats.nbinom.logpmf(x - k, theta, theta / (theta + native))
                log_joint = log_native + stats.poisson.logpmf(k, soup)
                expected = ((x - k) * softmax(log_joint)).sum()
                found = expected_native(np.array([x]), np.array([native]), np.array([soup]), theta)
                np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * x)


def test_expected_native_without_dispersion_is_the_share():
    rng = np.random.default_rng(0)
    x, native, soup = rng.integers(0, 50, 300), rng.gamma(0.3, 10, 300), rng.gamma(0.3, 10, 300)
    np.testing.assert_allclose(expected_native(x, native, soup, np.inf), x * native / (native + soup), rtol=1e-9)


def test_expected_native_at_the_edges():
    x = np.array([0.0, 3.0, 3.0, 3.0, 3000.0])
    found = expected_native(x, np.array([1, 0, 1, 0, 1e-3]), np.array([1, 1, 0, 0, 2500.0]), 2.0)
    np.testing.assert_array_equal(found[:4], [0, 0, 3, 3])
    assert 0 <= found[4] <= 3000


def test_expected_native_keeps_its_shape_and_never_exceeds_the_count():
    rng = np.random.default_rng(1)
    x = rng.integers(0, 2000, (40, 50))
    found = expected_native(x, rng.gamma(0.2, 100, x.shape), rng.gamma(0.2, 100, x.shape), rng.gamma(1, 1, 50))
    assert found.shape == x.shape
    assert np.isfinite(found).all()
    assert ((found >= 0) & (found <= x)).all()


@pytest.mark.parametrize("theta", [0.3, np.inf])
@pytest.mark.parametrize(("x", "native", "soup"), [(6, 2.0, 1.5), (1, 0.01, 0.02), (300, 150.0, 90.0)])
def test_draws_of_the_native_part_follow_the_posterior(x, native, soup, theta):
    k = np.arange(x + 1)
    if np.isinf(theta):
        log_native = stats.poisson.logpmf(x - k, native)
    else:
        log_native = stats.nbinom.logpmf(x - k, theta, theta / (theta + native))
    posterior = softmax(log_native + stats.poisson.logpmf(k, soup))
    n = 20_000
    drawn = draw_native(np.full(n, x), np.full(n, native), np.full(n, soup), theta, np.random.default_rng(0))
    observed = np.bincount((x - drawn).astype(int), minlength=x + 1)
    # Neighbouring values that expect fewer than 10 draws are counted together.
    bins = np.floor(np.minimum(np.cumsum(posterior) * n, n - 1e-6) / 50).astype(int)
    seen, expected = np.bincount(bins, observed), np.bincount(bins, posterior * n)
    assert stats.chisquare(seen[expected > 0], expected[expected > 0] * seen.sum() / expected.sum()).pvalue > 1e-4


def test_draws_at_the_edges():
    x = np.array([0, 3, 3, 3, 3000])
    native, soup = np.array([1, 0, 1, 0, 1e-3]), np.array([1, 1, 0, 0, 2500.0])
    drawn = draw_native(x, native, soup, 2.0, np.random.default_rng(0))
    np.testing.assert_array_equal(drawn[:4], [0, 0, 3, 3])
    assert 0 <= drawn[4] <= 3000


@pytest.mark.parametrize("theta", [0.05, 0.3, 0.8, 30.0, np.inf])
def test_native_part_of_a_corrected_count_lies_between_those_of_whole_ones(theta):
    rng = np.random.default_rng(0)
    x = np.concatenate([[0.3, 1.2, 1e-3, 7.999, 3.0, 0.0], rng.gamma(0.5, 4.0, 300)])
    native, soup = rng.gamma(0.5, 4, len(x)), rng.gamma(0.5, 4, len(x))
    native[4:20:5], soup[2:20:4] = 0.0, 0.0
    found = expected_native(x, native, soup, theta)
    assert ((found >= 0) & (found <= x)).all()
    below, above = (expected_native(whole, native, soup, theta) for whole in (np.floor(x), np.ceil(x)))
    np.testing.assert_allclose(found, below + (x - np.floor(x)) * (above - below), rtol=1e-9)
    if np.isinf(theta):
        some = native + soup > 0
        assert 0 < some.sum() < len(x)
        share = native[some] / (native + soup)[some]
        np.testing.assert_allclose(found[some], x[some] * share, rtol=1e-9)
        np.testing.assert_array_equal(found[~some], x[~some])


def test_draws_from_corrected_counts_are_whole_and_never_above_them():
    rng = np.random.default_rng(0)
    x = rng.gamma(0.5, 4.0, 2000)
    drawn = draw_native(x, rng.gamma(0.5, 4, 2000), rng.gamma(0.5, 4, 2000), 0.3, rng)
    np.testing.assert_array_equal(drawn, np.floor(drawn))
    assert ((drawn >= 0) & (drawn <= x)).all()
    assert drawn.sum() > 0.1 * x.sum()
