from __future__ import annotations

import warnings

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
from scipy import optimize

from cellstill.data import simulate_counts
from cellstill.data.soup import add_soup
from cellstill.errors import CellstillWarning, InvalidArgumentError, InvalidCountsError
from cellstill.vi import soup
from cellstill.vi.soup import _GRID, _fit, _likelihood, _quantile, estimate_soup

RATES = [0.0, 0.05, 0.2]


@pytest.fixture(scope="module")
def three_batches(blocks):
    clean, kind = blocks(1500, 4, seed=0)
    batch = np.arange(1500) % 3
    return add_soup(clean, RATES, batch=batch, seed=0), batch, kind


@pytest.fixture(scope="module")
def estimate(three_batches):
    dirty, batch, _ = three_batches
    return estimate_soup(dirty.counts, batch, seed=0)


def test_rates_are_found_batch_by_batch(three_batches, estimate):
    dirty, _, _ = three_batches
    assert estimate.identified.all()
    np.testing.assert_allclose(estimate.rate[1:], dirty.realised_rate[1:], rtol=0.1)
    low, high = estimate.interval.T
    assert ((low[1:] <= dirty.realised_rate[1:]) & (dirty.realised_rate[1:] <= high[1:])).all()
    assert (high - low < 0.05).all()
    assert estimate.batches == (0, 1, 2)


def test_cells_without_soup_have_none(estimate):
    assert estimate.rate[0] < 0.005
    assert estimate.interval[0, 1] < 0.02
    assert estimate.bound[0] == estimate.rate[0]


def test_known_types_give_the_same_rates(three_batches, estimate):
    dirty, batch, kind = three_batches
    known = estimate_soup(dirty.counts, batch, clusters=kind, seed=0)
    np.testing.assert_allclose(known.rate[1:], estimate.rate[1:], rtol=0.1)


def test_one_cell_type_identifies_nothing_and_says_so(blocks):
    clean, _ = blocks(300, 1, seed=2, absent=0.0)
    dirty = add_soup(clean, 0.1, seed=2)
    with pytest.warns(CellstillWarning, match=r"not identified in 1 of 1 batches: 'all cells' \(at most 0\.\d\d\)"):
        found = estimate_soup(dirty.counts, seed=0)
    assert not found.identified[0]
    assert np.isnan(found.rate[0])
    assert found.interval[0, 0] == 0
    assert found.interval[0, 1] >= 0.1


def test_too_few_counts_leave_the_rate_open(blocks):
    clean, _ = blocks(60, 3, seed=4, library=50)
    with pytest.warns(CellstillWarning, match="at most 1.00"):
        found = estimate_soup(clean, seed=0)
    np.testing.assert_array_equal(found.interval, [[0.0, 1.0]])


@pytest.fixture(scope="module")
def droplets(real_data):
    return anndata.read_h5ad(real_data("pbmc4k_soup.h5ad"))


@pytest.mark.parametrize("seed", [4, 9])
def test_soup_of_one_real_lane_is_found_by_any_split(droplets, seed):
    """Those of these seeds have the smallest piles of fifteen."""
    found = estimate_soup(droplets.X, seed=seed)
    assert found.identified[0]
    assert 0.04 < found.rate[0] < 0.08


def test_soup_of_real_droplets_is_found(droplets):
    """One lane has no other to borrow from. What is added to it, composed as its empty droplets, is found too."""
    found = estimate_soup(droplets.X, seed=0)
    assert found.identified[0]
    assert 0.04 < found.rate[0] < 0.08
    low, high = found.interval[0]
    halves = estimate_soup(droplets.X, np.arange(droplets.n_obs) % 2, seed=1)
    assert ((halves.rate > low) & (halves.rate < high)).all()
    dirty = add_soup(droplets.X, 0.1, profile=droplets.var["soup_fraction"].to_numpy(), seed=0)
    more = estimate_soup(dirty.counts, seed=0)
    added = dirty.realised_rate[0]
    assert more.rate[0] == pytest.approx(added + (1 - added) * found.rate[0], rel=0.15)


@pytest.mark.parametrize("kind", ["B", "MNP", "NK", "T_CD4", "T_CD8"])
def test_one_type_of_real_droplets_identifies_nothing(droplets, kind):
    cells = droplets[droplets.obs["cell_type"] == kind]
    with pytest.warns(CellstillWarning, match="not identified"):
        found = estimate_soup(cells.X, seed=0)
    assert found.interval[0, 1] > 0.06


@pytest.mark.parametrize("seed", [0, 7])
def test_types_that_share_most_genes_identify_nothing(real_data, seed):
    """Those of these seeds have the largest piles of thirty."""
    adata = anndata.read_h5ad(real_data("kang_pbmc.h5ad"))
    cells = adata[adata.obs["cell_type"].isin(["CD4 T cells", "CD8 T cells"])]
    with pytest.warns(CellstillWarning, match="not identified"):
        found = estimate_soup(cells.X, seed=seed)
    assert found.interval[0, 1] > 0.1


def test_the_same_seed_repeats_itself(three_batches, estimate):
    dirty, batch, _ = three_batches
    again = estimate_soup(dirty.counts, batch, seed=0)
    np.testing.assert_array_equal(again.rate, estimate.rate)
    np.testing.assert_array_equal(again.interval, estimate.interval)


def test_simulated_ambient_rna_of_the_project():
    adata = simulate_counts(
        n_obs=900, n_vars=400, n_batches=3, n_cell_types=5, ambient_fraction=(0.0, 0.1, 0.2), dropout_rate=0.0,
        marker_log2fc_mean=5.0, marker_fraction=0.2, library_size_median=3000, seed=5,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CellstillWarning)
        found = estimate_soup(adata.X, adata.obs["batch"], seed=0)
    # Genes of one type keep 2^-5 of it elsewhere, which no method can tell from soup: the rate may sit that higher.
    upper = found.interval[:, 1]
    assert (np.diff(upper) > 0).all()
    assert (upper >= [0.0, 0.1, 0.2]).all()


def test_some_cells_of_each_batch_stand_for_many(three_batches, estimate, monkeypatch):
    dirty, batch, _ = three_batches
    unequal = np.flatnonzero((batch < 2) | (np.arange(len(batch)) % 2 == 0))
    monkeypatch.setattr(soup, "_MAX_CELLS", 1000)
    monkeypatch.setattr(soup, "_CELLS_PER_CLUSTER", 15)
    kept = soup._some_of_each(batch[unequal], 3, np.random.default_rng(0))
    np.testing.assert_array_equal(np.bincount(batch[unequal][kept]), [333, 333, (batch[unequal] == 2).sum()])
    assert len(np.unique(kept)) == len(kept)
    found = estimate_soup(dirty.counts[unequal], batch[unequal], seed=0)
    np.testing.assert_allclose(found.rate[1:], estimate.rate[1:], rtol=0.15)


def test_em_reaches_the_maximum_of_the_likelihood():
    rng = np.random.default_rng(0)
    expected = rng.uniform(20, 200, 200)
    observed = rng.poisson(expected * rng.choice([0.1, 1.0], 200, p=[0.3, 0.7])).astype(float)
    likelihood = _likelihood(observed, expected)
    fitted = _fit(likelihood, np.ones(200), 5000)
    assert fitted.sum() == pytest.approx(1)
    # Kuhn and Tucker: at the maximum no value of the grid gains, and those with weight are at 1.
    gradient = (likelihood / (likelihood @ fitted)[:, None]).mean(axis=0)
    assert gradient.max() < 1 + 1e-3
    near = (_GRID > 0.08) & (_GRID < 0.13)
    share = optimize.minimize_scalar(
        lambda w: -np.log(w * np.exp(observed * np.log(0.1) + 0.9 * expected) + 1 - w).sum(), bounds=(0, 1)
    ).x
    assert fitted[near].sum() == pytest.approx(share, abs=0.02)
    assert _quantile(fitted, 0.005) == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"batch": ["a"]}, "batch must give one category"), ({"clusters": [0, 1, None]}, "clusters must give")],
    ids=["batch", "clusters"],
)
def test_bad_input_names_the_argument(kwargs, message):
    with pytest.raises(InvalidArgumentError, match=message):
        estimate_soup(np.ones((3, 4)), **kwargs)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1.0, "negative values"),
        (np.nan, "not finite"),
        (np.inf, "not finite"),
        (0.5, "not integers.*allow_noninteger"),
    ],
    ids=["negative", "nan", "infinite", "fraction"],
)
def test_what_is_not_a_count_is_refused(value, message):
    counts = np.ones((4, 3))
    counts[2, 1] = value
    with pytest.raises(InvalidCountsError, match=message):
        estimate_soup(counts)


def test_fractions_are_rounded_with_their_expectation():
    x = sp.csr_matrix(np.full((200, 50), 1.2))
    whole = soup._whole(x, np.random.default_rng(0))
    assert set(np.unique(whole.data)) == {1.0, 2.0}
    assert whole.mean() == pytest.approx(1.2, abs=0.02)
    kept = sp.csr_matrix(np.arange(6.0).reshape(2, 3))
    assert soup._whole(kept, np.random.default_rng(0)) is kept


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_few_cells_whose_lowest_genes_say_little_identify_nothing(blocks, rate):
    clean, _ = blocks(100, 2, seed=0, absent=0.02)
    dirty = add_soup(clean, rate, seed=0)
    with pytest.warns(CellstillWarning, match="not identified"):
        found = estimate_soup(dirty.counts, seed=0)
    assert found.interval[0, 0] == 0
    assert found.interval[0, 1] > 0.3


def test_one_cell_is_too_few():
    with pytest.raises(InvalidArgumentError, match="at least 2"):
        estimate_soup(np.full((1, 4), 9.0))
