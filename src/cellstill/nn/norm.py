"""LayerNorm and ReLU behind a matrix product, as one compiled function where loops are compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from cellstill.nn.compiled import kernels, share_out


def normed_relu(x: torch.Tensor, norm: nn.LayerNorm, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``relu(norm(x + bias))`` of rows, shape ``(n, width)``.

    On the CPU, in float32 and where loops are compiled (:func:`~cellstill.nn.compiled.compiled`), one function with
    its gradients; elsewhere torch's operations, to the same result.
    """
    loops = kernels(x.device)
    if loops is None or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return torch.relu(norm(x if bias is None else x + bias))
    return _NormedReLU.apply(x, bias, norm.weight, norm.bias, norm.eps)


class _NormedReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor, shift: torch.Tensor, eps: float
    ) -> torch.Tensor:
        loops = kernels(x.device)
        assert loops is not None
        normed_relu, x = loops.layers.normed_relu, x.contiguous()
        out, standard, inverse = torch.empty_like(x), torch.empty_like(x), x.new_empty(len(x))
        added = x.new_empty(0) if bias is None else bias
        arrays = [part.detach().numpy() for part in (x, added, scale, shift)]
        made = [part.numpy() for part in (out, standard, inverse)]
        share_out(lambda start, stop: normed_relu(start, stop, *arrays, eps, *made), len(x), x.numel())
        ctx.save_for_backward(out, standard, inverse, scale)
        ctx.has_bias = bias is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        from cellstill.nn.compiled import loops

        grad = grads[0].contiguous()
        normed_relu_backward = loops().layers.normed_relu_backward
        grad_x = torch.empty_like(grad)
        known = [part.detach().numpy() for part in (grad, *ctx.saved_tensors)]
        filled = grad_x.numpy()

        def share(start: int, stop: int) -> np.ndarray:
            sums = np.zeros((3, grad.shape[1]), np.float32)
            normed_relu_backward(start, stop, *known, filled, *sums)
            return sums

        sums = torch.from_numpy(sum(share_out(share, len(grad), grad.numel())))
        return grad_x, sums[2] if ctx.has_bias else None, sums[0], sums[1], None
