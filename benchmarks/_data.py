"""Data sets of the benchmarks: real ones from the data folder, simulated ones with their truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from scipy.sparse import csr_matrix

from cellstill.data.simulate import simulate_counts

SIMULATED = {"n_obs": 3000, "n_vars": 1000, "n_batches": 3, "batch_fractions": (0.5, 0.3, 0.2)}
TREATED = {
    "simulated_70_50_30": ((0.3, 0.7), (0.5, 0.5), (0.7, 0.3)),
    "simulated_100_50_0": ((0.0, 1.0), (0.5, 0.5), (1.0, 0.0)),
}
"""Share of controls and treated cells in each batch."""


@dataclass(frozen=True)
class DataSet:
    """A data set: where it comes from and which columns matter."""

    title: str
    batch_key: str
    condition_key: str | None
    read: Callable[..., ad.AnnData]
    labels_key: str = "cell_type"


def stored(name: str) -> Callable[..., ad.AnnData]:
    """Return a reader of a real data set."""

    def read(folder: Path, quick: bool) -> ad.AnnData:
        return real(folder / f"{name}.h5ad", quick)

    return read


def kang(folder: Path, quick: bool) -> ad.AnnData:
    adata = real(folder / "kang_pbmc.h5ad", quick)
    # Five cells that demultiplexing gave to nobody are no batch.
    return adata[adata.obs["donor"] != "unassigned"].copy()


def simulated(name: str) -> Callable[..., ad.AnnData]:
    """Return a reader of a simulated data set; ``batch_sd=0`` gives the same cells without batch effect."""

    def read(folder: Path, quick: bool, **overrides: Any) -> ad.AnnData:
        sizes = {**SIMULATED, "n_obs": 600, "n_vars": 300} if quick else SIMULATED
        return simulate_counts(**{"seed": 1, **sizes, "condition_fractions": TREATED[name], **overrides})

    return read


def sized(n_obs: int, n_vars: int, counts_per_gene: float) -> Callable[..., ad.AnnData]:
    """Return a reader of simulated cells of a size; the median depth, in counts per gene, sets the density."""

    def read(folder: Path, quick: bool) -> ad.AnnData:
        cells, genes = (n_obs // 5, n_vars // 4) if quick else (n_obs, n_vars)
        return simulate_counts(
            seed=1, n_obs=cells, n_vars=genes, n_batches=4, n_cell_types=8, library_size_median=counts_per_gene * genes
        )

    return read


DATA_SETS = {
    "cellbench_3cl_3tech": DataSet(
        "CellBench: 3 cell lines, batch = technology", "batch", None, stored("cellbench_3cl_3tech")
    ),
    "kang_pbmc": DataSet("Kang PBMC: stimulated and control, batch = donor", "donor", "condition", kang),
    "cellbench_3cl": DataSet(
        "CellBench: 3 cell lines, 2 technologies, all genes", "batch", None, stored("cellbench_3cl")
    ),
    "onek1k_subset": DataSet("OneK1K: 29 pools, batch = pool", "batch", None, stored("onek1k_subset")),
    "simulated_70_50_30": DataSet(
        "Simulated: 3 batches, 70 / 50 / 30 % treated", "batch", "condition", simulated("simulated_70_50_30")
    ),
    "simulated_100_50_0": DataSet(
        "Simulated: 3 batches, 100 / 50 / 0 % treated", "batch", "condition", simulated("simulated_100_50_0")
    ),
    "large": DataSet("Simulated: 20,000 x 5,000, 8 % not zero", "batch", None, sized(20_000, 5000, 0.105)),
    "sparse": DataSet("Simulated: 3,000 x 1,000, 8 % not zero", "batch", None, sized(3000, 1000, 0.11)),
    "dense": DataSet("Simulated: 3,000 x 1,000, 48 % not zero", "batch", None, sized(3000, 1000, 2.0)),
}

BATCHED = ("cellbench_3cl_3tech", "kang_pbmc", "onek1k_subset", "cellbench_3cl")
"""Real data sets that have batches."""


def store(adata: ad.AnnData, path: Path) -> dict[str, Any]:
    """Write counts and annotations for the workers to load, and describe them."""
    counts = csr_matrix(adata.X, dtype=np.float32)
    ad.AnnData(X=counts, obs=adata.obs, var=adata.var[[]]).write_h5ad(path)
    return {
        "n_obs": adata.n_obs,
        "n_vars": adata.n_vars,
        "density": round(float(counts.nnz / np.prod(counts.shape)), 4),
    }


def real(path: Path, quick: bool) -> ad.AnnData:
    """Read a real data set; ``quick`` keeps 600 cells and the 500 genes with most counts."""
    adata = ad.read_h5ad(path)
    if quick:
        adata = adata[np.random.default_rng(0).permutation(adata.n_obs)[:600]]
        adata = adata[:, np.asarray(adata.X.sum(axis=0)).ravel().argsort()[::-1][:500]]
        adata = adata[np.asarray(adata.X.sum(axis=1)).ravel() > 0].copy()
    return adata
