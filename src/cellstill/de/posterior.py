"""Posteriors of one fold change per gene that learn from all genes: variances, then effects, then the set called."""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq
from scipy.special import digamma, ndtr, ndtri, polygamma, stdtr

_MAX_DF = 1e6
_NULL_WEIGHT = 10.0
_MAX_CENTRES = 40
_MAX_STEPS = 2000


def moderate_variances(variances: np.ndarray, df: float) -> tuple[np.ndarray, float]:
    r"""Shrink the residual variance of each gene towards a value common to all genes.

    With :math:`s_g^2 \mid \sigma_g^2 \sim \sigma_g^2 \chi^2_d / d` and the prior
    :math:`1/\sigma_g^2 \sim \chi^2_{d_0} / (d_0 s_0^2)`, whose two numbers are estimated from the mean and variance of
    :math:`\log s_g^2`, the posterior has :math:`d_0 + d` degrees of freedom around
    :math:`(d_0 s_0^2 + d s_g^2) / (d_0 + d)` (Smyth, Stat. Appl. Genet. Mol. Biol. 3:3, 2004). With few donors this is
    what makes intervals of useful width: two against two leave 2 degrees of freedom to a gene on its own.

    Parameters
    ----------
    variances
        Residual variances, shape ``(n_genes,)``.
    df
        Their degrees of freedom.

    Returns
    -------
    Moderated variances, shape ``(n_genes,)``, and their degrees of freedom (at most a million, which is a normal).
    """
    # A gene that happens not to vary would pull the mean logarithm to minus infinity.
    floor = max(1e-5 * np.median(variances), 1e-12)
    logs = np.log(np.maximum(variances, floor)) - digamma(df / 2) + np.log(df / 2)
    excess = logs.var(ddof=1) - polygamma(1, df / 2) if len(logs) > 1 else 0.0
    if excess <= polygamma(1, _MAX_DF / 2):
        return np.full_like(variances, np.exp(logs.mean())), _MAX_DF
    prior_df = 2 * np.exp(brentq(lambda x: np.log(polygamma(1, np.exp(x)) / excess), -30, 30))
    prior = np.exp(logs.mean() + digamma(prior_df / 2) - np.log(prior_df / 2))
    return (prior_df * prior + df * variances) / (prior_df + df), min(prior_df + df, _MAX_DF)


def prob_effect(loc: np.ndarray, scale: np.ndarray, df: float, delta: float) -> np.ndarray:
    r"""Posterior probability of :math:`|\Delta_g| > \delta`, knowing how rare effects are among all genes.

    A flat prior would call any gene known badly enough a large effect. The prior is therefore a mixture estimated from
    all genes, :math:`\Delta_g \sim \pi_0 \delta_0 + \sum_k \pi_k N(m_k, \tau_k^2)`: adaptive shrinkage (Stephens,
    Biostatistics 18:275, 2017), whose components all have :math:`m_k = 0`, with components along both sides added, so
    that effects need be neither commonest near 0 nor balanced (with the former alone, and effects of 0.8 or more, 8 %
    of a set called at 5 % were false). Weights come from EM, with a Dirichlet penalty that adds nine genes to the null.
    The t-distributed error enters as the normal one of the same p-value (Lu & Stephens, arXiv:1901.10679).

    Parameters
    ----------
    loc, scale
        Estimate and standard error of each gene's effect, shape ``(n_genes,)``.
    df
        Degrees of freedom of the standard errors.
    delta
        Effect floor; 0 asks for any effect at all.

    Returns
    -------
    Probabilities, shape ``(n_genes,)``.
    """
    t = np.maximum(np.abs(loc) / scale, 1e-4)
    z = -ndtri(np.maximum(stdtr(df, -t), 1e-300))
    loc, variance = loc[:, None], (scale * t / z)[:, None] ** 2

    centre, spread = _components(loc, variance)
    total = variance + spread
    log_likelihood = -0.5 * (np.log(total) + (loc - centre) ** 2 / total)
    likelihood = np.exp(log_likelihood - log_likelihood.max(axis=1, keepdims=True))
    weights = _mixture_weights(likelihood)
    joint = likelihood * weights
    joint /= joint.sum(axis=1, keepdims=True)

    shrink = spread[1:] / total[:, 1:]
    mean, sd = centre[1:] + shrink * (loc - centre[1:]), np.sqrt(shrink * variance)
    beyond = ndtr((mean - delta) / sd) + ndtr((-mean - delta) / sd)
    return np.clip((joint[:, 1:] * beyond).sum(axis=1), 0.0, 1.0)


def _components(loc: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means and variances of the prior's components: none, around 0 in steps of sqrt(2), and along both sides."""
    typical, reach = np.sqrt(np.median(variance)), np.abs(loc).max()
    largest = 2 * max(reach, typical)
    around = largest**2 / 2.0 ** np.arange(np.ceil(2 * np.log2(10 * largest / np.sqrt(variance.min()))))
    n_centres = int(np.clip(np.ceil(reach / typical), 1, _MAX_CENTRES))
    step = max(reach, typical) / n_centres
    along = step * np.arange(1, n_centres + 1)
    centre = np.concatenate([[0.0], np.zeros_like(around), along, -along])
    return centre, np.concatenate([[0.0], around, np.full(2 * n_centres, (step / 2) ** 2)])


def _mixture_weights(likelihood: np.ndarray) -> np.ndarray:
    """Weights of the components (the null first) by EM, from the likelihood of each gene under each."""
    n_genes, n_components = likelihood.shape
    weights = np.full(n_components, 1 / n_components)
    before = -np.inf
    for _ in range(_MAX_STEPS):
        marginal = likelihood @ weights
        fit = np.log(marginal).mean()
        if fit - before < 1e-7:
            break
        before = fit
        weights = weights * (likelihood.T @ (1 / marginal))
        weights[0] += _NULL_WEIGHT - 1
        weights /= n_genes + _NULL_WEIGHT - 1
    return weights


def expected_fdr(prob: np.ndarray) -> np.ndarray:
    """Posterior expected share of false calls if a gene and all those as probable were called.

    The mean of ``1 - prob`` over the genes with at least the gene's own probability, shape ``(n_genes,)`` (Newton et
    al., Biostatistics 5:155, 2004).
    """
    order = np.argsort(-prob, kind="stable")
    falling = -prob[order]
    running = np.cumsum(1 + falling) / np.arange(1, len(prob) + 1)
    last_tied = np.searchsorted(falling, falling, side="right") - 1
    fdr = np.empty_like(prob)
    fdr[order] = running[last_tied]
    return fdr
