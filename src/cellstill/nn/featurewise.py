"""Parameters by group and feature: draws, transforms and penalties, each in one pass where loops are compiled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from cellstill.nn import priors
from cellstill.nn.compiled import as_array, contiguous_like, fit_loops, flat_array, more_loops, share_out


def log_normal_draw(mean: torch.Tensor, log_sigma: torch.Tensor) -> torch.Tensor:
    r"""Draw :math:`e^{m + \sigma \epsilon}`, with :math:`\epsilon \sim \mathrm{Normal}(0, 1)` for each entry.

    Parameters
    ----------
    mean, log_sigma
        m and :math:`\log\sigma`, of one shape.
    """
    noise = torch.randn_like(mean)
    if not fit_loops(mean, log_sigma) or mean.shape != log_sigma.shape:
        return (mean + log_sigma.exp() * noise).exp()
    return _LogNormalDraw.apply(mean, log_sigma, noise)


def log_softplus(x: torch.Tensor) -> torch.Tensor:
    """Logarithm of softplus of each entry."""
    return _LogSoftplus.apply(x) if fit_loops(x) else torch.nn.functional.softplus(x).log()


def containment_sum(mean: torch.Tensor, log_sigma: torch.Tensor, log_rate: torch.Tensor) -> torch.Tensor:
    """Sum of :func:`~cellstill.nn.priors.containment_kl` over all entries.

    Parameters
    ----------
    mean, log_sigma
        Of the log inverse dispersion, shape ``(n_groups, n_vars)``.
    log_rate
        Shape ``(n_groups,)``.
    """
    fits = mean.ndim == 2 and mean.shape == log_sigma.shape and log_rate.shape == mean.shape[:1]
    if not fits or not fit_loops(mean, log_sigma, log_rate):
        return priors.containment_kl(mean, log_sigma.exp(), log_rate[:, None]).sum()
    containment = more_loops("_prior_kernels").containment

    grads = [contiguous_like(part) for part in (mean, log_sigma, log_rate)]
    constant = priors.LOG_2 - priors.ENTROPY_OF_NORMAL
    total = containment(*[*map(as_array, (mean, log_sigma, log_rate)), constant, *map(as_array, grads)])
    return _Known.apply(total, grads, mean, log_sigma, log_rate)


def gamma_of_log_sum(log_x: torch.Tensor, concentration: float, rate: float) -> torch.Tensor:
    """Sum of :func:`~cellstill.nn.priors.gamma_of_log` over all entries."""
    if not fit_loops(log_x):
        return priors.gamma_of_log(log_x, concentration, rate).sum()
    return _gamma_sum(log_x, concentration, rate, concentration)


def gamma_sum(log_x: torch.Tensor, concentration: float, rate: float) -> torch.Tensor:
    """Sum of :func:`~cellstill.nn.priors.gamma` over all entries."""
    if not fit_loops(log_x):
        return priors.gamma(log_x, concentration, rate).sum()
    return _gamma_sum(log_x, concentration, rate, concentration - 1)


def _gamma_sum(log_x: torch.Tensor, concentration: float, rate: float, power: float) -> torch.Tensor:
    gamma = more_loops("_prior_kernels").gamma

    grad = contiguous_like(log_x)
    constant = concentration * math.log(rate) - math.lgamma(concentration)
    total = gamma(flat_array(log_x), power, rate, constant, flat_array(grad))
    return _Known.apply(total, [grad], log_x)


def lognormal_exponential_sum(mean: torch.Tensor, log_sigma: torch.Tensor, rate: float = 1.0) -> torch.Tensor:
    """Sum of :func:`~cellstill.nn.priors.lognormal_exponential_kl` over all entries."""
    if not fit_loops(mean, log_sigma) or mean.shape != log_sigma.shape:
        return priors.lognormal_exponential_kl(mean, log_sigma.exp(), rate).sum()
    lognormal_exponential = more_loops("_prior_kernels").lognormal_exponential

    grads = [contiguous_like(part) for part in (mean, log_sigma)]
    constant = -math.log(rate) - priors.ENTROPY_OF_NORMAL
    total = lognormal_exponential(*[*map(flat_array, (mean, log_sigma)), rate, constant, *map(flat_array, grads)])
    return _Known.apply(total, grads, mean, log_sigma)


class _LogNormalDraw(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: torch.Tensor, log_sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        log_normal = more_loops("_prior_kernels").log_normal

        out, slope = contiguous_like(mean), contiguous_like(mean)
        arrays = [flat_array(part) for part in (mean, log_sigma, noise, out, slope)]
        share_out(lambda start, stop: log_normal(start, stop, *arrays), mean.numel(), mean.numel())
        ctx.save_for_backward(out, slope)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        out, slope = ctx.saved_tensors
        return grads[0] * out, grads[0] * slope, None


class _LogSoftplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        log_softplus = more_loops("_prior_kernels").log_softplus

        out, slope = contiguous_like(x), contiguous_like(x)
        arrays = [flat_array(part) for part in (x, out, slope)]
        share_out(lambda start, stop: log_softplus(start, stop, *arrays), x.numel(), x.numel())
        ctx.save_for_backward(slope)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * ctx.saved_tensors[0]


class _Known(torch.autograd.Function):
    """A number whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, value: float, grads: Sequence[torch.Tensor], *parameters: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*grads)
        return parameters[0].new_tensor(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (None, None, *(grad * outer[0] for grad in ctx.saved_tensors))
