"""Likelihoods of sparse counts given a dense mean: log-gamma terms on the non-zeros only, gradients in closed form.

An entry that is not stored is a zero, whose log-probability takes one ``log1p``. Stored counts are worked out by
themselves and take their places among the zeros' terms before these are summed, so no large terms cancel in a sum.
Arrays of cells by genes are made in blocks that stay in the processor's cache, except for the gradients.

For theta from 1e-4 to 1e8 and means from 1e-12 to 1e6, log-probabilities and derivatives in the mean are exact to a few
roundings of each entry, in float32 as in float64. So are derivatives in theta, down to a few roundings of their two
parts where they change sign; those of zeros are exact to 6e-5 in float32 and 1e-10 in float64.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from cellstill.errors import InvalidArgumentError
from cellstill.nn.sparse import CSRRows
from cellstill.nn.special import digamma_excess, log1p_excess, stirling_error
from cellstill.nn.stored import Stored

# Share below which a derivative is a series of four terms, exact there to 2e-5 in float32 and 3e-11 in float64.
_SERIES_BOUND = {torch.float32: 0.09, torch.float64: 0.003}


def negative_binomial(
    x: CSRRows, mean: torch.Tensor, theta: torch.Tensor, *, group: torch.Tensor | None = None
) -> torch.Tensor:
    r"""Negative binomial (Gamma-Poisson) log-likelihood of each cell, summed over genes.

    .. math::
        \log p(x) = \log\Gamma(x+\theta) - \log\Gamma(\theta) - \log x!
        - \theta \log(1 + \mu/\theta) + x \log\frac{\mu}{\mu+\theta}

    For ``x = 0`` only the fourth term remains.

    Parameters
    ----------
    x
        Counts, ``n`` rows, each gene at most once a row. Explicit zeros count as zeros; counts need not be integers.
    mean
        Expected counts :math:`\mu > 0`, shape ``(n, n_vars)``.
    theta
        Inverse dispersion :math:`\theta > 0`: the variance is :math:`\mu + \mu^2/\theta`, so larger is closer to
        Poisson. Shape ``(n_vars,)``, one per gene; ``(n_groups, n_vars)`` with ``group``; or ``(n, n_vars)``, one per
        entry.
    group
        Row of ``theta`` that each cell takes, integers, shape ``(n,)``: its batch or its cell type, for example.

    Returns
    -------
    Shape ``(n,)``, in the wider precision of ``mean`` and ``theta`` and at least float32. Differentiable once in both.

    Raises
    ------
    InvalidArgumentError
        If shapes do not fit each other or ``group`` does not hold integers. Values are not checked.
    """
    _check_mean(x, mean)
    _check_theta(x, theta, group)
    x, mean, theta = _in_one_precision(x, mean, theta)
    return _GammaPoisson.apply(x, mean, theta, None, group, torch.is_grad_enabled())


def zero_inflated_negative_binomial(
    x: CSRRows,
    mean: torch.Tensor,
    theta: torch.Tensor,
    zero_logits: torch.Tensor,
    *,
    group: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Log-likelihood of each cell, summed over genes, where some counts are zero for a reason of their own.

    .. math::
        p(0) = \pi + (1 - \pi)\, p_{NB}(0), \qquad p(x) = (1 - \pi)\, p_{NB}(x) \text{ for } x > 0,
        \qquad \pi = \frac{1}{1 + e^{-\text{zero logits}}}

    Parameters
    ----------
    x, mean, theta, group
        As in :func:`negative_binomial`; ``mean`` is that of the counts that are not inflated to zero.
    zero_logits
        Logits of the probability of an extra zero, shape ``(n, n_vars)``, or ``(n_vars,)``, one per gene. Larger means
        more extra zeros; towards minus infinity the distribution becomes the negative binomial.

    Returns
    -------
    Shape ``(n,)``, in the widest precision of ``mean``, ``theta`` and ``zero_logits`` and at least float32.
    Differentiable once in all three.

    Raises
    ------
    InvalidArgumentError
        If shapes do not fit each other or ``group`` does not hold integers. Values are not checked.
    """
    _check_mean(x, mean)
    _check_theta(x, theta, group)
    _check_zero_logits(x, zero_logits)
    x, mean, theta, zero_logits = _in_one_precision(x, mean, theta, zero_logits)
    return _GammaPoisson.apply(x, mean, theta, zero_logits, group, torch.is_grad_enabled())


def poisson(x: CSRRows, mean: torch.Tensor) -> torch.Tensor:
    r"""Poisson log-likelihood of each cell, summed over genes: :math:`x \log\mu - \mu - \log x!`.

    Parameters
    ----------
    x, mean
        As in :func:`negative_binomial`, whose limit this is for large theta.

    Returns
    -------
    Shape ``(n,)``, in the precision of ``mean`` and at least float32. Differentiable once.

    Raises
    ------
    InvalidArgumentError
        If the shape of ``mean`` is not that of ``x``. Values are not checked.
    """
    _check_mean(x, mean)
    x, mean = _in_one_precision(x, mean)
    return _Poisson.apply(x, mean, torch.is_grad_enabled())


class _GammaPoisson(torch.autograd.Function):
    """Negative binomial, inflated if logits are given. Nothing is kept for gradients unless ``differentiable``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: CSRRows,
        mean: torch.Tensor,
        theta: torch.Tensor,
        logits: torch.Tensor | None,
        group: torch.Tensor | None,
        differentiable: bool,
    ) -> torch.Tensor:
        stored = Stored.of(x, group)
        log_pmf, value = torch.empty_like(x.data), mean.new_empty(x.n_rows)
        wants = [differentiable and needed for needed in ctx.needs_input_grad[1:4]]
        derivatives = [torch.empty_like(x.data) if wanted else None for wanted in wants]
        d_mean, d_theta, d_logits = derivatives
        # Of a parameter that counts share, each value's part is computed once.
        theta_errors = stirling_error(theta) if theta.numel() < len(x.data) else None
        for part in stored.parts():
            counts = _NBCounts.of(part.counts, part.take(mean), part.take_grouped(theta))
            log_pmf[part.stored] = counts.log_pmf(None if theta_errors is None else part.take_grouped(theta_errors))
            if logits is not None:
                own_logits = part.take(logits)
                log_pmf[part.stored] += torch.nn.functional.logsigmoid(-own_logits)
                if d_logits is not None:
                    d_logits[part.stored] = own_logits.sigmoid_().neg_()
            if d_mean is not None:
                d_mean[part.stored] = counts.d_mean()
            if d_theta is not None:
                d_theta[part.stored] = counts.d_theta()
        for block in stored.blocks():
            terms = _nb_log_zero(mean[block.rows], block.take_grouped(theta))
            if logits is not None:
                terms = _inflated_log_zero(terms, block.take(logits))
            value[block.rows] = block.put(log_pmf, terms).sum(dim=1)
        if differentiable:
            ctx.save_for_backward(mean, theta, logits, *derivatives)
            ctx.stored = stored
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        mean, theta, logits, d_mean, d_theta, d_logits = ctx.saved_tensors
        grad_mean = None if d_mean is None else torch.empty_like(mean)
        grad_theta = None if d_theta is None else torch.zeros_like(theta)
        grad_logits = None if d_logits is None else torch.zeros_like(logits)
        for block in ctx.stored.blocks():
            weight = grads[0][block.rows, None]
            own_mean, own_theta = mean[block.rows], block.take_grouped(theta)
            zero_mean, zero_theta = _nb_zero_derivatives(own_mean, own_theta, grad_theta is not None)
            if logits is not None:
                log_zero, own_logits = _nb_log_zero(own_mean, own_theta), block.take(logits)
                # The probability that a zero is the negative binomial's.
                of_nb = torch.sigmoid(log_zero - own_logits)
                zero_mean *= of_nb
                if zero_theta is not None:
                    zero_theta *= of_nb
                if grad_logits is not None:
                    zero_logits = torch.sigmoid(own_logits - log_zero).mul_(torch.sigmoid(-own_logits))
                    zero_logits.mul_(log_zero.expm1_()).neg_()
                    block.add(block.put(d_logits, zero_logits).mul_(weight), grad_logits)
            if grad_mean is not None:
                torch.mul(block.put(d_mean, zero_mean), weight, out=grad_mean[block.rows])
            if grad_theta is not None:
                block.add_grouped(block.put(d_theta, zero_theta).mul_(weight), grad_theta)
        return None, grad_mean, grad_theta, grad_logits, None, None


class _Poisson(torch.autograd.Function):
    """As :class:`_GammaPoisson`."""

    @staticmethod
    def forward(ctx: Any, x: CSRRows, mean: torch.Tensor, differentiable: bool) -> torch.Tensor:
        stored = Stored.of(x)
        log_pmf, value = torch.empty_like(x.data), mean.new_empty(x.n_rows)
        d_mean = torch.empty_like(x.data) if differentiable and ctx.needs_input_grad[1] else None
        for part in stored.parts():
            counts, own = part.counts, part.take(mean)
            terms = log1p_excess((own - counts).div_(counts), own / counts).mul_(counts).neg_()
            terms -= stirling_error(counts)
            log_pmf[part.stored] = terms.sub_((counts * (2 * math.pi)).log_().mul_(0.5))
            if d_mean is not None:
                d_mean[part.stored] = (counts - own).div_(own)
        for block in stored.blocks():
            value[block.rows] = block.put(log_pmf, -mean[block.rows]).sum(dim=1)
        ctx.save_for_backward(d_mean)
        ctx.stored = stored
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (d_mean,) = ctx.saved_tensors
        x = ctx.stored.x
        grad_mean = d_mean.new_empty(x.n_rows, x.n_vars)
        for block in ctx.stored.blocks():
            terms = block.put(d_mean, grad_mean[block.rows].fill_(-1))
            terms.mul_(grads[0][block.rows, None])
        return None, grad_mean, None


class _NBCounts(NamedTuple):
    r"""Negative binomial at stored counts, all above zero, in terms that do not cancel (Loader 2000).

    .. math::
        \log p(x) = S(x+\theta) - S(\theta) - S(x) - \tfrac12 \log (2\pi x (1 + x/\theta))
        - x\, e\left(\frac{\theta (\mu - x)}{x (\mu+\theta)}\right) - \theta\, e\left(\frac{x-\mu}{\mu+\theta}\right)

    with :math:`S` of :func:`stirling_error` and :math:`e(t) = t - \log(1+t)`. The derivative in theta is
    :func:`digamma_excess` less the last :math:`e`. Those two all but cancel for a single count at a small mean; for
    ``x = 1`` both value and derivative are written instead as those of ``x = 0`` and what one count changes.
    """

    x: torch.Tensor
    mean: torch.Tensor
    theta: torch.Tensor
    is_one: torch.Tensor
    share: torch.Tensor
    rest: torch.Tensor
    excess: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, mean: torch.Tensor, theta: torch.Tensor) -> _NBCounts:
        is_one = 1 - (x - 1).abs_().sign_()
        inverse = 1 / (mean + theta)
        anchor = x - is_one
        excess = log1p_excess((anchor - mean).mul_(inverse), (anchor + theta).mul_(inverse))
        return cls(x, mean, theta, is_one, mean * inverse, theta * inverse, excess)

    def log_pmf(self, theta_error: torch.Tensor | None) -> torch.Tensor:
        """Logarithm of the probability; ``theta_error`` is the Stirling error of theta, if known."""
        x, above, inverse = self.x, self.x + self.theta, 1 / self.x
        deviation = (self.mean - x).mul_(self.rest).mul_(inverse)
        result = log1p_excess(deviation, (above * self.share).mul_(inverse)).mul_(x).neg_()
        result += stirling_error(above)
        result -= stirling_error(self.theta) if theta_error is None else theta_error
        result -= stirling_error(x)
        result -= above.div_(self.theta).mul_(x).mul_(2 * math.pi).log_().mul_(0.5)
        # p(1) = p(0) mu theta / (mu + theta), and log p(0) is minus that less theta e.
        odds = self.mean * self.rest
        result.lerp_(odds.log().sub_(odds), self.is_one)
        return result.addcmul_(self.excess, self.theta, value=-1)

    def d_mean(self) -> torch.Tensor:
        """Derivative in the mean."""
        return (self.x - self.mean).div_(self.mean).mul_(self.rest)

    def d_theta(self) -> torch.Tensor:
        """Derivative in theta."""
        result = digamma_excess(self.x, self.theta)
        return result.lerp_(self.share / self.theta, self.is_one).sub_(self.excess)


def _nb_log_zero(mean: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """Logarithm of the negative binomial's probability of zero."""
    return (mean / theta).log1p_().mul_(theta).neg_()


def _nb_zero_derivatives(
    mean: torch.Tensor, theta: torch.Tensor, wants_theta: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    r"""Derivatives of :func:`_nb_log_zero` in mean, :math:`-1 / (1 + r)`, and in theta, :math:`s - \log (1 + r)`.

    Where :math:`s = r / (1 + r) = \mu / (\mu + \theta)` is small, the second is the series
    :math:`-s^2/2 - s^3/3 - \dots`, up to a bound; from there it goes on with what the bound leaves of s and of the
    logarithm, exactly zero below it.
    """
    ratio = mean / theta
    rest = (ratio + 1).reciprocal_()
    d_theta = None
    if wants_theta:
        bound = _SERIES_BOUND[mean.dtype]
        d_theta = ratio.mul_(rest)
        power = d_theta.clamp(max=bound)
        d_theta.sub_(power).add_((rest * (1 / (1 - bound))).clamp_(max=1).log_())
        square = power * power
        cube = power.mul_(square)
        d_theta.sub_(square, alpha=1 / 2).sub_(cube, alpha=1 / 3)
        d_theta.addcmul_(square, square, value=-1 / 4).addcmul_(square, cube, value=-1 / 5)
    return rest.neg_(), d_theta


def _inflated_log_zero(log_zero: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Logarithm of the probability of a zero, from that of the negative binomial and the logits of an extra one.

    Down to 1/2 it is what counts leave of 1, and below the sum of the two kinds of zeros. Each is bounded where the
    other holds.
    """
    other = torch.sigmoid(-logits)
    likely = torch.expm1(log_zero).mul_(other).clamp_(min=-0.5).log1p_()
    # Where a zero is less likely than 1/2, so is an extra one.
    unlikely = torch.logaddexp(log_zero, logits).add_(other.clamp_(min=0.5).log_())
    return likely.add_(unlikely.add_(math.log(2)).clamp_(max=0))


def _in_one_precision(x: CSRRows, *dense: torch.Tensor) -> tuple[Any, ...]:
    """Bring all to the widest precision of the parameters, at least float32, and parameters in order in memory."""
    dtype = torch.float32
    for values in dense:
        dtype = torch.promote_types(dtype, values.dtype)
    return x.with_data(x.data.to(dtype)), *[values.to(dtype).contiguous() for values in dense]


def _check_mean(x: CSRRows, mean: torch.Tensor) -> None:
    if mean.shape != (x.n_rows, x.n_vars):
        raise InvalidArgumentError(
            f"mean has shape {tuple(mean.shape)}, but x has {x.n_rows} cells and {x.n_vars} genes. "
            f"Pass one expected count per cell and gene, shape ({x.n_rows}, {x.n_vars})."
        )


def _check_theta(x: CSRRows, theta: torch.Tensor, group: torch.Tensor | None) -> None:
    if group is None:
        if theta.shape not in ((x.n_vars,), (x.n_rows, x.n_vars)):
            raise InvalidArgumentError(
                f"theta has shape {tuple(theta.shape)}, but x has {x.n_rows} cells and {x.n_vars} genes. "
                f"Pass shape ({x.n_vars},), one per gene, or ({x.n_rows}, {x.n_vars}), one per entry; "
                f"for (n_groups, {x.n_vars}) pass group too, the row of theta that each cell takes."
            )
        return
    if theta.dim() != 2 or theta.shape[1] != x.n_vars:
        raise InvalidArgumentError(
            f"theta has shape {tuple(theta.shape)}, but group was given and x has {x.n_vars} genes. "
            f"Pass shape (n_groups, {x.n_vars}), or leave out group."
        )
    if group.shape != (x.n_rows,):
        raise InvalidArgumentError(
            f"group has shape {tuple(group.shape)}, but x has {x.n_rows} cells. "
            f"Pass one code per cell, shape ({x.n_rows},)."
        )
    if group.dtype not in (torch.int32, torch.int64):
        raise InvalidArgumentError(f"group holds {group.dtype}. Pass int32 or int64 codes, which are rows of theta.")


def _check_zero_logits(x: CSRRows, zero_logits: torch.Tensor) -> None:
    if zero_logits.shape not in ((x.n_vars,), (x.n_rows, x.n_vars)):
        raise InvalidArgumentError(
            f"zero_logits has shape {tuple(zero_logits.shape)}, but x has {x.n_rows} cells and {x.n_vars} genes. "
            f"Pass shape ({x.n_rows}, {x.n_vars}), one per entry, or ({x.n_vars},), one per gene."
        )
