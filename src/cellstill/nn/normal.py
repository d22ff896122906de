"""Independent Normal posteriors: draws, and divergences from a prior, each in one pass where loops are compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from cellstill.nn import priors
from cellstill.nn.compiled import as_array, contiguous_like, fit_loops, flat_array, more_loops


def draw(mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """Draw from Normal(``mean``, ``variance``), reparameterised; both of one shape."""
    noise = torch.randn_like(mean)
    if not fit_loops(mean, variance) or mean.shape != variance.shape:
        return mean + variance.sqrt() * noise
    return _Draw.apply(mean, variance, noise)


def divergence(
    mean: torch.Tensor,
    variance: torch.Tensor,
    prior_mean: torch.Tensor | float = 0.0,
    prior_variance: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """Divergence of a diagonal Normal from a Normal prior, summed over the last axis.

    As :func:`~cellstill.nn.priors.normal_kl`, which it is where loops are not compiled, or the prior is learned, or not
    the same in all dimensions.

    Parameters
    ----------
    mean, variance
        Of the posterior, shape ``(n, d)``.
    prior_mean, prior_variance
        Of the prior; broadcast against ``mean``.

    Returns
    -------
    Shape ``(n,)``.
    """
    known = [part for part in (prior_mean, prior_variance) if isinstance(part, torch.Tensor)]
    of_rows = len(known) == 2 and all(part.shape == (mean.shape[0], 1) and not part.requires_grad for part in known)
    fits = mean.ndim == 2 and mean.shape == variance.shape and (of_rows or not known)
    if not fits or not fit_loops(mean, variance, *known):
        return priors.normal_kl(mean, variance, prior_mean, prior_variance)
    parts = [
        part[:, 0] if isinstance(part, torch.Tensor) else mean.new_full((1,), part)
        for part in (prior_mean, prior_variance)
    ]
    return _Divergence.apply(mean, variance, *parts)


class _Draw(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: torch.Tensor, variance: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        normal_draw = more_loops("_prior_kernels").normal_draw

        out, slope = contiguous_like(mean), contiguous_like(mean)
        normal_draw(*map(flat_array, (mean, variance, noise, out, slope)))
        ctx.save_for_backward(slope)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return grads[0], grads[0] * ctx.saved_tensors[0], None


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *posterior_and_prior: torch.Tensor) -> torch.Tensor:
        normal_kl = more_loops("_prior_kernels").normal_kl

        out = posterior_and_prior[0].new_empty(posterior_and_prior[0].shape[0])
        normal_kl(*map(as_array, (*posterior_and_prior, out)))
        ctx.save_for_backward(*posterior_and_prior)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        normal_kl_backward = more_loops("_prior_kernels").normal_kl_backward

        made = contiguous_like(ctx.saved_tensors[0]), contiguous_like(ctx.saved_tensors[1])
        normal_kl_backward(*map(as_array, (*ctx.saved_tensors, grads[0], *made)))
        return *made, None, None
