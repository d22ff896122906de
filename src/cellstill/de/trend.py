"""How much the fold changes of a gene may be expected to scatter, given how much of it there is."""

from __future__ import annotations

import numpy as np
from scipy.interpolate import CubicSpline

_N_KNOTS = 5
_MIN_GENES_PER_KNOT = 10


def variance_trend(variances: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Typical variance of genes with as many counts, shape ``(n_genes,)``.

    Counting makes the logarithm of a gene with few counts scatter more, so that a prior common to all genes
    (:func:`~cellstill.de.variances.moderate_variances`) would be too wide to be of use. Divided by this trend the
    variances have one (limma-trend: Law et al., Genome Biol. 15:R29, 2014). It is a natural cubic spline of the log
    variance, by least squares, with five knots at quantiles of the level; constant with fewer than 50 genes.

    Parameters
    ----------
    variances
        Residual variances of log expression, shape ``(n_genes,)``.
    level
        Logarithm of the mean count of each gene, shape ``(n_genes,)``.
    """
    logs = np.log(np.maximum(variances, max(1e-5 * np.median(variances), 1e-12)))
    knots = np.unique(np.quantile(level, np.linspace(0, 1, _N_KNOTS)))
    if len(knots) < 3 or len(logs) < _MIN_GENES_PER_KNOT * _N_KNOTS:
        return np.full_like(logs, np.exp(logs.mean()))
    basis = CubicSpline(knots, np.eye(len(knots)), bc_type="natural")(level)
    return np.exp(basis @ np.linalg.lstsq(basis, logs)[0])
