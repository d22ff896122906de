"""What is not known of a correction of counts, as part of the error of fold changes."""

from __future__ import annotations

import numpy as np
from scipy.special import ndtr

from cellstill.de.gene_tests import GeneTests, benjamini_hochberg

_SPAN = 0.5
_MIN_TREND_GENES = 10


def correction_variance(change: np.ndarray, sums: np.ndarray) -> np.ndarray:
    r"""Variance of the error that a correction brings into each fold change.

    The batch stays in the design, which takes up what a correction does to all samples of a batch. What still moves a
    fold change, :math:`d_g = \hat\Delta_g^{corrected} - \hat\Delta_g^{raw}`, differs between samples of one batch. Most
    genes need none of it, so the scatter of :math:`d_g` among genes of a similar count is taken for error: its trend is
    estimated by robust local regression, which genes that are corrected much more than others do not move.

    Draws of a network's dropout masks do not tell this error: on simulated batches they scatter a third as much as
    fold changes really move, and against batches without one of the groups an eighth.

    Parameters
    ----------
    change
        Fold change with corrected counts less that with raw ones, shape ``(n_genes,)``.
    sums
        Raw counts, samples x genes.

    Returns
    -------
    Shape ``(n_genes,)``. Of fewer than 10 genes, or genes all with one count, the mean square of all.
    """
    from statsmodels.nonparametric.smoothers_lowess import lowess  # type: ignore[import-untyped]

    level = np.log(sums.mean(axis=0) + 0.5)
    if len(change) < _MIN_TREND_GENES or np.ptp(level) == 0:
        return np.full(len(change), np.square(change).mean())
    trend = lowess(np.abs(change), level, frac=_SPAN, delta=0.01 * np.ptp(level), return_sorted=False)
    # Of a normal, the mean size is sqrt(2 / pi) standard deviations.
    return np.asarray(np.pi / 2 * np.maximum(trend, 0.0) ** 2)


def widen(corrected: GeneTests, raw: GeneTests, sums: np.ndarray, lfc_threshold: float) -> GeneTests:
    """Wald tests of corrected counts with errors no smaller than those of raw ones, and that of the correction added.

    Parameters
    ----------
    corrected, raw
        The same test of corrected and of raw counts.
    sums
        Raw counts, samples x genes.
    lfc_threshold
        See :class:`~cellstill.de.PseudobulkConfig`.
    """
    columns = dict(corrected.columns)
    lfc, tested = columns["lfc"], ~np.isnan(columns["p_value"])
    change = np.nan_to_num(lfc - raw.columns["lfc"])
    error = np.hypot(np.fmax(columns["lfc_se"], raw.columns["lfc_se"]), np.sqrt(correction_variance(change, sums)))
    size = np.abs(lfc)
    p_value = np.minimum(ndtr((lfc_threshold - size) / error) + ndtr(-(lfc_threshold + size) / error), 1.0)
    columns |= {"lfc_se": error, "p_value": np.where(tested, p_value, np.nan)}
    filtered = np.isnan(columns["fdr"])
    columns["fdr"] = benjamini_hochberg(np.where(filtered, np.nan, columns["p_value"]))
    return corrected._replace(columns=columns)
