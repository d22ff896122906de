"""Euclidean neighbour searches on checked arrays: rows of the neighbours and their distances, nearest first."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Found = tuple[NDArray[np.integer], NDArray[np.floating]]


def exact_search(points: NDArray[np.floating], query: NDArray[np.floating] | None, n_neighbors: int) -> Found:
    """Search all the points; without a query, for the points' own neighbours, each without itself."""
    from sklearn.neighbors import NearestNeighbors

    distances, indices = NearestNeighbors(n_neighbors=n_neighbors).fit(points).kneighbors(query)
    return indices, distances


def approximate_search(points: NDArray[np.floating], n_neighbors: int, seed: int) -> Found:
    """Search for the points' own neighbours by nearest neighbour descent."""
    from pynndescent import NNDescent  # type: ignore[import-untyped]

    index = NNDescent(points.astype(np.float32), n_neighbors=n_neighbors + 1, random_state=seed)
    indices, distances = (array.copy() for array in index.neighbor_graph)
    lost = np.flatnonzero((indices < 0).any(axis=1))
    if len(lost):
        indices[lost], distances[lost] = exact_search(points, points[lost], n_neighbors + 1)
    # A cell finds itself first, save where others lie at the same place: drop its own row, or else the farthest.
    own = indices == np.arange(len(points))[:, None]
    own[~own.any(axis=1), -1] = True
    shape = (len(points), n_neighbors)
    return indices[~own].reshape(shape), distances[~own].reshape(shape)


def search_other_batches(
    points: NDArray[np.floating], batch: NDArray[np.integer], rows: NDArray[np.integer], n_neighbors: int
) -> Found:
    """Find neighbours of ``rows`` outside their own batch.

    Every batch is searched once, and the nearest found so far are kept: the cost does not grow with the number of
    batches, as it would if all the others were indexed anew for each.
    """
    indices = np.full((len(rows), n_neighbors), -1)
    distances = np.full((len(rows), n_neighbors), np.inf)
    for code in range(int(batch.max()) + 1):
        members, others = np.flatnonzero(batch == code), np.flatnonzero(batch[rows] != code)
        if not len(others):
            continue
        found = exact_search(points[members], points[rows[others]], min(n_neighbors, len(members)))
        index = np.hstack([indices[others], members[found[0]]])
        distance = np.hstack([distances[others], found[1]])
        order = np.argsort(distance, axis=1, kind="stable")[:, :n_neighbors]
        distances[others] = np.take_along_axis(distance, order, axis=1)
        indices[others] = np.take_along_axis(index, order, axis=1)
    return indices, distances
