"""Likelihoods of sparse counts: log-gamma terms on the non-zeros only, gradients in closed form."""

from __future__ import annotations

from typing import Any

import torch

from cellstill.nn.sparse import CSRRows

_SHIFT = 4.0
_TABLE = torch.lgamma(torch.arange(1, 1025, dtype=torch.float64))


def nb_log_likelihood(
    x: CSRRows, log_rate: torch.Tensor, log_library: torch.Tensor, log_theta: torch.Tensor
) -> torch.Tensor:
    r"""Negative binomial log-likelihood of each cell, summed over genes.

    .. math::
        \log p(x) = \log\Gamma(x+\theta) - \log\Gamma(\theta) - \log x!
        - \theta \log(1 + \mu/\theta) + x \log\frac{\mu}{\mu+\theta}, \qquad \mu = \ell\rho

    For ``x = 0`` only the fourth term remains. It alone is computed for every entry; the others are computed on the
    non-zeros, and are zero on explicit zeros. The gradients are written out rather than recorded.

    Parameters
    ----------
    x
        Counts, ``n`` rows.
    log_rate
        Logarithm of the expected proportions :math:`\rho`, shape ``(n, n_vars)``.
    log_library
        Logarithm of the library size, shape ``(n,)``.
    log_theta
        Logarithm of the inverse dispersion per gene, shape ``(n_vars,)``. Larger theta is closer to Poisson.

    Returns
    -------
    Shape ``(n,)``. Differentiable in all but the counts.
    """
    varying, constant = _NegativeBinomial.apply(x, log_rate + log_library[:, None], log_theta), log_factorial(x.data)
    return varying - x.sum_rows(constant)


def log_rising_factorial(x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    r"""``lgamma(x + theta) - lgamma(theta)``, without the cancellation of its terms, for any theta > 0.

    The recurrence :math:`\Gamma(z) = \Gamma(z + 4) / (z (z+1) (z+2) (z+3))` brings both arguments to 4 or more, where
    Stirling's series with three corrections is exact to 4e-8; its leading terms are subtracted in closed form.
    """
    start = theta + _SHIFT
    end = start + x
    u, v = 1 / start, 1 / end
    corrections = _stirling(v) - _stirling(u)
    products = _product(theta) / _product(theta + x)
    return (start - 0.5) * torch.log1p(x * u) + x * (end.log() - 1) + corrections + products.log()


def digamma_difference(x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """``digamma(x + theta) - digamma(theta)``: the derivative of :func:`log_rising_factorial` in theta."""
    start = theta + _SHIFT
    u, v = 1 / start, 1 / (start + x)
    steps = sum(x / ((theta + k) * (theta + x + k)) for k in range(int(_SHIFT)))
    return torch.log1p(x * u) + _digamma_tail(v) - _digamma_tail(u) + steps


def log_factorial(x: torch.Tensor) -> torch.Tensor:
    """``lgamma(x + 1)`` of counts; integers below 1,024 are looked up."""
    table = _TABLE.to(x)
    small = x < len(table)
    if bool((small & (x == x.floor())).all()):
        return table[x.long()]
    return torch.lgamma(x + 1)


class _NegativeBinomial(torch.autograd.Function):
    """All terms of the log-likelihood that depend on mean or theta."""

    @staticmethod
    def forward(ctx: Any, x: CSRRows, log_mean: torch.Tensor, log_theta: torch.Tensor) -> torch.Tensor:
        theta = log_theta.exp()
        log_ratio = log_mean - log_theta
        # theta log(1 + mu / theta); softplus(log(mu / theta)) is the same without overflow.
        at_zero = torch.nn.functional.softplus(log_ratio, threshold=30)
        share = log_ratio.sigmoid_()
        value = -(at_zero @ theta)

        rows = x.row_of_nonzeros()
        where = rows * x.n_vars + x.indices
        share_nz = share.view(-1)[where]
        theta_nz = theta[x.indices]
        # log(mu / (mu + theta)) at the non-zeros, from what is there already.
        log_share = log_mean.reshape(-1)[where] - log_theta[x.indices] - at_zero.view(-1)[where]
        value += x.sum_rows(x.data * log_share + log_rising_factorial(x.data, theta_nz))
        ctx.save_for_backward(at_zero, share, theta, theta_nz, share_nz, rows, where)
        ctx.x = x
        return value

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor | None]:
        at_zero, share, theta, theta_nz, share_nz, rows, where = ctx.saved_tensors
        x, grad = ctx.x, grads[0]
        rest = x.data * (1 - share_nz) * grad[rows]
        grad_theta = None
        if ctx.needs_input_grad[2]:
            at_nonzero = digamma_difference(x.data, theta_nz) * grad[rows]
            grad_theta = theta * (grad @ share - grad @ at_zero)
            grad_theta.index_add_(0, x.indices, theta_nz * at_nonzero - rest)
        grad_mean = share * (-theta)
        grad_mean *= grad[:, None]
        grad_mean.view(-1).index_add_(0, where, rest)
        return None, grad_mean, grad_theta


def _stirling(u: torch.Tensor) -> torch.Tensor:
    square = u * u
    return u * (1 / 12 - square * (1 / 360 - square * (1 / 1260)))


def _digamma_tail(u: torch.Tensor) -> torch.Tensor:
    square = u * u
    return -u / 2 - square * (1 / 12 - square * (1 / 120 - square * (1 / 252)))


def _product(z: torch.Tensor) -> torch.Tensor:
    return z * (z + 1) * (z + 2) * (z + 3)
