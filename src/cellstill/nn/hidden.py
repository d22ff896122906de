"""A hidden layer, linear, LayerNorm and ReLU: one function where loops are compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from cellstill.nn.compiled import add_up, as_array, kernels, loops, share_out
from cellstill.nn.product import columns_times, rows_times, sparse_pays
from cellstill.nn.sparse import CSRRows


def hidden_layer(
    x: CSRRows | torch.Tensor,
    linear: nn.Module,
    norm: nn.Module,
    added: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """``relu(norm(linear(x) + added))``, shape ``(n, n_out)``.

    On the CPU, in float32 and where loops are compiled (:func:`~cellstill.nn.compiled.compiled`), one function with
    its gradients; elsewhere torch's operations. The results agree to rounding.

    Parameters
    ----------
    x
        Dense rows, or sparse ones, which have no gradient; shape ``(n, n_in)``.
    linear
        A :class:`torch.nn.Linear`, or a :class:`~cellstill.nn.layers.SparseLinear` for sparse rows.
    norm
        LayerNorm over ``n_out``.
    added
        What else is added before the norm, shape ``(n, n_out)``.
    weight
        The part of a :class:`torch.nn.Linear`'s weight that multiplies ``x``, shape ``(n_out, n_in)``, where ``added``
        has what its other inputs give. ``None`` is all of it.
    """
    if weight is None:
        assert isinstance(linear.weight, torch.Tensor)
        weight = linear.weight
    assert isinstance(norm, nn.LayerNorm)
    device = weight.device
    if kernels(device) is None or weight.dtype != torch.float32 or torch.is_autocast_enabled(device.type):
        if isinstance(linear, nn.Linear) and isinstance(x, torch.Tensor):
            product = nn.functional.linear(x, weight, linear.bias)
        else:
            product = linear(x)
        return torch.relu(norm(product if added is None else product + added))
    rows = x if isinstance(x, CSRRows) and sparse_pays(x, weight) else None
    dense = None if rows is not None else x.to_dense() if isinstance(x, CSRRows) else x
    learned = (weight, linear.bias, norm.weight, norm.bias)
    return _HiddenLayer.apply(dense, rows, added, *learned, isinstance(linear, nn.Linear), norm.eps)


class _HiddenLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor | None,
        rows: CSRRows | None,
        added: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        by_output: bool,
        eps: float,
    ) -> torch.Tensor:
        if x is not None:
            standard = torch.mm(x, weight.t() if by_output else weight)
        else:
            assert rows is not None
            standard = rows_times(rows, weight)
        if added is not None:
            standard += added
        out, inverse = torch.empty_like(standard), standard.new_empty(standard.shape[0])
        normed_relu = loops().layers.normed_relu
        learned = [as_array(part) for part in (bias, scale, shift)]
        made = standard.numpy(), out.numpy(), inverse.numpy()
        share_out(lambda start, stop: normed_relu(start, stop, *learned, eps, *made), out.shape[0], out.numel())
        ctx.rows, ctx.by_output = rows, by_output
        ctx.save_for_backward(x, weight, scale, out, standard, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, *saved = ctx.saved_tensors
        grad = grads[0].contiguous()
        through = torch.empty_like(grad)
        learned = grad.new_zeros((3, grad.shape[1]))
        known = [as_array(part) for part in (grad, *saved, through)]
        add_up(loops().layers.normed_relu_backward, known, [learned.numpy()], grad.shape[0], grad.numel())
        of_scale, of_shift, of_bias = learned.unbind()
        of_weight = None
        if ctx.needs_input_grad[3] and ctx.rows is not None:
            of_weight = columns_times(ctx.rows, through)
        elif ctx.needs_input_grad[3]:
            of_weight = torch.mm(through.t(), x) if ctx.by_output else torch.mm(x.t(), through)
        of_x = torch.mm(through, weight if ctx.by_output else weight.t()) if ctx.needs_input_grad[0] else None
        of_added = through if ctx.needs_input_grad[2] else None
        return of_x, None, of_added, of_weight, of_bias, of_scale, of_shift, None, None
