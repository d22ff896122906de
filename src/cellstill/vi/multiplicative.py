r"""Do batches differ by a factor per gene, as technologies do? An additive background cannot mend that.

Cells of each batch are put into a few groups by their expression. Two batches are as far apart as their two closest
groups, so that a batch with other cell types is not taken for another technology. Groups are as far apart as the log
ratios of their genes' shares spread, beyond sampling noise, which halves of the cells tell. Of the spread above and
below the median the smaller one counts: a background of one of the groups raises genes, by any factor, but lowers none
by more than its own share.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

from cellstill.errors import CellstillWarning, level_outside

SPREAD = 0.45
"""Largest spread of log ratios that an additive background is left to deal with: a typical factor of 1.6."""

_MOST_BATCHES = 12
_MOST_CELLS = 1000
_CELLS_PER_GROUP = 60
_MOST_GROUPS = 6
_N_GENES = 500
_N_COMPONENTS = 10
_LEAST_COUNT = 10
_LEAST_GENES = 50
_QUARTILE_OF_NORMAL = 0.6745


def multiplicative_spread(counts: sp.csr_matrix, codes: np.ndarray, *, seed: int = 0) -> dict[int, float]:
    r"""How far each batch is from most others, beyond noise, cell types, and additive background.

    Parameters
    ----------
    counts
        Shape ``(n_obs, n_vars)``. At most 1,000 cells of each of the 12 largest batches are read.
    codes
        Batch of each cell, integers, shape ``(n_obs,)``.
    seed
        Seeds the choice of cells and their halves.

    Returns
    -------
    By code: the median over the other batches of the spread (a standard deviation) of log ratios of genes between the
    closest groups of cells; empty where counts are too few to tell. 0.3 is a typical factor of 1.35 per gene.

    Notes
    -----
    Real data: 0.62 to 0.75 for three technologies (cellbench_3cl_3tech), 0.55 for two (cellbench_3cl); at most 0.34
    for samples and 0.18 for donors of one technology (kang_pbmc), 0.23 for pools (onek1k_subset).
    """
    present, sizes = np.unique(codes, return_counts=True)
    largest = present[np.argsort(-sizes, kind="stable")][:_MOST_BATCHES]
    rng = np.random.default_rng(seed)
    groups = [_groups(counts, np.flatnonzero(codes == code), rng) for code in largest]
    apart = np.full((len(largest),) * 2, np.nan)
    for i, first in enumerate(groups):
        for j, second in enumerate(groups[:i]):
            spreads = [_spread(a, b) for a in first for b in second]
            known = [spread for spread in spreads if np.isfinite(spread)]
            apart[i, j] = apart[j, i] = min(known, default=np.nan)
    known_rows = np.isfinite(apart).any(axis=1)
    return {
        int(code): float(np.nanmedian(row))
        for code, row, known in zip(largest, apart, known_rows, strict=True)
        if known
    }


def warn_if_multiplicative(
    counts: sp.csr_matrix, codes: np.ndarray, names: Sequence[str], key: str, *, seed: int = 0
) -> float:
    """Warn where batches differ by a factor per gene, and name the arguments that take it up.

    Parameters
    ----------
    counts, codes, seed
        See :func:`multiplicative_spread`.
    names
        Names of the codes.
    key
        Column with the batches.

    Returns
    -------
    The largest spread of a batch; 0 where there is nothing to compare.

    Warns
    -----
    CellstillWarning
        It is above 0.45.
    """
    spreads = multiplicative_spread(counts, codes, seed=seed)
    if not spreads:
        return 0.0
    code = max(spreads, key=lambda code: spreads[code])
    largest = spreads[code]
    if largest > SPREAD:
        warnings.warn(
            f"The batches of {key!r} differ by a factor per gene (typically {np.exp(largest):.1f}-fold for "
            f"{names[code]!r}), as technologies do. An additive background cannot take that up, so the latent space "
            f"would keep the batches apart: add nn_conditioning_covariate_keys=[{key!r}], and "
            f"feature_scaling_covariate_keys=[{key!r}] where the difference is technical.",
            CellstillWarning,
            stacklevel=level_outside(),
        )
    return largest


def _groups(counts: sp.csr_matrix, cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Summed counts of groups of similar cells, and of all of them, by halves; shape (groups, 2, n_vars)."""
    if len(cells) > _MOST_CELLS:
        cells = np.sort(rng.choice(cells, _MOST_CELLS, replace=False))
    rows = counts[cells].astype(np.float64)
    n_groups = int(np.clip(len(cells) // _CELLS_PER_GROUP, 1, _MOST_GROUPS))
    group = _cluster(rows, n_groups) if n_groups > 1 else np.zeros(len(cells), dtype=np.int64)
    shuffled = rng.permutation(len(cells))
    shuffled = shuffled[np.argsort(group[shuffled], kind="stable")]
    half = np.empty(len(cells), dtype=np.int64)
    half[shuffled] = np.arange(len(cells)) % 2
    member = sp.csr_matrix((np.ones(len(cells)), (2 * group + half, np.arange(len(cells)))), (2 * n_groups, len(cells)))
    sums = np.asarray((member @ rows).todense()).reshape(n_groups, 2, -1)
    return np.concatenate([sums, sums.sum(axis=0, keepdims=True)]) if n_groups > 1 else sums


def _cluster(rows: sp.csr_matrix, n_groups: int) -> np.ndarray:
    """Clusters of cells in the principal components of log1p of their most variable genes."""
    from sklearn.cluster import KMeans

    library = np.maximum(np.asarray(rows.sum(axis=1)).ravel(), 1.0)
    logged = sp.csr_matrix(sp.diags(1e4 / library) @ rows)
    logged.data = np.log1p(logged.data)
    mean = np.asarray(logged.mean(axis=0)).ravel()
    variance = np.asarray(logged.multiply(logged).mean(axis=0)).ravel() - mean**2
    variable = np.argsort(-variance, kind="stable")[:_N_GENES]
    dense = logged[:, variable].toarray() - mean[variable]
    u, s, _ = np.linalg.svd(dense, full_matrices=False)
    components = u[:, :_N_COMPONENTS] * s[:_N_COMPONENTS]
    return KMeans(n_groups, n_init=1, random_state=0).fit_predict(components)


def _spread(first: np.ndarray, second: np.ndarray) -> float:
    """Spread of the log ratios of two groups beyond that of their halves; NaN where too few genes are counted."""
    a, b = first.sum(axis=0), second.sum(axis=0)
    if min(a.sum(), b.sum()) == 0:
        return np.nan
    share = 0.5 * (a / a.sum() + b / b.sum())
    counted = share * min(a.sum(), b.sum()) >= _LEAST_COUNT
    if counted.sum() < _LEAST_GENES:
        return np.nan

    def quartiles(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        low, middle, high = np.quantile(np.log((x[counted] + 0.5) / (y[counted] + 0.5)), [0.25, 0.5, 0.75])
        return np.array([middle - low, high - middle]) / _QUARTILE_OF_NORMAL

    # A half has twice the variance of the whole, and the difference of two halves twice that again.
    noise = sum(float(quartiles(*halves).mean()) ** 2 for halves in (first, second)) / 4
    return float(np.sqrt(max(quartiles(a, b).min() ** 2 - noise, 0.0)))
