"""Posterior draws of the native expression of cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from cellstill.de import BayesianConfig
from cellstill.vi.cells import Cells
from cellstill.vi.evaluation import Block, blocks, expected_means, native_expression, to_numpy
from cellstill.vi.module import RegularizedVAE


def posterior_draws(
    module: RegularizedVAE,
    name: str,
    cells: Cells,
    wanted: np.ndarray,
    is_first: np.ndarray,
    targets: Sequence[Mapping[str, int]],
    how: BayesianConfig,
) -> Iterator[Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    r"""Yield draws of the native expression of the ``wanted`` cells, as shares, averaged over the ``targets``.

    With them come the counts that the draw expects of these cells as they were measured, in their own categories, with
    scaling and background, so that :func:`~cellstill.de.bayesian_de` can tell by how much the counts of each sample
    depart from what was decoded.

    In each draw, every cell has a draw of z from its posterior. That alone would take the decoder for known, and what
    is left of the counts' noise in its estimate for an effect. In each draw and group, the log rate of each feature is
    therefore moved by :math:`\delta_f \sim \mathrm{Normal}(0, 1 / (1 + I_f))`, with the information that the group's
    cells have about it (a Laplace approximation, with a standard normal prior),

    .. math::
        I_f = \sum_n \frac{(l_n \rho_{nf} y_{nf})^2}{\mu_{nf} + \mu_{nf}^2 / \theta_f}

    which is small where counts are few or most of them background.

    Parameters
    ----------
    module, name, cells
        Model, modality, and cells that have it.
    wanted
        Positions of the cells of the two groups.
    is_first
        Mask of those of the first, shape of ``wanted``.
    targets
        Categories to decode as.
    how
        Number of draws, seed, and cells decoded at a time, on which the draws do not depend.
    """
    subset, group = cells[wanted], np.where(is_first, 0, 1)
    information = np.zeros((2, module.config.modalities[name].n_vars))
    for block in blocks(module, subset, how.batch_size):
        each = _information(module, name, block)
        first = torch.from_numpy(is_first[block.rows]).to(each)
        information += to_numpy(torch.stack([first, 1 - first]) @ each)
    spread = (1 + information) ** -0.5
    rng = np.random.default_rng(how.seed)
    for _ in range(how.n_samples):
        factors = np.exp(spread * rng.standard_normal(spread.shape)).astype(np.float32)
        yield _draw(module, name, subset, wanted, (factors, group), targets, how.batch_size, rng)


def _information(module: RegularizedVAE, name: str, block: Block) -> torch.Tensor:
    """Fisher information of each count about the logarithm of its native expression, cells x features."""
    modality, n = module.modality(name), len(block.latent.mean)
    native, background = expected_means(module, name, block)
    expected = native if background is None else native + background
    theta, group = modality.dispersion(block.batch, n)
    theta = theta if group is None else theta[group]
    return native.square() / (expected + expected.square() / theta).clamp(min=torch.finfo(expected.dtype).tiny)


def _draw(
    module: RegularizedVAE,
    name: str,
    cells: Cells,
    positions: np.ndarray,
    moved: tuple[np.ndarray, np.ndarray],
    targets: Sequence[Mapping[str, int]],
    batch_size: int,
    rng: np.random.Generator,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """One draw; ``moved`` are the factors of the two groups, and the group of each cell."""
    for block in blocks(module, cells, batch_size):
        latent = block.latent
        noise = rng.standard_normal(latent.mean.shape, dtype=np.float32)
        z = latent.mean + latent.variance.sqrt() * torch.from_numpy(noise).to(latent.mean)
        factors = torch.from_numpy(moved[0][moved[1][block.rows]]).to(latent.mean)
        native, background = expected_means(module, name, block, z=z)
        expected = native * factors if background is None else native * factors + background
        rates = native_expression(module, name, z, block.batch, targets) * factors
        yield positions[block.rows], to_numpy(rates / rates.sum(dim=1, keepdim=True)), to_numpy(expected)
