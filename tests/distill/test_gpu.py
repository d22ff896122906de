"""A Distiller on a GPU against one on the CPU; the bodies are run on the CPU as well, there with compiled loops."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from cellstill import Distiller
from cellstill.data import simulate_counts
from cellstill.errors import CellstillWarning


def make():
    return simulate_counts(n_obs=300, n_vars=120, n_batches=3, n_cell_types=3, seed=3)


def train(accelerator, compile=False, **settings) -> Distiller:
    # Nothing is drawn at random but on the host.
    model = Distiller(make(), "batch", covariate_keys=["condition"], n_latent=8, dropout=0.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Harmony stopped at max_iter", category=CellstillWarning)
        settings = {"progress": False, "train_size": 0.8, **settings}
        return model.train(6, 8, accelerator=accelerator, compile=compile, **settings)


@pytest.fixture(scope="module")
def on_the_cpu():
    return train("cpu")


def assert_close(found, expected, bound=1e-3):
    """Off by little of what values differ among themselves."""
    assert np.abs(np.asarray(found) - np.asarray(expected)).max() <= bound * np.asarray(expected).std()


def test_training_ends_as_on_the_cpu(accelerator, on_the_cpu):
    found = train(accelerator, compile=True)
    assert found.device.type == "cpu"
    for phase, frame in on_the_cpu.history.items():
        np.testing.assert_allclose(found.history[phase], frame, rtol=1e-4, err_msg=phase)
    assert_close(found.latent.student, on_the_cpu.latent.student)


def test_getters_and_new_batches_are_there_what_they_are_on_the_cpu(accelerator, device, on_the_cpu, tmp_path):
    on_the_cpu.save(tmp_path / "model")
    new = make()
    new.obs["batch"] = new.obs["batch"].astype(str).replace({"batch_2": "unseen"})

    def got(place):
        model = Distiller.load(tmp_path / "model", make())
        model.to_device(place)
        mapped = model.map_query(new, fine_tune_batches=True, n_epochs=5)
        assert model.device.type == place
        assert mapped.unseen_batches == ("unseen",)
        return {
            "latent": model.get_latent_representation(),
            "corrected": model.corrected_expression(target_batch=None),
            "mapped": mapped.latent,
            "unseen": model._fit_result.query_batches["unseen"],
        }

    found = got(device)
    for name, expected in got("cpu").items():
        assert_close(found[name], expected)
