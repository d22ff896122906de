"""Optional priors of z and of hidden activations: each is off until it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from cellstill.nn.priors import gamma_of_log, horseshoe, sparse_gamma

if TYPE_CHECKING:
    from cellstill.vi.config import VAEConfig

_FLOOR_OF_HIDDEN = 0.3
"""Activations below it count as zero. No posterior keeps them off the pole of the density at 0, as it does z: with a
floor of 0.1 all of them end there, and the decoder is dead."""


class Relevance(nn.Module):
    r"""Automatic relevance determination: each dimension of z learns the precision of its own prior.

    .. math:: z_{nj} \sim \mathrm{Normal}(0, 1 / \alpha_j), \qquad \alpha_j \sim \mathrm{Gamma}(1, \mathrm{scale}^2)

    A dimension that no decoder needs says nothing about its precision, which settles at the prior's mean: z is then of
    the order of ``scale``. One that carries something pays for being smaller than its content.

    Parameters
    ----------
    n_latent
        Dimensions.
    scale
        Standard deviation of a dimension that is not needed. Smaller shrinks further.

    References
    ----------
    MacKay (1992), Bayesian interpolation. Tipping (2001), Sparse Bayesian learning.
    """

    def __init__(self, n_latent: int, scale: float) -> None:
        super().__init__()
        self.rate = scale**2
        self.log_precision = nn.Parameter(torch.zeros(n_latent))

    def variance(self) -> torch.Tensor:
        """Variance of the prior of each dimension, shape ``(n_latent,)``."""
        return torch.exp(-self.log_precision)

    def penalty(self) -> torch.Tensor:
        """Negative log prior, as a density of the log precision, which settles at the mean of the precision."""
        return -gamma_of_log(self.log_precision, 1.0, self.rate).sum()


def penalties_of_z(
    config: VAEConfig, z: torch.Tensor, present: torch.Tensor | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Negative log densities of a draw of z, that multiply its Normal prior.

    Parameters
    ----------
    config
        Of the model.
    z
        Shape ``(n, n_latent)``.
    present
        1 where a cell has the modality that a dimension belongs to, 0 elsewhere, shape of ``z``; ``None`` is 1.

    Yields
    ------
    Term, and its value per cell, shape ``(n,)``.
    """
    densities = {}
    if config.z_sparsity is not None:
        densities["z_sparsity"] = sparse_gamma(z, config.z_sparsity / z.shape[1])
    if config.z_horseshoe is not None:
        densities["z_horseshoe"] = horseshoe(z, config.z_horseshoe)
    for term, density in densities.items():
        yield term, -(density if present is None else density * present).sum(dim=1)


def penalty_of_hidden(n_active: float, hidden: torch.Tensor) -> torch.Tensor:
    """Negative log density of hidden activations, ``(n, n_hidden)``: Gamma(n_active / n_hidden, 1); per cell."""
    return -sparse_gamma(hidden.float(), n_active / hidden.shape[1], floor=_FLOOR_OF_HIDDEN).sum(dim=1)


def dimensions_present(widths: Mapping[str, int], present: Mapping[str, torch.Tensor | None]) -> torch.Tensor | None:
    """Mask of the dimensions of a concatenated z that cells have; ``None`` where all have all.

    Parameters
    ----------
    widths
        Dimensions of each modality, in order.
    present
        Mask of the cells that have each modality, shape ``(n,)``; ``None`` is all.
    """
    masks = [mask for mask in present.values() if mask is not None]
    if not masks:
        return None
    everyone = torch.ones_like(masks[0])
    parts = []
    for name, width in widths.items():
        mask = present[name]
        parts.append((everyone if mask is None else mask)[:, None].expand(-1, width))
    return torch.cat(parts, dim=1)
