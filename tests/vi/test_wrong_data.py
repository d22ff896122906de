"""Data that do not fit are refused by name, before anything is written into them."""

from __future__ import annotations

import re

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cellstill import AmbientRegularizedSCVI, RegularizedMultimodalVI
from cellstill.errors import InvalidArgumentError, MissingKeyError

pytestmark = pytest.mark.filterwarnings("ignore:From 0.4:FutureWarning")

SMALL = {"n_hidden": 8, "n_latent": 2, "ambient_rate": 0.1}


def make(prefix="g"):
    counts = sp.csr_matrix(np.random.default_rng(0).poisson(3.0, (20, 10)) + 1.0)
    obs = pd.DataFrame({"lane": np.where(np.arange(20) % 2, "x", "y")}, index=[f"cell{i}" for i in range(20)])
    var = pd.DataFrame(index=[f"{prefix}{i}" for i in range(10)])
    return ad.AnnData(counts, obs=obs, var=var, layers={"counts": counts.copy()})


def make_mudata():
    return mudata.MuData({"rna": make(), "prot": make("p")})


@pytest.fixture(scope="module")
def rna(tmp_path_factory):
    adata, path = make(), tmp_path_factory.mktemp("models") / "rna"
    AmbientRegularizedSCVI.setup_anndata(adata, layer="counts", batch_key="lane")
    AmbientRegularizedSCVI(adata, **SMALL).train(max_epochs=1, progress=False).save(path)
    return path


@pytest.fixture(scope="module")
def joint(tmp_path_factory):
    mdata, path = make_mudata(), tmp_path_factory.mktemp("models") / "joint"
    RegularizedMultimodalVI.setup_mudata(mdata, batch_key="lane")
    RegularizedMultimodalVI(mdata, **SMALL).train(max_epochs=1, progress=False).save(path)
    return path


def refused(message, error=InvalidArgumentError):
    return pytest.raises(error, match=re.escape(message))


def test_set_up_refuses_the_other_container_views_and_files():
    with refused(
        "adata is a MuData with the modalities ['rna', 'prot'], and an AnnData is needed. Give one of them, "
        "mdata['rna']; or use RegularizedMultimodalVI.setup_mudata for all."
    ):
        AmbientRegularizedSCVI.setup_anndata(make_mudata())
    with refused("mdata is of type AnnData, not a MuData. Give one: mudata.MuData({'rna': adata, ...}); or use"):
        RegularizedMultimodalVI.setup_mudata(make())
    with refused("mdata is a view of other data. Pass a copy: mdata.copy()."):
        RegularizedMultimodalVI.setup_mudata(make_mudata()[:9], batch_key="lane")
    with refused("adata is a view of other data. Pass a copy: adata.copy()."):
        AmbientRegularizedSCVI.setup_anndata(make()[:9])
    with refused("adata is of type str, not an AnnData or a MuData. Read files first"):
        AmbientRegularizedSCVI.setup_anndata("cells.h5ad")


def test_loading_refuses_the_other_container_and_views(rna, joint):
    with refused("The model has the modalities ['prot', 'rna'], and an AnnData has one. Give a MuData: mudata.MuData("):
        RegularizedMultimodalVI.load(joint, ad.AnnData(make().X))
    with refused("modality='rna' is not in mdata.mod. mdata.mod has: 'gex'.", MissingKeyError):
        AmbientRegularizedSCVI.load(rna, mudata.MuData({"gex": make()}))
    with refused("mdata is a view of other data. Pass a copy: mdata.copy()."):
        RegularizedMultimodalVI.load(joint, make_mudata()[:9])
    with refused("adata is a view of other data. Pass a copy: adata.copy()."):
        AmbientRegularizedSCVI.load(rna, make()[:9])


def test_loading_says_what_data_lack_and_leaves_them_as_they_are(rna):
    adata = make()
    del adata.layers["counts"]
    adata.layers["raw"] = adata.X
    with refused("layer='counts' is not in adata.layers. adata.layers has: 'raw'.", MissingKeyError):
        AmbientRegularizedSCVI.load(rna, adata)
    adata = make()
    adata.obs["lane"] = ["x", "z"] * 10
    with refused(
        "batch_key: 'lane' has categories that the model does not know: ['z']. It knows: ['x', 'y']. "
        "Teach it new ones with load_query_data."
    ):
        AmbientRegularizedSCVI.load(rna, adata)
    assert list(adata.obs) == ["lane"]
    assert not adata.uns
    del adata.obs["lane"]
    with refused("batch_key='lane' is not in adata.obs. adata.obs has: no keys at all.", MissingKeyError):
        AmbientRegularizedSCVI.load(rna, adata)


def test_set_up_again_follows_corrected_modalities():
    mdata = make_mudata()
    RegularizedMultimodalVI.setup_mudata(mdata, batch_key="lane")
    for one in mdata.mod.values():
        one.obs["lane"] = ["u"] * 15 + ["v"] * 5
    RegularizedMultimodalVI.setup_mudata(mdata, batch_key="lane")
    model = RegularizedMultimodalVI(mdata, **SMALL)
    assert list(mdata.obs["lane"]) == list(mdata["rna"].obs["lane"])
    assert model.adata_manager.get_from_registry("batch").ravel().tolist() == [0] * 15 + [1] * 5
    mdata["prot"].obs["lane"] = "w"
    with refused(
        "batch_key: modalities give cell 'cell0' different values of 'lane' ('u' and 'w'). Set mdata.obs['lane']"
    ):
        RegularizedMultimodalVI.setup_mudata(mdata, batch_key="lane")


def test_loading_finds_columns_of_modalities(joint):
    model = RegularizedMultimodalVI.load(joint, make_mudata())
    codes = model.adata_manager.get_from_registry("batch").ravel()
    assert codes.tolist() == [1, 0] * 10
