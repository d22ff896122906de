"""Rank tests of log counts per million."""

from __future__ import annotations

import itertools
import math

import numpy as np
from scipy.stats import mannwhitneyu, norm, rankdata

from cellstill.de.design import Design
from cellstill.de.gene_tests import GeneTests, benjamini_hochberg, log_cpm
from cellstill.errors import InvalidArgumentError

_MAX_EXACT_PAIRS = 12
_MAX_EXACT_GROUP = 10
_DIGITS = 9
_CHUNK_SIZE = 2048


def rank_sum(sums: np.ndarray, design: Design, *, fdr: float = 0.05) -> GeneTests:
    r"""Compare the ranks of the samples of two groups, gene by gene.

    - Without further terms: the Mann-Whitney U test, exact with up to 10 samples in each group for genes without ties,
      by the normal approximation otherwise, but never below the smallest exact p-value.
    - Donors in both groups: Wilcoxon's signed-rank test of their differences, exact with up to 12 pairs (over all
      patterns of signs, so with ties too), by the normal approximation above.
    - With batches: ranks within each batch, sums weighted by :math:`1 / (n_b + 1)`, normal approximation with the
      variance that permuting within batches has, ties included (van Elteren, Bull. Int. Stat. Inst. 37:351, 1960).

    ``lfc`` is the difference of mean log2 counts per million (of the pairs, or within batches with the weights of
    least squares), ``lfc_se`` its standard error; the test does not use them.

    Parameters
    ----------
    sums
        Counts, samples x genes, no gene or sample without counts.
    design
        Its matrix, and what pairs or stratifies the samples.
    fdr
        At which genes will be called; a note says if that takes many of them, or cannot be.

    Raises
    ------
    InvalidArgumentError
        Pairs, and a batch that differs inside them.
    """
    if design.paired and design.strata is not None and (np.bincount(design.strata) != 2).any():
        raise InvalidArgumentError(
            f"method='wilcoxon' ranks the differences of pairs, and cannot take out a batch that differs inside them "
            f"(the design is {design.formula}). Use method='ttest' or 'deseq2', or leave the batch out."
        )
    totals = sums.sum(axis=1)
    # Rounded, so that samples without a count of a gene are tied whatever their depth.
    values = np.round(log_cpm(sums, totals), _DIGITS)
    matrix = design.matrix
    first = matrix[:, -1] == 1
    if design.strata is None:
        p_value = _two_groups(values, first)
    elif design.paired:
        p_value = _signed_rank(values, first, design.strata)
    else:
        p_value = _stratified(values, first, design.strata)
    coefficients = np.linalg.pinv(matrix)
    residuals = values - matrix @ (coefficients @ values)
    df = matrix.shape[0] - matrix.shape[1]
    error = np.sqrt(np.square(residuals).sum(axis=0) / df * (coefficients[-1] @ coefficients[-1]))
    columns = {"lfc": coefficients[-1] @ values, "lfc_se": error, "p_value": p_value}
    notes = []
    least = _smallest_p(first, design)
    needed = math.ceil(least * values.shape[1] / fdr - 1e-9)
    if needed > 1:
        limit = (
            f"none of {values.shape[1]:,} genes can be called"
            if needed > values.shape[1]
            else f"genes are called only where at least {needed:,} of {values.shape[1]:,} reach it"
        )
        notes.append(
            f"With {first.sum()} against {(~first).sum()} samples no rank test has a p-value below {least:.2g}: "
            f"{limit}. method='ttest' finds more with few samples."
        )
    size_factors = totals / np.exp(np.log(totals).mean())
    return GeneTests(columns | {"fdr": benjamini_hochberg(p_value)}, size_factors, notes)


def _two_groups(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Two-sided p-values of Mann and Whitney: exact for few samples, but of genes with ties."""
    n_genes = values.shape[1]
    tied = np.array([len(np.unique(values[:, gene])) < len(values) for gene in range(n_genes)])
    few = max(first.sum(), (~first).sum()) <= _MAX_EXACT_GROUP
    p_value = np.empty(n_genes)
    for genes, method in ((tied, "asymptotic"), (~tied, "exact" if few else "asymptotic")):
        if genes.any():
            part = values[:, genes]
            p_value[genes] = mannwhitneyu(part[first], part[~first], method=method).pvalue
    return np.maximum(p_value, _smallest_two_groups(first)) if few else p_value


def _smallest_two_groups(first: np.ndarray) -> float:
    """The p-value of two groups that are perfectly separated, which no approximation may fall below."""
    return 2 / math.comb(len(first), int(first.sum()))


def _signed_rank(values: np.ndarray, first: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Two-sided p-values of the signed ranks of differences; those of 0 have no rank."""
    order = np.argsort(pairs, kind="stable")
    values, first = values[order], first[order]
    difference = values[first] - values[~first]
    size = np.where(difference == 0, np.nan, np.abs(difference))
    ranks = np.nan_to_num(rankdata(size, axis=0, nan_policy="omit"))
    statistic = np.abs((np.sign(difference) * ranks).sum(axis=0))
    n_pairs = len(difference)
    if n_pairs > _MAX_EXACT_PAIRS:
        sd = np.sqrt(np.square(ranks).sum(axis=0))
        z = np.divide(statistic, sd, out=np.zeros_like(statistic), where=sd > 0)
        return np.asarray(2 * norm.sf(z))
    # Of each pattern of signs and its opposite, one is enough.
    signs = np.array(list(itertools.product([1.0], *[[-1.0, 1.0]] * (n_pairs - 1))))
    p_value = np.empty(len(statistic))
    for start in range(0, len(statistic), _CHUNK_SIZE):
        part = slice(start, start + _CHUNK_SIZE)
        p_value[part] = (np.abs(signs @ ranks[:, part]) >= statistic[part] - 1e-9).mean(axis=0)
    return p_value


def _stratified(values: np.ndarray, first: np.ndarray, strata: np.ndarray) -> np.ndarray:
    statistic = np.zeros(values.shape[1])
    variance = np.zeros(values.shape[1])
    for stratum in np.unique(strata):
        here = strata == stratum
        n, n_first = here.sum(), (first & here).sum()
        if n_first in (0, n):
            continue
        ranks = rankdata(values[here], axis=0)
        statistic += (ranks[first[here]].sum(axis=0) - n_first * (n + 1) / 2) / (n + 1)
        variance += n_first * (n - n_first) / n * ranks.var(axis=0, ddof=1) / (n + 1) ** 2
    z = np.divide(statistic, np.sqrt(variance), out=np.zeros_like(statistic), where=variance > 0)
    return np.asarray(2 * norm.sf(np.abs(z)))


def _smallest_p(first: np.ndarray, design: Design) -> float:
    """The p-value of samples that are perfectly separated."""
    values = first[:, None].astype(float) + np.linspace(0, 0.1, len(first))[:, None]
    if design.strata is None:
        return _smallest_two_groups(first)
    if design.paired:
        return float(_signed_rank(values, first, design.strata)[0])
    return float(_stratified(values, first, design.strata)[0])
