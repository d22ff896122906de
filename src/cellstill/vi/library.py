"""Library size of a cell: its posterior, which starts from the observed total, and the prior of its group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from cellstill.nn.featurewise import log_normal_draw, lognormal_exponential_sum
from cellstill.nn.priors import gamma_of_log
from cellstill.nn.sparse import CSRRows
from cellstill.vi.networks import GaussianEncoder, Trunk

_START_VARIANCE = 1e-2


class LibraryPosterior(NamedTuple):
    """Posterior of log library size and its prior, each of shape ``(n, 1)``."""

    mean: torch.Tensor
    variance: torch.Tensor
    prior_mean: torch.Tensor
    prior_variance: torch.Tensor


class Library(nn.Module):
    r"""Log library size of a cell, centred over all cells: the mean cell has the sensitivity.

    .. math::
        \log l_n \sim \mathrm{Normal}(\log s + \mu_p,\; w \sigma^2_p), \qquad
        q(\log l_n) = \mathrm{Normal}(\log s + w_r (\log N_n - \overline{\log N}) + e(x_n), v(x_n))

    with the sensitivity s, and :math:`\mu_p, \sigma^2_p` mean and variance of the centred :math:`\log N` in the cell's
    group. Without the residual form the second term is left out. q(w_r) is LogNormal, its prior Exponential(1), and its
    mean starts at 1. Where s is learned, it starts at the sensitivity :math:`s_0`, with the prior Gamma(5, 5 / s_0).

    Parameters
    ----------
    n_vars, n_hidden, n_continuous, categories, dropout
        Of the encoder, which sees log1p of the counts, the continuous covariates, and the categories, if any.
    column
        Column of the groups; ``None`` is one group of all cells.
    n_groups
        Number of groups.
    sensitivity
        s, the scale of l. Predicted totals do not depend on it: expression is scaled by its inverse.
    variance_weight
        w. Larger lets library sizes stray further from the mean of their group.
    residual
        Use the observed total.
    learn_scale
        Learn s.
    """

    center: torch.Tensor
    group_mean: torch.Tensor
    group_variance: torch.Tensor

    def __init__(
        self,
        n_vars: int,
        *,
        n_hidden: int,
        n_continuous: int,
        categories: Mapping[str, int],
        dropout: float,
        column: str | None,
        n_groups: int,
        sensitivity: float,
        variance_weight: float,
        residual: bool,
        learn_scale: bool = False,
    ) -> None:
        super().__init__()
        self.column, self.variance_weight, self.log_sensitivity = column, variance_weight, math.log(sensitivity)
        trunk = Trunk(
            n_sparse=[n_vars], n_dense=n_continuous, categories=categories, widths=[n_hidden], dropout=dropout
        )
        self.encoder = GaussianEncoder(trunk, n_hidden, 1, start_variance=_START_VARIANCE)
        self.weight: nn.ParameterDict | None = None
        if residual:
            log_sigma = math.log(0.1)
            mean = -0.5 * math.exp(2 * log_sigma)
            self.weight = nn.ParameterDict(
                {"mean": nn.Parameter(torch.tensor(mean)), "log_sigma": nn.Parameter(torch.tensor(log_sigma))}
            )
        self.log_scale = nn.Parameter(torch.zeros(())) if learn_scale else None
        self.register_buffer("center", torch.zeros(()))
        self.register_buffer("group_mean", torch.zeros(n_groups))
        self.register_buffer("group_variance", torch.ones(n_groups))

    def forward(
        self, x: CSRRows, totals: torch.Tensor, dense: torch.Tensor | None, codes: Mapping[str, torch.Tensor]
    ) -> LibraryPosterior:
        """Posterior and prior of cells with ``totals``, shape ``(n,)``, of at least 1."""
        mean, variance = self.encoder([x.log1p()], dense, codes)
        log_scale = self.log_sensitivity if self.log_scale is None else self.log_sensitivity + self.log_scale
        mean = mean + log_scale
        if self.weight is not None:
            mean = mean + self.residual_weight() * (totals.log() - self.center)[:, None]
        prior = self.group_mean + log_scale, self.variance_weight * self.group_variance
        return LibraryPosterior(mean, variance, *[self._of_cells(values, len(totals), codes) for values in prior])

    def _of_cells(self, values: torch.Tensor, n: int, codes: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Values of the groups of ``n`` cells, shape ``(n, 1)``."""
        return values.expand(n)[:, None] if self.column is None else values.index_select(0, codes[self.column])[:, None]

    def log_observed(self, totals: torch.Tensor) -> torch.Tensor:
        """Observed totals on the scale of log l, shape ``(n, 1)``."""
        return (totals.log() - self.center)[:, None] + self.log_sensitivity

    def shift(self, log_unit: torch.Tensor) -> None:
        """Move the means of all groups, which are relative to the center."""
        self.group_mean += log_unit

    def residual_weight(self) -> torch.Tensor:
        """A draw of w_r in training, its mean otherwise."""
        assert self.weight is not None
        mean, log_sigma = self.weight["mean"], self.weight["log_sigma"]
        if self.training:
            return log_normal_draw(mean, log_sigma)
        return (mean + 0.5 * (2 * log_sigma).exp()).exp()

    def penalty(self) -> torch.Tensor:
        """Divergence of w_r from its prior, times the variance weight."""
        if self.weight is None:
            return self.center.new_zeros(())
        return self.variance_weight * lognormal_exponential_sum(self.weight["mean"], self.weight["log_sigma"])

    def scale_penalty(self) -> torch.Tensor:
        """Gamma(5, 5) on s over the sensitivity, as a density of its logarithm, which settles at 1."""
        assert self.log_scale is not None
        return -gamma_of_log(self.log_scale, 5.0, 5.0)
