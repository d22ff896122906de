"""Counts and covariates of AnnData and MuData, in the order of a model."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cellstill._compat.scvi import RegisteredModel, register, registered_categories
from cellstill.data.annotations import complete_obs
from cellstill.errors import (
    CellstillWarning,
    GeneMismatchError,
    InvalidArgumentError,
    InvalidCountsError,
    MissingKeyError,
)
from cellstill.vi.cells import Cells
from cellstill.vi.covariates import CovariateKeys

mudata = pytest.importorskip("mudata")

KEYS = CovariateKeys.resolve(
    batch_key="lane", nn_conditioning_covariate_keys=["site"], continuous_covariate_keys=["mito", "age"]
)
LANES = ["b", "a", "b", "c", "a", "c", "b"]


def counts_of(n_obs, n_vars, seed):
    counts = np.random.default_rng(seed).poisson(1.0, (n_obs, n_vars)).astype(np.float32)
    counts[:, 0] += 1
    return counts


def make(n_obs=7, n_vars=5, seed=0, prefix="g"):
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame(
        {
            "lane": LANES[:n_obs],
            "site": pd.Categorical(["y", "x"] * 3 + ["y"], categories=["y", "unused", "x"])[:n_obs],
            "mito": rng.random(n_obs),
            "age": np.arange(n_obs) + 20,
        },
        index=[f"c{i}" for i in range(n_obs)],
    )
    var = pd.DataFrame(index=[f"{prefix}{i}" for i in range(n_vars)])
    return ad.AnnData(sp.csr_matrix(counts_of(n_obs, n_vars, seed)), obs=obs, var=var)


@pytest.fixture
def adata():
    return make()


@pytest.fixture(params=[False, True], ids=["kept", "pulled"])
def unpaired(request):
    """Seven cells; two lack atac, two lack rna, and the rows of the modalities are in orders of their own."""
    whole, other = make(), make(n_vars=4, seed=1, prefix="p")
    rna, atac = whole[["c4", "c0", "c1", "c2", "c3"]].copy(), other[["c6", "c2", "c0", "c5", "c4"]].copy()
    atac.obs = atac.obs[["lane", "site"]]
    with mudata.set_options(pull_on_update=request.param):
        mdata = mudata.MuData({"rna": rna, "atac": atac})
    assert ("rna:lane" in mdata.obs) == request.param
    return mdata, {"rna": whole, "atac": other}


@pytest.fixture(autouse=True)
def _options():
    with mudata.set_options(pull_on_update=False):
        yield


def read(data, keys=KEYS, layers=None, **settings):
    return Cells.read(data, keys, layers={"rna": None} if layers is None else layers, **settings)


BOTH = {"rna": None, "atac": None}
LANE = CovariateKeys.resolve(batch_key="lane", nn_conditioning_covariate_keys=["site"])


# AnnData.


def test_counts_codes_and_continuous_covariates_of_an_anndata(adata):
    cells = read(adata)
    assert len(cells) == 7
    assert cells.counts["rna"] is adata.X
    assert cells.present["rna"].all()
    assert cells.categories == {"lane": ("a", "b", "c"), "site": ("y", "x")}
    np.testing.assert_array_equal(cells.codes["lane"], [1, 0, 1, 2, 0, 2, 1])
    np.testing.assert_array_equal(cells.codes["site"], [0, 1, 0, 1, 0, 1, 0])
    assert cells.codes["lane"].dtype == np.int64
    raw = adata.obs[["mito", "age"]].to_numpy(dtype=float)
    np.testing.assert_allclose(cells.continuous, (raw - raw.mean(0)) / raw.std(0), rtol=1e-6)
    assert cells.continuous.dtype == np.float32
    assert cells.scales["age"] == (23.0, 2.0)
    assert cells.features == {"rna": ("g0", "g1", "g2", "g3", "g4")}
    assert cells.overlap == {"rna": 1.0}
    assert list(cells.obs_names) == list(adata.obs_names)


def test_what_the_model_knows_is_kept_for_other_data(adata):
    known = read(adata)
    query = adata[[3, 5], ["g4", "g2", "g0"]].copy()
    with pytest.warns(CellstillWarning, match="2 of the model's 5 genes are missing"):
        cells = read(query, features=known.features, categories=known.categories, scales=known.scales)
    np.testing.assert_array_equal(cells.codes["lane"], [2, 2])
    np.testing.assert_array_equal(cells.continuous, known.continuous[[3, 5]])
    expected = adata.X.toarray()[[3, 5]] * [1, 0, 1, 0, 1]
    np.testing.assert_array_equal(cells.counts["rna"].toarray(), expected)
    assert cells.overlap["rna"] == 0.6


def test_other_names_for_the_modality_and_a_layer(adata):
    adata.layers["raw"] = adata.X.copy()
    adata.X = adata.X * 0.5
    cells = read(adata, layers={"gex": "raw"})
    assert cells.counts["gex"] is adata.layers["raw"]
    with pytest.raises(InvalidCountsError, match="not integers"):
        read(adata)
    assert read(adata, allow_noninteger=True).counts["rna"] is adata.X
    with pytest.raises(MissingKeyError, match="layer='other'"):
        read(adata, layers={"rna": "other"})


def test_unknown_categories_are_refused_or_appended(adata):
    known = {"lane": ("c", "b"), "site": ("x", "y")}
    with pytest.raises(
        InvalidArgumentError, match=r"batch_key: 'lane' has categories .* \['a'\]. It knows: \['c', 'b'\]"
    ):
        read(adata, categories=known)
    cells = read(adata, categories=known, extend=True)
    assert cells.categories["lane"] == ("c", "b", "a")
    np.testing.assert_array_equal(cells.codes["lane"], [1, 2, 1, 0, 2, 0, 1])


def test_categories_that_are_numbers_are_in_the_order_of_numbers_and_known_by_name(adata):
    adata.obs["lane"] = [10, 2, 10, 1, 2, 1, 10]
    cells = read(adata)
    assert cells.categories["lane"] == ("1", "2", "10")
    np.testing.assert_array_equal(cells.codes["lane"], [2, 1, 2, 0, 1, 0, 2])
    adata.obs["lane"] = adata.obs["lane"].astype(str)
    np.testing.assert_array_equal(read(adata, categories=cells.categories).codes["lane"], cells.codes["lane"])


def test_without_any_covariate(adata):
    cells = read(adata, CovariateKeys())
    assert cells.codes == {}
    assert cells.continuous.shape == (7, 0)
    assert cells.per_cell == {}


@pytest.mark.parametrize("how", ["dense", "csc", "integers"])
def test_counts_in_other_forms_become_csr(adata, how):
    expected = adata.X.toarray()
    forms = {"dense": expected, "csc": sp.csc_matrix(expected), "integers": sp.csr_array(expected.astype(np.int32))}
    adata.X = forms[how]
    counts = read(adata).counts["rna"]
    assert isinstance(counts, sp.csr_matrix)
    np.testing.assert_array_equal(counts.toarray(), expected)


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_backed_data_are_read_as_those_in_memory(adata, tmp_path, dense):
    if dense:
        adata.X = adata.X.toarray()
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    assert backed.isbacked
    cells, expected = read(backed), read(adata)
    np.testing.assert_array_equal(cells.counts["rna"].toarray(), expected.counts["rna"].toarray())
    np.testing.assert_array_equal(cells.codes["lane"], expected.codes["lane"])
    np.testing.assert_array_equal(cells.continuous, expected.continuous)
    order = [5, 0, 3]
    np.testing.assert_array_equal(cells[order].counts["rna"].toarray(), expected.counts["rna"].toarray()[order])
    backed.file.close()


@pytest.mark.parametrize(
    "indices",
    [[4, 1, 1], np.array([6, 0]), slice(2, 5), np.arange(7) % 2 == 0, np.array([-1])],
    ids=["list", "array", "slice", "mask", "negative"],
)
def test_cells_are_chosen_in_the_order_asked_for(adata, indices):
    cells = read(adata)
    chosen, positions = cells[indices], np.arange(7)[indices]
    assert len(chosen) == len(positions)
    np.testing.assert_array_equal(chosen.counts["rna"].toarray(), adata.X.toarray()[positions])
    np.testing.assert_array_equal(chosen.codes["lane"], cells.codes["lane"][positions])
    np.testing.assert_array_equal(chosen.continuous, cells.continuous[positions])
    assert list(chosen.obs_names) == list(adata.obs_names[positions])
    assert chosen.categories == cells.categories


def test_no_choice_is_all_cells_and_none_is_refused(adata):
    cells = read(adata)
    assert cells[None] is cells
    with pytest.raises(InvalidArgumentError, match="selects no cell"):
        cells[[]]
    with pytest.raises(IndexError):
        cells[[7]]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda a: a.obs.pop("lane"), MissingKeyError, "batch_key='lane' is not in adata.obs"),
        (lambda a: a.obs.__setitem__("lane", [None, *LANES[1:]]), InvalidArgumentError, "missing for 1 of 7"),
        (lambda a: a.obs.__setitem__("mito", "much"), InvalidArgumentError, "'mito' does not hold numbers"),
        (lambda a: a.obs.__setitem__("mito", 1.0), InvalidArgumentError, "'mito' is constant"),
        (lambda a: setattr(a, "var", pd.DataFrame(index=["g"] * 5)), GeneMismatchError, "duplicated gene names"),
        (lambda a: a.X.data.__setitem__(0, -1), InvalidCountsError, "negative"),
    ],
    ids=["no_column", "missing", "text", "constant", "genes", "negative"],
)
@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_what_cannot_be_read_is_named(adata, change, error, match):
    change(adata)
    with pytest.raises(error, match=match):
        read(adata)


# MuData.


def test_cells_of_a_mudata_are_in_its_own_order(unpaired):
    mdata, whole = unpaired
    cells = read(mdata, LANE, BOTH)
    assert list(cells.counts) == ["atac", "rna"]
    assert list(cells.obs_names) == list(mdata.obs_names)
    for name, adata in whole.items():
        has = mdata.obs_names.isin(mdata[name].obs_names)
        np.testing.assert_array_equal(cells.present[name], has)
        expected = adata[mdata.obs_names].X.toarray() * has[:, None]
        np.testing.assert_array_equal(cells.counts[name].toarray(), expected)
    lanes = whole["rna"].obs["lane"][mdata.obs_names]
    assert [cells.categories["lane"][code] for code in cells.codes["lane"]] == list(lanes)
    sites = whole["rna"].obs["site"][mdata.obs_names]
    assert [cells.categories["site"][code] for code in cells.codes["site"]] == list(sites)


def test_what_a_minibatch_holds_of_unpaired_cells(unpaired):
    cells = read(unpaired[0], LANE, BOTH)
    batch = next(iter(cells.loader(np.array([6, 0, 3]))))
    assert next(iter(batch)) == "rows"
    assert {"rna/data", "atac/indptr", "rna/present", "atac/present", "code/lane", "code/site"} < set(batch)
    assert "continuous" not in batch
    np.testing.assert_array_equal(batch["rna/present"], cells.present["rna"][[6, 0, 3]].astype(np.float32))
    paired = read(mudata.MuData({"rna": make()}), LANE)
    assert not any(name.endswith("/present") for name in paired.per_cell)


def test_a_choice_of_unpaired_cells(unpaired):
    cells = read(unpaired[0], LANE, BOTH)
    some = cells[[5, 2]]
    for name in BOTH:
        np.testing.assert_array_equal(some.counts[name].toarray(), cells.counts[name].toarray()[[5, 2]])
        np.testing.assert_array_equal(some.present[name], cells.present[name][[5, 2]])


def test_a_view_of_a_mudata_is_read_in_its_own_order(unpaired):
    mdata, _ = unpaired
    whole, order = read(mdata, LANE, BOTH), [6, 2, 0]
    view = mdata[order]
    cells = read(view, LANE, BOTH, categories=whole.categories)
    assert list(cells.obs_names) == list(mdata.obs_names[order])
    for name in BOTH:
        np.testing.assert_array_equal(cells.counts[name].toarray(), whole.counts[name].toarray()[order])
    np.testing.assert_array_equal(cells.codes["lane"], whole.codes["lane"][order])


def test_backed_mudata(unpaired, tmp_path):
    mdata, _ = unpaired
    mdata.write(tmp_path / "m.h5mu")
    backed = mudata.read_h5mu(tmp_path / "m.h5mu", backed="r")
    assert backed.isbacked
    cells, expected = read(backed, LANE, BOTH), read(mdata, LANE, BOTH)
    for name in BOTH:
        np.testing.assert_array_equal(cells.counts[name].toarray(), expected.counts[name].toarray())
    np.testing.assert_array_equal(cells.codes["lane"], expected.codes["lane"])
    backed.file.close()


def test_columns_are_found_in_mdata_first_then_in_modalities(unpaired):
    mdata, whole = unpaired
    mdata.obs["lane"] = "same"
    assert read(mdata, CovariateKeys.resolve(batch_key="lane"), BOTH).categories == {"lane": ("same",)}
    del mdata.obs["lane"]
    mdata["atac"].obs["site"] = mdata["atac"].obs["site"].astype(str)
    np.testing.assert_array_equal(
        read(mdata, LANE, BOTH).codes["lane"], pd.Categorical(whole["rna"].obs["lane"][mdata.obs_names]).codes
    )
    # Only the RNA knows the age, so cells without it have none.
    with pytest.raises(InvalidArgumentError, match="continuous_covariate_keys: 'age' is missing for 2 of 7 cells"):
        read(mdata, CovariateKeys.resolve(continuous_covariate_keys="age"), BOTH)
    with pytest.raises(InvalidArgumentError, match="'rna:lane' is missing for 2 of 7"):
        read(mdata, CovariateKeys.resolve(batch_key="rna:lane"), BOTH)
    with pytest.raises(MissingKeyError, match=r"batch_key='plate' is not in mdata.obs .*'rna:age'"):
        read(mdata, CovariateKeys.resolve(batch_key="plate"), BOTH)


def test_modalities_that_contradict_each_other_are_refused(unpaired):
    mdata, _ = unpaired
    mdata["atac"].obs["lane"] = "z"
    with pytest.raises(InvalidArgumentError, match=r"different values of 'lane' \('\w' and 'z'\)"):
        read(mdata, LANE, BOTH)


def test_a_modality_that_is_not_there(unpaired):
    mdata, _ = unpaired
    known = read(mdata, LANE, BOTH)
    alone = mudata.MuData({"rna": make()})
    with pytest.raises(MissingKeyError, match="modality='atac' is not in mdata.mod"):
        read(alone, LANE, BOTH, features=known.features)
    cells = read(alone, LANE, BOTH, features=known.features, categories=known.categories, allow_missing_modalities=True)
    assert not cells.present["atac"].any()
    assert cells.counts["atac"].shape == (7, 4)
    assert cells.counts["atac"].nnz == 0
    assert cells.overlap["atac"] == 0
    with pytest.raises(InvalidArgumentError, match=r"modalities \['atac', 'rna'\], and an AnnData has one"):
        read(make(), LANE, BOTH)


def test_cells_with_no_count_of_a_modality_are_taken_to_lack_it(unpaired):
    mdata, _ = unpaired
    atac = mdata["atac"].X.tolil()
    atac[[1, 2]] = 0
    mdata["atac"].X = atac.tocsr()
    empty = mdata["atac"].obs_names[[1, 2]]
    with pytest.warns(CellstillWarning, match="2 cells have no count in the modality 'atac'"):
        cells = read(mdata, LANE, BOTH)
    expected = mdata.obs_names.isin(mdata["atac"].obs_names) & ~mdata.obs_names.isin(empty)
    np.testing.assert_array_equal(cells.present["atac"], expected)
    for row, name in enumerate(mdata.obs_names):
        if expected[row]:
            np.testing.assert_array_equal(cells.counts["atac"].toarray()[row], mdata["atac"][name].X.toarray()[0])
    kept = ~mdata["rna"].obs_names.isin(["c1"])
    mdata["rna"].X = sp.csr_matrix(sp.diags(kept.astype(float)) @ mdata["rna"].X)
    with (
        pytest.warns(CellstillWarning),
        pytest.raises(InvalidArgumentError, match=r"1 cells have no counts in any .*'c1'"),
    ):
        read(mdata, LANE, BOTH)


def test_a_modality_changed_behind_the_back_of_its_mudata_is_refused(unpaired):
    mdata, _ = unpaired
    mdata.mod["rna"] = mdata["rna"][::-1].copy()
    with pytest.raises(InvalidArgumentError, match=r"Call mdata.update\(\)"):
        read(mdata, LANE, BOTH)


# The registry of scvi-tools.


@pytest.mark.parametrize("lanes", [[10, 2, 10, 1, 2, 1, 10], LANES], ids=["numbers", "text"])
def test_codes_are_those_of_the_registry_of_an_anndata(adata, lanes):
    adata.obs["lane"] = lanes
    register(Model, adata, categorical=KEYS.registered, continuous=KEYS.continuous, setup_args={})
    manager, cells = Model(adata).adata_manager, read(adata)
    assert_registered(manager, cells, KEYS)


def test_codes_are_those_of_the_registry_of_a_mudata(unpaired, caplog):
    mdata, _ = unpaired
    with caplog.at_level("INFO", logger="cellstill"):
        obs = complete_obs(mdata, LANE.arguments)
    assert caplog.messages == ["Copied to mdata.obs from its modalities: 'lane', 'site'."]
    assert list(mdata.obs["lane"]) == list(obs["lane"])
    register(Model, mdata, layers=BOTH, categorical=LANE.registered, setup_args={})
    assert_registered(Model(mdata).adata_manager, read(mdata, LANE, BOTH), LANE)
    caplog.clear()
    complete_obs(mdata, LANE.arguments)
    assert caplog.messages == []


def test_copies_of_columns_follow_the_modalities_until_they_are_changed(unpaired, tmp_path):
    mdata, _ = unpaired
    complete_obs(mdata, LANE.arguments)
    for again in (mdata, mdata[::2].copy(), reread(mdata, tmp_path / "cells.h5mu")):
        for one in again.mod.values():
            one.obs["lane"] = one.obs["lane"].astype(str) + "!"
        corrected = [*again.obs["lane"].astype(str) + "!"]
        assert read(again, LANE, BOTH).categories["lane"] == tuple(sorted(set(corrected)))
        complete_obs(again, LANE.arguments)
        assert list(again.obs["lane"]) == corrected
        # What users write into mdata.obs goes before what modalities say, as ever.
        again.obs["lane"] = ["own"] * again.n_obs
        assert list(complete_obs(again, LANE.arguments)["lane"]) == ["own"] * again.n_obs
        assert list(again.obs["lane"]) == ["own"] * again.n_obs


def reread(mdata, path):
    mdata.copy().write(path)
    return mudata.read_h5mu(path)


def assert_registered(manager, cells, keys):
    names = registered_categories(manager)
    for key, column in keys.registered.items():
        assert names[key] == cells.categories[column]
        np.testing.assert_array_equal(manager.get_from_registry(key).ravel(), cells.codes[column])


class Model(RegisteredModel):
    @classmethod
    def setup_anndata(cls, adata):
        raise NotImplementedError

    def train(self):
        raise NotImplementedError
