"""Results without names have the features in the order of the data that were asked for."""

from __future__ import annotations

import warnings

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from cellstill import AmbientRegularizedSCVI, RegularizedMultimodalVI
from cellstill.errors import CellstillWarning

pytestmark = pytest.mark.filterwarnings("ignore:From 0.4:FutureWarning")

N, N_GENES, N_PROTEINS = 60, 40, 12
SMALL = {"n_hidden": 16, "n_latent": 4, "ambient_rate": 0.2}
FAST = {"accelerator": "cpu", "progress": False, "early_stopping": False}
GENES = np.random.default_rng(5).permutation(N_GENES)


def make(n_vars=N_GENES, prefix="g", seed=0):
    rng = np.random.default_rng(seed)
    rates = rng.gamma(0.5, 6.0, (3, n_vars))[np.arange(N) % 3]
    counts = rng.poisson(rates + 0.2)
    counts[:, 0] += 1
    obs = pd.DataFrame({"lane": np.where(np.arange(N) % 2, "x", "y")}, index=[f"cell{i}" for i in range(N)])
    var = pd.DataFrame(index=[f"{prefix}{i}" for i in range(n_vars)])
    return ad.AnnData(sp.csr_matrix(counts, dtype=np.float32), obs=obs, var=var)


def make_mudata(genes=slice(None)):
    return mudata.MuData({"rna": make()[:, genes].copy(), "prot": make(N_PROTEINS, "p", seed=1)})


@pytest.fixture(scope="module")
def rna():
    adata = make()
    AmbientRegularizedSCVI.setup_anndata(adata, batch_key="lane")
    return AmbientRegularizedSCVI(adata, **SMALL).train(max_epochs=3, **FAST)


@pytest.fixture(scope="module")
def joint():
    mdata = make_mudata()
    RegularizedMultimodalVI.setup_mudata(mdata, batch_key="lane")
    return RegularizedMultimodalVI(mdata, **SMALL).train(max_epochs=3, **FAST)


@pytest.fixture(scope="module")
def folder(rna, joint, tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    rna.save(path / "rna")
    joint.save(path / "joint")
    return path


RESULTS = {
    "denoised": lambda model, data, **how: model.get_denoised_counts(data, **how).toarray(),
    "integers": lambda model, data, **how: model.get_denoised_counts(data, integer=True, **how).toarray(),
    "drawn": lambda model, data, **how: model.posterior_predictive_sample(data, **how).toarray(),
    "drawn_twice": lambda model, data, **how: (
        model.posterior_predictive_sample(data, n_samples=2, **how).todense().transpose(0, 2, 1)
    ),
    "expression": lambda model, data, **how: model.get_normalized_expression(data, return_numpy=True, **how),
    "table": lambda model, data, **how: model.get_normalized_expression(data, **how).to_numpy(),
}


@pytest.fixture(params=["load", "query", "argument"])
def moved(request, rna, folder):
    """A model that has, or is given, the genes in another order; and the argument of its getters."""
    data = make()[:, GENES].copy()
    if request.param == "load":
        return AmbientRegularizedSCVI.load(folder / "rna", data), None, data
    if request.param == "query":
        return AmbientRegularizedSCVI.load_query_data(data, rna), None, data
    return rna, data, data


@pytest.mark.parametrize("result", RESULTS)
def test_genes_have_the_order_of_the_data(moved, rna, result):
    model, given, data = moved
    with warnings.catch_warnings():
        warnings.simplefilter("error", CellstillWarning)
        found = RESULTS[result](model, given)
    expected = RESULTS[result](rna, None)
    if result == "drawn_twice":
        assert not np.array_equal(found[:, 0], found[:, 1])
    np.testing.assert_allclose(found, expected[..., GENES], rtol=1e-4, atol=1e-6)
    if result in ("denoised", "integers"):
        counts = data.X.toarray()
        assert (found <= counts).all()
        assert 0.05 < 1 - found.sum() / counts.sum() < 0.5
        assert (expected > counts).any()  # the order matters


def test_what_is_written_has_the_order_of_the_data(moved, rna, tmp_path):
    model, given, data = moved
    expected = rna.get_normalized_expression(return_numpy=True)[:, GENES]
    array = np.empty(data.shape, dtype=np.float32)
    model.get_normalized_expression(given, out=array, batch_size=16)
    model.get_normalized_expression(given, out=tmp_path / "expression.zarr", batch_size=16)
    for written in (array, zarr.open_array(tmp_path / "expression.zarr", mode="r")[:]):
        np.testing.assert_allclose(written, expected, rtol=1e-4, atol=1e-7)


def test_names_and_a_gene_list_go_before_the_order_of_the_data(moved, rna):
    model, given, data = moved
    assert list(model.get_normalized_expression(given).columns) == list(data.var_names)
    wanted = ["g7", "g2"]
    expected = rna.get_normalized_expression(return_numpy=True)[:, [7, 2]]
    for how in ({"return_numpy": True}, {}):
        found = np.asarray(model.get_normalized_expression(given, gene_list=wanted, **how))
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_minified_data_keep_their_order(folder, rna):
    model = AmbientRegularizedSCVI.load(folder / "rna", make()[:, GENES].copy())
    model.minify_adata()
    expected = rna.get_normalized_expression(return_numpy=True)[:, GENES]
    np.testing.assert_allclose(model.get_normalized_expression(return_numpy=True), expected, rtol=1e-4)


@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("how", ["load", "argument"])
def test_each_modality_has_its_own_order(joint, folder, how, result):
    data = make_mudata(GENES)
    model, given = (joint, data) if how == "argument" else (RegularizedMultimodalVI.load(folder / "joint", data), None)
    for name, order in (("rna", GENES), ("prot", np.arange(N_PROTEINS))):
        found = RESULTS[result](model, given, modality=name)
        expected = RESULTS[result](joint, None, modality=name)
        np.testing.assert_allclose(found, expected[..., order], rtol=1e-4, atol=1e-6)
        if result == "denoised":
            assert (found <= data[name].X.toarray()).all()


@pytest.mark.filterwarnings("ignore:3 of the model's:cellstill.errors.CellstillWarning")
@pytest.mark.parametrize(("n_lacking", "n_others"), [(3, 0), (0, 2), (3, 2)])
@pytest.mark.parametrize("result", RESULTS)
def test_other_features_give_those_of_the_model_and_a_warning(rna, n_lacking, n_others, result):
    others = make(max(n_others, 1), "other", seed=2)[:, :n_others]
    data = ad.concat([make()[:, GENES[n_lacking:]], others], axis=1, merge="first")
    said = f"The data lack {n_lacking} of the model's 40 features of 'rna' and have {n_others} others"
    if result == "table":
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="The data lack")
            assert list(rna.get_normalized_expression(data).columns) == list(rna.get_var_names())
        return
    with pytest.warns(CellstillWarning, match=said + r" \('.*get_var_names\(\).*return_numpy=False") as seen:
        found = RESULTS[result](rna, data)
    assert next(one for one in seen if str(one.message).startswith(said)).filename == __file__
    full = data[:, data.var_names.isin(rna.get_var_names())].copy()
    in_full = make()
    in_full.X = (
        pd.DataFrame(full.X.toarray(), columns=full.var_names)
        .reindex(columns=in_full.var_names, fill_value=0)
        .to_numpy()
    )
    np.testing.assert_allclose(found, RESULTS[result](rna, in_full), rtol=1e-4, atol=1e-6)


def test_a_modality_that_the_data_lack_has_the_order_of_the_model(joint):
    data = mudata.MuData({"rna": make()[:, GENES].copy()})
    with warnings.catch_warnings():
        warnings.simplefilter("error", CellstillWarning)
        found = joint.get_normalized_expression(data, modality="prot", return_numpy=True)
        table = joint.get_normalized_expression(data, modality="prot")
    assert list(table.columns) == list(joint.get_var_names()["prot"])
    np.testing.assert_array_equal(table.to_numpy(), found)
