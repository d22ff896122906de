"""Counts on a scale on which cells of different depth compare, without making them dense."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

TARGET_SUM = 1e4


def scaled_counts(counts: sp.csr_matrix, library_size: float) -> sp.csr_matrix:
    r""":math:`L x_{ng} / l_n`, with :math:`l_n` the total of the cell and :math:`L` one library size for all.

    Parameters
    ----------
    counts
        Shape ``(n_obs, n_vars)``. Cells without counts stay without.
    library_size
        Total of each cell afterwards.

    Returns
    -------
    CSR, float64; index arrays are shared with ``counts``.
    """
    total = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    scale = np.divide(library_size, total, out=np.zeros_like(total), where=total > 0)
    data = counts.data * np.repeat(scale, np.diff(counts.indptr))
    return sp.csr_matrix((data, counts.indices, counts.indptr), shape=counts.shape, copy=False)


def log_expression(counts: sp.csr_matrix) -> sp.csr_matrix:
    r""":math:`\log(1 + 10^4 x_{ng} / l_n)`: CSR, float32, of the shape of ``counts``."""
    values = scaled_counts(counts, TARGET_SUM)
    return sp.csr_matrix((np.log1p(values.data).astype(np.float32), values.indices, values.indptr), shape=values.shape)


def gene_moments(counts: sp.csr_matrix, library_size: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance (``n_obs - 1`` in the denominator) of each gene's scaled counts, ``(n_vars,)`` each.

    Parameters
    ----------
    counts
        Shape ``(n_obs, n_vars)``, two cells at least.
    library_size
        Total to which every cell is scaled; see :func:`scaled_counts`.
    """
    return sparse_moments(scaled_counts(counts, library_size))


def sparse_moments(values: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance (``n_obs - 1`` in the denominator) of each column, ``(n_vars,)`` each, float64.

    Deviations are taken from the mean before they are squared, so that nothing cancels.
    """
    n_obs, n_vars = values.shape
    column, data = values.indices, values.data.astype(np.float64)
    mean = np.bincount(column, data, n_vars) / n_obs
    absent = n_obs - np.bincount(column, minlength=n_vars)
    squares = np.bincount(column, np.square(data - mean[column]), n_vars) + absent * np.square(mean)
    return mean, squares / (n_obs - 1)
