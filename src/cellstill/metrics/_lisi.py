"""Local inverse Simpson index: how many categories a cell meets in its neighbourhood.

Names of this module are public through :mod:`cellstill.metrics.integration`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellstill.errors import InvalidArgumentError
from cellstill.metrics._inputs import category_codes, fewer_neighbours
from cellstill.metrics.neighbourhood import Neighbours

MIN_NEIGHBOURHOOD = 9
_CHUNK = 8192
_ENTROPY_TOLERANCE = 1e-5
_MAX_STEPS = 60


def lisi(neighbours: Neighbours, codes: Any, perplexity: float = 30) -> NDArray[np.float64]:
    r"""Local inverse Simpson index of every cell.

    Neighbour :math:`j` of cell :math:`i` at distance :math:`d_{ij}` weighs
    :math:`p_{ij} \propto \exp(-\beta_i d_{ij})`, where bisection sets :math:`\beta_i` so that the entropy of the
    weights is the logarithm of the perplexity. The index is

    .. math:: \mathrm{LISI}_i = 1 \Big/ \sum_b \Big(\sum_{j: b_j = b} p_{ij}\Big)^2,

    the number of equally common categories that would be as diverse as the neighbourhood is. The paper calls the
    kernel Gaussian; its authors' program and those that follow it take it of the distance, not of its square, as is
    done here.

    Parameters
    ----------
    neighbours
        Neighbours of each cell, itself excluded.
    codes
        One category per cell, without NaN; any array-like.
    perplexity
        Effective number of neighbours, more than 1 and less than ``neighbours.n_neighbors``; a third of them is usual.
        Smaller values look closer and are noisier; larger ones smooth over coarser neighbourhoods.

    Returns
    -------
    ndarray
        Shape ``(n_obs,)``, from 1 (one category all around) to the number of categories (all equally common).

    Raises
    ------
    InvalidArgumentError
        If the perplexity cannot be reached with so many neighbours, or categories are missing.

    References
    ----------
    Korsunsky et al. (2019), Fast, sensitive and accurate integration of single-cell data with Harmony, Nat Methods 16.
    """
    if not 1 < perplexity < neighbours.n_neighbors:
        raise InvalidArgumentError(
            f"perplexity={perplexity} must lie between 1 and the {neighbours.n_neighbors} neighbours of each cell; "
            "a third of them is usual."
        )
    return lisi_of_each(neighbours, [category_codes("codes", codes, neighbours.n_obs)[0]], perplexity)[0]


def lisi_of_each(
    neighbours: Neighbours, code_sets: Sequence[NDArray[np.integer]], perplexity: float
) -> NDArray[np.float64]:
    """LISI of several labellings with the same weights; shape ``(len(code_sets), n_obs)``."""
    result = np.empty((len(code_sets), neighbours.n_obs))
    for start in range(0, neighbours.n_obs, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        weights = _weights_of_perplexity(neighbours.distances[chunk].astype(np.float64), perplexity)
        cell = np.arange(len(weights))[:, None]
        for codes, row in zip(code_sets, result, strict=True):
            n_categories = int(codes.max()) + 1
            bins = cell * n_categories + codes[neighbours.indices[chunk]]
            shares = np.bincount(bins.ravel(), weights.ravel(), minlength=len(weights) * n_categories)
            simpson = np.square(shares.reshape(len(weights), n_categories)).sum(axis=1)
            row[chunk] = 1 / np.minimum(simpson, 1)  # shares may sum to a little more than 1
    return result


def neighbourhood_size(n_neighbors: int, n_obs: int) -> int:
    """Return the neighbourhood's size, the cell itself counted, that ``n_obs`` cells allow."""
    n_neighbors = fewer_neighbours(n_neighbors, n_obs, "cells")
    if n_neighbors < MIN_NEIGHBOURHOOD:
        raise InvalidArgumentError(
            f"LISI needs neighbourhoods of at least {MIN_NEIGHBOURHOOD} cells; found n_neighbors={n_neighbors} "
            f"and n_obs={n_obs}."
        )
    return n_neighbors


def _weights_of_perplexity(distances: NDArray[np.float64], perplexity: float) -> NDArray[np.float64]:
    """Weights ``exp(-beta d)`` of each row, summing to 1, with the ``beta`` whose entropy is ``log(perplexity)``.

    Where more neighbours than the perplexity lie at the same least distance no ``beta`` does it, and these neighbours
    share the weight equally.
    """
    # A common shift of a row's distances cancels in its weights; a common scale makes beta a pure number near 1.
    distances = distances - distances.min(axis=1, keepdims=True)
    scale = distances.mean(axis=1, keepdims=True)
    distances /= np.where(scale > 0, scale, 1)
    target = np.log(perplexity)
    beta = np.ones((len(distances), 1))
    low, high = np.zeros_like(beta), np.full_like(beta, np.inf)
    for _ in range(_MAX_STEPS):
        weights = np.exp(-beta * distances)
        total = weights.sum(axis=1, keepdims=True)
        weights /= total
        excess = np.log(total) + beta * (weights * distances).sum(axis=1, keepdims=True) - target
        if np.abs(excess).max() < _ENTROPY_TOLERANCE:
            break
        too_flat = excess > 0
        low, high = np.where(too_flat, beta, low), np.where(too_flat, high, beta)
        beta = np.where(np.isinf(high), 2 * beta, (low + np.where(np.isinf(high), beta, high)) / 2)
    return weights
