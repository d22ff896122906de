"""A regularised model on a GPU against one on the CPU; the bodies are run on the CPU as well, with compiled loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cellstill import AmbientRegularizedSCVI
from cellstill.data import simulate_counts


@pytest.fixture
def _noise_of_the_host(monkeypatch):
    """Generators of a GPU draw other numbers from the same seed."""
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.randn(x.shape, dtype=x.dtype).to(x.device))


def make():
    return simulate_counts(n_obs=300, n_vars=120, n_batches=2, n_cell_types=3, ambient_fraction=0.1, seed=3)


def train(accelerator, compile=False, **settings) -> AmbientRegularizedSCVI:
    adata = make()
    AmbientRegularizedSCVI.setup_anndata(adata, batch_key="batch", nn_conditioning_covariate_keys=["batch"])
    model = AmbientRegularizedSCVI(adata, n_hidden=16, n_latent=4, ambient_rate=0.1)
    settings = {"max_epochs": 6, "batch_size": 64, "lr": 4e-3, "progress": False, **settings}
    return model.train(accelerator=accelerator, compile=compile, **settings)


def getters(model):
    return {
        "latent": model.get_latent_representation(),
        "expression": np.log(model.get_normalized_expression(transform_batch="batch_0", return_numpy=True)),
        "library": model.get_latent_library_size(),
        "ambient": np.log(model.get_ambient_profile()),
    }


def assert_same_getters(found, expected, bound=1e-3):
    """Off by little of what values differ among themselves."""
    found = getters(found)
    for name, values in getters(expected).items():
        off = np.abs(np.asarray(found[name]) - np.asarray(values)).max()
        assert off <= bound * np.asarray(values).std(), name


@pytest.fixture
def on_the_cpu(_noise_of_the_host):
    return train("cpu")


@pytest.mark.parametrize(("precision", "bound"), [("32-true", 1e-4), ("bf16-mixed", 0.01)])
def test_training_ends_as_on_the_cpu(accelerator, precision, bound, on_the_cpu):
    found = train(accelerator, compile=True, precision=precision)
    assert found.device.type == "cpu"
    for term, frame in on_the_cpu.history.items():
        if term.startswith(("elbo", "reconstruction")):
            np.testing.assert_allclose(found.history[term], frame, rtol=bound, err_msg=term)
    if precision == "32-true":
        assert_same_getters(found, on_the_cpu)


def test_getters_give_there_what_they_give_on_the_cpu(accelerator, device, on_the_cpu, tmp_path):
    on_the_cpu.save(tmp_path / "model")
    model = AmbientRegularizedSCVI.load(tmp_path / "model", make(), accelerator=accelerator)
    assert model.device.type == device
    assert_same_getters(model, on_the_cpu)
