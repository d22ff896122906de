"""What we take from scvi-tools: a registry that users of scvi-tools recognise, and that keeps no data alive."""

from __future__ import annotations

import gc
import re
import weakref

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scvi import REGISTRY_KEYS

from cellstill._compat.scvi import RegisteredModel, category_registry, register, registered_categories, setup_args
from cellstill.errors import InvalidArgumentError

ARGUMENTS = {"batch_key": "tech", "labels_key": "kind", "layer": None}


class Model(RegisteredModel):
    @classmethod
    def setup_anndata(cls, adata, batch_key, labels_key, layer=None, source_registry=None):
        register(
            cls,
            adata,
            layer=layer,
            categorical={"batch": batch_key, "labels": labels_key},
            setup_args={"batch_key": batch_key, "labels_key": labels_key, "layer": layer},
            source_registry=source_registry,
        )

    def train(self):
        raise NotImplementedError


class Other(Model):
    """A second class, whose data are its own."""


def make(batches=("x", "y", "z"), n_obs=30):
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        {"tech": np.resize(batches, n_obs), "kind": np.resize(["a", "b"], n_obs)}, index=[f"c{i}" for i in range(n_obs)]
    )
    return ad.AnnData(sp.csr_matrix(rng.poisson(1.0, (n_obs, 5)).astype(np.float32)), obs=obs)


@pytest.fixture
def adata():
    data = make()
    Model.setup_anndata(data, "tech", "kind")
    return data


def codes(model_or_manager, key):
    return np.asarray(model_or_manager.get_from_registry(key)).ravel()


def test_codes_follow_the_sorted_categories(adata):
    manager = Model(adata).adata_manager
    np.testing.assert_array_equal(codes(manager, REGISTRY_KEYS.BATCH_KEY), np.resize([0, 1, 2], 30))
    np.testing.assert_array_equal(codes(manager, "labels"), np.resize([0, 1], 30))
    assert manager.get_from_registry(REGISTRY_KEYS.X_KEY) is adata.X
    assert manager.summary_stats.n_batch == 3
    assert manager.summary_stats.n_labels == 2
    assert manager.summary_stats.n_vars == 5


def test_the_registry_holds_what_the_data_were_set_up_with(adata):
    registry = Model(adata).adata_manager.registry
    assert setup_args(registry) == ARGUMENTS
    assert registry["model_name"] == "Model"
    assert registry["setup_method_name"] == "setup_anndata"


def test_known_codes_are_kept_for_other_data(adata):
    known = category_registry("Model", ARGUMENTS, {"batch": ["x", "y", "z"], "labels": ["a", "b"]})
    query = make(batches=("z", "y"))
    Model.setup_anndata(query, "tech", "kind", source_registry=known)
    np.testing.assert_array_equal(codes(Model(query).adata_manager, "batch"), np.resize([2, 1], 30))


def test_our_registry_agrees_with_that_of_scvi_tools(adata):
    theirs = Model(adata).adata_manager.registry
    ours = category_registry("Model", ARGUMENTS, {"batch": ["x", "y", "z"], "labels": ["a", "b"]})
    assert set(ours) <= set(theirs)
    for key, entry in ours["field_registries"].items():
        real = theirs["field_registries"][key]
        assert entry["data_registry"] == dict(real["data_registry"])
        assert entry["summary_stats"] == dict(real["summary_stats"])
        assert set(entry["state_registry"]) == set(real["state_registry"])
        for name, value in entry["state_registry"].items():
            np.testing.assert_array_equal(value, real["state_registry"][name])


def test_names_saved_as_text_find_categories_that_are_numbers():
    known = category_registry("Model", ARGUMENTS, {"batch": ["1", "2", "10"], "labels": ["a", "b"]})
    query = make(batches=(10, 1))
    Model.setup_anndata(query, "tech", "kind", source_registry=known)
    np.testing.assert_array_equal(codes(Model(query).adata_manager, "batch"), np.resize([2, 0], 30))


def test_an_unknown_category_is_refused(adata):
    known = category_registry("Model", ARGUMENTS, {"batch": ["x", "y"], "labels": ["a", "b"]})
    with pytest.raises(ValueError, match="Category z not found in source registry"):
        Model.setup_anndata(make(), "tech", "kind", source_registry=known)


def test_the_setup_can_be_viewed(adata, capsys):
    Model(adata).view_anndata_setup()
    shown = capsys.readouterr().out
    assert "adata.obs['tech']" in shown
    assert "Anndata setup" in shown


def test_each_class_has_its_own_data(adata):
    with pytest.raises(ValueError, match="has not been set up|setup"):
        Other(adata)
    Other.setup_anndata(adata, "tech", "kind")
    assert Other(adata).adata_manager is not Model(adata).adata_manager


def test_nothing_is_kept_alive(adata):
    data = make()
    Model.setup_anndata(data, "tech", "kind")
    model = Model(data)
    alive, ident = weakref.ref(data), model.id
    assert ident in Model._per_instance_manager_store
    del data, model
    gc.collect()
    assert alive() is None
    assert ident not in Model._per_instance_manager_store


# Categories.


COPY = "adata is a copy, a subset or from the file of data that"


def read_again(adata, folder):
    adata.write_h5ad(folder / "data.h5ad")
    return ad.read_h5ad(folder / "data.h5ad")


@pytest.mark.parametrize(
    "taken",
    [lambda data, folder: data.copy(), lambda data, folder: data[:9].copy(), read_again],
    ids=["copy", "subset", "file"],
)
def test_what_is_taken_of_data_is_set_up_again(adata, taken, tmp_path):
    part = taken(adata, tmp_path)
    wanted = f"{COPY} are set up, and a set-up does not go along. Call "
    call = "Model.setup_anndata(adata, batch_key='tech', labels_key='kind')"
    with pytest.raises(InvalidArgumentError, match=re.escape(f"{wanted}{call} first.")):
        Model(part)
    with pytest.raises(InvalidArgumentError, match=re.escape(f"{wanted}adata = adata.copy(), then {call} first.")):
        Model(part[:5])
    exec(call, {"Model": Model, "adata": part})
    assert Model(part).adata_manager.adata is part
    assert Model(adata).adata_manager.adata is adata


def test_what_is_taken_of_a_copy_is_set_up_as_the_copy_was(adata):
    part = adata[:9].copy()
    Model.setup_anndata(part, "kind", "tech")
    with pytest.raises(InvalidArgumentError, match="batch_key='kind', labels_key='tech'"):
        Model(part.copy())
    with pytest.raises(InvalidArgumentError, match="batch_key='tech', labels_key='kind'"):
        Model(adata.copy())
    assert Model(adata).adata_manager.adata is adata


def test_data_that_are_deregistered_are_set_up_again(adata):
    model, other = Model(adata), make()
    Model.setup_anndata(other, "tech", "kind")
    model.deregister_manager()
    assert Model(adata).adata_manager.adata is adata
    with pytest.raises(InvalidArgumentError, match="is not set up for Model|were set up"):
        Model(other)
    model.deregister_manager(adata)
    with pytest.raises(InvalidArgumentError, match="were set up"):
        Model(adata)
    Model.setup_anndata(adata, "tech", "kind")
    adata.uns.clear()
    with pytest.raises(InvalidArgumentError, match="set up"):
        Model(adata)


def test_a_copy_whose_original_is_gone_is_not_taken_for_data_of_another_model():
    data = make()
    Model.setup_anndata(data, "tech", "kind")
    part = data[:9].copy()
    del data
    gc.collect()
    with pytest.raises(InvalidArgumentError, match=rf"^{COPY} were set up.*Call Model.setup_anndata\(adata, \.\.\.\)"):
        Model(part)


def test_data_of_another_class_say_so(adata):
    with pytest.raises(
        InvalidArgumentError, match="^adata is set up for Model, not for Other. Call Other.setup_anndata"
    ):
        Other(adata)
    with pytest.raises(InvalidArgumentError, match="^adata is not set up for Other. Call Other.setup_anndata"):
        Other(make())


def test_categories_that_no_cell_has_get_no_code():
    data = make()
    data.obs["tech"] = pd.Categorical(data.obs["tech"], categories=["z", "unused", "y", "x"])
    Model.setup_anndata(data, "tech", "kind")
    manager = Model(data).adata_manager
    assert registered_categories(manager) == {"batch": ("z", "y", "x"), "labels": ("a", "b")}
    assert manager.summary_stats.n_batch == 3
    np.testing.assert_array_equal(codes(manager, "batch"), np.resize([2, 1, 0], 30))


@pytest.mark.parametrize("unknown", [0, "", False], ids=["zero", "empty", "false"])
def test_an_unknown_category_that_counts_as_false_is_refused(unknown):
    known = category_registry("Model", ARGUMENTS, {"batch": ["1", "2"], "labels": ["a", "b"]})
    with pytest.raises(ValueError, match=f"Category {unknown} not found in source registry"):
        Model.setup_anndata(make(batches=(unknown,)), "tech", "kind", source_registry=known)


def test_unknown_categories_are_appended_on_request():
    known = category_registry("Model", ARGUMENTS, {"batch": ["z", "a"], "labels": ["a", "b"]})
    query = make(batches=("y", "z", "x"))
    register(
        Model,
        query,
        categorical={"batch": "tech", "labels": "kind"},
        setup_args=ARGUMENTS,
        source_registry=known,
        extend_categories=True,
    )
    manager = Model(query).adata_manager
    assert registered_categories(manager)["batch"] == ("z", "a", "x", "y")
    np.testing.assert_array_equal(codes(manager, "batch"), np.resize([3, 0, 2], 30))


def test_missing_values_are_refused():
    data = make()
    data.obs["tech"] = [None, *data.obs["tech"][1:]]
    with pytest.raises((ValueError, TypeError)):
        Model.setup_anndata(data, "tech", "kind")


def test_few_cells_of_a_category_need_no_warning(recwarn):
    Model.setup_anndata(make(n_obs=4), "tech", "kind")
    assert not recwarn.list


# Several columns, and modalities.

COLUMNS = {"batch": "tech", "covariate_kind": "kind"}
SETUP = {"layers": {"rna": None, "atac": "raw"}}


class Joint(RegisteredModel):
    @classmethod
    def setup_anndata(cls, adata):
        raise NotImplementedError

    @classmethod
    def setup_mudata(cls, mdata, source_registry=None, **settings):
        register(
            cls,
            mdata,
            layers=SETUP["layers"],
            categorical=COLUMNS,
            continuous=["depth", "age"],
            setup_args=SETUP,
            source_registry=source_registry,
            **settings,
        )

    def train(self):
        raise NotImplementedError


def make_mudata(batches=("x", "y", "z")):
    """Cells of two modalities, the first and last ten of which have only one."""
    mudata = pytest.importorskip("mudata")
    whole = make(batches)
    atac = whole[10:].copy()
    atac.layers["raw"], atac.var_names = atac.X.copy(), [f"p{i}" for i in range(5)]
    with mudata.set_options(pull_on_update=False):
        mdata = mudata.MuData({"rna": whole[:20].copy(), "atac": atac})
    for column in ("tech", "kind"):
        mdata.obs[column] = whole.obs[column][mdata.obs_names]
    mdata.obs["depth"], mdata.obs["age"] = np.arange(30.0), np.arange(30)
    return mdata


def test_unpaired_modalities_and_several_columns_are_registered():
    mdata = make_mudata()
    Joint.setup_mudata(mdata)
    model = Joint(mdata)
    manager = model.adata_manager
    assert manager.get_from_registry("X_rna") is mdata["rna"].X
    assert manager.get_from_registry("X_atac") is mdata["atac"].layers["raw"]
    assert registered_categories(manager) == {"batch": ("x", "y", "z"), "covariate_kind": ("a", "b")}
    np.testing.assert_array_equal(codes(manager, "batch"), pd.Categorical(mdata.obs["tech"]).codes)
    continuous = manager.get_from_registry(REGISTRY_KEYS.CONT_COVS_KEY)
    np.testing.assert_array_equal(np.asarray(continuous), mdata.obs[["depth", "age"]])
    stats = manager.summary_stats
    assert (stats.n_batch, stats.n_covariate_kind, stats.n_X_rna, stats.n_X_atac) == (3, 2, 5, 5)
    assert stats.n_extra_continuous_covs == 2
    assert manager.registry["setup_method_name"] == "setup_mudata"
    assert setup_args(model.registry) == SETUP


def test_our_registry_of_modalities_agrees_with_that_of_scvi_tools():
    mdata = make_mudata()
    Joint.setup_mudata(mdata)
    theirs = Joint(mdata).adata_manager.registry
    known = {"batch": ["x", "y", "z"], "covariate_kind": ["a", "b"]}
    ours = category_registry("Joint", SETUP, known, columns=COLUMNS, mudata=True)
    assert ours["setup_method_name"] == theirs["setup_method_name"]
    for key, entry in ours["field_registries"].items():
        real = theirs["field_registries"][key]
        assert entry["data_registry"] == dict(real["data_registry"])
        assert entry["summary_stats"] == dict(real["summary_stats"])
        for name, value in entry["state_registry"].items():
            np.testing.assert_array_equal(value, real["state_registry"][name])


def test_known_codes_are_kept_for_other_modalities():
    known = category_registry(
        "Joint", SETUP, {"batch": ["z", "q", "y"], "covariate_kind": ["b", "a"]}, columns=COLUMNS, mudata=True
    )
    query = make_mudata(batches=("y", "z"))
    Joint.setup_mudata(query, source_registry=known)
    manager = Joint(query).adata_manager
    np.testing.assert_array_equal(codes(manager, "batch"), query.obs["tech"].map({"z": 0, "y": 2}))
    np.testing.assert_array_equal(codes(manager, "covariate_kind"), query.obs["kind"].map({"b": 0, "a": 1}))
    with pytest.raises(ValueError, match="Category x not found"):
        Joint.setup_mudata(make_mudata(), source_registry=known)
    Joint.setup_mudata(query_with_more := make_mudata(), source_registry=known, extend_categories=True)
    assert registered_categories(Joint(query_with_more).adata_manager)["batch"] == ("z", "q", "y", "x")


def test_a_model_of_modalities_is_made_without_data():
    known = category_registry("Joint", SETUP, {"batch": ["x"]}, columns={"batch": "tech"}, mudata=True)
    model = Joint(None, known)
    assert model.adata is None
    assert setup_args(model.registry) == SETUP


def test_several_columns_of_an_anndata_with_numbers():
    data = make()
    data.obs["depth"] = np.arange(30.0)
    register(Model, data, categorical=COLUMNS, continuous=["depth"], setup_args=ARGUMENTS)
    manager = Model(data).adata_manager
    assert set(registered_categories(manager)) == set(COLUMNS)
    assert manager.get_from_registry(REGISTRY_KEYS.CONT_COVS_KEY).columns.tolist() == ["depth"]


def test_the_setup_of_modalities_can_be_viewed(capsys):
    mdata = make_mudata()
    Joint.setup_mudata(mdata)
    Joint(mdata).adata_manager.view_registry()
    assert "adata.obs['tech']" in capsys.readouterr().out


def test_data_registered_again_by_another_class_stay_registered():
    mdata = make_mudata()
    Joint.setup_mudata(mdata)
    model = Joint(mdata)
    register(Other, mdata, layers={"rna": None}, categorical={"batch": "kind"}, setup_args={})
    np.testing.assert_array_equal(codes(Other(mdata).adata_manager, "batch"), pd.Categorical(mdata.obs["kind"]).codes)
    model.adata_manager.validate()
    np.testing.assert_array_equal(codes(model.adata_manager, "batch"), pd.Categorical(mdata.obs["tech"]).codes)


def test_no_mudata_is_kept_alive():
    mdata = make_mudata()
    Joint.setup_mudata(mdata)
    model = Joint(mdata)
    alive = weakref.ref(mdata)
    del mdata, model
    gc.collect()
    assert alive() is None
