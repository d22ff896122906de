"""Negative binomial counts whose mean is native expression plus a background, times a scaling of each feature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from cellstill.errors import InvalidArgumentError
from cellstill.nn.compiled import add_up, kernels, more_loops
from cellstill.nn.composition import SparseComposition
from cellstill.nn.fused import fused_output
from cellstill.nn.sparse import CSRRows
from cellstill.nn.special import digamma_difference, log_rising_factorial

_CACHED = 1 << 18
"""Entries over which torch's operations stay in the cache of a core."""


def background_output(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    x: CSRRows,
    log_size: torch.Tensor,
    theta: torch.Tensor,
    *,
    group: torch.Tensor | None = None,
    log_background: torch.Tensor | None = None,
    background_group: torch.Tensor | None = None,
    log_amount: torch.Tensor | None = None,
    log_scaling: torch.Tensor | None = None,
    scaling_group: torch.Tensor | None = None,
    cell_weight: torch.Tensor | None = None,
    weight_l2: float = 0.0,
    native_penalty: NativePenalty | None = None,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    r"""Negative binomial log-likelihood of counts, with a softplus decoder, ambient background and feature scaling.

    .. math::
        x_{nf} \sim \mathrm{NB}(\mu_{nf}, \theta_{f}), \qquad
        \mu_{nf} = l_n \left(\mathrm{softplus}(W h_n + b)_f + a_n e^{\beta_f}\right) y_f

    with :math:`\theta, \beta, y` of the cell's groups. The last layer of the decoder and the likelihood are one
    function (:func:`~cellstill.nn.fused.fused_output`).

    Parameters
    ----------
    hidden
        Shape ``(n, n_hidden)``.
    weight, bias
        Shapes ``(n_vars, n_hidden)`` and ``(n_vars,)``.
    x
        Counts, ``n`` rows.
    log_size
        Logarithm of :math:`l` per cell, shape ``(n,)``.
    theta
        Inverse dispersion, shape ``(n_vars,)``, or ``(n_groups, n_vars)`` with ``group``. Larger is closer to Poisson.
    group
        Row of ``theta`` for each cell, integers of shape ``(n,)``.
    log_background, background_group
        :math:`\beta`, the logarithm of the background, as ``theta`` and ``group``. ``None`` leaves it out.
    log_amount
        Logarithm of a cell's own factor :math:`a` of the background, shape ``(n,)``; ``None`` is 0.
    log_scaling, scaling_group
        :math:`\log y`, as ``theta`` and ``group``. ``None`` leaves it out.
    cell_weight
        Weight of each cell in the total, shape ``(n,)``, not differentiated; ``None`` weighs all by 1.
    weight_l2
        Penalty of the squared ``weight``, taken from the total.
    native_penalty
        Penalty of the native expression :math:`\mathrm{softplus}(W h_n + b)` of some cells, taken from the total.
    scale
        Factor of the total, not 0, as in :func:`~cellstill.nn.output.negative_binomial_output`.

    Returns
    -------
    Weighted sum over cells, less the penalties, times ``scale``, differentiable in all but the counts, groups and
    weights; the log-likelihood of each cell, shape ``(n,)``, and the mean native penalty of a cell, both without
    gradient. All float32.

    Raises
    ------
    InvalidArgumentError
        Shapes that do not fit.
    """
    n = x.n_rows
    _check_shape("hidden", hidden, (n, weight.shape[1]))
    _check_shape("weight", weight, (x.n_vars, weight.shape[1]))
    _check_shape("bias", bias, (x.n_vars,))
    _check_shape("log_size", log_size, (n,))
    if log_amount is not None:
        _check_shape("log_amount", log_amount, (n,))
    likelihood = _Background(
        x,
        log_size.detach().exp(),
        bias.detach(),
        _by_group("theta", theta, "group", group, x, 1.0),
        _by_group("log_background", log_background, "background_group", background_group, x, -torch.inf).exp(),
        torch.ones_like(log_size) if log_amount is None else log_amount.detach().exp(),
        _by_group("log_scaling", log_scaling, "scaling_group", scaling_group, x, 0.0).exp(),
        torch.full_like(log_size, scale, requires_grad=False) if cell_weight is None else cell_weight * scale,
        scale,
        weight_l2,
        native_penalty,
    )
    parameters = (bias, log_size, theta, log_background, log_amount, log_scaling)
    total, value = fused_output(hidden, weight, likelihood, parameters)
    return total, value, likelihood.native_mean


class NativePenalty(NamedTuple):
    """Penalty of native expression.

    Attributes
    ----------
    prior
        Its negative log density is the penalty of a cell.
    weight
        Of the mean over cells.
    n_cells
        How many cells are looked at, the first ones: in shuffled minibatches they stand for all.
    """

    prior: SparseComposition
    weight: float
    n_cells: int


class _ByGroup(NamedTuple):
    """A parameter by group and feature, the group of each cell, and the parameter's gradient, which is added to."""

    values: torch.Tensor
    group: torch.Tensor
    grad: torch.Tensor
    shape: tuple[int, ...] | None

    def exp(self) -> _ByGroup:
        return self._replace(values=self.values.exp())

    def of(self, rows: slice) -> torch.Tensor:
        """Values of some cells; one row where there is a single group."""
        return self.values if self.values.shape[0] == 1 else self.values[self.group[rows]]

    def add(self, terms: torch.Tensor, rows: slice) -> None:
        """Add terms of some cells, which may be overwritten, to the gradient."""
        if self.values.shape[0] == 1:
            self.grad[0].add_(terms.sum(dim=0))
        else:
            self.grad.index_add_(0, self.group[rows], terms)

    def gradient(self) -> torch.Tensor | None:
        return None if self.shape is None else self.grad.view(self.shape)


def _by_group(
    name: str, values: torch.Tensor | None, group_name: str, group: torch.Tensor | None, x: CSRRows, absent: float
) -> _ByGroup:
    shape = None if values is None else tuple(values.shape)
    values = torch.full((1, x.n_vars), absent, device=x.data.device) if values is None else values.detach()
    values = (values if values.ndim == 2 else values[None]).contiguous()
    if group is None:
        _check_shape(name, values, (1, x.n_vars))
        group = torch.zeros(x.n_rows, dtype=torch.int64, device=values.device)
    else:
        _check_shape(name, values, (values.shape[0], x.n_vars))
        _check_shape(group_name, group, (x.n_rows,))
    return _ByGroup(values, group, torch.zeros_like(values), shape)


class _Background:
    """The distribution of :func:`background_output`, as a :class:`~cellstill.nn.fused.FusedLikelihood`."""

    def __init__(
        self,
        x: CSRRows,
        size: torch.Tensor,
        bias: torch.Tensor,
        theta: _ByGroup,
        background: _ByGroup,
        amount: torch.Tensor,
        scaling: _ByGroup,
        weight: torch.Tensor,
        scale: float,
        weight_l2: float,
        native_penalty: NativePenalty | None,
    ) -> None:
        # The weights of the cells, and with them the gradients, have the scale already.
        self.scale, self.weight_l2, self.native_penalty = scale, scale * weight_l2, native_penalty
        self.penalty, self.native_mean = size.new_zeros(()), size.new_zeros(())
        self.n_rows, self.n_vars = x.n_rows, x.n_vars
        self.x, self.size, self.bias, self.amount, self.weight = x, size, bias, amount, weight
        self.theta, self.background, self.scaling = theta, background, scaling
        self.value, self.grad_size, self.grad_amount = (torch.empty_like(size) for _ in range(3))
        self.grad_bias = torch.zeros_like(bias)

    def gradients(self) -> Sequence[torch.Tensor | None]:
        of_background = self.background.gradient()
        return (
            self.grad_bias,
            self.grad_size,
            self.theta.gradient(),
            of_background,
            None if of_background is None else self.grad_amount,
            self.scaling.gradient(),
        )

    def total(self) -> torch.Tensor:
        return torch.dot(self.value, self.weight) - self.penalty

    def rows(self, logits: torch.Tensor, rows: slice) -> None:
        penalised = 0 if self.native_penalty is None else min(self.native_penalty.n_cells - rows.start, logits.shape[0])
        if penalised > 0:
            gradient = self._penalise(logits[:penalised], slice(rows.start, rows.start + penalised))
        self._likelihood(logits, rows)
        if penalised > 0:
            logits[:penalised] -= gradient

    def _penalise(self, logits: torch.Tensor, rows: slice) -> torch.Tensor:
        """Add the penalty of some cells; returns its gradient."""
        assert self.native_penalty is not None
        prior, weight, n_cells = self.native_penalty
        share = self.weight[rows] / min(n_cells, self.n_rows)
        penalty, gradient, of_bias = prior.penalty_and_gradient(logits, self.bias, weight * share)
        mean = torch.dot(penalty, share)
        self.native_mean += mean / self.scale
        self.penalty += weight * mean
        self.grad_bias -= of_bias
        return gradient

    def _likelihood(self, logits: torch.Tensor, rows: slice) -> None:
        if kernels(logits.device) is not None:
            self._rows_compiled(logits, rows)
            return
        step = logits.shape[0] if logits.is_cuda else max(1, _CACHED // self.n_vars)
        for start in range(0, logits.shape[0], step):
            part = slice(start, min(start + step, logits.shape[0]))
            self._rows_in_cache(logits[part], slice(rows.start + part.start, rows.start + part.stop))

    def _rows_compiled(self, logits: torch.Tensor, rows: slice) -> None:
        background_rows = more_loops("_background_kernels").background_rows

        x = self.x if logits.shape[0] == self.n_rows else self.x.rows(rows)
        grouped = (self.theta, self.background, self.scaling)
        theta, background, scaling = (part.values.numpy() for part in grouped)
        groups = [part.group.numpy()[rows] for part in grouped]
        cells = [part.numpy()[rows] for part in (self.size, self.amount, self.weight)]
        filled = [part.numpy()[rows] for part in (self.value, self.grad_size, self.grad_amount)]
        counts = x.data.numpy(), *x.places
        values, bias = logits.numpy(), self.bias.numpy()
        inverse = 1 / theta
        arrays = (
            *(values, bias, cells[0], theta, inverse, groups[0], background, groups[1], cells[1]),
            *(scaling, groups[2], cells[2], *counts, *filled),
        )
        totals = [part.grad.numpy() for part in grouped] + [self.grad_bias.numpy()]
        add_up(background_rows, arrays, totals, logits.shape[0], logits.numel())

    def _rows_in_cache(self, logits: torch.Tensor, rows: slice) -> None:
        x = self.x if logits.shape[0] == self.n_rows else self.x.rows(rows)
        weight, theta = self.weight[rows, None], self.theta.of(rows)
        logits += self.bias
        native = torch.nn.functional.softplus(logits)
        added = self.amount[rows, None] * self.background.of(rows)
        means = native.add_(added)
        slope = torch.sigmoid(logits).div_(means)
        from_background = added.div_(means)
        means *= self.scaling.of(rows) * self.size[rows, None]
        ratio = means / theta
        at_zero = torch.log1p(ratio)
        ratio /= 1 + ratio
        value = (at_zero * theta).sum(dim=1).neg_()
        grads = torch.mul(ratio, theta, out=logits).neg_()
        self.theta.add((ratio - at_zero).mul_(weight), rows)

        cell = x.row_of_nonzeros()
        where = cell * x.n_vars + x.indices
        group = self.theta.group[rows][cell]
        theta_at, mean_at = self.theta.values[group, x.indices], means.view(-1)[where]
        rest = x.data / (theta_at + mean_at)
        term = log_rising_factorial(x.data, theta_at).sub_(torch.lgamma(x.data + 1))
        term += x.data * (mean_at / (theta_at + mean_at)).log()
        self.value[rows] = value + x.sum_rows(term)
        grads.view(-1).index_add_(0, where, rest * theta_at)
        at_theta = (digamma_difference(x.data, theta_at) - rest).mul_(self.weight[rows][cell])
        self.theta.grad.view(-1).index_add_(0, group * x.n_vars + x.indices, at_theta)

        self.grad_size[rows] = grads.sum(dim=1) * self.weight[rows]
        grads *= weight
        self.scaling.add(grads, rows)
        from_background *= grads
        self.background.add(from_background, rows)
        self.grad_amount[rows] = from_background.sum(dim=1)
        grads *= slope
        self.grad_bias.add_(grads.sum(dim=0))


def _check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise InvalidArgumentError(f"{name} has shape {tuple(tensor.shape)}; {expected} is needed.")
