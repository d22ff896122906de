from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from cellstill.errors import InvalidArgumentError
from cellstill.metrics._clusters import ari, nmi
from cellstill.metrics._inputs import category_codes, check_embedding, fewer_neighbours
from cellstill.metrics._lisi import lisi, lisi_of_each, neighbourhood_size
from cellstill.metrics.neighbourhood import cross_batch_knn_accuracy, nearest_neighbours, vote_accuracy

__all__ = ["ari", "clisi", "ilisi", "ilisi_ceiling", "integration_table", "lisi", "nmi"]

_LISI_NEIGHBOURHOOD = 90
_VOTERS = 15
_PERMUTATIONS = 20


def ilisi(embedding: ArrayLike, batch: Any, *, n_neighbors: int = 90) -> float:
    """Mixing of batches: the median LISI of the batch labels, scaled to 0 (apart) .. 1 (equal shares everywhere).

    The score is ``(median - 1) / (n_batches - 1)``. One is out of reach, more so for batches of unequal size:
    compare with :func:`ilisi_ceiling`.

    Parameters
    ----------
    embedding
        Coordinates of shape ``(n_obs, n_dims)``.
    batch
        Batch of each cell, without NaN, of two batches at least.
    n_neighbors
        Size of the neighbourhood, *the cell itself counted* as scib-metrics counts it; a third of it, rounded down,
        is the perplexity. Larger values judge mixing on a coarser scale. Reduced to ``n_obs``, with a warning, for
        smaller data; less than 9 is an error.

    Returns
    -------
    float
        Score between 0 and 1; larger is better mixed.

    Raises
    ------
    InvalidArgumentError
        If there is one batch only, if batches are missing for a cell, or if the data are too few.

    References
    ----------
    Korsunsky et al. (2019), Nat Methods 16; scaled as in Luecken et al. (2022), Nat Methods 19.
    """
    points = check_embedding("embedding", embedding)
    codes, batches = category_codes("batch", batch, len(points), min_categories=2)
    return _scale_ilisi(_lisi_of_embedding(points, [codes], n_neighbors), len(batches))


def clisi(embedding: ArrayLike, labels: Any, *, n_neighbors: int = 90) -> float:
    """Purity of labels: the median LISI of the labels, scaled to 0 (mixed) .. 1 (one label in each neighbourhood).

    The score is ``(n_labels - median) / (n_labels - 1)``. It is near one for any embedding that keeps the common
    labels apart, so that a small loss is news.

    Parameters
    ----------
    embedding
        Coordinates of shape ``(n_obs, n_dims)``.
    labels
        Label of each cell, without NaN, of two labels at least.
    n_neighbors
        Size of the neighbourhood; see :func:`ilisi`. Larger values ask for purity on a coarser scale.

    Returns
    -------
    float
        Score between 0 and 1; larger is purer.

    Raises
    ------
    InvalidArgumentError
        If there is one label only, if labels are missing for a cell, or if the data are too few.

    References
    ----------
    Korsunsky et al. (2019), Nat Methods 16; scaled as in Luecken et al. (2022), Nat Methods 19.
    """
    points = check_embedding("embedding", embedding)
    codes, names = category_codes("labels", labels, len(points), min_categories=2)
    return _scale_clisi(_lisi_of_embedding(points, [codes], n_neighbors), len(names))


def ilisi_ceiling(
    embedding: ArrayLike, batch: Any, *, seed: int = 0, n_permutations: int = _PERMUTATIONS, n_neighbors: int = 90
) -> float:
    """Mean iLISI after batch labels are permuted among the cells: what perfect mixing reaches on these data.

    A neighbourhood of finite perplexity does not see equal shares even where batches are mixed at random, and
    batches of unequal size can never have them, so that iLISI does not reach 1. The fraction
    ``ilisi / ilisi_ceiling`` can be compared between data sets: 1 says that batches are as mixed as chance makes them.

    Parameters
    ----------
    embedding
        Coordinates of shape ``(n_obs, n_dims)``.
    batch
        Batch of each cell, without NaN, of two batches at least.
    seed
        Seed of the permutations.
    n_permutations
        Permutations to average over. More of them lower the noise: with 20, the standard error is near 0.001 for
        some thousand cells.
    n_neighbors
        As given to :func:`ilisi`.

    Returns
    -------
    float
        Score on the scale of :func:`ilisi`.

    Raises
    ------
    InvalidArgumentError
        As :func:`ilisi`, or if ``n_permutations`` is less than 1.
    """
    points = check_embedding("embedding", embedding)
    codes, batches = category_codes("batch", batch, len(points), min_categories=2)
    permuted = _permutations(codes, n_permutations, seed)
    return _scale_ilisi(_lisi_of_embedding(points, permuted, n_neighbors), len(batches))


def integration_table(
    embeddings: Mapping[str, ArrayLike], batch: Any, labels: Any = None, *, seed: int = 0
) -> pd.DataFrame:
    """Score several embeddings of the same cells, one row each.

    Parameters
    ----------
    embeddings
        Coordinates of shape ``(n_obs, n_dims)`` by name; dimensions may differ, cells and their order may not.
    batch
        Batch of each cell, without NaN, of two batches at least.
    labels
        Label of each cell, without NaN, of two labels at least; without it only batch mixing is scored.
    seed
        Seed of the permutations, of k-means and of the sample of cells that is scored in large data.

    Returns
    -------
    DataFrame
        Indexed by embedding, with columns ``ilisi`` and ``ilisi_ceiling`` and, where labels are given, ``clisi``,
        ``cross_batch_knn_accuracy``, ``knn_accuracy`` and ``nmi``: the functions of these names with their defaults.

    Raises
    ------
    InvalidArgumentError
        If embeddings differ in their number of cells, or as the single functions do.
    """
    if not embeddings:
        raise InvalidArgumentError("embeddings is empty; give at least one array of shape (n_obs, n_dims) by name.")
    points = {name: check_embedding(f"embeddings[{name!r}]", array) for name, array in embeddings.items()}
    sizes = {name: len(array) for name, array in points.items()}
    if len(set(sizes.values())) > 1:
        raise InvalidArgumentError(f"embeddings must have the same cells; found n_obs of {sizes}.")
    n_obs = next(iter(sizes.values()))
    batch_codes, batches = category_codes("batch", batch, n_obs, min_categories=2)
    code_sets = [batch_codes, *_permutations(batch_codes, _PERMUTATIONS, seed)]
    if labels is not None:
        label_codes, label_names = category_codes("labels", labels, n_obs, min_categories=2)
        code_sets.append(label_codes)
    size = neighbourhood_size(_LISI_NEIGHBOURHOOD, n_obs)
    rows = {}
    for name, array in points.items():
        neighbours = nearest_neighbours(array, size - 1)
        values = lisi_of_each(neighbours, code_sets, size // 3)
        row = {
            "ilisi": _scale_ilisi(values[:1], len(batches)),
            "ilisi_ceiling": _scale_ilisi(values[1 : _PERMUTATIONS + 1], len(batches)),
        }
        if labels is not None:
            voters = neighbours.nearest(fewer_neighbours(_VOTERS, neighbours.n_neighbors, "other cells"))
            row |= {
                "clisi": _scale_clisi(values[-1:], len(label_names)),
                "cross_batch_knn_accuracy": cross_batch_knn_accuracy(
                    array, labels, batch, n_neighbors=_VOTERS, seed=seed
                ),
                "knn_accuracy": vote_accuracy(voters, label_codes, label_codes),
                "nmi": nmi(array, labels, seed=seed),
            }
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("embedding")


def _permutations(codes: NDArray[np.integer], n_permutations: int, seed: int) -> list[NDArray[np.integer]]:
    """Return ``n_permutations`` random permutations of ``codes``."""
    if n_permutations < 1:
        raise InvalidArgumentError(f"n_permutations={n_permutations} must be at least 1.")
    rng = np.random.default_rng(seed)
    return [rng.permutation(codes) for _ in range(n_permutations)]


def _scale_ilisi(values: NDArray[np.float64], n_batches: int) -> float:
    """Scale the median of each row to 0..1, larger for mixed batches, and average over rows."""
    return float((np.median(values, axis=1).mean() - 1) / (n_batches - 1))


def _scale_clisi(values: NDArray[np.float64], n_labels: int) -> float:
    """Scale the median of each row to 0..1, larger for pure labels, and average over rows."""
    return float((n_labels - np.median(values, axis=1).mean()) / (n_labels - 1))


def _lisi_of_embedding(
    points: NDArray[np.floating], code_sets: Sequence[NDArray[np.integer]], n_neighbors: int
) -> NDArray[np.float64]:
    size = neighbourhood_size(n_neighbors, len(points))
    return lisi_of_each(nearest_neighbours(points, size - 1), code_sets, size // 3)
