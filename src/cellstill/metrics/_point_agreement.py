"""Do two sets of cells lie alike in one space? Mixing, discrepancy, and variance within classes.

Names of this module are public through :mod:`cellstill.metrics.realism`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cellstill.errors import InvalidArgumentError
from cellstill.metrics._gene_agreement import common_classes
from cellstill.metrics._inputs import check_embedding
from cellstill.metrics.integration import ilisi

_MIN_OF_CLASS = 5


def mixing(real: ArrayLike, synthetic: ArrayLike, *, n_neighbors: int = 90) -> float:
    """Mixing of real and synthetic cells: the median LISI of which is which, 0 (apart) .. 1 (equal shares everywhere).

    Parameters
    ----------
    real, synthetic
        Coordinates in one space, ``(n_real, n_dims)`` and ``(n_synthetic, n_dims)``; sets of like size.
    n_neighbors
        Size of the neighbourhood; see :func:`~cellstill.metrics.ilisi`. All cells, where there are fewer.
    """
    a, b = _same_space(real, synthetic)
    n_obs = len(a) + len(b)
    return ilisi(np.vstack([a, b]), np.repeat([0, 1], [len(a), len(b)]), n_neighbors=min(n_neighbors, n_obs))


def mmd(real: ArrayLike, synthetic: ArrayLike) -> float:
    r"""Squared maximum mean discrepancy, unbiased, with the kernel :math:`\exp(-d^2 / 2 \sigma^2)`.

    :math:`\sigma` is the median distance between real cells.

    Parameters
    ----------
    real, synthetic
        Coordinates in one space, ``(n_real, n_dims)`` and ``(n_synthetic, n_dims)``. All pairs are held in memory.

    Returns
    -------
    float
        0 on average for cells of one distribution, and below 0 about half of the time.

    References
    ----------
    Gretton et al. (2012), A kernel two-sample test, JMLR 13, Lemma 6.
    """
    from scipy.spatial.distance import cdist, pdist

    a, b = _same_space(real, synthetic)
    within = pdist(a, "sqeuclidean")
    width = float(np.median(within))
    if width == 0:
        raise InvalidArgumentError("Half of the real cells or more lie at one place: they have no median distance.")
    return float(
        np.exp(-within / (2 * width)).mean()
        + np.exp(-pdist(b, "sqeuclidean") / (2 * width)).mean()
        - 2 * np.exp(-cdist(a, b, "sqeuclidean") / (2 * width)).mean()
    )


def within_class_variance_ratio(
    real: ArrayLike, synthetic: ArrayLike, real_labels: Any, synthetic_labels: Any
) -> float:
    """Total variance within a class of synthetic cells over that of real ones, averaged over classes.

    The total variance is the trace of the covariance of the cells of a class, in the space given: principal components
    of log expression, or a latent space.

    Parameters
    ----------
    real, synthetic
        Coordinates in one space, ``(n_real, n_dims)`` and ``(n_synthetic, n_dims)``.
    real_labels, synthetic_labels
        Class of each cell, without NaN. Classes of fewer than five cells in either set are left out.

    Returns
    -------
    float
        1 is best; less for cells that huddle around their class mean, 0 if all are the same.

    Raises
    ------
    InvalidArgumentError
        No class has five cells in both sets.
    """
    a, b = _same_space(real, synthetic)
    codes, n_classes = common_classes(a, b, real_labels, synthetic_labels)
    ratios = []
    for k in range(n_classes):
        members = [points[code == k] for points, code in zip((a, b), codes, strict=True)]
        if min(map(len, members)) >= _MIN_OF_CLASS:
            of_real, of_synthetic = (float(x.var(axis=0, ddof=1).sum()) for x in members)
            if of_real > 0:
                ratios.append(of_synthetic / of_real)
    if not ratios:
        raise InvalidArgumentError(
            f"No class has {_MIN_OF_CLASS} cells among the real and the synthetic ones: the variance within classes "
            "cannot be compared. Make more synthetic cells."
        )
    return float(np.mean(ratios))


def _same_space(real: ArrayLike, synthetic: ArrayLike) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    a, b = check_embedding("real", real), check_embedding("synthetic", synthetic)
    if a.shape[1] != b.shape[1]:
        raise InvalidArgumentError(f"real has {a.shape[1]} dimensions and synthetic {b.shape[1]}; they need one space.")
    return a, b
