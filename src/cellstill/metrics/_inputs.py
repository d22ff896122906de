"""What every metric checks before it counts: a finite embedding, and one known category for each cell."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from cellstill.errors import CellstillWarning, InvalidArgumentError, level_outside


def check_embedding(argument: str, embedding: ArrayLike) -> NDArray[np.floating]:
    """Return ``embedding`` as a finite ``(n_obs, n_dims)`` array; float32 stays float32, the rest becomes float64."""
    array = np.asarray(embedding)
    if array.ndim != 2 or array.shape[1] == 0 or array.dtype.kind not in "fiub":
        raise InvalidArgumentError(
            f"{argument} must be a dense numeric array of shape (n_obs, n_dims), one row per cell; "
            f"found {type(embedding).__name__} of shape {array.shape} and dtype {array.dtype}."
        )
    if len(array) < 2:
        raise InvalidArgumentError(f"{argument} has {len(array)} cells; at least 2 are needed to have neighbours.")
    array = array if array.dtype == np.float32 else array.astype(np.float64)
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        raise InvalidArgumentError(
            f"{argument} has NaN or infinite values in {(~finite).sum()} of {len(array)} cells, "
            f"the first in row {np.argmin(finite)}. Drop these cells or recompute the embedding."
        )
    return array


def category_codes(
    argument: str, values: Any, n_obs: int, *, min_categories: int = 1
) -> tuple[NDArray[np.intp], pd.Index]:
    """Turn one category per cell into codes ``0 .. n_categories - 1`` and the categories they stand for.

    Codes are given in order of first appearance, so they know nothing of names, and categories without cells have none.
    """
    if np.ndim(values) != 1 or len(values) != n_obs:
        raise InvalidArgumentError(
            f"{argument} must give one category for each of the {n_obs} cells; found shape {np.shape(values)}. "
            "Pass a column of adata.obs."
        )
    codes, categories = pd.factorize(pd.Series(values))
    if (codes < 0).any():
        raise InvalidArgumentError(
            f"{argument} is missing (NaN) for {(codes < 0).sum()} of {n_obs} cells, the first in row "
            f"{np.argmax(codes < 0)}. Drop these cells or give them a category of their own."
        )
    if len(categories) < min_categories:
        raise InvalidArgumentError(
            f"{argument} has {len(categories)} category ({', '.join(map(repr, categories))}), "
            f"where at least {min_categories} are needed."
        )
    return codes, pd.Index(categories)


def fewer_neighbours(n_neighbors: int, available: int, of_what: str) -> int:
    """Return ``n_neighbors``, or ``available`` with a warning where there are fewer cells than that."""
    if n_neighbors < 1:
        raise InvalidArgumentError(f"n_neighbors={n_neighbors} must be at least 1.")
    if n_neighbors > available:
        warnings.warn(
            f"n_neighbors={n_neighbors} is more than the {available} {of_what}; using {available}.",
            CellstillWarning,
            stacklevel=level_outside(),
        )
    return min(n_neighbors, available)
