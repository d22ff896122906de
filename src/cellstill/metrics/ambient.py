"""Was the soup removed, and only the soup? Measures against cells whose soup is known."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from cellstill.data.counts import as_csr
from cellstill.data.soup import expected_native
from cellstill.errors import InvalidArgumentError
from cellstill.metrics._inputs import category_codes

_THETA_RANGE = (1e-2, 1e4)


def denoising_error(denoised: Any, contaminated: Any, clean: Any) -> float:
    r"""Root mean squared error of denoised counts, relative to doing nothing.

    .. math:: \sqrt{\sum_{nf} (d_{nf} - c_{nf})^2 / \sum_{nf} (x_{nf} - c_{nf})^2}

    Parameters
    ----------
    denoised, contaminated, clean
        Counts :math:`d, x, c` of the same cells and genes, sparse or dense. Sparse ones are never made dense.

    Returns
    -------
    float
        0 for the clean counts themselves, 1 for the contaminated ones; above 1 the correction did harm.

    Raises
    ------
    InvalidArgumentError
        The shapes differ, or contaminated and clean are the same, so that there is nothing to remove.
    """
    d, x, c = _same_shape(denoised=denoised, contaminated=contaminated, clean=clean)
    nothing = _sum_of_squares(x - c)
    if nothing == 0:
        raise InvalidArgumentError(
            "contaminated and clean are equal: there is no soup whose removal could be measured. "
            "Use removed_share for cells without soup."
        )
    return float(np.sqrt(_sum_of_squares(d - c) / nothing))


def removed_share(denoised: Any, contaminated: Any) -> float:
    """Share of all counts that a correction takes away; on cells without soup it should be 0.

    Parameters
    ----------
    denoised, contaminated
        Counts of the same cells and genes, sparse or dense.
    """
    d, x = _same_shape(denoised=denoised, contaminated=contaminated)
    return 1 - float(d.sum(dtype=np.float64)) / float(x.sum(dtype=np.float64))


def absent_genes(
    clean: Any, labels: Any, *, max_share: float = 0.05, min_mean: float = 0.1
) -> tuple[NDArray[np.bool_], list[Any]]:
    """Find the markers that a cell type does not express.

    A gene is a marker if the type that expresses most of it (per count of the cell) has at least ``min_mean`` counts
    of it per cell, and it is absent from every type that expresses at most ``max_share`` of that.

    Parameters
    ----------
    clean
        Counts without the added soup, ``(n_obs, n_vars)``.
    labels
        Cell type of each cell, without NaN.
    max_share
        Expression, as a share of the highest among types, up to which a gene counts as absent. Real cells have some
        soup already, so that 0 finds rare genes only; larger values call real expression absent.
    min_mean
        Mean count in the highest type from which a gene is a marker.

    Returns
    -------
    absent
        Mask of shape ``(n_types, n_vars)``.
    types
        The cell types, in the order of the rows.
    """
    c = as_csr(clean)
    codes, names = category_codes("labels", labels, c.shape[0], min_categories=2)
    sums = _sums(c, codes, len(names))
    expression = sums / np.maximum(sums.sum(axis=1, keepdims=True), 1.0)
    means = sums / np.bincount(codes)[:, None]
    highest = expression.max(axis=0)
    is_marker = means[expression.argmax(axis=0), np.arange(c.shape[1])] >= min_mean
    return (expression <= max_share * highest) & is_marker & (highest > 0), list(names)


def marker_leak(denoised: Any, contaminated: Any, labels: Any, absent: NDArray[np.bool_], types: list[Any]) -> float:
    """Share of the false marker counts that a correction leaves.

    False marker counts are those of genes in cells whose type does not express them (:func:`absent_genes`). Real cells
    have some of them before any soup is added: the leak of the clean counts is what a perfect correction reaches.

    Parameters
    ----------
    denoised, contaminated
        Counts of the same cells and genes, sparse or dense.
    labels
        Cell type of each cell; cells of types not in ``types`` are left out.
    absent, types
        What :func:`absent_genes` returns.

    Returns
    -------
    float
        1 for doing nothing, less if counts are removed.

    Raises
    ------
    InvalidArgumentError
        No contaminated cell has a false marker count, or ``absent`` does not fit.
    """
    d, x = _same_shape(denoised=denoised, contaminated=contaminated)
    codes, names = category_codes("labels", labels, x.shape[0])
    if absent.shape != (len(types), x.shape[1]):
        raise InvalidArgumentError(f"absent has shape {absent.shape}; it must be {(len(types), x.shape[1])}.")
    row = {name: i for i, name in enumerate(types)}
    mask = np.stack([absent[row[name]] if name in row else np.zeros(x.shape[1], dtype=bool) for name in names])
    before = _sums(x, codes, len(names))[mask].sum()
    if before == 0:
        raise InvalidArgumentError("contaminated has no count of an absent gene: there is no leak to measure.")
    return float(_sums(d, codes, len(names))[mask].sum() / before)


def rate_error(estimated: ArrayLike, true: ArrayLike) -> NDArray[np.float64]:
    """Relative error of contamination rates, ``estimated / true - 1``; shape of the rates.

    Raises
    ------
    InvalidArgumentError
        The shapes differ, or a true rate is not positive, where only the absolute error has a meaning.
    """
    found, truth = np.asarray(estimated, dtype=np.float64), np.asarray(true, dtype=np.float64)
    if found.shape != truth.shape or not (truth > 0).all():
        raise InvalidArgumentError(
            f"estimated {found.shape} and true {truth.shape} need one shape and positive true rates."
        )
    return found / truth - 1


class ProfileAgreement(NamedTuple):
    """How well an estimated soup profile fits the true one.

    Attributes
    ----------
    correlation
        Pearson correlation of the profiles. The mean expression alone often reaches 0.97.
    log_ratio_correlation
        Pearson correlation of ``log(profile / mean)`` with the same of the truth: what the estimate knows about the
        soup beyond the mean expression. 0 where it knows nothing (also where the estimate *is* the mean).
    n_genes
        Genes that the second is computed on.
    """

    correlation: float
    log_ratio_correlation: float
    n_genes: int


def profile_agreement(
    estimated: ArrayLike, true: ArrayLike, mean: ArrayLike, *, min_true: float = 1e-5
) -> ProfileAgreement:
    """Compare a soup profile with the truth, with and without what the mean expression tells.

    Parameters
    ----------
    estimated, true, mean
        Estimated and true soup profile and mean expression of the cells, ``(n_vars,)``; each is scaled to sum to 1.
    min_true
        Log ratios are compared on the genes with at least this share in the true profile and a positive one in the
        others: the ratio of rare genes is noise.

    Raises
    ------
    InvalidArgumentError
        The shapes differ, or fewer than 3 genes are left for the log ratios.
    """
    profiles = [np.asarray(v, dtype=np.float64) for v in (estimated, true, mean)]
    if len({v.shape for v in profiles}) != 1 or profiles[0].ndim != 1:
        raise InvalidArgumentError(f"estimated, true and mean have shapes {[v.shape for v in profiles]}; need one.")
    e, t, m = (v / v.sum() for v in profiles)
    kept = (t >= min_true) & (e > 0) & (m > 0)
    if kept.sum() < 3:
        raise InvalidArgumentError(f"min_true={min_true} leaves {kept.sum()} genes; lower it.")
    beyond_e, beyond_t = np.log(e[kept] / m[kept]), np.log(t[kept] / m[kept])
    return ProfileAgreement(_correlation(e, t), _correlation(beyond_e, beyond_t), int(kept.sum()))


def subtract_soup(contaminated: Any, rate: ArrayLike, profile: ArrayLike) -> sp.csr_matrix:
    r"""Subtract expected soup: :math:`\max(x_{nf} - r_n N_n \chi_{nf}, 0)`.

    Parameters
    ----------
    contaminated
        Counts :math:`x` with totals :math:`N`, ``(n_obs, n_vars)``.
    rate
        Share of soup :math:`r` of each cell, ``(n_obs,)``, or one for all.
    profile
        Composition of the soup :math:`\chi`, ``(n_vars,)`` or one row per cell, ``(n_obs, n_vars)``.

    Returns
    -------
    CSR, float64, never above ``contaminated``.
    """
    x = as_csr(contaminated)
    return _with_data(x, np.maximum(x.data - _expected_soup(x, rate, profile), 0))


def oracle_denoise(
    contaminated: Any, clean: Any, labels: Any, rate: ArrayLike, profile: ArrayLike, *, overdispersed: bool = True
) -> sp.csr_matrix:
    r"""Denoise as well as can be done knowing types, rates and profile, but no cell's own clean counts.

    The expected native counts of a cell are the mean expression of its type in the clean data,
    :math:`\mu_{nf} = (1 - r_n) N_n \pi_{t(n)f}`, those of soup :math:`r_n N_n \chi_{nf}`; the result is the posterior
    mean of the native counts (:func:`~cellstill.data.soup.expected_native`).

    Parameters
    ----------
    contaminated, clean
        Counts with and without soup, ``(n_obs, n_vars)``.
    labels
        Cell type of each cell, without NaN.
    rate, profile
        True share of soup and its composition, as for :func:`subtract_soup`.
    overdispersed
        Native counts are negative binomial, one dispersion per gene by moments within types of the clean data.
        ``False`` makes them Poisson: the oracle is then the share ``x * native / (native + soup)``, which is as good
        for markers and far worse for genes whose expression varies within a type.

    Returns
    -------
    CSR, float64, never above ``contaminated``.
    """
    x, c = _same_shape(contaminated=contaminated, clean=clean)
    codes, names = category_codes("labels", labels, x.shape[0])
    sums = _sums(c, codes, len(names))
    expression = sums / np.maximum(sums.sum(axis=1, keepdims=True), 1.0)
    row, gene = np.repeat(np.arange(x.shape[0]), np.diff(x.indptr)), x.indices
    total = np.asarray(x.sum(axis=1, dtype=np.float64)).ravel()
    share = np.broadcast_to(np.asarray(rate, dtype=np.float64), x.shape[0])
    native = ((1 - share) * total)[row] * expression[codes[row], gene]
    theta = _theta_within_types(c, codes, expression)[gene] if overdispersed else np.inf
    return _with_data(x, expected_native(x.data, native, _expected_soup(x, rate, profile), theta))


def _theta_within_types(counts: sp.csr_matrix, codes: NDArray[np.intp], expression: np.ndarray) -> np.ndarray:
    """Inverse dispersion of each gene by moments around the means of the types."""
    library = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    n_types = len(expression)
    squares = np.bincount(codes, library**2, n_types)[:, None] * expression**2
    # sum (x - m)^2 = sum x^2 - 2 sum x m + sum m^2, with m = library * expression of the type.
    weighted = _sums(sp.diags_array(library).tocsr() @ counts, codes, n_types)
    values = counts.astype(np.float64)
    deviation = _sums(values.multiply(values).tocsr(), codes, n_types) - 2 * weighted * expression + squares
    excess = (deviation - np.bincount(codes, library, n_types)[:, None] * expression).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        theta = np.where(excess > 0, squares.sum(axis=0) / excess, np.inf)
    return np.clip(theta, *_THETA_RANGE)


def _expected_soup(x: sp.csr_matrix, rate: ArrayLike, profile: ArrayLike) -> np.ndarray:
    """Expected soup of the stored entries of ``x``."""
    n_obs, n_vars = x.shape
    rates, chi = np.asarray(rate, dtype=np.float64), np.asarray(profile, dtype=np.float64)
    if rates.shape not in ((), (n_obs,)) or chi.shape not in ((n_vars,), (n_obs, n_vars)):
        raise InvalidArgumentError(
            f"rate has shape {rates.shape} and profile {chi.shape}; they must be () or ({n_obs},), and ({n_vars},) or "
            f"({n_obs}, {n_vars})."
        )
    row = np.repeat(np.arange(n_obs), np.diff(x.indptr))
    soup_total = np.broadcast_to(rates, n_obs) * np.asarray(x.sum(axis=1, dtype=np.float64)).ravel()
    return soup_total[row] * (chi[x.indices] if chi.ndim == 1 else chi[row, x.indices])


def _with_data(x: sp.csr_matrix, data: np.ndarray) -> sp.csr_matrix:
    return sp.csr_matrix((data, x.indices.copy(), x.indptr.copy()), shape=x.shape)


def _same_shape(**matrices: Any) -> list[sp.csr_matrix]:
    found = [as_csr(matrix) for matrix in matrices.values()]
    if len({matrix.shape for matrix in found}) != 1:
        shapes = ", ".join(f"{name} {matrix.shape}" for name, matrix in zip(matrices, found, strict=True))
        raise InvalidArgumentError(f"These must have the same cells and genes: {shapes}.")
    return found


def _sums(matrix: sp.csr_matrix, codes: NDArray[np.intp], n_groups: int) -> np.ndarray:
    """Sum of the rows of each group, float64, ``(n_groups, n_vars)``."""
    member = sp.csr_matrix((np.ones(len(codes)), (codes, np.arange(len(codes)))), shape=(n_groups, len(codes)))
    return np.asarray((member @ matrix).todense(), dtype=np.float64)


def _sum_of_squares(matrix: sp.csr_matrix) -> float:
    return float(np.square(matrix.data, dtype=np.float64).sum())


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    # The mean itself has log ratios of 0 up to rounding, which correlate with nothing.
    return float(a @ b / scale) if np.sqrt(a @ a) > 1e-12 * np.sqrt(len(a)) and scale > 0 else 0.0
