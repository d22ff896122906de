"""Everything we touch of harmonypy, whose result changed its names and orientation between releases."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class HarmonyResult:
    """What harmonypy found.

    Attributes
    ----------
    corrected
        Corrected coordinates, shape ``(n_obs, n_comps)``; transposed by releases before 2.0.
    memberships
        Soft memberships of the cells in the clusters, shape ``(n_obs, n_clusters)``; rows sum to 1.
    objective
        Objective before the first round and after each.
    """

    corrected: np.ndarray
    memberships: np.ndarray
    objective: np.ndarray


def run_harmony(
    pca: np.ndarray,
    variables: Mapping[str, np.ndarray],
    *,
    n_clusters: int,
    theta: float,
    sigma: float,
    alpha: float,
    max_iter: int,
    tol: float,
    seed: int,
) -> HarmonyResult:
    """Run harmonypy, silently, on principal components of shape ``(n_obs, n_comps)`` and nominal variables."""
    import harmonypy
    import pandas as pd

    logger = logging.getLogger("harmonypy")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        found = harmonypy.run_harmony(
            np.asarray(pca, dtype=np.float64),
            pd.DataFrame(variables),
            list(variables),
            nclust=n_clusters,
            theta=theta,
            sigma=sigma,
            alpha=alpha,
            max_iter_harmony=max_iter,
            epsilon_harmony=tol,
            random_state=seed,
            verbose=False,
        )
    finally:
        logger.setLevel(level)
    return HarmonyResult(found.Z_corr, found.R, np.asarray(found.objective_harmony, dtype=np.float64))
