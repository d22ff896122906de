"""Principal components of counts, without ever making them dense.

Both transforms are a sparse matrix plus one of low rank, which is all that a Lanczos solver has to multiply by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import LinearOperator, svds

from cellstill.data.counts import iter_rows
from cellstill.errors import InvalidArgumentError, check_option

PCAMethod = Literal["standard", "pearson_residuals"]

_THETA = 100.0
_N_NODES = 32
_DENSE_ROWS = 256


def log2_cpm(counts: sp.csr_matrix) -> sp.csr_matrix:
    """``log2(1 + 1e6 x / library size)`` of the non-zeros, float32; index arrays are shared with ``counts``."""
    library = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    scale = np.divide(1e6, library, out=np.zeros_like(library), where=library > 0).astype(np.float32)
    data = counts.data.astype(np.float32)
    data *= np.repeat(scale, np.diff(counts.indptr))
    np.log1p(data, out=data)
    data *= np.float32(1 / np.log(2))
    return sp.csr_matrix((data, counts.indices, counts.indptr), shape=counts.shape, copy=False)


@dataclass(frozen=True, kw_only=True)
class PCA:
    """A fitted linear projection of counts.

    Attributes
    ----------
    method
        ``"standard"`` or ``"pearson_residuals"``.
    components
        Loadings, shape ``(n_vars, n_comps)``, orthonormal columns, float32.
    offset
        Projection of the mean cell, shape ``(n_comps,)``; subtracted, so the training cells are centred.
    explained_variance
        Variance along each component, shape ``(n_comps,)``, decreasing.
    gene_fraction
        Share of each gene in all counts, shape ``(n_vars,)``; used by Pearson residuals.
    clip
        Residuals are clipped to ``[-clip, clip]``; used by Pearson residuals.
    """

    method: PCAMethod
    components: np.ndarray
    offset: np.ndarray
    explained_variance: np.ndarray
    gene_fraction: np.ndarray
    clip: float

    def transform(self, counts: sp.csr_matrix) -> np.ndarray:
        """Project cells, shape ``(n_obs, n_vars)``, to float32 coordinates, ``(n_obs, n_comps)``, in blocks of rows."""
        coordinates = np.empty((counts.shape[0], self.components.shape[1]), dtype=np.float32)
        for start, rows in iter_rows(counts, _DENSE_ROWS if self.method == "pearson_residuals" else 4096):
            values = log2_cpm(rows) if self.method == "standard" else self._residuals(rows)
            coordinates[start : start + rows.shape[0]] = values @ self.components - self.offset
        return coordinates

    def _residuals(self, rows: sp.csr_matrix) -> np.ndarray:
        mean = np.asarray(rows.sum(axis=1, dtype=np.float64)) * self.gene_fraction
        residuals = rows.toarray() - mean
        residuals /= np.sqrt(mean + mean**2 / _THETA, out=mean) + np.finfo(np.float64).tiny
        return np.clip(residuals, -self.clip, self.clip, out=residuals).astype(np.float32)


def fit_pca(counts: sp.csr_matrix, n_comps: int = 50, *, method: PCAMethod = "standard", seed: int = 0) -> PCA:
    """Fit principal components to counts.

    Parameters
    ----------
    counts
        Raw counts, CSR, shape ``(n_obs, n_vars)``.
    n_comps
        Number of components. More keep finer structure, and more noise.
    method
        ``"standard"``: PCA of :func:`log2_cpm`. ``"pearson_residuals"``: PCA of analytic Pearson residuals
        (Lause, Berens & Kobak 2021, theta = 100, clipped to sqrt(n_obs)), which puts cells of different depth on one
        scale of noise.
    seed
        Seed of the solver's start vector. The result does not depend on it beyond rounding.

    Notes
    -----
    The residual of a zero is ``-sqrt(m / (1 + m / theta))`` with ``m = library_i * fraction_g``: a smooth function of
    ``log library_i + log fraction_g``, hence of low numerical rank. It is written as its Chebyshev interpolant in
    ``log library`` (32 nodes; error below 1e-6 for depths that span a factor of 1,000), and the non-zeros are a
    sparse correction to it. The solver (ARPACK, through :func:`scipy.sparse.linalg.svds`) sees exact products.

    Raises
    ------
    InvalidArgumentError
        Unknown ``method``, or ``n_comps`` is not below both ``n_obs`` and ``n_vars``.
    """
    check_option("pca_method", method, get_args(PCAMethod))
    n_obs, n_vars = counts.shape
    if not 0 < n_comps < min(n_obs, n_vars):
        raise InvalidArgumentError(
            f"n_latent={n_comps} components cannot be computed from {n_obs} cells x {n_vars} genes. "
            f"Choose a number from 1 to {min(n_obs, n_vars) - 1}."
        )
    library = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    totals = np.asarray(counts.sum(axis=0, dtype=np.float64)).ravel()
    fraction = totals / totals.sum()
    clip = float(np.sqrt(n_obs))
    if method == "standard":
        values, left, right = log2_cpm(counts), np.empty((n_obs, 0)), np.empty((0, n_vars))
    else:
        values, left, right = _residual_parts(counts, library, fraction, clip)
    mean = np.asarray(values.mean(axis=0, dtype=np.float64)).ravel() + left.mean(axis=0) @ right
    left = np.hstack([left, np.ones((n_obs, 1))]).astype(np.float32)
    right = np.vstack([right, -mean]).astype(np.float32)

    transposed = values.T
    operator = LinearOperator(
        shape=(n_obs, n_vars),
        matvec=lambda v: values @ v.ravel() + left @ (right @ v.ravel()),
        rmatvec=lambda u: transposed @ u.ravel() + right.T @ (left.T @ u.ravel()),
        matmat=lambda V: values @ V + left @ (right @ V),
        rmatmat=lambda U: transposed @ U + right.T @ (left.T @ U),
        dtype=np.float32,
    )
    start = np.random.default_rng(seed).standard_normal(min(n_obs, n_vars)).astype(np.float32)
    _, singular, rows = svds(operator, k=n_comps, v0=start, solver="arpack")
    order = np.argsort(-singular, kind="stable")
    components = rows[order].T
    signs = np.sign(components[np.abs(components).argmax(axis=0), np.arange(n_comps)])
    components = np.ascontiguousarray(components * signs, dtype=np.float32)
    return PCA(
        method=method,
        components=components,
        offset=(mean @ components).astype(np.float32),
        explained_variance=singular[order].astype(np.float64) ** 2 / (n_obs - 1),
        gene_fraction=fraction,
        clip=clip,
    )


def _residual_parts(
    counts: sp.csr_matrix, library: np.ndarray, fraction: np.ndarray, clip: float
) -> tuple[sp.csr_matrix, np.ndarray, np.ndarray]:
    """Write Pearson residuals as ``sparse + left @ right``."""
    log_library = np.log(library)
    middle = (log_library.max() + log_library.min()) / 2
    half = max((log_library.max() - log_library.min()) / 2, 1e-6)
    nodes = np.polynomial.chebyshev.chebpts1(_N_NODES)
    # Discrete orthogonality of the Chebyshev polynomials on their own nodes gives the interpolant's coefficients.
    at_nodes = np.polynomial.chebyshev.chebvander(nodes, _N_NODES - 1)
    weights = at_nodes * (np.r_[1.0, np.full(_N_NODES - 1, 2.0)] / _N_NODES)
    zeros = _residual_of_zero(np.exp(middle + half * nodes)[:, None] * fraction, clip)
    left = np.polynomial.chebyshev.chebvander((log_library - middle) / half, _N_NODES - 1)

    correction = np.empty(counts.nnz, dtype=np.float32)
    for start, rows in iter_rows(counts):
        mean = np.repeat(library[start : start + rows.shape[0]], np.diff(rows.indptr)) * fraction[rows.indices]
        residual = np.clip(
            (rows.data - mean) / (np.sqrt(mean + mean**2 / _THETA) + np.finfo(np.float64).tiny), -clip, clip
        )
        first = counts.indptr[start]
        correction[first : first + rows.nnz] = residual - _residual_of_zero(mean, clip)
    sparse = sp.csr_matrix((correction, counts.indices, counts.indptr), shape=counts.shape, copy=False)
    return sparse, left, weights.T @ zeros


def _residual_of_zero(mean: np.ndarray, clip: float) -> np.ndarray:
    return -np.minimum(np.sqrt(mean / (1 + mean / _THETA)), clip)
