"""From profiles of expression back to counts."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from cellstill.data.expression import TARGET_SUM
from cellstill.errors import InvalidArgumentError


def counts_of_profiles(profiles: np.ndarray, depth: np.ndarray | float) -> sp.csr_matrix:
    r"""Expected counts whose log-normalised expression points where the profiles do.

    No counts have an arbitrary profile :math:`e`: those of :math:`\log(1 + 10^4 x / l)` satisfy
    :math:`\sum_g (\exp e_g - 1) = 10^4`. Along the ray of a profile one point does, :math:`s e`, found by Newton's
    method on an increasing convex function; then :math:`x = l \, (\exp(s e) - 1) / 10^4`. The expression of the result
    is :math:`s e` up to rounding.

    Parameters
    ----------
    profiles
        Not negative, shape ``(n, n_vars)``; of any length.
    depth
        Total counts :math:`l` of each cell, or of all.

    Returns
    -------
    CSR, float32, shape ``(n, n_vars)``, zero where the profile is.

    Raises
    ------
    InvalidArgumentError
        A profile is negative, not finite, or zero everywhere.
    """
    e = np.asarray(profiles, dtype=np.float64)
    largest = e.max(axis=1, keepdims=True, initial=0)
    if not np.isfinite(e).all() or (e < 0).any() or (largest <= 0).any():
        raise InvalidArgumentError("profiles has negative values, NaN or infinity, or a row of zeros.")
    # From here no term exceeds the target, and the sum is above it: Newton's method descends without overshooting.
    s = np.log1p(TARGET_SUM) / largest
    for _ in range(100):
        grown = np.exp(s * e)
        step = ((grown - 1).sum(axis=1, keepdims=True) - TARGET_SUM) / (e * grown).sum(axis=1, keepdims=True)
        s = s - step
        if (np.abs(step) <= 1e-13 * s).all():
            break
    counts = np.expm1(s * e) * (np.broadcast_to(np.asarray(depth, dtype=np.float64), len(e))[:, None] / TARGET_SUM)
    return sp.csr_matrix(counts.astype(np.float32))


def unit_length(profiles: sp.csr_matrix) -> np.ndarray:
    """Rows scaled to Euclidean length 1, dense float32; rows of zeros stay."""
    length = np.sqrt(np.asarray(profiles.multiply(profiles).sum(axis=1)))
    return np.asarray(profiles.toarray() / np.maximum(length, 1e-12), dtype=np.float32)
