from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from cellstill import SCDD
from cellstill.condense import GeneratorConfig, LatentConfig

LATENT = LatentConfig(n_latent=6, n_hidden=32, max_epochs=25, batch_size=32, lr=4e-3)
GENERATOR = GeneratorConfig(
    n_hidden=48, n_blocks=2, n_steps=500, n_tuning_steps=200, lr=2e-3, decay=0.99, n_teacher_steps=6
)


def labelled_cells(n_obs: int = 420, seed: int = 0) -> AnnData:
    """Three classes, the last of them rare, of six donors; over-dispersed counts in a layer, rubbish in X."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(3, n_obs, p=[0.5, 0.4, 0.1])
    rate = np.tile(np.linspace(0.1, 2, 60), (3, 1))
    for k in range(3):
        rate[k, 12 * k : 12 * k + 12] += 2.5
    mean = rate[kind] / rate[kind].sum(axis=1, keepdims=True) * rng.lognormal(np.log(150), 0.2, (n_obs, 1))
    counts = rng.poisson(rng.gamma(3.0, mean / 3.0)).astype(np.float32)
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical.from_codes(kind, ["B cell", "T cell", "rare/odd"]),
            "stage": np.where(kind == 1, "late", np.where(np.arange(n_obs) % 2, "late", "early")),
            "donor": [f"d{i % 6}" for i in range(n_obs)],
        },
        index=[f"c{i}" for i in range(n_obs)],
    )
    adata = AnnData(sp.csr_matrix(-np.ones((n_obs, 60), dtype=np.float32)), obs=obs)
    adata.var_names = [f"g{i}" for i in range(60)]
    adata.layers["counts"] = sp.csr_matrix(counts)
    return adata


@dataclass(frozen=True)
class Trained:
    """A small trained model, its cells, new cells of the same kinds, and where the model is saved."""

    model: SCDD
    adata: AnnData
    new: AnnData
    path: Path


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Trained:
    adata = labelled_cells()
    SCDD.setup_anndata(adata, "cell_type", layer="counts", donor_key="donor")
    model = SCDD(adata, latent_settings=LATENT, generator_settings=GENERATOR)
    model.train(accelerator="cpu", progress=False)
    path = tmp_path_factory.mktemp("scdd") / "model"
    model.save(path)
    return Trained(model, adata, labelled_cells(seed=1), path)
