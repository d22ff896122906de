r"""Priors: each a small pure function of tensors, which says what it is a density of.

A penalty on a transformed parameter needs the density of that parameter, Jacobian and all: where ``x`` is learnt as
``log x``, the density of ``log x`` is ``p(x) x``, whose mode is the mean of a Gamma, and not ``p(x)``, whose mode may
be 0. Functions ending in ``_kl`` are divergences of a posterior from its prior, at least 0, to be added to a loss; the
others are log densities, whose negative is. Nothing here is summed over genes, groups or cells unless it says so.
"""

from __future__ import annotations

import math

import torch

LOG_2 = math.log(2.0)
ENTROPY_OF_NORMAL = 0.5 * math.log(2 * math.pi * math.e)


def normal_kl(
    mean: torch.Tensor,
    variance: torch.Tensor,
    prior_mean: torch.Tensor | float = 0.0,
    prior_variance: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    r"""Divergence of a diagonal Normal posterior from a Normal prior, summed over the last axis.

    .. math::
        KL = \tfrac12 \sum_j \left[ \frac{v_j + (m_j - m_{0j})^2}{v_{0j}} - 1 - \log\frac{v_j}{v_{0j}} \right]

    Serves z, whose prior is Normal(0, 1), the log library, whose prior is that of its group, and automatic relevance
    determination, where ``prior_variance`` is learnt per dimension.

    Parameters
    ----------
    mean, variance
        Of the posterior, shape ``(..., d)``.
    prior_mean, prior_variance
        Of the prior; broadcast against ``mean``.

    Returns
    -------
    Shape ``(...)``.
    """
    ratio, distance = variance, mean.square()
    if not (isinstance(prior_mean, float) and prior_mean == 0):
        distance = (mean - prior_mean).square()
    if not (isinstance(prior_variance, float) and prior_variance == 1):
        ratio, distance = variance / prior_variance, distance / prior_variance
    return 0.5 * (ratio + distance - 1 - ratio.log()).sum(dim=-1)


def gamma(log_x: torch.Tensor, concentration: torch.Tensor | float, rate: torch.Tensor | float) -> torch.Tensor:
    r"""Log density of x ~ Gamma(concentration, rate), **as a density of x**, given ``log_x``.

    .. math:: \log p(x) = a \log b - \log\Gamma(a) + (a - 1) \log x - b x

    Its mode is :math:`(a - 1) / b`, and 0 where a is at most 1. For the rate of the containment prior: Gamma(9, 3),
    which settles at 8/3.

    Returns
    -------
    Shape of ``log_x`` broadcast with the parameters.
    """
    return gamma_of_log(log_x, concentration, rate) - log_x


def gamma_of_log(log_x: torch.Tensor, concentration: torch.Tensor | float, rate: torch.Tensor | float) -> torch.Tensor:
    r"""Log density of x ~ Gamma(concentration, rate), **as a density of log x**.

    .. math:: \log p(\log x) = a \log b - \log\Gamma(a) + a \log x - b x

    Its mode is at :math:`x = a / b`, the mean of x, whatever the concentration. For the ambient background,
    Gamma(1, 100), which settles at 0.01; for feature scaling, Gamma(200, 200), which settles at 1; for the scaling of
    modalities, Gamma(5, 5 / start), which settles at its start; for precisions of automatic relevance determination.

    Parameters
    ----------
    log_x
        Logarithm of the variable.
    concentration
        Shape of the Gamma, a > 0. Larger holds x closer to its mean: the standard deviation is mean / sqrt(a).
    rate
        Inverse scale b > 0.

    Returns
    -------
    Shape of ``log_x`` broadcast with the parameters.
    """
    if not (isinstance(concentration, torch.Tensor) or isinstance(rate, torch.Tensor)):
        constant = concentration * math.log(rate) - math.lgamma(concentration)
        return concentration * log_x - rate * log_x.exp() + constant
    a = torch.as_tensor(concentration, dtype=log_x.dtype, device=log_x.device)
    b = torch.as_tensor(rate, dtype=log_x.dtype, device=log_x.device)
    return a * (b.log() + log_x) - torch.lgamma(a) - b * log_x.exp()


def containment_kl(m: torch.Tensor, sigma: torch.Tensor, log_rate: torch.Tensor) -> torch.Tensor:
    r"""Divergence of the posterior of a log inverse dispersion from the containment prior, in closed form.

    The prior contains the model without overdispersion (Simpson 2017, *Penalising model component complexity*):
    :math:`u = \theta^{-1/2} \sim \mathrm{Exponential}(\lambda)`. The posterior is of :math:`\log\theta`,
    Normal(m, sigma), so the prior is taken as a density of :math:`\log\theta`, where :math:`|du / d\log\theta| = u/2`:

    .. math::
        \log p(\log\theta) = \log\lambda - \lambda u + \log(u / 2), \qquad
        E_q[u] = e^{-m/2 + \sigma^2/8}, \qquad E_q[\log u] = -m/2,

    .. math::
        KL = \lambda E_q[u] - \log\lambda + m/2 + \log 2 - \log\sigma - \tfrac12 \log(2 \pi e)

    Without the Jacobian, the term m/2, it would fall for ever as theta grows. With it and no data its optimum is
    :math:`E_q[u] = 1/\lambda`, sigma = 2; with lambda ~ Gamma(9, 3) (:func:`gamma`) learnt too, lambda = 8/3 and
    exp(m) = 19.3, whatever the number of genes.

    Parameters
    ----------
    m, sigma
        Mean and standard deviation of log theta, such as ``(n_groups, n_vars)``.
    log_rate
        Logarithm of lambda; broadcast against ``m``, such as ``(n_groups, 1)``. Larger rates hold counts closer to
        Poisson.

    Returns
    -------
    One divergence per posterior, in the shape broadcast.
    """
    mean_u = torch.exp(sigma.square() / 8 - m / 2)
    return log_rate.exp() * mean_u - log_rate + m / 2 - sigma.log() + (LOG_2 - ENTROPY_OF_NORMAL)


def lognormal_exponential_kl(m: torch.Tensor, sigma: torch.Tensor, rate: float = 1.0) -> torch.Tensor:
    r"""Divergence of w ~ LogNormal(m, sigma) from w ~ Exponential(rate), in closed form.

    Both are densities of :math:`\log w`, where the prior's is :math:`\log b - b w + \log w`:

    .. math:: KL = b\, e^{m + \sigma^2/2} - m - \log b - \log\sigma - \tfrac12 \log(2 \pi e)

    Without data its optimum is sigma = 1 and E[w] = 1 / rate. For the weight of the observed library size.

    Parameters
    ----------
    m, sigma
        Mean and standard deviation of log w.
    rate
        b > 0. Larger shrinks w further.

    Returns
    -------
    Shape of ``m`` broadcast with ``sigma``.
    """
    mean_w = torch.exp(m + sigma.square() / 2)
    return rate * mean_w - m - sigma.log() - (math.log(rate) + ENTROPY_OF_NORMAL)


def sparse_gamma(
    x: torch.Tensor, concentration: torch.Tensor | float, rate: torch.Tensor | float = 1.0, *, floor: float = 1e-2
) -> torch.Tensor:
    r"""Log density of the magnitude |x| ~ Gamma(concentration, rate), **as a density of |x|**: sparse if below 1.

    Taken at :math:`\sqrt{x^2 + \epsilon^2}`, because below a concentration of 1 the density of |x| is infinite at 0,
    and the gradient's variance over samples of x with it. For z and for activations, with ``n_active / n_dimensions``
    as concentration: ``n_active`` is then their expected sum per cell at a rate of 1.

    Parameters
    ----------
    x
        Values, of any sign.
    concentration
        Smaller is sparser; 1 is a penalty on |x|.
    rate
        Larger is smaller values.
    floor
        :math:`\epsilon`. Smaller tells small values from zero more sharply, with gradients of up to
        ``(1 - concentration) / (2 floor) + rate``.

    Returns
    -------
    Shape of ``x`` broadcast with the parameters.
    """
    return gamma(0.5 * torch.log(x.square() + floor**2), concentration, rate)


def horseshoe(x: torch.Tensor, scale: torch.Tensor | float = 1.0) -> torch.Tensor:
    r"""Lower bound of the log density of x under a horseshoe, as a density of x.

    The horseshoe is :math:`x \sim \mathrm{Normal}(0, \tau^2\lambda^2)`, :math:`\lambda \sim \mathrm{HalfCauchy}(1)`.
    Its density has no elementary form; Carvalho, Polson and Scott (2010, *The horseshoe estimator for sparse signals*,
    theorem 1) bound it from below by

    .. math:: p(x) > \frac{1}{2 \tau \sqrt{2 \pi^3}} \log\left(1 + \frac{4 \tau^2}{x^2}\right)

    so an evidence lower bound with it is one still. The bound has the pole at 0 and the tails of the horseshoe, and is
    below it by a factor of 2 to 1, in the order of |x|. Within 1e-4 scales of 0 it is flat, which only lowers it.

    Parameters
    ----------
    x
        Values.
    scale
        :math:`\tau`. Smaller is sparser.

    Returns
    -------
    Shape of ``x`` broadcast with ``scale``.
    """
    scale = torch.as_tensor(scale, dtype=x.dtype, device=x.device)
    square = (x / scale).square() + 1e-8
    return torch.log1p(4 / square).log() - scale.log() - (LOG_2 + 0.5 * math.log(2 * math.pi**3))
