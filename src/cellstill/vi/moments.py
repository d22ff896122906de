"""Where inverse dispersions start: the spread of the counts themselves, by the method of moments."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

_WEIGHT_OF_MEDIAN = 10.0
_FEWEST = 100.0
_RANGE = (1e-2, 1e3)


def inverse_dispersion(
    counts: sp.csr_matrix,
    size: np.ndarray,
    group: np.ndarray,
    n_groups: int,
    *,
    biological_fraction: float,
    otherwise: float,
) -> np.ndarray:
    r"""Inverse dispersion of each feature in each group of cells, by the method of moments.

    With :math:`\mu_{nf} = l_n m_{df}` and the mean expression :math:`m_{df}` of the cell's group,

    .. math::
        \phi_{df} = \frac{\sum_n (x_{nf} - \mu_{nf})^2 - \mu_{nf}}{\sum_n \mu_{nf}^2}, \qquad
        \theta_{df} = \frac{1}{(1 - \mathrm{fraction})\,\phi_{df}}

    since cell types, which z is there to explain, spread the counts too. Features that are counted too rarely to tell
    are drawn towards the median of those of their group that are not: it weighs as much as a sum of squared means of
    10, at which :math:`\phi` has a standard error of 0.45 and more.

    Parameters
    ----------
    counts
        Cells x features.
    size
        Library sizes l, shape ``(n_obs,)``.
    group
        Group of each cell, integers of shape ``(n_obs,)``.
    n_groups
        Number of groups.
    biological_fraction
        Share of the overdispersion that is left to z, from 0 to below 1. Larger starts closer to Poisson.
    otherwise
        Inverse dispersion of a group in which no feature is counted often enough.

    Returns
    -------
    Shape ``(n_groups, n_vars)``, between 0.01 and 1000.
    """
    member = sp.csr_matrix((np.ones(len(size)), (group, np.arange(len(size)))), (n_groups, len(size)))
    counts = counts.astype(np.float64)
    n = np.bincount(group, minlength=n_groups)[:, None]
    sizes, squares = (np.bincount(group, values, n_groups)[:, None] for values in (size, size**2))
    sums = _dense(member @ counts)
    means = sums / np.maximum(sizes, 1e-12)
    crossed = _dense(member.multiply(size) @ counts)
    residual = _dense(member @ counts.power(2)) - 2 * means * crossed + means**2 * squares
    excess = residual * n / np.maximum(n - 1, 1) - sums
    power = means**2 * squares
    overdispersion = np.empty_like(means)
    for row in range(n_groups):
        known = power[row] >= _FEWEST
        usual = 1 / ((1 - biological_fraction) * otherwise)
        if known.any():
            usual = max(float(np.median(excess[row, known] / power[row, known])), 0.0)
        overdispersion[row] = (excess[row] + _WEIGHT_OF_MEDIAN * usual) / (power[row] + _WEIGHT_OF_MEDIAN)
    smallest = 1 / ((1 - biological_fraction) * _RANGE[1])
    theta = 1 / ((1 - biological_fraction) * np.maximum(overdispersion, smallest))
    return np.clip(theta, *_RANGE)


def _dense(matrix: sp.spmatrix) -> np.ndarray:
    return np.asarray(matrix.todense(), dtype=np.float64)
