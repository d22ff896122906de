"""Harmony, and how it is kept from removing biology."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cellstill._compat.harmony import run_harmony
from cellstill.errors import CellstillWarning, InvalidArgumentError, level_outside
from cellstill.teachers.base import Teacher, TeacherInfo, TeacherInput, TeacherOutput


@dataclass(frozen=True)
class HarmonyTeacher(Teacher):
    """Harmony (Korsunsky et al. 2019) on principal components, through harmonypy.

    Parameters
    ----------
    theta
        Diversity penalty. Larger forces batches to mix within each cluster; 0 only clusters.
    max_iter
        Most rounds of clustering and correction.
    tol
        Relative change of the objective at which the rounds stop. Smaller corrects further where batches are far apart.
    sigma
        Width of the soft clusters. Larger makes them softer.
    n_clusters
        Number of clusters; ``None`` takes ``min(n_obs / 30, 100)``.
    alpha
        Ridge penalty of the correction, relative to the number of cells expected of a batch in a cluster. 0.2 leaves
        about a sixth of any shift; smaller removes more of it, and follows the noise of small batches.

    Notes
    -----
    Harmony alternates soft clustering, in which each cluster k is pushed to hold all batches, with a correction that is
    linear within a cluster: a ridge regression of the coordinates, weighted by the memberships R_k, on an intercept and
    the batches, of which the batch part is subtracted.

    With covariates to protect the regression holds them too. The clusters are made diverse over batches *and* nominal
    covariates (harmonypy with several variables), so that one cluster holds a cell type in all its conditions. Then,
    for each k, with the design ``D = [1, batch one-hot, covariates]`` and ``W_k`` solving
    ``(D' R_k D + Lambda_k) W_k = D' R_k Z``, only the batch rows of ``W_k`` are subtracted:
    ``z_i <- z_i - sum_k R_ik batch_i W_k[batch]``. ``Lambda_k`` is harmonypy's own penalty, ``alpha`` times the
    expected number of cells of a level in the cluster, and 0 for the intercept. What differs between conditions within
    a batch, or between batches that share a condition, is thus told apart; without covariates the formula gives
    harmonypy's own result.
    """

    theta: float = 2.0
    max_iter: int = 10
    tol: float = 1e-4
    sigma: float = 0.1
    n_clusters: int | None = None
    alpha: float = 0.2

    info: ClassVar[TeacherInfo] = TeacherInfo(
        name="harmony",
        reference="10.1038/s41592-019-0619-0",
        backend="harmonypy",
        in_pca_space=True,
        protection="clusters are diverse over batch and covariates; a joint regression, of which only the batch part "
        "is subtracted",
    )

    def _teach(self, inputs: TeacherInput) -> TeacherOutput:
        n_obs = len(inputs.pca)
        if self.max_iter < 1:
            raise InvalidArgumentError(f"max_iter={self.max_iter} of HarmonyTeacher must be at least 1.")
        variables = {"batch": inputs.batch}
        for key in inputs.design.levels:
            variables[f"covariate {key}"] = inputs.obs[key].astype(str).to_numpy()
        result = run_harmony(
            inputs.pca,
            variables,
            n_clusters=self.n_clusters or int(np.clip(round(n_obs / 30), 1, 100)),
            theta=self.theta,
            sigma=self.sigma,
            alpha=self.alpha,
            max_iter=self.max_iter,
            tol=self.tol,
            seed=inputs.seed,
        )
        corrected = result.corrected
        if corrected.shape != inputs.pca.shape:
            raise InvalidArgumentError(
                f"harmonypy returned shape {corrected.shape} for {n_obs} cells x {inputs.pca.shape[1]} components. "
                "cellstill needs harmonypy >= 2.1: upgrade it."
            )
        if inputs.design.keys:
            batch = np.eye(inputs.batch.max() + 1)[inputs.batch]
            covariates = inputs.design.encode(inputs.obs)
            corrected = subtract_batch(inputs.pca, result.memberships, batch, covariates, alpha=self.alpha)

        objective = result.objective
        n_iter = len(objective) - 1
        change = abs(objective[-2] - objective[-1]) / abs(objective[-2])
        converged = bool(change < self.tol)
        if not converged:
            warnings.warn(
                f"Harmony stopped at max_iter={self.max_iter} before it reached tol={self.tol:g} "
                f"(last relative change {change:.1e}). Raise max_iter of HarmonyTeacher to go on.",
                CellstillWarning,
                stacklevel=level_outside(),
            )
        record = {
            "n_iter": n_iter,
            "converged": converged,
            "stopped_by": "tol" if converged else "max_iter",
            "last_relative_change": float(change),
            "n_clusters": result.memberships.shape[1],
        }
        return TeacherOutput(corrected, record)


def subtract_batch(
    embedding: np.ndarray, memberships: np.ndarray, batch: np.ndarray, covariates: np.ndarray, *, alpha: float = 0.2
) -> np.ndarray:
    """Subtract the batch part of a regression on batch and covariates, cluster by cluster.

    Parameters
    ----------
    embedding
        Uncorrected coordinates, shape ``(n_obs, n_comps)``.
    memberships
        Soft cluster memberships R, shape ``(n_obs, n_clusters)``, rows sum to 1.
    batch
        One-hot batches, shape ``(n_obs, n_batches)``.
    covariates
        Encoded covariates, shape ``(n_obs, n_columns)``; may have no column.
    alpha
        Ridge penalty relative to the expected size of a column in a cluster.

    Returns
    -------
    Corrected coordinates, float64, shape ``(n_obs, n_comps)``.
    """
    design = np.hstack([np.ones((len(batch), 1)), batch, covariates])
    expected = (design**2).mean(axis=0)
    batch_columns = slice(1, 1 + batch.shape[1])
    corrected = embedding.astype(np.float64)
    for membership in np.asarray(memberships, dtype=np.float64).T:
        weighted = design * membership[:, None]
        penalty = alpha * membership.sum() * expected
        penalty[0] = 0.0
        weights = np.linalg.solve(design.T @ weighted + np.diag(penalty), weighted.T @ embedding)
        corrected -= weighted[:, batch_columns] @ weights[batch_columns]
    return corrected
