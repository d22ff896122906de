"""Data that are saved with a model, and the device that it is loaded to."""

from __future__ import annotations

import warnings

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from cellstill import AmbientRegularizedSCVI, RegularizedMultimodalVI
from cellstill.errors import InvalidArgumentError, StoreError

N = 60

pytestmark = pytest.mark.filterwarnings("ignore:From 0.4:FutureWarning")


def cells(n_vars=20, prefix="g", seed=0):
    rng = np.random.default_rng(seed)
    counts = sp.csr_matrix(rng.poisson(rng.gamma(0.5, 6.0, n_vars) + 0.2, (N, n_vars)), dtype=np.float32)
    obs = pd.DataFrame({"lane": np.array(["a", "b"])[np.arange(N) % 2]}, index=[f"cell{i}" for i in range(N)])
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"{prefix}{i}" for i in range(n_vars)]))


@pytest.fixture(params=["rna", "joint"])
def model(request):
    if request.param == "rna":
        data, kind = cells(), AmbientRegularizedSCVI
        kind.setup_anndata(data, batch_key="lane")
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            data, kind = mudata.MuData({"gex": cells(), "peaks": cells(15, "p", 1)}), RegularizedMultimodalVI
        data.obs["lane"] = cells().obs["lane"]
        kind.setup_mudata(data, batch_key="lane")
    return kind(data, n_hidden=8, n_latent=2, ambient_rate=0.1).train(max_epochs=1)


def test_data_are_saved_with_the_model_and_loaded_with_it(model, tmp_path):
    folder, kind = tmp_path / "model", type(model)
    model.save(folder, save_anndata=True)
    name = "adata.h5ad" if kind is AmbientRegularizedSCVI else "mdata.h5mu"
    assert sorted(path.name for path in folder.iterdir()) == sorted(["model.json", "tensors.safetensors", name])
    assert list(tmp_path.iterdir()) == [folder]
    loaded = kind.load(folder)
    assert loaded.adata is not model.adata
    np.testing.assert_array_equal(loaded.get_latent_representation(), model.get_latent_representation())
    assert loaded.get_elbo() == model.get_elbo()
    assert kind.load(folder, False).adata is None
    assert kind.load(folder, model.adata).adata is model.adata
    mapped = kind.load_query_data(model.adata.copy(), folder)
    np.testing.assert_array_equal(mapped.get_latent_representation(), model.get_latent_representation())


def test_saved_data_are_not_lost_to_a_model_without_data(model, tmp_path):
    folder = tmp_path / "model"
    model.save(folder, save_anndata=True)
    with pytest.raises(StoreError, match="holds other files .*h5"):
        model.save(folder, overwrite=True)
    before = {path: path.stat().st_ino for path in folder.iterdir()}
    model.save(folder, overwrite=True, save_anndata=True)
    assert all(path.stat().st_ino != node for path, node in before.items())
    model.save(tmp_path / "bare")
    model.save(tmp_path / "bare", overwrite=True, save_anndata=True)
    assert type(model).load(tmp_path / "bare").adata is not None


def test_a_failed_write_leaves_what_was_there(model, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    model.save(folder, save_anndata=True)
    content = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(data, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("cellstill.vi.base._write_data", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save(folder, overwrite=True, save_anndata=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == content
    assert list(tmp_path.iterdir()) == [folder]


def test_a_model_without_data_has_none_to_save(model, tmp_path):
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model")
    assert loaded.adata is None
    with pytest.raises(InvalidArgumentError, match="loaded without data"):
        loaded.save(tmp_path / "other", save_anndata=True)
    assert not (tmp_path / "other").exists()


def test_a_model_is_loaded_to_the_device_that_is_named(model, tmp_path):
    model.save(tmp_path / "model")
    kind, n_devices = type(model), torch.cuda.device_count()
    assert kind.load(tmp_path / "model").device == torch.device("cpu")
    found = kind.load(tmp_path / "model", accelerator="auto").device
    assert found.type == ("cuda" if n_devices else "cpu")
    for settings in ({"accelerator": "gpu", "device": n_devices}, {"accelerator": "tpu"}):
        with pytest.raises(InvalidArgumentError, match="accelerator="):
            kind.load(tmp_path / "model", **settings)
