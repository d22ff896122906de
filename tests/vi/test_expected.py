"""Library size of a modality that a cell lacks, expected from the others; and the scale of protein."""

from __future__ import annotations

import warnings

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from cellstill import RegularizedMultimodalVI
from cellstill.vi.cells import Cells
from cellstill.vi.config import ModalityConfig, VAEConfig
from cellstill.vi.covariates import CovariateKeys
from cellstill.vi.evaluation import blocks
from cellstill.vi.expected_fit import _STRENGTHS, fit_expected_libraries, ridge
from cellstill.vi.module import RegularizedVAE
from cellstill.vi.start import start_from_data

N, HELD_OUT = 400, 100
ALL = np.arange(N)


def as_mudata(counts):
    names = [f"cell{i}" for i in range(len(next(iter(counts.values()))))]
    parts = {
        name: ad.AnnData(
            sp.csr_matrix(matrix, dtype=np.float32),
            obs=pd.DataFrame(index=names),
            var=pd.DataFrame(index=[f"{name}{j}" for j in range(matrix.shape[1])]),
        )
        for name, matrix in counts.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return mudata.MuData(parts)


def mosaic(seed=0, lacking=None):
    """Three modalities whose depths share a factor; ``lacking`` gives the cells without one."""
    rng = np.random.default_rng(seed)
    depth = rng.normal(0, 0.5, (N, 1))
    counts = {
        name: rng.poisson(mean * np.exp(depth + rng.normal(0, 0.3, (N, 1))), (N, width))
        for name, width, mean in (("atac", 30, 1.0), ("protein", 8, 20.0), ("rna", 20, 3.0))
    }
    for name, cells in (lacking or {}).items():
        counts[name][cells] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cells = Cells.read(as_mudata(counts), CovariateKeys.resolve(), layers=dict.fromkeys(sorted(counts)))
    torch.manual_seed(0)
    module = RegularizedVAE(
        VAEConfig(
            modalities={
                name: ModalityConfig(n_vars=matrix.shape[1], n_hidden=12, n_latent=4, background=None)
                for name, matrix in counts.items()
            }
        )
    )
    start_from_data(module, cells.counts, {}, cells.present, ALL)
    return module.eval(), cells


def libraries(module, cells, name):
    (block,) = blocks(module, cells, N)
    with torch.inference_mode():
        return module.library(name, block.counts[name], block.batch), module.told(name, block.batch)


def refit(x, y, strength):
    center, mean = x.mean(axis=0), y.mean()
    weight = np.linalg.solve((x - center).T @ (x - center) + strength * np.eye(x.shape[1]), (x - center).T @ (y - mean))
    return lambda new: mean + (new - center) @ weight


def test_ridge_finds_the_penalty_of_least_leave_one_out_error():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 6)) * [3, 1, 1, 0.2, 0.2, 0.0]
    x -= x.mean(axis=0)
    y = x @ [1, -1, 0, 0, 0, 0] + 2 + rng.normal(size=40)
    coefficients, error = ridge(x @ x.T, y)
    everyone = np.arange(40)
    errors = {}
    for strength in _STRENGTHS * np.square(x).sum():
        left_out = [y[i] - refit(x[everyone != i], y[everyone != i], strength)(x[i]) for i in everyone]
        errors[strength] = np.mean(np.square(left_out))
    best = min(errors, key=errors.get)
    assert error == pytest.approx(errors[best], rel=1e-6)
    np.testing.assert_allclose(x @ (x.T @ coefficients) + y.mean(), refit(x, y, best)(x), rtol=1e-6)


def test_expected_library_is_the_ridge_regression_on_dense_features_of_cells_that_lack_any():
    lacking = {"protein": ALL[:100], "atac": ALL[50:200], "rna": ALL[300:]}
    module, cells = mosaic(lacking=lacking)
    before, _ = libraries(module, cells, "protein")
    fit_expected_libraries(module, cells)
    after, told = libraries(module, cells, "protein")
    y = (before.mean - before.prior_mean)[:, 0].double().numpy()
    has = cells.present["protein"] & (cells.present["rna"] | cells.present["atac"])
    features = []
    for one in told.values():
        x, total = one.rows.to_dense().double().numpy(), one.log_total.double().numpy()
        shown = one.has.numpy() > 0
        fitted_on = shown & has
        for block in (x, total[:, None]):
            block = (block - block[fitted_on].mean(axis=0)) * shown[:, None]
            features.append(block / np.sqrt(np.square(block[fitted_on]).sum() / fitted_on.sum()))
    features = np.hstack(features)
    gram = features[has] @ features[has].T
    _, error = ridge(gram, y[has])
    candidates = [refit(features[has], y[has], s * np.trace(gram)) for s in _STRENGTHS]
    lacks = ~cells.present["protein"]
    found = (after.mean - after.prior_mean)[:, 0].double().numpy()
    gaps = [np.abs(found[lacks] - predict(features[lacks])).max() for predict in candidates]
    assert min(gaps) < 1e-5
    assert found[lacks].std() > 0.1
    variance = (error / before.prior_variance[0].item()) * before.prior_variance[0].item()
    torch.testing.assert_close(
        after.variance[lacks], torch.full_like(after.variance[lacks], variance), rtol=1e-4, atol=0
    )
    np.testing.assert_array_equal(after.mean[~lacks], before.mean[~lacks])
    np.testing.assert_array_equal(after.variance[~lacks], before.variance[~lacks])


def test_prior_is_expected_until_it_is_fitted_and_where_too_few_cells_have_both():
    module, cells = mosaic(lacking={"protein": ALL[19:]})
    for _ in range(2):
        found, _ = libraries(module, cells, "protein")
        torch.testing.assert_close(found.mean[19:], found.prior_mean[19:], rtol=0, atol=0)
        torch.testing.assert_close(found.variance[19:], found.prior_variance[19:], rtol=0, atol=0)
        fit_expected_libraries(module, cells)
    assert module.expected_library("rna").weight0.any()


@pytest.fixture(scope="module")
def shared_factors():
    """Cells of which three factors tell RNA and protein, the total of protein too; some lack protein."""
    rng = np.random.default_rng(4)
    factors = rng.normal(size=(N, 3))

    def counts(n_vars, total, sd):
        log_rate = factors @ rng.normal(0, 0.7, (3, n_vars)) + rng.normal(0, 0.5, n_vars)
        share = np.exp(log_rate)
        share /= share.sum(axis=1, keepdims=True)
        return rng.poisson(total * np.exp(sd * factors[:, :1]) * share)

    rna, protein = counts(80, 1500, 0.0), counts(12, 6000, 0.5)
    lacks = np.arange(N) < HELD_OUT
    return as_mudata({"rna": rna, "protein": protein * ~lacks[:, None]}), lacks, protein


def fitted(mdata, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        RegularizedMultimodalVI.setup_mudata(mdata)
        model = RegularizedMultimodalVI(mdata, n_hidden=32, n_latent=6, ambient_rate=0.0, **settings)
    return model.train(max_epochs=30, batch_size=64, lr=5e-3, early_stopping=False, accelerator="cpu", progress=False)


@pytest.fixture(scope="module")
def trained(shared_factors):
    return fitted(shared_factors[0])


def only_rna(whole, cells):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return mudata.MuData({"rna": whole["rna"][cells].copy()})


def total_of(model, data=None, **which):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.get_latent_library_size(data, modality="protein", **which)[:, 0]


@pytest.mark.filterwarnings("ignore:.*taken to lack it")
def test_total_of_a_modality_that_cells_lack_is_expected_from_the_others(shared_factors, trained):
    _, lacks, protein = shared_factors
    size, seen = total_of(trained, indices=lacks), total_of(trained, indices=~lacks)
    np.testing.assert_array_equal(size, total_of(trained, indices=lacks))
    predicted = trained.get_normalized_expression(
        indices=lacks, modality="protein", library_size="latent", include_background=True, return_numpy=True
    )
    predicted, true = (np.log(counts.sum(axis=1)) for counts in (predicted, protein[lacks]))
    assert np.corrcoef(predicted, true)[0, 1] > 0.85
    # The prior, which knows one size for all, has no correlation.
    assert np.corrcoef(np.log(size), true)[0, 1] > 0.6
    assert predicted.mean() == pytest.approx(true.mean(), abs=0.15)
    assert np.log(size).mean() == pytest.approx(np.log(seen).mean(), abs=0.15)
    assert 0 < trained.module.expected_library("protein").unexplained.item() < 1


@pytest.mark.filterwarnings("ignore:.*taken to lack it")
def test_data_without_the_modality_and_a_stored_model_expect_the_same(shared_factors, trained, tmp_path):
    mdata, lacks, _ = shared_factors
    expected = total_of(trained, indices=lacks)
    alone = only_rna(mdata, lacks)
    np.testing.assert_allclose(total_of(trained, alone), expected, rtol=1e-5)
    trained.save(tmp_path / "model")
    again = RegularizedMultimodalVI.load(tmp_path / "model", mdata)
    np.testing.assert_array_equal(total_of(again, indices=lacks), expected)


@pytest.mark.filterwarnings("ignore:.*taken to lack it")
def test_protein_of_hundreds_of_counts_is_learned_by_factors(shared_factors, trained):
    mdata, lacks, protein = shared_factors
    largest = protein[~lacks].mean(axis=0).max()
    assert largest > 500
    modalities = trained.module.config.modalities
    assert modalities["protein"].sensitivity == pytest.approx(largest)
    assert modalities["rna"].sensitivity == 1.0
    share = np.log(protein[~lacks].clip(1) / protein[~lacks].sum(axis=1, keepdims=True))

    def slope(model):
        found = np.log(
            model.get_normalized_expression(
                indices=~lacks, modality="protein", include_background=True, return_numpy=True
            )
        )
        many = protein[~lacks].mean(axis=0) > 300
        assert many.sum() >= 4
        centred = [(part - part.mean(axis=0))[:, many] for part in (found, share)]
        return (centred[0] * centred[1]).sum() / np.square(centred[1]).sum()

    by_factors, by_counts = slope(trained), slope(fitted(mdata, sensitivity=1.0))
    assert by_factors > 0.5
    assert by_counts < by_factors / 2


def test_given_sensitivity_is_kept(shared_factors):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        RegularizedMultimodalVI.setup_mudata(shared_factors[0])
        model = RegularizedMultimodalVI(
            shared_factors[0], n_hidden=8, n_latent=2, ambient_rate=0.0, sensitivity={"rna": 0.5, "protein": None}
        )
    modalities = model.module.config.modalities
    assert modalities["rna"].sensitivity == 0.5
    assert modalities["protein"].sensitivity > 500
