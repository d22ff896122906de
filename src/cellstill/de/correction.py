"""What is not known of a correction of counts, as part of the error of fold changes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import ndtr
from scipy.stats import rankdata

from cellstill.de.gene_tests import GeneTests, benjamini_hochberg
from cellstill.de.posterior import NORMAL_DF, mixture_weights, normal_scale, shrunken_effect

_SPAN = 0.5
_MIN_TREND_GENES = 10
_LEAST_SCALE = 0.1
_LEAST_VARIANCE = 1e-3


class CorrectionError(NamedTuple):
    """Distribution of the error that a correction brings into each fold change: a mixture of normals around 0.

    Attributes
    ----------
    weights
        Of the components, shape ``(n_components,)``.
    variances
        Of the components, for each gene, shape ``(n_components, n_genes)``.
    """

    weights: np.ndarray
    variances: np.ndarray

    def mean(self) -> np.ndarray:
        """Variance of each gene's error, shape ``(n_genes,)``."""
        return np.asarray(self.weights @ self.variances)


def correction_error(change: np.ndarray, sums: np.ndarray) -> CorrectionError:
    r"""Distribution of the error that a correction brings into each fold change.

    The batch stays in the design, which takes up what a correction does to all samples of a batch. What still moves a
    fold change, :math:`d_g = \hat\Delta_g^{corrected} - \hat\Delta_g^{raw}`, differs between samples of one batch. How
    much of it is right is not known; all of it is taken for error. Its size follows the count of a gene, by local
    regression on the rank of the mean count. Relative to that size it is a mixture of normals of many widths, by EM:
    where most genes are hardly moved and some are by much, or a few by very much, the tails say so. A p-value averaged
    over this distribution is uniform, on average over genes, where nothing but the correction makes a difference.

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
    Of genes that nothing moves, the error is 0. Fewer than 10 genes share one normal.
    """
    from statsmodels.nonparametric.smoothers_lowess import lowess  # type: ignore[import-untyped]

    size = np.abs(change)
    if len(change) < _MIN_TREND_GENES or not size.any():
        return CorrectionError(np.ones(1), np.full((1, len(change)), np.square(change).mean()))
    level = rankdata(sums.mean(axis=0), method="ordinal")
    trend = lowess(size, level, frac=_SPAN, it=0, delta=0.01 * len(level), return_sorted=False)
    scale = np.maximum(trend, _LEAST_SCALE * size.mean())
    relative = np.square(change / scale)
    # The first component, which the EM adds a few genes to, is that of the mean square.
    widths = _LEAST_VARIANCE * 2.0 ** np.arange(np.ceil(np.log2(max(relative.max(), 1.0) / _LEAST_VARIANCE)) + 1)
    variances = np.concatenate([[relative.mean()], widths])
    log_likelihood = -0.5 * (np.log(variances) + relative[:, None] / variances)
    weights = mixture_weights(np.exp(log_likelihood - log_likelihood.max(axis=1, keepdims=True)))
    used = weights > 0
    return CorrectionError(weights[used] / weights[used].sum(), variances[used, None] * np.square(scale))


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
    lfc = columns["lfc"]
    unknown = correction_error(np.nan_to_num(lfc - raw.columns["lfc"]), sums)
    own = np.square(np.fmax(columns["lfc_se"], raw.columns["lfc_se"]))

    def p_value(threshold: float) -> np.ndarray:
        # As DESeq2 has it, of |lfc| > threshold: both tails as heavy as the nearer one.
        beyond = (threshold - np.abs(lfc)) / np.sqrt(own + unknown.variances)
        return np.asarray(unknown.weights @ np.minimum(2 * ndtr(beyond), 1.0))

    tested = ~np.isnan(columns["p_value"])
    filtered = np.isnan(columns["fdr"])
    error = np.sqrt(own + unknown.mean())
    columns |= {"lfc_se": error, "p_value": np.where(tested, p_value(lfc_threshold), np.nan)}
    columns["fdr"] = benjamini_hochberg(np.where(filtered, np.nan, columns["p_value"]))
    if "lfc_shrunken" in columns:
        known = ~np.isnan(lfc + error)
        scale = normal_scale(lfc[known], error[known], p_value(0.0)[known])
        columns["lfc_shrunken"] = np.full(len(lfc), np.nan)
        columns["lfc_shrunken"][known] = shrunken_effect(lfc[known], scale, NORMAL_DF)
    return corrected._replace(columns=columns)
