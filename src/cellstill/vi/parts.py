"""The parts of a modality's mean and variance, each with its own prior."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from cellstill.nn.featurewise import containment_sum, gamma_of_log_sum, gamma_sum, log_normal_draw, log_softplus
from cellstill.vi.tables import CategoryTables

_NO_OVERDISPERSION = 1e8
_SCALING_AT_ONE = 0.7

Codes = Mapping[str, torch.Tensor]
"""Codes of the categories of each column, int64, shape ``(n,)``."""


class Background(nn.Module):
    r"""Additive background of each feature, summed over the ambient columns: :math:`b_{ef} = e^{\beta_{ef}}`.

    Parameters
    ----------
    categories
        Number of categories of each ambient column.
    n_vars
        Features.
    """

    def __init__(self, categories: Mapping[str, int], n_vars: int) -> None:
        super().__init__()
        self.beta = CategoryTables(categories, n_vars, math.log(1e-2))

    def forward(self, codes: Codes) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log background by group and feature, and the group of each cell."""
        if len(self.beta.tables) == 1:
            return self.beta(codes, lambda beta: beta)
        table, group = self.beta(codes, torch.exp)
        return table.log(), group

    def tables(self) -> list[torch.Tensor]:
        """Log background of the categories of each column."""
        return list(self.beta.tables)

    def shift(self, log_factor: torch.Tensor) -> None:
        """Multiply the background of all categories."""
        with torch.no_grad():
            for beta in self.beta.tables:
                beta += log_factor

    def penalty(self) -> torch.Tensor:
        """Gamma(1, 100) on the background, as a density of its logarithm, which settles at 0.01."""
        return _negative_sum([gamma_of_log_sum(beta, 1.0, 100.0) for beta in self.beta.tables])


class FeatureScaling(nn.Module):
    r"""Multiplicative factor of each feature, a product over columns.

    .. math:: y_f = \prod_k \mathrm{softplus}(\gamma_{kf}) / 0.7

    Every factor starts at 1.

    Parameters
    ----------
    categories
        Number of categories of each scaling column; without any, each feature has one factor.
    n_vars
        Features.
    """

    def __init__(self, categories: Mapping[str, int], n_vars: int) -> None:
        super().__init__()
        self.gamma = CategoryTables(categories, n_vars, math.log(math.expm1(_SCALING_AT_ONE)))

    def forward(self, codes: Codes) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log scaling by group and feature, and the group of each cell."""
        return self.gamma(codes, log_scaling)

    def penalty(self) -> torch.Tensor:
        """Gamma(200, 200) on every factor, as a density of its logarithm, which settles at 1."""
        return _negative_sum([gamma_of_log_sum(log_scaling(one), 200.0, 200.0) for one in self.gamma.tables])


class Dispersion(nn.Module):
    r"""Inverse dispersion by group and feature: :math:`q(\log\theta) = \mathrm{Normal}(m, \sigma)`.

    The containment prior :math:`\theta^{-1/2} \sim \mathrm{Exponential}(\lambda_d)`, with
    :math:`\lambda_d \sim \mathrm{Gamma}(9, 3)` learned per group, holds counts near Poisson as far as they allow it.

    Parameters
    ----------
    column
        Column of the groups; ``None`` is one group of all cells.
    n_groups, n_vars
        Sizes.
    per_cell
        Draw for every cell, not once per group.
    """

    def __init__(self, column: str | None, n_groups: int, n_vars: int, *, per_cell: bool = False) -> None:
        super().__init__()
        self.column, self.per_cell = column, per_cell
        self.mean = nn.Parameter(torch.full((n_groups, n_vars), math.log(9.0)))
        self.log_sigma = nn.Parameter(torch.full((n_groups, n_vars), math.log(0.1)))
        self.log_rate = nn.Parameter(torch.full((n_groups,), math.log(3.0)))

    def forward(self, codes: Codes, n: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Inverse dispersion by group and feature, drawn in training, and the group of each of ``n`` cells."""
        group = None if self.column is None else codes[self.column]
        mean: torch.Tensor = self.mean
        if not self.training:
            return mean.exp(), group
        log_sigma: torch.Tensor = self.log_sigma
        if self.per_cell:
            rows = torch.zeros(n, dtype=torch.int64, device=mean.device) if group is None else group
            mean, log_sigma, group = mean[rows], log_sigma[rows], torch.arange(n, device=mean.device)
        return log_normal_draw(mean, log_sigma), group

    def penalty(self) -> torch.Tensor:
        """Divergence from the containment prior, and the prior of its rate, Gamma(9, 3) as a density of the rate."""
        divergence = containment_sum(self.mean, self.log_sigma, self.log_rate)
        return divergence - gamma_sum(self.log_rate, 9.0, 3.0)


class NoOverdispersion(nn.Module):
    """Poisson: an inverse dispersion too large to be told from infinity, in place of :class:`Dispersion`."""

    theta: torch.Tensor

    def __init__(self, n_vars: int) -> None:
        super().__init__()
        self.register_buffer("theta", torch.full((n_vars,), _NO_OVERDISPERSION), persistent=False)

    def forward(self, codes: Codes, n: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Inverse dispersion by feature."""
        return self.theta, None

    def penalty(self) -> torch.Tensor:
        """Nothing is learned."""
        return self.theta.new_zeros(())


def _negative_sum(sums: Sequence[torch.Tensor]) -> torch.Tensor:
    return -(sums[0] if len(sums) == 1 else torch.stack(list(sums)).sum())


def log_scaling(gamma: torch.Tensor) -> torch.Tensor:
    r"""Logarithm of a factor, :math:`\log(\mathrm{softplus}(\gamma) / 0.7)`."""
    return log_softplus(gamma) - math.log(_SCALING_AT_ONE)
