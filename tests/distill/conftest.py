from __future__ import annotations

import warnings

import pytest
from anndata import AnnData

from cellstill import Distiller
from cellstill.data import simulate_counts
from cellstill.errors import CellstillWarning
from cellstill.teachers import HarmonyTeacher


def train(adata: AnnData, *, epochs: tuple[int, int] = (30, 60), batch_size: int = 256, **settings) -> Distiller:
    """A small model; that Harmony stopped at its cap is tested elsewhere."""
    defaults = {"batch_key": "batch", "n_latent": 15, "teacher": HarmonyTeacher(max_iter=10)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Harmony stopped at max_iter", category=CellstillWarning)
        model = Distiller(adata, **{**defaults, **settings})
        shares = {"train_size": 0.8, "validation_size": 0.1}
        return model.train(*epochs, batch_size=batch_size, accelerator="cpu", progress=False, **shares)


@pytest.fixture(scope="session")
def simulated() -> AnnData:
    """Cells of four types in three batches, two conditions and twelve donors, whose truth is known."""
    return simulate_counts(
        n_obs=1500,
        n_vars=300,
        n_batches=3,
        n_cell_types=4,
        library_size_median=3000,
        theta_median=10.0,
        theta_sigma=0.8,
        batch_sd=0.4,
        seed=11,
    )


@pytest.fixture(scope="session")
def model(simulated) -> Distiller:
    # 1,200 cells are few steps in an epoch of the default batch size: dispersions would not arrive.
    return train(simulated.copy(), batch_size=64, labels_key="cell_type", covariate_keys=["condition"])
