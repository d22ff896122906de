"""Library size of a cell that lacks a modality, expected from the counts that the cell has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import nn

from cellstill.nn.sparse import CSRRows

if TYPE_CHECKING:
    from cellstill.vi.library import LibraryPosterior


class Told(NamedTuple):
    """What a modality tells of the library sizes of others.

    Attributes
    ----------
    rows
        What its encoder sees of the counts.
    log_total
        Centred logarithm of the totals, shape ``(n,)``.
    has
        1 for the cells that have the modality, 0 for those that lack it, shape ``(n,)``.
    """

    rows: CSRRows
    log_total: torch.Tensor
    has: torch.Tensor


class ExpectedLibrary(nn.Module):
    r"""Log library size of a modality m, given the counts of the others.

    .. math::
        \log l_n \sim \mathrm{Normal}\Big(\log s + \mu_p + a + \sum_{k \ne m} h_{nk} \big(b_k^\top \tilde x_n^{(k)} +
            c_k (\log N_n^{(k)} - \overline{\log N^{(k)}}) - d_k\big),\; u w \sigma^2_p\Big)

    with what the encoder of modality k sees of a cell, :math:`\tilde x`, its total N, and h, which is 1 where the cell
    has the modality and 0 elsewhere. a, b, c, d, and u, the unexplained variance over that of the prior, are those of
    :func:`~cellstill.vi.expected_fit.fit_expected_libraries`; until then all but u = 1 are 0: the prior.

    z could tell the same, but encoders learn their training cells by heart: z of those that have the modality is not
    like z of those that lack it.

    Parameters
    ----------
    n_vars
        Features of each of the other modalities.
    """

    intercept: torch.Tensor
    unexplained: torch.Tensor

    def __init__(self, n_vars: Mapping[str, int]) -> None:
        super().__init__()
        self.others = list(n_vars)
        self.register_buffer("intercept", torch.zeros(()))
        self.register_buffer("unexplained", torch.ones(()))
        for i, n in enumerate(n_vars.values()):
            self.register_buffer(f"weight{i}", torch.zeros(n))
            self.register_buffer(f"slope_and_offset{i}", torch.zeros(2))

    def forward(self, found: LibraryPosterior, told: Mapping[str, Told], has: torch.Tensor) -> LibraryPosterior:
        """Replace the posterior of the cells that lack the modality.

        Parameters
        ----------
        found
            Posterior of all cells, and its prior.
        told
            Of the other modalities.
        has
            1 for the cells that have the modality, 0 for those that lack it, shape ``(n,)``.
        """
        shift = self.intercept.expand(len(has))
        for i, name in enumerate(self.others):
            x, log_total, shown = told[name]
            weight, (slope, offset) = self.get_buffer(f"weight{i}"), self.get_buffer(f"slope_and_offset{i}")
            product = x.sum_rows(x.data * weight[x.indices])
            shift = shift + shown * (product + slope * log_total - offset)
        lacks = has[:, None] == 0
        return found._replace(
            mean=torch.where(lacks, found.prior_mean + shift[:, None], found.mean),
            variance=torch.where(lacks, self.unexplained * found.prior_variance, found.variance),
        )

    def fill(self, name: str, weight: np.ndarray, slope: float, offset: float) -> None:
        """Set b, c and d of one of the other modalities."""
        i = self.others.index(name)
        self.get_buffer(f"weight{i}").copy_(torch.from_numpy(weight))
        self.get_buffer(f"slope_and_offset{i}").copy_(torch.tensor([slope, offset]))
