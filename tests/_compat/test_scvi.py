"""What we take from scvi-tools: a registry that users of scvi-tools recognise, and that keeps no data alive."""

from __future__ import annotations

import gc
import weakref

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scvi import REGISTRY_KEYS

from cellstill._compat.scvi import RegisteredModel, category_registry, register, setup_args

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
