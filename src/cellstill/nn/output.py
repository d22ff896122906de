"""Negative binomial counts whose mean is a share, by softmax, of the cell's library size."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from cellstill.errors import InvalidArgumentError
from cellstill.nn.compiled import add_up, kernels, loops
from cellstill.nn.fused import fused_output
from cellstill.nn.sparse import CSRRows
from cellstill.nn.special import digamma_difference, log_rising_factorial

_ABSENT = np.empty(0, np.float32), np.empty(0, np.int64), np.empty(0, np.float32)

_CACHED = 1 << 18
"""Entries over which torch's operations stay in the cache of a core."""


def negative_binomial_output(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    x: CSRRows,
    log_size: torch.Tensor | None,
    theta: torch.Tensor,
    *,
    group: torch.Tensor | None = None,
    cell_weight: torch.Tensor | None = None,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Negative binomial log-likelihood of counts, whose means are a linear layer of ``hidden``.

    .. math::
        x_{ng} \sim \mathrm{NB}(\mu_{ng}, \theta_g), \qquad \mu_n = s_n\,\mathrm{softmax}(W h_n + b)

    The last layer of the decoder and the likelihood are one function (:func:`~cellstill.nn.fused.fused_output`).

    Parameters
    ----------
    hidden
        Shape ``(n, n_hidden)``.
    weight, bias
        Shapes ``(n_vars, n_hidden)`` and ``(n_vars,)``.
    x
        Counts, ``n`` rows.
    log_size
        Logarithm of the size factor :math:`s` per cell, shape ``(n,)``: the expected library size. ``None`` takes the
        total of the counts, at least 1.
    theta
        Inverse dispersion, shape ``(n_vars,)``, or ``(n_groups, n_vars)`` with ``group``. Larger is closer to Poisson.
    group
        Row of ``theta`` for each cell, integers of shape ``(n,)``.
    cell_weight
        Weight of each cell in the total, shape ``(n,)``, not differentiated; ``None`` weighs all by 1.
    scale
        Factor of the total. With ``-1 / n`` it is a mean to minimise; as a term of the loss it then needs no further
        pass over the gradients.

    Returns
    -------
    Weighted sum over cells times ``scale``, differentiable in ``hidden``, ``weight``, ``bias``, ``log_size`` and
    ``theta``; and the log-likelihood of each cell, shape ``(n,)``, without gradient. Both float32, also where the
    products run in bfloat16 (autocast).

    Raises
    ------
    InvalidArgumentError
        Shapes that do not fit.

    References
    ----------
    Lopez et al. (2018), Deep generative modeling for single-cell transcriptomics, for the model.
    """
    n, n_vars = x.n_rows, x.n_vars
    _check_shape("hidden", hidden, (n, weight.shape[1]))
    _check_shape("weight", weight, (n_vars, weight.shape[1]))
    _check_shape("bias", bias, (n_vars,))
    n_groups = theta.shape[0] if theta.ndim == 2 and group is not None else 1
    _check_shape("theta", theta, (n_vars,) if theta.ndim == 1 else (n_groups, n_vars))
    for name, per_cell in (("log_size", log_size), ("group", group), ("cell_weight", cell_weight)):
        if per_cell is not None:
            _check_shape(name, per_cell, (n,))
    likelihood = _Softmax(x, bias, log_size, theta, group, cell_weight, scale)
    return fused_output(hidden, weight, likelihood, (bias, log_size, theta))


class _Softmax:
    """The likelihood as :func:`~cellstill.nn.fused.fused_output` asks for it."""

    weight_l2 = 0.0

    def __init__(
        self,
        x: CSRRows,
        bias: torch.Tensor,
        log_size: torch.Tensor | None,
        theta: torch.Tensor,
        group: torch.Tensor | None,
        cell_weight: torch.Tensor | None,
        scale: float,
    ) -> None:
        self.n_rows, self.n_vars, self.scale = x.n_rows, x.n_vars, scale
        self.value = torch.empty(x.n_rows, dtype=torch.float32, device=bias.device)
        self.cells = _Cells(
            x,
            None if log_size is None else log_size.detach().contiguous(),
            group,
            None if cell_weight is None else cell_weight.detach(),
            self.value,
            torch.empty_like(self.value),
        )
        grad_theta = torch.zeros_like(theta, memory_format=torch.contiguous_format)
        self.genes = _Genes(
            *(bias.detach(), theta.detach().contiguous().view(-1, x.n_vars), torch.zeros_like(bias), grad_theta)
        )

    def rows(self, logits: torch.Tensor, rows: slice) -> None:
        """Turn the logits of some cells into their gradient."""
        block = _rows_torch if kernels(logits.device) is None else _rows_compiled
        block(logits, self.cells.of(rows), self.genes, self.scale)

    def total(self) -> torch.Tensor:
        """Weighted sum of the log-likelihoods."""
        weight = self.cells.weight
        return (self.value.sum() if weight is None else self.value @ weight) * self.scale

    def gradients(self) -> tuple[torch.Tensor | None, ...]:
        """Of bias, log size and theta."""
        of_size = None if self.cells.log_size is None else self.cells.grad_size
        return self.genes.grad_bias, of_size, self.genes.grad_theta


class _Cells(NamedTuple):
    """What belongs to the cells of a block; the last two are filled."""

    x: CSRRows
    log_size: torch.Tensor | None
    group: torch.Tensor | None
    weight: torch.Tensor | None
    value: torch.Tensor
    grad_size: torch.Tensor

    def of(self, rows: slice) -> _Cells:
        if rows.start == 0 and rows.stop >= self.x.n_rows:
            return self
        optional = {"log_size": self.log_size, "group": self.group, "weight": self.weight}
        cut = {name: None if part is None else part[rows] for name, part in optional.items()}
        return _Cells(self.x.rows(rows), **cut, value=self.value[rows], grad_size=self.grad_size[rows])


class _Genes(NamedTuple):
    """What belongs to the genes; the last two are added to."""

    bias: torch.Tensor
    theta: torch.Tensor
    grad_bias: torch.Tensor
    grad_theta: torch.Tensor


def _rows_compiled(logits: torch.Tensor, cells: _Cells, genes: _Genes, scale: float) -> None:
    """Turn logits into their gradient, with the compiled loops."""
    x, theta, rows = cells.x, genes.theta.numpy(), loops().counts.negative_binomial_rows
    log_size, group, weight = (
        absent if part is None else part.numpy() for part, absent in zip(cells[1:4], _ABSENT, strict=True)
    )
    arrays = (
        *(logits.numpy(), genes.bias.numpy(), log_size, theta, group, weight, np.float32(scale)),
        *(x.data.numpy(), *x.places),
        *(cells.value.numpy(), cells.grad_size.numpy()),
    )
    totals = genes.grad_theta.view(theta.shape).numpy(), genes.grad_bias.numpy()
    add_up(rows, arrays, totals, logits.shape[0], logits.numel())


def _rows_torch(logits: torch.Tensor, cells: _Cells, genes: _Genes, scale: float) -> None:
    """Turn logits into their gradient, with torch's operations."""
    step = logits.shape[0] if logits.is_cuda else max(1, _CACHED // logits.shape[1])
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        _rows_in_cache(logits[rows], cells.of(rows), genes, scale)


def _rows_in_cache(logits: torch.Tensor, cells: _Cells, genes: _Genes, scale: float) -> None:
    x = cells.x
    size = x.library_size().clamp(min=1) if cells.log_size is None else cells.log_size.exp()
    weight = torch.full_like(cells.value, scale) if cells.weight is None else cells.weight * scale
    group, grad_theta = cells.group if genes.theta.shape[0] > 1 else None, genes.grad_theta.view(genes.theta.shape)
    theta = genes.theta if group is None else genes.theta[group]
    logits += genes.bias
    means = torch.softmax(logits, dim=1).mul_(size[:, None])
    share = means / theta
    at_zero = torch.log1p(share)
    share /= 1 + share
    cells.value.copy_((at_zero @ theta[0] if group is None else (at_zero * theta).sum(dim=1)).neg_())
    grads = torch.mul(share, -theta, out=logits)
    share -= at_zero
    if group is None:
        grad_theta[0].add_(weight @ share)
    else:
        grad_theta.index_add_(0, group, share.mul_(weight[:, None]))

    rows = x.row_of_nonzeros()
    where = torch.add(x.indices, rows, alpha=x.n_vars)
    grouped = x.indices if group is None else torch.add(x.indices, group.index_select(0, rows), alpha=x.n_vars)
    theta_at, mean_at = genes.theta.reshape(-1).index_select(0, grouped), means.view(-1).index_select(0, where)
    spread = 1 / (theta_at + mean_at)
    value = log_rising_factorial(x.data, theta_at).sub_(torch.lgamma(x.data + 1))
    cells.value.add_(x.sum_rows(value.addcmul_(x.data, (mean_at * spread).log_())))
    rest = spread.mul_(x.data)
    grads.view(-1).index_add_(0, where, rest * theta_at)
    at_theta = digamma_difference(x.data, theta_at).sub_(rest).mul_(weight.index_select(0, rows))
    grad_theta.view(-1).index_add_(0, grouped, at_theta)

    common = grads.sum(dim=1)
    # The sum over all genes goes back through the normalisation.
    grads.addcmul_(means, (common / size)[:, None], value=-1)
    grads *= weight[:, None]
    cells.grad_size.copy_(common * weight)
    genes.grad_bias.add_(grads.sum(dim=0))


def _check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise InvalidArgumentError(f"{name} has shape {tuple(tensor.shape)}; {expected} is needed.")
