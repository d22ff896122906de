"""The last layer of a decoder and its likelihood as one function: means are made, used and dropped in blocks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

_BLOCK = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Entries, cells x genes, of a block of logits."""


_NOTHING: AbstractContextManager[Any] = nullcontext()


class FusedLikelihood(Protocol):
    """Counts of a minibatch and what their distribution needs besides the logits.

    Attributes
    ----------
    n_rows, n_vars
        Cells and genes.
    value
        Log-likelihood of each cell, filled by :meth:`rows`.
    weight_l2
        Weight of the squared ``weight`` of the layer, which is taken from the total.
    """

    n_rows: int
    n_vars: int
    value: torch.Tensor
    weight_l2: float

    def rows(self, logits: torch.Tensor, rows: slice) -> None:
        """Turn the logits of some cells, float32, into their gradient; add to the gradients of the parameters."""
        ...

    def total(self) -> torch.Tensor:
        """What the gradients are of, but for ``weight_l2``: a scalar, once all rows are done."""
        ...

    def gradients(self) -> Sequence[torch.Tensor | None]:
        """Gradients of the total in the parameters, in the order in which :func:`fused_output` is given them."""
        ...


def fused_output(
    hidden: torch.Tensor, weight: torch.Tensor, likelihood: FusedLikelihood, parameters: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-likelihood of counts whose logits are ``hidden @ weight.T``.

    The array of cells x genes exists only in blocks of cells: a block of logits becomes means, terms of the likelihood
    and gradients in place, and enters the gradients of ``hidden`` and ``weight`` before the next one is made. All
    gradients are therefore computed on the way forward; going backward only scales them.

    Parameters
    ----------
    hidden, weight
        Shapes ``(n, n_hidden)`` and ``(n_vars, n_hidden)``.
    likelihood
        Evaluates blocks of logits.
    parameters
        What else is differentiated; ``None`` where the likelihood goes without.

    Returns
    -------
    The total of ``likelihood``, less the penalty of ``weight``, differentiable in ``hidden``, ``weight`` and
    ``parameters``; and the log-likelihood of each cell, shape ``(n,)``, without gradient. Both float32, also where the
    products run in bfloat16 (autocast).
    """
    # Inside, needs_input_grad does not say whether gradients are recorded at all.
    return _FusedOutput.apply(hidden, weight, likelihood, torch.is_grad_enabled(), *parameters)


class _FusedOutput(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        likelihood: FusedLikelihood,
        recorded: bool,
        *parameters: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device = hidden.device.type
        precision, context = torch.float32, _NOTHING
        if torch.is_autocast_enabled(device):
            precision, context = torch.get_autocast_dtype(device), torch.autocast(device, enabled=False)
        with context:
            low, matrix = hidden.to(precision), weight.to(precision)
            grad_hidden, grad_weight = [], None
            step = max(1, _BLOCK.get(device, _BLOCK["cuda"]) // likelihood.n_vars)
            for start in range(0, likelihood.n_rows, step):
                rows = slice(start, start + step)
                features = low if step >= likelihood.n_rows else low[rows]
                logits = torch.mm(features, matrix.t()).float()
                likelihood.rows(logits, rows)
                logits = logits.to(precision)
                if recorded and ctx.needs_input_grad[0]:
                    grad_hidden.append(torch.mm(logits, matrix))
                if recorded and ctx.needs_input_grad[1]:
                    grad_weight = _add_product(grad_weight, logits.t(), features)
            total = likelihood.total()
            if likelihood.weight_l2:
                flat = weight.reshape(-1)
                total = total - likelihood.weight_l2 * torch.dot(flat, flat)
                if grad_weight is not None:
                    grad_weight.add_(weight, alpha=-2 * likelihood.weight_l2)
        of_hidden = None
        if grad_hidden:
            of_hidden = (grad_hidden[0] if len(grad_hidden) == 1 else torch.cat(grad_hidden)).to(hidden.dtype)
        ctx.grads = (of_hidden, grad_weight, None, None, *(likelihood.gradients() if recorded else ()))
        ctx.mark_non_differentiable(likelihood.value)
        return total, likelihood.value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("The gradients of fused_output are computed once, and were already used.")
        # Left to autograd alone, which then need not copy them.
        grads, ctx.grads = ctx.grads, None
        wanted = [grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=True)]
        # Where the total is a term of the loss as it is, no pass over the gradients is needed. Only a CPU can look.
        if outer[0].device.type != "cpu" or outer[0].item() != 1.0:
            wanted = [None if grad is None else grad.mul_(outer[0]) for grad in wanted]
        return tuple(wanted)


def _add_product(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Add a product to a sum in float32."""
    if total is None:
        return torch.mm(left, right).float()
    return total.addmm_(left, right) if left.dtype == total.dtype else total.add_(torch.mm(left, right))
