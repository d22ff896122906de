"""Counts: reading and checking them, minibatches, principal components, simulation."""

from cellstill.data.counts import CountsSummary, as_csr, check_counts
from cellstill.data.loader import CountsLoader, split_cells
from cellstill.data.pca import PCA, fit_pca
from cellstill.data.simulate import simulate_counts
from cellstill.data.simulation_config import SimulationConfig

__all__ = [
    "PCA",
    "CountsLoader",
    "CountsSummary",
    "SimulationConfig",
    "as_csr",
    "check_counts",
    "fit_pca",
    "simulate_counts",
    "split_cells",
]
