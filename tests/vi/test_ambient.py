"""The ambient rate is found, and what is taken away is soup."""

from __future__ import annotations

import numpy as np
import pytest
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
    model = train(soup[0].counts, soup[3], ambient_rate={"0": 0.0, "1": 0.15})
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
    [(1.0, r"'all_cells' is 1.0"), ({"0": -0.1}, r"'0' is -0.1"), ({"x": 0.1}, r"\['x'\], and the categories .*'0'")],
    ids=["one", "negative", "unknown"],
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


def test_several_columns_share_the_soup():
    background = ProfileBackground({"lane": 2, "site": 3}, 4)
    for soup in background.soups:
        torch.nn.init.normal_(soup.expected)
    lane, site = (soup().exp().detach() for soup in background.soups)
    table, group = background({"lane": torch.tensor([1, 0]), "site": torch.tensor([2, 2])})
    torch.testing.assert_close(table.exp()[group], lane[[1, 0]] + site[[2, 2]])


def test_the_native_penalty_prefers_absent_genes_and_no_scale():
    background = ProfileBackground({}, 3)
    background.typical.copy_(torch.tensor([1.0, 2.0, 3.0]))
    typical, absent = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, 1.5, 4.5]])
    penalty = background.native_penalty(torch.cat([typical, absent, 7 * absent]))
    assert penalty[1] < penalty[0]
    torch.testing.assert_close(penalty[1], penalty[2])
    # Gamma(1/2, 1/2) of the ratio, which integrates to one but for what the floor takes at 0.
    one = ProfileBackground({}, 2)
    mass, _ = integrate.quad(
        lambda r: float(torch.exp(-one.native_penalty(torch.tensor([[r, 2 - r]], dtype=torch.float64)))), 0, 2
    )
    product, _ = integrate.quad(
        lambda r: np.exp(-r / 2 - (2 - r) / 2) / (2 * np.pi) / np.sqrt(np.hypot(r, 1e-3) * np.hypot(2 - r, 1e-3)), 0, 2
    )
    assert mass == pytest.approx(product, rel=0.01)
