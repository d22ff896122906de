"""Do two sets of cells agree gene by gene? Means, correlations, zeros, variances and fold changes.

Names of this module are public through :mod:`cellstill.metrics.realism`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from cellstill.data.counts import as_csr
from cellstill.data.expression import gene_moments, log_expression, scaled_counts, sparse_moments
from cellstill.errors import InvalidArgumentError
from cellstill.metrics._inputs import category_codes

N_CORRELATED = 200
_N_BINS = 20
_FANO_FLOOR = 1e-3


def class_mean_correlation(real: Any, synthetic: Any, real_labels: Any, synthetic_labels: Any) -> float:
    r"""Pearson correlation over genes of class means of :math:`\log(1 + 10^4 x / l)`, averaged over classes.

    It is near one for any cells with the right abundance of genes: compare with a control, and see
    :func:`fold_change_slope` for what sets classes apart.

    Parameters
    ----------
    real, synthetic
        Counts of the same genes, ``(n_real, n_vars)`` and ``(n_synthetic, n_vars)``, sparse or dense.
    real_labels, synthetic_labels
        Class of each cell, without NaN. Classes that are in one set only are left out.

    Returns
    -------
    float
        1 is best.
    """
    r, s = same_genes(real=real, synthetic=synthetic)
    codes, n_classes = common_classes(r, s, real_labels, synthetic_labels)
    means = [_class_means(log_expression(x), code, n_classes) for x, code in zip((r, s), codes, strict=True)]
    return float(np.mean([_correlation(a, b) for a, b in zip(*means, strict=True)]))


def gene_correlation_agreement(real: Any, synthetic: Any, *, n_genes: int = N_CORRELATED) -> float:
    r"""Pearson correlation, over pairs of genes, of the genes' correlations in two sets of cells.

    Parameters
    ----------
    real, synthetic
        Counts of the same genes, sparse or dense; correlations are of :math:`\log(1 + 10^4 x / l)`. Both sets should
        have the same shares of classes, which make most of the correlations.
    n_genes
        Genes of the highest variance in the real cells that are compared, all pairs of them. More bring in rare genes,
        whose correlations are noise in few cells.

    Returns
    -------
    float
        1 is best. A gene that is constant in a set correlates with none there.
    """
    r, s = (log_expression(x) for x in same_genes(real=real, synthetic=synthetic))
    if n_genes < 3:
        raise InvalidArgumentError(f"n_genes={n_genes} has to be at least 3: two genes have one correlation only.")
    variance = sparse_moments(r)[1]
    top = np.argsort(-variance, kind="stable")[:n_genes]
    pairs = np.triu_indices(len(top), 1)
    return _correlation(*(_gene_correlations(x[:, top].toarray())[pairs] for x in (r, s)))


def zero_fraction_error(real: Any, synthetic: Any) -> float:
    r"""Mean absolute difference of the genes' shares of zeros, :math:`G^{-1} \sum_g |z_g - z'_g|`.

    A zero is a count of exactly 0: expected counts, which are never 0, have none and are told apart by that.

    Parameters
    ----------
    real, synthetic
        Counts of the same genes, sparse or dense.

    Returns
    -------
    float
        0 is best, 1 worst.
    """
    return float(np.mean(np.abs(np.subtract(*map(_zero_fraction, same_genes(real=real, synthetic=synthetic))))))


def zero_fraction_excess(real: Any, synthetic: Any) -> float:
    """Share of zeros among all synthetic counts minus that among real ones; below 0 the synthetic lack zeros."""
    r, s = map(_zero_fraction, same_genes(real=real, synthetic=synthetic))
    return float(s.mean() - r.mean())


def mean_variance_error(real: Any, synthetic: Any) -> float:
    r"""Distance of two mean-variance trends, in decades of the variance at equal mean.

    All cells are scaled to the median depth of the real ones. Genes with counts in both sets are cut into 20 bins of
    equal size by their real mean; the trend is the median over each bin of :math:`\log_{10}` of the variance divided by
    the mean, and the error the mean absolute difference over bins. 0.1 stands for variances that are wrong by 26 %.

    Parameters
    ----------
    real, synthetic
        Counts of the same genes, sparse or dense, two cells at least.

    Returns
    -------
    float
        0 is best. Ratios of variance and mean below 0.001 count as 0.001.

    Raises
    ------
    InvalidArgumentError
        Fewer than 20 genes have counts in both sets.
    """
    r, s = same_genes(real=real, synthetic=synthetic)
    depth = float(np.median(np.asarray(r.sum(axis=1, dtype=np.float64))))
    moments = [gene_moments(x, depth) for x in (r, s)]
    counted = np.flatnonzero((moments[0][0] > 0) & (moments[1][0] > 0))
    if len(counted) < _N_BINS:
        raise InvalidArgumentError(
            f"{len(counted)} genes have counts in the real and the synthetic cells; a trend takes {_N_BINS} at least."
        )
    fano = [np.log10(np.maximum(variance[counted] / mean[counted], _FANO_FLOOR)) for mean, variance in moments]
    bins = np.array_split(np.argsort(moments[0][0][counted], kind="stable"), _N_BINS)
    return float(np.mean([abs(np.median(fano[0][genes]) - np.median(fano[1][genes])) for genes in bins]))


def fold_change_slope(real: Any, synthetic: Any, real_labels: Any, synthetic_labels: Any) -> float:
    r"""Slope of synthetic on real log fold changes between each class and the others, averaged over classes.

    The change is :math:`\log_2 (1 + m_{cg}) - \log_2 (1 + \bar m_{-c,g})`, where :math:`m` is the mean of a class in
    counts per 10,000 and :math:`\bar m_{-c}` the mean over the other classes, each of one weight; the slope is that of
    least squares over genes, with intercept.

    Parameters
    ----------
    real, synthetic
        Counts of the same genes, sparse or dense.
    real_labels, synthetic_labels
        Class of each cell, without NaN. Classes that are in one set only are left out.

    Returns
    -------
    float
        1 is best, less if differences between classes are washed out, more if they are overdrawn. Noise of the real
        changes lowers it, so that real cells do not reach 1 either: compare with a control.

    Raises
    ------
    InvalidArgumentError
        Fewer than two classes are in both sets.
    """
    r, s = same_genes(real=real, synthetic=synthetic)
    codes, n_classes = common_classes(r, s, real_labels, synthetic_labels)
    if n_classes < 2:
        raise InvalidArgumentError("real_labels and synthetic_labels share one class; fold changes are between two.")
    changes = []
    for x, code in zip((r, s), codes, strict=True):
        mean = _class_means(scaled_counts(x, 1e4), code, n_classes)
        others = (mean.sum(axis=0) - mean) / (n_classes - 1)
        changes.append(np.log2(1 + mean) - np.log2(1 + others))
    a, b = (change - change.mean(axis=1, keepdims=True) for change in changes)
    norm = np.square(a).sum(axis=1)
    return float(np.mean((a * b).sum(axis=1) / np.where(norm > 0, norm, np.nan)))


def same_genes(**matrices: Any) -> list[sp.csr_matrix]:
    """Counts as CSR; raises unless all have the same number of genes, two cells at least and finite values >= 0."""
    for name, matrix in matrices.items():
        if hasattr(matrix, "obs_names"):
            raise InvalidArgumentError(f"{name} is an AnnData: pass its counts, such as {name}.X, of the same genes.")
    found = {name: as_csr(matrix) for name, matrix in matrices.items()}
    if len({x.shape[1] for x in found.values()}) > 1:
        shapes = ", ".join(f"{name} {x.shape}" for name, x in found.items())
        raise InvalidArgumentError(
            f"These must have the same genes: {shapes}. Select the genes of the synthetic cells."
        )
    for name, x in found.items():
        if x.shape[0] < 2:
            raise InvalidArgumentError(
                f"{name} has {x.shape[0]} cells; at least 2 are needed to compare sets of cells."
            )
        if not (np.isfinite(x.data) & (x.data >= 0)).all():
            raise InvalidArgumentError(f"{name} has negative, NaN or infinite values. Pass counts, not scaled values.")
        if not x.data.all():  # stored zeros would count as expressed
            found[name] = x = x.copy()
            x.eliminate_zeros()
    return list(found.values())


def check_integers(**matrices: sp.csr_matrix) -> None:
    """Refuse real cells that were transformed: what is compared would be weaker without a sign of it."""
    for name, x in matrices.items():
        fractions = x.data[x.data != np.floor(x.data)]
        if len(fractions):
            shown = ", ".join(f"{value:g}" for value in fractions[:3])
            raise InvalidArgumentError(
                f"{name} has values that are not integers ({shown}). Pass the raw counts of real cells, not normalised "
                "or log-transformed ones."
            )


def common_classes(
    real: Any, synthetic: Any, real_labels: Any, synthetic_labels: Any
) -> tuple[tuple[NDArray[np.integer], NDArray[np.integer]], int]:
    """Code each cell by the classes that both sets have, -1 for others; and the number of classes.

    Classes are compared as text, so that categories read from a file are those that were written.
    """
    coded = [
        category_codes(argument, labels, len_of)
        for argument, labels, len_of in (
            ("real_labels", real_labels, real.shape[0]),
            ("synthetic_labels", synthetic_labels, synthetic.shape[0]),
        )
    ]
    names = [pd.Index([str(name) for name in known]) for _, known in coded]
    shared = pd.Index(sorted(set(names[0]) & set(names[1])))
    if not len(shared):
        raise InvalidArgumentError(
            f"real_labels has {', '.join(names[0][:5])} and synthetic_labels {', '.join(names[1][:5])}: they share no "
            "class. Label both by the same names."
        )
    first, second = (shared.get_indexer(known)[codes] for known, (codes, _) in zip(names, coded, strict=True))
    return (first, second), len(shared)


def _zero_fraction(counts: sp.csr_matrix) -> NDArray[np.float64]:
    return 1 - np.bincount(counts.indices, minlength=counts.shape[1]) / counts.shape[0]


def _class_means(values: sp.csr_matrix, codes: NDArray[np.integer], n_classes: int) -> NDArray[np.float64]:
    """Mean of the rows of each class, ``(n_classes, n_vars)``; rows of code -1 have none."""
    rows = np.flatnonzero(codes >= 0)
    share = 1 / np.bincount(codes[rows], minlength=n_classes)[codes[rows]]
    weights = sp.csr_matrix((share, (codes[rows], rows)), shape=(n_classes, len(codes)))
    return np.asarray((weights @ values).todense(), dtype=np.float64)


def _gene_correlations(values: NDArray[np.floating]) -> NDArray[np.float64]:
    centred = values.astype(np.float64) - values.mean(axis=0, dtype=np.float64)
    norm = np.sqrt(np.square(centred).sum(axis=0))
    constant = norm <= 1e-6 * np.abs(values).max(axis=0)
    unit = np.where(constant, 0, centred / np.where(constant, 1, norm))
    return unit.T @ unit


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Pearson correlation; 0 where one side does not vary."""
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else 0.0
