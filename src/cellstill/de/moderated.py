"""A t-test of log counts per million that weighs each observation by its precision."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cellstill.de.correction import CorrectionError, correction_error
from cellstill.de.gene_tests import RATIO_NOTE, GeneTests, benjamini_hochberg, has_ratio_genes, log_cpm
from cellstill.de.posterior import NORMAL_DF, normal_scale, shrunken_effect
from cellstill.de.variances import learn_variances

_SPAN = 0.5
_MIN_TREND_GENES = 10
_MAX_DEPTH_RATIO = 4.0


def moderated_t(
    sums: np.ndarray,
    matrix: np.ndarray,
    common: np.ndarray | None = None,
    *,
    lfc_threshold: float,
    shrink_lfc: bool = False,
    uncorrected: np.ndarray | None = None,
) -> GeneTests:
    r"""Test the last coefficient of a design by weighted least squares with moderated variances.

    1. Log counts per million of each sample (:func:`~cellstill.de.gene_tests.log_cpm`).
    2. The standard deviation of :math:`y` falls with the count. Its trend over genes, at the level that the terms which
       samples have in common expect of gene :math:`g` in a sample of that depth, gives the precision :math:`w_{sg}` of
       an observation (after Law et al., Genome Biol. 15:R29, 2014), so that samples of a few cells weigh what they are
       worth. The terms of single donors in a paired design are not used for it: one cell full of haemoglobin would give
       its donor all of the weight, and its own residual would vanish.
    3. Weighted least squares for each gene. Its residual variance learns from those of all genes
       (:func:`~cellstill.de.variances.learn_variances`); the p-value is that of a normal effect, averaged over what is
       then known of the variance: the moderated t-test of Smyth (2004), were variances of the shape that it assumes.

    With an effect floor :math:`\tau`, the p-value is that of :math:`|\Delta| \le \tau` at its least favourable point
    (McCarthy & Smyth, Bioinformatics 25:765, 2009).

    Size factors are medians of ratios over the genes with counts in every sample; where there are fewer than 10 of
    them, totals, and a note says so.

    Parameters
    ----------
    sums
        Counts, samples x genes, no gene or sample without counts.
    matrix
        Design, samples x coefficients, of full rank.
    common
        Its columns without those of single pairs (:class:`~cellstill.de.design.Design`); all of them by default.
    lfc_threshold, shrink_lfc
        See :class:`~cellstill.de.PseudobulkConfig`.
    uncorrected
        If ``sums`` were corrected: the sums before, whose scatter bounds that of the corrected ones from below. The
        error of the correction itself is added (:func:`~cellstill.de.correction.correction_error`).
    """
    depth, size_factors, notes = _depth(sums, matrix)
    fit = _fit(sums, matrix, common, depth)
    variances, added = fit.variances, CorrectionError(np.ones(1), np.zeros((1, sums.shape[1])))
    if uncorrected is not None:
        before = _fit(uncorrected, matrix, common, _depth(uncorrected, matrix)[0])
        variances = np.maximum(variances, before.variances * before.unit / fit.unit)
        added = correction_error(fit.lfc - before.lfc, uncorrected)
    posterior = learn_variances(variances, fit.df)

    def p_of(threshold: float) -> np.ndarray:
        each = [posterior.two_sided(fit.lfc, fit.unit, threshold, variance) for variance in added.variances]
        return np.asarray(added.weights @ np.stack(each))

    error = np.sqrt(posterior.mean() * fit.unit + added.mean())
    p_value = p_of(lfc_threshold)
    columns = {"lfc": fit.lfc, "lfc_se": error, "p_value": p_value, "fdr": benjamini_hochberg(p_value)}
    if shrink_lfc:
        scale = normal_scale(fit.lfc, error, p_of(0.0))
        columns["lfc_shrunken"] = shrunken_effect(fit.lfc, scale, NORMAL_DF)
    return GeneTests(columns, size_factors, notes)


class _Fit(NamedTuple):
    """Weighted least squares of each gene: last coefficient, its variance per unit of residual variance, the latter."""

    lfc: np.ndarray
    unit: np.ndarray
    variances: np.ndarray
    df: int


def _fit(sums: np.ndarray, matrix: np.ndarray, common: np.ndarray | None, depth: np.ndarray) -> _Fit:
    values = log_cpm(sums, depth)
    weights = _precision(values, matrix, matrix if common is None else common, np.log2(depth) - np.log2(1e6))
    cross = np.einsum("si,sg,sj->gij", matrix, weights, matrix)
    inverse = np.linalg.inv(cross)
    coefficients = np.einsum("gij,sj,sg->ig", inverse, matrix, weights * values)
    df = matrix.shape[0] - matrix.shape[1]
    variances = (weights * np.square(values - matrix @ coefficients)).sum(axis=0) / df
    return _Fit(coefficients[-1], inverse[:, -1, -1], variances, df)


def _depth(sums: np.ndarray, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Effective totals of the samples, size factors, and notes on both."""
    notes = []
    totals = sums.sum(axis=1)
    if has_ratio_genes(sums):
        logs = np.log(sums[:, (sums > 0).all(axis=0)])
        size_factors = np.exp(np.median(logs - logs.mean(axis=0), axis=1))
    else:
        size_factors = totals / np.exp(np.log(totals).mean())
        notes.append(RATIO_NOTE + "totals are the size factors.")
    size_factors = size_factors / np.exp(np.log(size_factors).mean())
    depth = size_factors * np.exp(np.log(totals).mean())
    first = matrix[:, -1] == 1
    ratio = np.exp(np.abs(np.log(depth[first]).mean() - np.log(depth[~first]).mean()))
    if ratio > _MAX_DEPTH_RATIO:
        notes.append(
            f"Samples of one group are {ratio:.1f} times as deep: fold changes of genes with few counts are biased. "
            "method='deseq2' models counts."
        )
    return depth, size_factors, notes


def _precision(values: np.ndarray, matrix: np.ndarray, common: np.ndarray, log_depth: np.ndarray) -> np.ndarray:
    """Inverse variances expected of each observation, samples x genes."""
    from statsmodels.nonparametric.smoothers_lowess import lowess  # type: ignore[import-untyped]

    if values.shape[1] < _MIN_TREND_GENES:
        return np.ones_like(values)
    fitted = matrix @ (np.linalg.pinv(matrix) @ values)
    df = matrix.shape[0] - matrix.shape[1]
    spread = np.sqrt(np.square(values - fitted).sum(axis=0) / df)
    level = values.mean(axis=0) + log_depth.mean()
    trend = lowess(np.sqrt(spread), level, frac=_SPAN, delta=0.01 * np.ptp(level))
    # Zeros are all alike, so that the scatter of genes with hardly a count bends down; they are known no better for it.
    trend[:, 1] = np.maximum.accumulate(trend[::-1, 1])[::-1]
    at = common @ (np.linalg.pinv(common) @ values) + log_depth[:, None]
    expected = np.interp(at, trend[:, 0], trend[:, 1])
    floor = 1e-2 * np.median(np.sqrt(spread)) + 1e-6
    return np.maximum(expected, floor) ** -4.0
