"""Ambient RNA as a share of the counts: a rate and a profile for each category."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from torch import nn

from cellstill.nn.priors import sparse_gamma
from cellstill.vi.parts import Codes
from cellstill.vi.tables import join

_SHAPE, _FLOOR = 0.5, 1e-3
_LOWEST_RATE = 1e-6


class Soup(nn.Module):
    r"""Soup of the categories of one column.

    .. math:: b_{ef} = r_e\, T\, \chi_{ef}

    with the rate r of a category, the composition :math:`\chi` of its cells, and the total expression T. Nothing of it
    is learned: the rate would grow wherever the decoder has not yet reached what cells express, and the composition
    would take up what differs between batches.

    Parameters
    ----------
    n_categories, n_vars
        Sizes.

    Attributes
    ----------
    rate, interval, identified
        What counts say of each category's rate, shapes ``(n_categories,)``, ``(n_categories, 2)``,
        ``(n_categories,)``; the rate is what the model starts from, also where counts do not identify it.
    """

    rate: torch.Tensor
    interval: torch.Tensor
    identified: torch.Tensor
    expected: torch.Tensor

    def __init__(self, n_categories: int, n_vars: int) -> None:
        super().__init__()
        self.register_buffer("rate", torch.full((n_categories,), 0.1))
        self.register_buffer("interval", torch.tensor([[0.0, 1.0]]).repeat(n_categories, 1))
        self.register_buffer("identified", torch.zeros(n_categories, dtype=torch.bool))
        self.register_buffer("expected", torch.full((n_categories, n_vars), math.log(1e-2)))

    def forward(self) -> torch.Tensor:
        """Log background, categories x features."""
        return self.expected

    def set_rate(self, rate: np.ndarray, interval: np.ndarray, identified: np.ndarray) -> None:
        """Set the rates, before :meth:`start`."""
        self.rate.copy_(torch.from_numpy(rate))
        self.interval.copy_(torch.from_numpy(interval))
        self.identified.copy_(torch.from_numpy(identified))

    def start(self, expression: np.ndarray) -> None:
        """Set the background to its share of each category's mean expression, categories x features."""
        rate = self.rate.clamp(min=_LOWEST_RATE)
        self.expected.copy_((rate[:, None] * torch.from_numpy(expression)).log())


class ProfileBackground(nn.Module):
    r"""Additive background that is soup: a share of the counts, composed like the cells it comes from.

    Likelihood alone does not tell background from low expression, since a decoder can paint both. Here the rate comes
    from genes that some cells lack (:func:`~cellstill.vi.soup.estimate_soup`), the profile is the mean expression of
    the category's cells, and native expression pays for being small but not zero (:meth:`native_penalty`).

    Parameters
    ----------
    categories
        Number of categories of each ambient column, whose soups add up; without any, all cells share one.
    n_vars
        Features.

    Attributes
    ----------
    typical
        Mean expression of each feature, the unit of native expression in its penalty.
    """

    typical: torch.Tensor

    def __init__(self, categories: Mapping[str, int], n_vars: int) -> None:
        super().__init__()
        self.columns = list(categories)
        self.soups = nn.ModuleList([Soup(n, n_vars) for n in list(categories.values()) or [1]])
        self.register_buffer("typical", torch.ones(n_vars))

    def forward(self, codes: Codes) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log background by group and feature, and the group of each cell."""
        tables = self.tables()
        if not self.columns:
            return tables[0], None
        if len(tables) == 1:
            return tables[0], codes[self.columns[0]]
        table, group = join([one.exp() for one in tables], [codes[column] for column in self.columns])
        return table.log(), group

    def tables(self) -> list[torch.Tensor]:
        """Log background of the categories of each column."""
        return [soup() for soup in self.soups]

    def of(self, position: int) -> Soup:
        """Soup of one column."""
        return cast(Soup, self.soups[position])

    def shift(self, log_factor: torch.Tensor) -> None:
        """Multiply the expected background of all categories."""
        for position in range(len(self.soups)):
            self.of(position).expected += log_factor

    def native_penalty(self, native: torch.Tensor) -> torch.Tensor:
        r"""Negative log density of native expression under a sparse prior, summed over features.

        :math:`\rho_{nf} / \bar\rho_f \sim \mathrm{Gamma}(0.5, 0.5)`, as a density of the ratio, with both as shares
        of their totals: most features are near 0 in most cells, or well above it.

        Parameters
        ----------
        native
            Shape ``(n, n_vars)``.

        Returns
        -------
        Shape ``(n,)``.
        """
        # Of the composition, so that nothing is gained by smaller expression and larger library sizes.
        ratio = native / native.sum(dim=1, keepdim=True) / (self.typical / self.typical.sum())
        return -sparse_gamma(ratio, _SHAPE, _SHAPE, floor=_FLOOR).sum(dim=1)
