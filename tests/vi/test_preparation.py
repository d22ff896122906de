"""New data given the features of a model beforehand: what the model makes of them is what it makes without."""

from __future__ import annotations

import warnings

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cellstill import AmbientRegularizedSCVI, RegularizedMultimodalVI
from cellstill.errors import (
    CellstillWarning,
    GeneMismatchError,
    InvalidArgumentError,
    MissingKeyError,
    NotTrainedError,
    StoreError,
)

N, N_GENES = 60, 20
FAST = {"max_epochs": 2, "batch_size": 32, "accelerator": "cpu", "progress": False}
SMALL = {"n_hidden": 8, "n_latent": 2, "ambient_rate": 0.1}
pytestmark = [
    pytest.mark.filterwarnings("ignore:From 0.4:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Cannot join columns:UserWarning"),
]


def cells(seed=0, lanes=("a", "b"), n_vars=N_GENES, prefix="g", genes=None):
    """Counts in a layer; ``genes`` picks some, in any order, and -1 is one that is of no model."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.5, 6.0, n_vars) + 0.5, (N, n_vars)) + 1
    genes = np.arange(n_vars) if genes is None else np.asarray(genes)
    names = [f"{prefix}{gene}" if gene >= 0 else "other" for gene in genes]
    var = pd.DataFrame({"variable": genes % 2 == 0, "rank": genes, "text": names}, index=names)
    data = ad.AnnData(sp.csr_matrix(np.log1p(counts[:, genes]), dtype=np.float32), var=var)
    data.obs["lane"] = np.resize(lanes, N)
    data.obs_names = [f"cell{i}" for i in range(N)]
    data.layers["counts"] = sp.csc_matrix(counts[:, genes], dtype=np.int32)
    data.layers["dense"] = counts[:, genes] * 0.5
    data.obsm["X_any"], data.uns["note"], data.raw = counts[:, :2], {"kept": 1}, data.copy()
    data.varm["loadings"] = np.ones((len(genes), 2))
    return data


def joined(**modalities):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = mudata.MuData(modalities)
    data.obs["lane"] = next(iter(modalities.values())).obs["lane"]
    return data


@pytest.fixture(scope="module")
def reference():
    data = cells()
    AmbientRegularizedSCVI.setup_anndata(data, layer="counts", batch_key="lane")
    return AmbientRegularizedSCVI(data, **SMALL).train(**FAST)


@pytest.fixture(scope="module")
def joint():
    data = joined(rna=cells(), peaks=cells(1, n_vars=12, prefix="p"))
    RegularizedMultimodalVI.setup_mudata(
        data, modalities={"rna": "counts", "peaks": "counts"}, batch_key="lane", nn_conditioning_covariate_keys=["lane"]
    )
    return RegularizedMultimodalVI(data, **SMALL).train(**FAST)


LACKS = [7, 3, -1, *range(8, 20), 0, 1, 2]
SHUFFLED = [5, -1, *range(6, 20), *range(5)]


@pytest.fixture(params=[LACKS, SHUFFLED], ids=["some_genes_are_missing", "all_genes_are_there"])
def query(request):
    return cells(2, ("b", "new"), genes=request.param)


def same_model(kind, prepared, plain, reference):
    """Compare all weights and the latents of two query models, trained alike."""
    one, other = (kind.load_query_data(data, reference, ambient_rate=0.1) for data in (prepared, plain))
    assert one.module.state_dict().keys() == other.module.state_dict().keys()
    for model in (one, other):
        model.train(**FAST)
    for name, tensor in one.module.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), other.module.state_dict()[name].numpy(), err_msg=name)
    np.testing.assert_array_equal(one.get_latent_representation(), other.get_latent_representation())
    np.testing.assert_array_equal(one.get_elbo(return_mean=False), other.get_elbo(return_mean=False))
    return one


@pytest.mark.filterwarnings("ignore:.*genes are missing:cellstill.errors.CellstillWarning")
def test_a_query_of_prepared_data_is_that_of_data_as_they_were(reference, query, tmp_path):
    plain = query.copy()
    assert AmbientRegularizedSCVI.prepare_query_anndata(query, reference) is None
    assert list(query.var_names) == [f"g{i}" for i in range(N_GENES)]
    model = same_model(AmbientRegularizedSCVI, query, plain, reference)
    query.layers["expression"] = model.get_normalized_expression(return_numpy=True)
    query.write_h5ad(tmp_path / "prepared.h5ad")
    assert list(ad.read_h5ad(tmp_path / "prepared.h5ad").var_names) == list(query.var_names)


@pytest.mark.filterwarnings("ignore:.*genes are missing:cellstill.errors.CellstillWarning")
def test_genes_keep_their_values_and_cells_all_they_have(reference, query):
    before = query.copy()
    after = AmbientRegularizedSCVI.prepare_query_anndata(query, reference, inplace=False)
    # Data are left as they were.
    assert list(query.var_names) == list(before.var_names)
    np.testing.assert_array_equal(query.layers["dense"], before.layers["dense"])
    for name in ("X", "counts", "dense"):
        old, new = (data.X if name == "X" else data.layers[name] for data in (before, after))
        assert (type(new), new.dtype) == (type(old), old.dtype)
        old, new = (
            pd.DataFrame(matrix.toarray() if sp.issparse(matrix) else matrix, columns=data.var_names)
            for matrix, data in ((old, before), (new, after))
        )
        expected = old.reindex(columns=[f"g{i}" for i in range(N_GENES)], fill_value=0)
        np.testing.assert_array_equal(new, expected)
    pd.testing.assert_frame_equal(after.obs, before.obs)
    np.testing.assert_array_equal(after.obsm["X_any"], before.obsm["X_any"])
    assert after.uns["note"] == {"kept": 1}
    assert list(after.raw.var_names) == list(before.var_names)
    shared = [name for name in after.var_names if name in before.var_names]
    assert after.var.loc[shared, "text"].tolist() == shared
    assert after.var.loc[shared, "variable"].tolist() == [int(name[1:]) % 2 == 0 for name in shared]
    lacking = after.var_names.difference(before.var_names)
    assert after.var.loc[lacking].isna().all(axis=None)
    assert ("loadings" in after.varm) == (len(lacking) == 0)


def test_what_is_filled_is_said(reference):
    with pytest.warns(CellstillWarning, match=r"3 of the model's 20 genes are missing .* zero \('g4', 'g5', 'g6'\)"):
        AmbientRegularizedSCVI.prepare_query_anndata(cells(genes=LACKS), reference)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CellstillWarning)
        AmbientRegularizedSCVI.prepare_query_anndata(cells(genes=SHUFFLED), reference)


@pytest.mark.filterwarnings("ignore:.*genes are missing:cellstill.errors.CellstillWarning")
@pytest.mark.parametrize("inplace", [True, False])
def test_modalities_are_prepared_and_others_left(joint, inplace):
    peaks, hashtags = cells(3, n_vars=12, prefix="p", genes=range(2, 12)), cells(4, n_vars=3, prefix="h")
    query = joined(rna=cells(2, ("b", "new"), genes=LACKS), peaks=peaks, hto=hashtags)
    plain = query.copy()
    changed = RegularizedMultimodalVI.prepare_query_mudata(query, joint, inplace=inplace)
    assert (changed is None) == inplace
    if not inplace:
        assert list(query.var_names) == list(plain.var_names)
    prepared = query if inplace else changed
    assert list(prepared["peaks"].var_names) == [f"p{i}" for i in range(12)]
    assert prepared["peaks"].layers["counts"][:, :2].nnz == 0
    assert list(prepared["hto"].var_names) == list(plain["hto"].var_names)
    assert prepared.shape == (N, N_GENES + 12 + 3)
    same_model(RegularizedMultimodalVI, prepared, plain, joint)


def test_modalities_may_be_missing_but_not_all(joint):
    query = joined(rna=cells(2, genes=SHUFFLED))
    RegularizedMultimodalVI.prepare_query_mudata(query, joint)
    assert list(query["rna"].var_names) == [f"g{i}" for i in range(N_GENES)]
    with pytest.raises(MissingKeyError, match="'peaks' is not in mdata.mod. mdata.mod has: 'hto'"):
        RegularizedMultimodalVI.prepare_query_mudata(joined(hto=cells()), joint)


def test_only_the_names(reference, joint, tmp_path):
    reference.save(tmp_path / "model")
    genes = pd.Index([f"g{i}" for i in range(N_GENES)])
    data = cells(genes=LACKS)
    names = AmbientRegularizedSCVI.prepare_query_anndata(data, tmp_path / "model", return_reference_var_names=True)
    assert names.equals(genes)
    assert data.n_vars == len(LACKS)
    found = RegularizedMultimodalVI.prepare_query_mudata(None, joint, return_reference_var_names=True)
    assert found["rna"].equals(genes)
    assert list(found) == ["peaks", "rna"]


def test_what_does_not_fit_is_refused_and_nothing_is_changed(reference, joint, tmp_path):
    prepare = AmbientRegularizedSCVI.prepare_query_anndata
    few, twice = cells(genes=[0, 1, 2, -1]), cells(genes=SHUFFLED)
    twice.var_names = ["g0", *twice.var_names[1:-1], "g0"]
    for data, match in ((few, r"Only 3 of the model's 20 genes \(15%\)"), (twice, "duplicated")):
        names = list(data.var_names)
        with pytest.raises(GeneMismatchError, match=match):
            prepare(data, reference)
        assert list(data.var_names) == names
    with pytest.warns(CellstillWarning, match="17 of the model's 20"):
        prepare(few, reference, min_gene_overlap=0.1)
    query = joined(rna=cells(genes=SHUFFLED), peaks=cells(prefix="x"))
    with pytest.raises(GeneMismatchError):
        RegularizedMultimodalVI.prepare_query_mudata(query, joint)
    assert query["rna"].var_names[0] == "g5"
    with pytest.raises(InvalidArgumentError, match="a view"):
        prepare(cells()[:, :15], reference)
    cells().write_h5ad(tmp_path / "data.h5ad")
    with pytest.raises(InvalidArgumentError, match="backed by a file"):
        prepare(ad.read_h5ad(tmp_path / "data.h5ad", backed="r"), reference)
    with pytest.raises(InvalidArgumentError, match="adata is a MuData"):
        prepare(query, reference)
    with pytest.raises(InvalidArgumentError, match="not a MuData"):
        RegularizedMultimodalVI.prepare_query_mudata(cells(), joint)


def test_wrong_references_are_refused(reference, joint, tmp_path):
    data = cells()
    with pytest.raises(InvalidArgumentError, match="reference_model is a RegularizedMultimodalVI, not a"):
        AmbientRegularizedSCVI.prepare_query_anndata(data, joint)
    with pytest.raises(InvalidArgumentError, match=r"model of MuData. Call prepare_query_mudata\(\)"):
        RegularizedMultimodalVI.prepare_query_anndata(data, joint)
    with pytest.raises(InvalidArgumentError, match=r"model of AnnData. Call prepare_query_anndata\(\)"):
        AmbientRegularizedSCVI.prepare_query_mudata(data, reference)
    with pytest.raises(StoreError, match="is not a saved model"):
        AmbientRegularizedSCVI.prepare_query_anndata(data, tmp_path / "none")
    AmbientRegularizedSCVI.setup_anndata(data, layer="counts")
    with pytest.raises(NotTrainedError):
        AmbientRegularizedSCVI.prepare_query_anndata(cells(), AmbientRegularizedSCVI(data, **SMALL))
