"""Residual variances of genes, each of which learns from all others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import fdtrc, fdtri, ndtr

_MAX_DF = 1e6
_DRAWN_IN = 0.05, 0.1
_GRID = (np.arange(512) + 0.5) / 512
_N_VALUES = 40, 200
_PRIOR_GENES = 10.0
_MAX_SHAPE_DF = 1e4
_MAX_STEPS = 1000


@dataclass(frozen=True)
class VariancePosterior:
    """What is known of the variance of each gene.

    Attributes
    ----------
    values
        Variances that a gene may have, increasing, shape ``(n_values,)``.
    weights
        Probability of each, shape ``(n_genes, n_values)``.
    """

    values: np.ndarray
    weights: np.ndarray

    def mean(self) -> np.ndarray:
        """Posterior mean of each variance, shape ``(n_genes,)``."""
        return self.weights @ self.values

    def two_sided(
        self, effect: np.ndarray, unit: np.ndarray, threshold: float = 0.0, added: float | np.ndarray = 0.0
    ) -> np.ndarray:
        """P-value of a normal effect, whose variance is ``unit`` times the gene's, at the posterior of the latter.

        Parameters
        ----------
        effect, unit
            Shape ``(n_genes,)``.
        threshold
            The null is that the effect is at most so large; the p-value is that at its least favourable point.
        added
            Variance that the effect has beside that of the residuals, known; shape ``(n_genes,)`` or one for all.
        """
        size = np.abs(effect)[:, None]
        error = np.sqrt(unit[:, None] * self.values + np.reshape(added, (-1, 1)))
        p_value = ndtr(-(size - threshold) / error) + ndtr(-(size + threshold) / error)
        return np.minimum((self.weights * p_value).sum(axis=1), 1.0)


def learn_variances(variances: np.ndarray, df: float) -> VariancePosterior:
    r"""Posterior of each gene's variance under the distribution of variances over all genes, whatever its shape.

    With :math:`s_g^2 \mid \sigma_g^2 \sim \sigma_g^2 \chi^2_d / d`, the distribution of :math:`\sigma_g^2` is the
    nonparametric maximum likelihood estimate on a grid, by EM. In the limit of many genes, p-values of effects averaged
    over the posteriors are uniform where there is no effect, also given :math:`s_g^2`, and Benjamini-Hochberg holds on
    them (Ignatiadis & Sen, arXiv:2303.02887). A prior of one shape (:func:`moderate_variances`) does not have this if
    variances come in kinds. Among mock comparisons in which marker genes also vary with the share of their cell type in
    a sample, 1.7 in 10,000 p-values were below 1e-4 with it, and 1.2 are with this (200 runs, 500 genes).

    Where genes are few, the distribution leans on that shape: the estimate is penalised as if 10 more genes had been
    drawn from it. Of fewer than some 30 genes with one or two degrees of freedom, too many p-values are small.

    Parameters
    ----------
    variances
        Residual variances, shape ``(n_genes,)``.
    df
        Their degrees of freedom.
    """
    floor = _floor(variances)
    logs = np.log(np.maximum(variances, floor))
    prior, prior_df = _variance_prior(logs, df)
    low, high = min(logs.min(), np.log(prior) - 1), max(logs.max(), np.log(prior) + 1)
    n_values = int(np.clip(np.ceil((high - low) / np.sqrt(0.5 / df)), *_N_VALUES))
    grid = np.linspace(low, high, n_values)
    # Densities of log s2 given log sigma2, and of log sigma2, up to factors that cancel.
    difference = logs[:, None] - grid
    log_likelihood = df / 2 * (difference - np.exp(difference))
    likelihood = np.exp(log_likelihood - log_likelihood.max(axis=1, keepdims=True))
    log_shape = -min(prior_df, _MAX_SHAPE_DF) / 2 * (grid - np.log(prior) + np.exp(np.log(prior) - grid))
    shape = np.exp(log_shape - log_shape.max())
    shape /= shape.sum()

    weights, before = np.full(n_values, 1 / n_values), -np.inf
    likely = shape > 0
    for _ in range(_MAX_STEPS):
        marginal = likelihood @ weights
        penalty = _PRIOR_GENES * (shape[likely] @ np.log(weights[likely]))
        fit = (np.log(marginal).sum() + penalty) / len(variances)
        if fit - before < 1e-7:
            break
        before = fit
        weights = weights * (likelihood.T @ (1 / marginal)) + _PRIOR_GENES * shape
        weights /= len(variances) + _PRIOR_GENES
    joint = likelihood * weights
    return VariancePosterior(np.exp(grid), joint / joint.sum(axis=1, keepdims=True))


def moderate_variances(variances: np.ndarray, df: float) -> tuple[np.ndarray, np.ndarray]:
    r"""Shrink the residual variance of each gene towards a value common to all genes.

    With :math:`s_g^2 \mid \sigma_g^2 \sim \sigma_g^2 \chi^2_d / d` and the prior
    :math:`1/\sigma_g^2 \sim \chi^2_{d_0} / (d_0 s_0^2)`, whose two numbers are estimated from the mean and variance of
    :math:`\log s_g^2`, the posterior has :math:`d_0 + d` degrees of freedom around
    :math:`(d_0 s_0^2 + d s_g^2) / (d_0 + d)` (Smyth, Stat. Appl. Genet. Mol. Biol. 3:3, 2004). With few donors this is
    what makes intervals of useful width: two against two leave 2 degrees of freedom to a gene on its own.

    Genes that vary far more than this prior allows, such as one that only some donors express, would be pulled to a
    variance much too small. Both ends of the distribution of :math:`\log s_g^2` are therefore drawn in before the two
    numbers are estimated, and a gene that the prior does not expect among as many genes gets fewer prior degrees of
    freedom: :math:`d_0` times the ratio of its tail probability to the one expected at its rank, if that is below 1
    (Phipson et al., Ann. Appl. Stat. 10:946, 2016).

    Parameters
    ----------
    variances
        Residual variances, shape ``(n_genes,)``.
    df
        Their degrees of freedom.

    Returns
    -------
    Moderated variances, and their degrees of freedom (at most a million, which is a normal), shape ``(n_genes,)`` each.
    """
    n_genes = len(variances)
    logs = np.log(np.maximum(variances, _floor(variances)))
    prior, prior_df = _variance_prior(logs, df)
    tail = fdtrc(df, prior_df, np.exp(logs) / prior)
    expected = np.empty(n_genes)
    expected[np.argsort(-variances, kind="stable")] = (np.arange(n_genes) + 0.5) / n_genes
    own_df = prior_df * np.minimum(_running_max(tail / expected, -variances), 1.0)
    moderated = (own_df * prior + df * variances) / (own_df + df)
    return moderated, np.minimum(own_df + df, _MAX_DF)


def _variance_prior(logs: np.ndarray, df: float) -> tuple[float, float]:
    """Location and degrees of freedom of the prior, from the bulk of the logarithms of the variances."""
    low, high = np.quantile(logs, [_DRAWN_IN[0], 1 - _DRAWN_IN[1]])
    drawn_in = np.clip(logs, low, high)

    def expected(prior_df: float) -> tuple[float, float]:
        # Of log F, likewise drawn in: quantiles on a grid stand for the distribution.
        grid = np.log(fdtri(df, prior_df, _GRID))
        ends = np.log(fdtri(df, prior_df, np.array([_DRAWN_IN[0], 1 - _DRAWN_IN[1]])))
        grid = np.clip(grid, *ends)
        return float(grid.mean()), float(grid.var())

    spread = drawn_in.var(ddof=1) if len(logs) > 1 else 0.0
    if spread <= expected(_MAX_DF)[1]:
        prior_df = _MAX_DF
    else:
        prior_df = np.exp(brentq(lambda x: np.log(expected(np.exp(x))[1] / spread), np.log(0.05), np.log(_MAX_DF)))
    return float(np.exp(drawn_in.mean() - expected(prior_df)[0])), prior_df


def _running_max(values: np.ndarray, order_by: np.ndarray) -> np.ndarray:
    """Largest value so far in the given order: a gene that varies less than another is no more of an outlier."""
    order = np.argsort(order_by, kind="stable")
    result = np.empty_like(values)
    result[order] = np.maximum.accumulate(values[order])
    return result


def _floor(variances: np.ndarray) -> float:
    """Least variance taken for real: a gene that happens not to vary has a logarithm of minus infinity."""
    return max(1e-5 * float(np.median(variances)), 1e-12)
