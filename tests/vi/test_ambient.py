"""The ambient rate is found, and what is taken away is soup."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData
from scipy import integrate

from cellstill import AmbientRegularizedSCVI
from cellstill.data.soup import add_soup
from cellstill.errors import CellstillWarning, InvalidArgumentError
from cellstill.metrics.ambient import (
    absent_genes,
    denoising_error,
    marker_leak,
    oracle_denoise,
    rate_error,
    removed_share,
    subtract_soup,
)
from cellstill.vi.ambient import ProfileBackground
from cellstill.vi.rates import estimate_rates, known_rates

RATES = [0.0, 0.05, 0.2]
SIZES = {"n_hidden": 64, "n_latent": 8}


def train(counts, batch, **settings):
    adata = AnnData(counts)
    adata.obs["batch"] = batch.astype(str)
    AmbientRegularizedSCVI.setup_anndata(adata, batch_key="batch")
    return AmbientRegularizedSCVI(adata, **SIZES, **settings).train(max_epochs=60, batch_size=64, compile=True)


@pytest.fixture(scope="module")
def soup(blocks):
    clean, kind = blocks(900, 4, seed=0)
    batch = np.arange(900) % 3
    return add_soup(clean, RATES, batch=batch, seed=0), clean, kind, batch


@pytest.fixture(scope="module")
def model(soup):
    return train(soup[0].counts, soup[3])


def test_rates_are_found(soup, model):
    rates = model.get_ambient_rate()
    assert rates["identified"].all()
    assert rates["rate"].iloc[0] < 0.01
    assert np.abs(rate_error(rates["rate"].iloc[1:], soup[0].realised_rate[1:])).max() < 0.2
    fraction = model.get_ambient_fraction().groupby(soup[3]).mean()
    np.testing.assert_allclose(fraction, rates["rate"], rtol=0.1, atol=2e-3)


def test_denoised_counts_are_about_those_of_an_oracle(soup, model):
    dirty, clean, kind, batch = soup
    cells = batch > 0
    found, counts, truth = model.get_denoised_counts()[cells], dirty.counts[cells], clean[cells]
    rate, profile = dirty.rate[batch[cells]], dirty.profile[batch[cells]]
    oracle = oracle_denoise(counts, truth, kind[cells], rate, profile)
    absent, types = absent_genes(clean, kind)

    def leak(denoised):
        return marker_leak(denoised, counts, kind[cells], absent, types)

    assert denoising_error(found, counts, truth) < 1.05 * denoising_error(oracle, counts, truth)
    assert denoising_error(found, counts, truth) < denoising_error(subtract_soup(counts, rate, profile), counts, truth)
    assert leak(found) < leak(oracle) + 0.05
    assert (counts - found).min() >= 0


def test_little_is_taken_from_cells_without_soup(soup, model):
    assert removed_share(model.get_denoised_counts()[soup[3] == 0], soup[0].counts[soup[3] == 0]) < 0.01


def test_draws_agree_with_the_expectation(soup, model):
    drawn, expected = model.get_denoised_counts(integer=True), model.get_denoised_counts()
    np.testing.assert_array_equal(drawn.data, np.round(drawn.data))
    assert (soup[0].counts - drawn).min() >= 0
    taken = [np.asarray((soup[0].counts - one).sum(axis=0)).ravel() for one in (expected, drawn)]
    np.testing.assert_allclose(taken[1].sum(), taken[0].sum(), rtol=0.02)
    assert np.corrcoef(taken)[0, 1] > 0.99
    assert (drawn != model.get_denoised_counts(integer=True)).nnz == 0
    assert (drawn != model.get_denoised_counts(integer=True, seed=1)).nnz > 0


def test_a_known_rate_is_taken_as_it_is(soup):
    adata = AnnData(soup[0].counts)
    adata.obs["batch"] = soup[3]
    AmbientRegularizedSCVI.setup_anndata(adata, batch_key="batch")
    model = AmbientRegularizedSCVI(adata, **SIZES, ambient_rate={0: 0.0, "1": 0.15}).train(max_epochs=1, batch_size=64)
    known = model.get_ambient_rate()
    np.testing.assert_allclose(known["rate"].iloc[:2], [0.0, 0.15], rtol=1e-6)
    np.testing.assert_allclose(known[["low", "high"]].iloc[1], 0.15, rtol=1e-6)
    np.testing.assert_allclose(known["rate"].iloc[2], soup[0].realised_rate[2], rtol=0.2)


def test_one_cell_type_gets_a_warning_an_interval_and_no_correction(blocks):
    clean, _ = blocks(200, 1, seed=2, absent=0.0)
    adata = AnnData(add_soup(clean, 0.1, seed=2).counts)
    AmbientRegularizedSCVI.setup_anndata(adata)
    with pytest.warns(CellstillWarning, match="not identified"):
        model = AmbientRegularizedSCVI(adata, **SIZES)
    model.train(max_epochs=2, batch_size=64)
    (row,) = model.get_ambient_rate().itertuples()
    assert not row.identified
    assert row.rate < 1e-4
    assert (row.low, row.high > 0.1) == (0.0, True)
    assert removed_share(model.get_denoised_counts(), adata.X) < 1e-3


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (1.0, r"ambient_rate=1.0 is no share"),
        ({"0": -0.1}, r"ambient_rate\['0'\]=-0.1"),
        ({"x": 0.1}, r"\['x'\], and the categories .*'0'"),
        ([0.1, 0.2], r"is \[0.1, 0.2\]. Give one number"),
        ("0.1", "is '0.1'. Give one number"),
        (True, "is True. Give one number"),
        ({"0": "0.1"}, r"ambient_rate\['0'\]='0.1' is no share"),
        ({"0": float("nan")}, r"\['0'\]=nan"),
        ({0: 0.1, "0": 0.2}, "a category twice"),
    ],
    ids=["one", "negative", "unknown", "list", "text", "bool", "text_of_one", "nan", "twice"],
)
def test_bad_rates_are_refused(soup, rate, message):
    adata = AnnData(soup[0].counts)
    adata.obs["batch"] = soup[3].astype(str)
    AmbientRegularizedSCVI.setup_anndata(adata, batch_key="batch")
    with pytest.raises(InvalidArgumentError, match=message):
        AmbientRegularizedSCVI(adata, **SIZES, ambient_rate=rate)


def test_rates_survive_the_store(model, tmp_path):
    model.save(tmp_path / "model")
    restored = AmbientRegularizedSCVI.load(tmp_path / "model", model.adata.copy())
    assert restored.get_ambient_rate().equals(model.get_ambient_rate())
    assert (restored.get_denoised_counts() != model.get_denoised_counts()).nnz == 0


def of_two_columns(soup):
    adata = AnnData(soup[0].counts)
    adata.obs["batch"] = soup[3].astype(str)
    # The same names in both columns, and a column that tells nothing.
    adata.obs["site"] = np.where(soup[3] == 1, "1", "0")
    AmbientRegularizedSCVI.setup_anndata(adata, ambient_covariate_keys=["batch", "site"])
    return adata


def test_several_columns_have_the_rate_of_their_combinations(soup, model, tmp_path):
    adata = of_two_columns(soup)
    both = AmbientRegularizedSCVI(adata, **SIZES).train(max_epochs=1, batch_size=64)
    found, alone = both.get_ambient_rate(), model.get_ambient_rate()
    assert found.index.tolist() == [("0", "0"), ("1", "1"), ("2", "0")]
    assert found.index.names == ["batch", "site"]
    np.testing.assert_array_equal(found.to_numpy(), alone.to_numpy())
    profile = both.get_ambient_profile()
    assert profile.index.equals(found.index)
    np.testing.assert_allclose(profile, model.get_ambient_profile(), rtol=1e-5)
    # The mean share over cells is the rate, not a part of it.
    share = both.get_ambient_fraction().groupby(soup[3]).mean()
    np.testing.assert_allclose(share, found["rate"], rtol=0.1, atol=2e-3)
    both.save(tmp_path / "both")
    restored = AmbientRegularizedSCVI.load(tmp_path / "both", adata.copy())
    assert restored.get_ambient_rate().equals(found)
    np.testing.assert_array_equal(restored.get_ambient_fraction(), both.get_ambient_fraction())
    # Combinations that no cell had: as good as any is the median of those that are known.
    other = adata[soup[3] == 0].copy()
    other.obs["site"] = "1"
    share = both.get_ambient_fraction(other).mean()
    assert share == pytest.approx(np.median(found["rate"]), rel=0.3)


def test_rates_of_several_columns_are_stated_by_tuple(soup):
    adata = of_two_columns(soup)
    model = AmbientRegularizedSCVI(adata, **SIZES, ambient_rate={("0", "0"): 0, (1, 1): 0.05, ("2", "0"): 0.2})
    model.is_trained_ = True
    np.testing.assert_allclose(model.get_ambient_rate()["rate"], [0, 0.05, 0.2], rtol=1e-6)
    assert model.get_ambient_rate()["identified"].all()
    with pytest.raises(InvalidArgumentError, match=r"\['1'\], and the combinations .*\('1', '1'\).* as tuples"):
        AmbientRegularizedSCVI(adata, **SIZES, ambient_rate={"1": 0.1})


def test_a_rate_without_a_background_of_that_form_is_refused(soup):
    with pytest.raises(InvalidArgumentError, match="ambient_rate=0.1 is of no use"):
        AmbientRegularizedSCVI(of_two_columns(soup), **SIZES, background="free", ambient_rate=0.1)


def estimated(counts, code, n, known=None):
    background = ProfileBackground({"batch": n}, counts.shape[1])
    names = {"batch": [str(one) for one in range(n)]}
    estimate_rates(background, counts, {"batch": code}, names, known_rates(background, names, known), 0)
    return background


def test_categories_that_tell_nothing_get_the_median_of_the_others_within_their_bound(blocks):
    clean, kind = blocks(900, 5, seed=3)
    # The first category has one type of cells, the last no cell.
    code = np.where(kind == 0, 0, 1)
    dirty = add_soup(clean, 0.1, batch=code, profile=np.asarray(clean.sum(axis=0)).ravel(), seed=3)
    with pytest.warns(CellstillWarning, match="'0'"):
        found = estimated(dirty.counts, code, 3)
    assert found.identified.tolist() == [False, True, False]
    assert found.rate[1] > 0.05
    np.testing.assert_array_equal(found.rate[[0, 2]], found.rate[1])
    np.testing.assert_array_equal(found.interval[2], [0, 1])
    with pytest.warns(CellstillWarning, match="'0'"):
        high = estimated(dirty.counts, code, 3, {1: 0.95})
    assert 0.1 < high.rate[0] < 0.9
    assert high.rate[0] <= high.interval[0, 1]
    assert high.rate[1:].tolist() == pytest.approx([0.95, 0.95])


def test_fractional_counts_keep_their_rate(soup):
    counts = soup[0].counts.copy()
    counts.data = counts.data * 0.75
    found = estimated(counts, soup[3], 3)
    assert found.identified.all()
    np.testing.assert_allclose(found.rate[1:], soup[0].realised_rate[1:], rtol=0.2)


def test_combinations_have_rows_and_all_others_share_one():
    background = ProfileBackground({"lane": 2, "site": 3}, 4)
    lane, site = np.array([1, 0, 1, 0]), np.array([2, 2, 0, 2])
    background.occur({"lane": lane, "site": site}, torch.tensor([[1, 1], [0, 2]]))
    assert background.combinations.tolist() == [[1, 1], [0, 2], [1, 0], [1, 2]]
    torch.nn.init.normal_(background.expected)
    for repeats in (1, 3):
        codes = {"lane": torch.tensor([1, 0, 1, 0] * repeats), "site": torch.tensor([2, 2, 1, 0] * repeats)}
        table, group = background(codes)
        torch.testing.assert_close(table[group], background.expected[[3, 1, 0, 4] * repeats])
    copy = ProfileBackground({"lane": 2, "site": 3}, 4)
    copy.load_state_dict(background.state_dict())
    torch.testing.assert_close(copy(codes)[0], background(codes)[0])


def test_soup_of_the_models_own_counts_is_recovered():
    # mu = l softplus(W z + b) + r N chi, negative binomial plus Poisson, with other types in other batches.
    rng = np.random.default_rng(4)
    n, n_genes, rates = 900, 120, np.array([0.04, 0.16])
    batch = np.arange(n) % 2
    kind = np.where(rng.random(n) < 0.5, 2 + batch, rng.integers(0, 4, n))
    z = 2.0 * np.eye(4)[kind] + 0.2 * rng.normal(size=(n, 4))
    weight = rng.choice([-4.0, 1.0], (4, n_genes), p=[0.3, 0.7]) * rng.uniform(0.7, 1.3, (4, n_genes))
    native = np.logaddexp(0, z @ weight + rng.normal(0, 0.5, n_genes)) * rng.lognormal(3.0, 0.3, n)[:, None]
    chi = np.stack([native[batch == one].sum(axis=0) for one in range(2)])
    chi /= chi.sum(axis=1, keepdims=True)
    odds = (rates / (1 - rates))[batch]
    soup = rng.poisson(odds[:, None] * native.sum(axis=1, keepdims=True) * chi[batch])
    x = sp.csr_matrix(rng.poisson(native * rng.gamma(5.0, 0.2, native.shape)) + soup, dtype=np.float32)
    adata = AnnData(x)
    adata.obs["batch"] = batch
    AmbientRegularizedSCVI.setup_anndata(adata, batch_key="batch")
    model = AmbientRegularizedSCVI(adata, **SIZES).train(max_epochs=15, batch_size=64, compile=True)
    found = model.get_ambient_rate()
    assert found["identified"].all()
    np.testing.assert_allclose(found["rate"], rates, rtol=0.15)
    assert ((found["low"] < rates) & (rates < found["high"])).all()
    profile = model.get_ambient_profile().to_numpy()
    # The batches differ by more than the estimates miss.
    miss, apart = np.abs(profile - chi).sum(axis=1), np.abs(chi[0] - chi[1]).sum()
    assert (miss < [0.1 * apart, 0.1 * apart]).all()
    share = model.get_ambient_fraction().groupby(batch).mean()
    np.testing.assert_allclose(share, rates, rtol=0.15)


def test_the_native_penalty_prefers_absent_genes_and_no_scale():
    background = ProfileBackground({}, 3)
    background.typical.copy_(torch.tensor([1.0, 2.0, 3.0]))
    typical, absent = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, 1.5, 4.5]])
    penalty = background.native_prior.penalty(torch.cat([typical, absent, 7 * absent]))
    assert penalty[1] < penalty[0]
    torch.testing.assert_close(penalty[1], penalty[2])
    # Gamma(1/2, 1/2) of the ratio, which integrates to one but for what the floor takes at 0.
    one = ProfileBackground({}, 2)
    mass, _ = integrate.quad(
        lambda r: float(torch.exp(-one.native_prior.penalty(torch.tensor([[r, 2 - r]], dtype=torch.float64)))), 0, 2
    )
    product, _ = integrate.quad(
        lambda r: np.exp(-r / 2 - (2 - r) / 2) / (2 * np.pi) / np.sqrt(np.hypot(r, 1e-3) * np.hypot(2 - r, 1e-3)), 0, 2
    )
    assert mass == pytest.approx(product, rel=0.01)
