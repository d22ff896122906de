from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cellstill.errors import CellstillWarning, InvalidArgumentError, level_outside
from cellstill.metrics._inputs import category_codes, check_embedding, fewer_neighbours
from cellstill.metrics._search import approximate_search, exact_search, search_other_batches

EXACT_UP_TO = 50_000
_CHUNK = 8192


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The nearest neighbours of every cell, the cell itself not among them.

    Attributes
    ----------
    indices
        Rows of the neighbours, nearest first; shape ``(n_obs, n_neighbors)``.
    distances
        Their Euclidean distances, in the units of the embedding; same shape.
    """

    indices: NDArray[np.integer]
    distances: NDArray[np.floating]

    def __post_init__(self) -> None:
        if self.indices.ndim != 2 or self.indices.shape != self.distances.shape:
            raise InvalidArgumentError(
                "indices and distances must both have shape (n_obs, n_neighbors); "
                f"found {self.indices.shape} and {self.distances.shape}."
            )

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        return self.indices.shape[0]

    @property
    def n_neighbors(self) -> int:
        """Number of neighbours of each cell."""
        return self.indices.shape[1]

    def nearest(self, n_neighbors: int) -> Neighbours:
        """Return the ``n_neighbors`` nearest of these neighbours, as views."""
        if not 1 <= n_neighbors <= self.n_neighbors:
            raise InvalidArgumentError(f"n_neighbors={n_neighbors} must lie between 1 and {self.n_neighbors}.")
        return Neighbours(self.indices[:, :n_neighbors], self.distances[:, :n_neighbors])


def nearest_neighbours(
    embedding: ArrayLike, n_neighbors: int, *, exact_up_to: int = EXACT_UP_TO, seed: int = 0
) -> Neighbours:
    """Find the nearest neighbours of every cell in Euclidean distance, the cell itself excluded.

    Up to ``exact_up_to`` cells the search is exact, by scikit-learn, which chooses a kd-tree in few dimensions and
    blocked brute force in many. Its cost grows with the square of ``n_obs``, so that larger data go to nearest
    neighbour descent (pynndescent), whose cost is nearly linear and which misses a neighbour now and then.
    Neither holds an array of ``n_obs`` by ``n_obs``.

    Parameters
    ----------
    embedding
        Coordinates of shape ``(n_obs, n_dims)``.
    n_neighbors
        Neighbours of each cell, at most ``n_obs - 1``.
    exact_up_to
        Number of cells up to which the search is exact. Larger values buy exactness with quadratic time.
    seed
        Seed of the approximate search, which repeats itself for the same seed and number of threads. The exact one
        draws no random numbers.

    Returns
    -------
    Neighbours
        Indices and distances of shape ``(n_obs, n_neighbors)``, nearest first.

    Raises
    ------
    InvalidArgumentError
        If the embedding is not a finite two-dimensional array, or has too few cells for ``n_neighbors``.

    References
    ----------
    Dong, Moses and Li (2011), Efficient k-nearest neighbor graph construction for generic similarity measures.
    """
    points = check_embedding("embedding", embedding)
    if not 1 <= n_neighbors < len(points):
        raise InvalidArgumentError(
            f"n_neighbors={n_neighbors} must lie between 1 and n_obs - 1 = {len(points) - 1}: "
            "a cell is not its own neighbour."
        )
    # Squared distances computed as |x|^2 + |y|^2 - 2xy cancel badly far from the origin.
    points = points - points.mean(axis=0)
    if len(points) <= exact_up_to:
        return Neighbours(*exact_search(points, None, n_neighbors))
    return Neighbours(*approximate_search(points, n_neighbors, seed))


def knn_accuracy(embedding: ArrayLike, labels: Any, *, n_neighbors: int = 15) -> float:
    """Share of cells whose label is the majority among their nearest neighbours (leave one out).

    Between labels with equally many votes the one with the nearest member wins.

    Parameters
    ----------
    embedding
        Coordinates of shape ``(n_obs, n_dims)``.
    labels
        One category per cell, without NaN.
    n_neighbors
        Voters. More of them steady the vote and blur rare labels: a label of fewer than about ``n_neighbors / 2``
        cells cannot win one. Reduced to ``n_obs - 1``, with a warning, for smaller data.

    Returns
    -------
    float
        Accuracy between 0 and 1. A label of a single cell is never found.

    Raises
    ------
    InvalidArgumentError
        If the labels are missing for a cell or do not fit the embedding.
    """
    points = check_embedding("embedding", embedding)
    codes, _ = category_codes("labels", labels, len(points))
    n_neighbors = fewer_neighbours(n_neighbors, len(points) - 1, "other cells")
    return vote_accuracy(nearest_neighbours(points, n_neighbors), codes, codes)


def cross_batch_knn_accuracy(
    embedding: ArrayLike, labels: Any, batch: Any, *, n_neighbors: int = 15, max_cells: int = 50_000, seed: int = 0
) -> float:
    """Share of cells whose label is the majority among their nearest neighbours in *other* batches.

    Neighbours of a cell's own batch know its label however badly batches are aligned; those of other batches know it
    only where the same biology lies at the same place. Ties are broken as in :func:`knn_accuracy`.

    A label that occurs in one batch only cannot be found. Its cells vote, but are left out of the mean; a warning
    counts them, and :func:`labels_of_one_batch` tells which they are.

    Parameters
    ----------
    embedding
        Coordinates of shape ``(n_obs, n_dims)``.
    labels
        One category per cell, without NaN.
    batch
        Batch of each cell, without NaN.
    n_neighbors
        Voters; more of them steady the vote and blur rare labels. Reduced, with a warning, to the number of cells
        outside the largest batch where that is smaller.
    max_cells
        Where more cells than this could be scored, a random sample of so many is; all the cells vote all the same,
        and the search is exact. With 50,000 the standard error is at most 0.0022; larger values shrink it by the
        square root and cost time in proportion.
    seed
        Seed of that sample.

    Returns
    -------
    float
        Mean over the cells whose label occurs in another batch, between 0 and 1.

    Raises
    ------
    InvalidArgumentError
        If there is one batch only, if no label occurs in two batches, or if categories are missing for a cell.
    """
    points = check_embedding("embedding", embedding)
    label_codes, names = category_codes("labels", labels, len(points))
    batch_codes, _ = category_codes("batch", batch, len(points), min_categories=2)
    if max_cells < 1:
        raise InvalidArgumentError(f"max_cells={max_cells} must be at least 1.")
    left_out = labels_of_one_batch(label_codes, batch_codes)
    if left_out.all():
        raise InvalidArgumentError("labels and batch share no label: every label occurs in one batch only.")
    if left_out.any():
        alone = ", ".join(map(str, names[np.unique(label_codes[left_out])]))
        warnings.warn(
            f"{left_out.sum()} of {len(points)} cells are left out of the cross-batch accuracy, "
            f"because their label occurs in one batch only: {alone}.",
            CellstillWarning,
            stacklevel=level_outside(),
        )
    available = int(len(points) - np.bincount(batch_codes).max())
    n_neighbors = fewer_neighbours(n_neighbors, available, "cells outside the largest batch")
    rows = np.flatnonzero(~left_out)
    if len(rows) > max_cells:
        rows = np.random.default_rng(seed).choice(rows, max_cells, replace=False, shuffle=False)
    found = search_other_batches(points - points.mean(axis=0), batch_codes, rows, n_neighbors)
    return vote_accuracy(Neighbours(*found), label_codes, label_codes[rows])


def labels_of_one_batch(labels: Any, batch: Any) -> NDArray[np.bool_]:
    """Tell which cells have a label that occurs in no batch but their own; shape ``(n_obs,)``."""
    label_codes, label_names = category_codes("labels", labels, len(labels))
    batch_codes, batch_names = category_codes("batch", batch, len(labels))
    occurs = np.zeros((len(label_names), len(batch_names)), dtype=bool)
    occurs[label_codes, batch_codes] = True
    return (occurs.sum(axis=1) == 1)[label_codes]


def vote_accuracy(neighbours: Neighbours, codes: NDArray[np.integer], truth: NDArray[np.integer]) -> float:
    """Share of the cells whose ``truth`` wins the vote of their neighbours' ``codes``.

    Parameters
    ----------
    neighbours
        Neighbours of the scored cells, as rows of ``codes``.
    codes
        Code of every cell that may vote.
    truth
        Code of every scored cell.
    """
    k, n_categories = neighbours.n_neighbors, int(codes.max()) + 1
    correct = 0
    for start in range(0, neighbours.n_obs, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        voters = codes[neighbours.indices[chunk]]
        cell = np.arange(len(voters))
        votes = np.zeros((len(voters), n_categories), dtype=np.int64)
        nearness = np.zeros_like(votes)
        for rank in reversed(range(k)):
            votes[cell, voters[:, rank]] += 1
            nearness[cell, voters[:, rank]] = k - rank
        # Nearness is at most k: it decides between equal votes only, and no two labels are equally near.
        winner = np.argmax(votes * (k + 1) + nearness, axis=1)
        correct += int((winner == truth[chunk]).sum())
    return correct / neighbours.n_obs
