"""Order of features: results without names have that of the data they are of, not that of the model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellstill.data.annotations import is_mudata
from cellstill.errors import CellstillWarning, level_outside

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData


def order_of(
    data: AnnData | MuData, features: Sequence[str], name: str | None = None, *, named: bool = False
) -> np.ndarray | slice:
    """Positions of a model's features in the order that data have them.

    Parameters
    ----------
    data
        What a result is asked for.
    features
        The model's, in its order.
    name
        Name of the modality.
    named
        The result has the names of its features.

    Returns
    -------
    Positions, shape ``(n_features,)``; the slice of all features, in the model's order, where that is the data's, where
    the data do not have the modality, or where their features are not the model's.

    Warns
    -----
    CellstillWarning
        The data's features are not the model's, and the result is not ``named``.
    """
    if is_mudata(data) and name not in data.mod:
        return slice(None)
    found, known = (data.mod[name] if is_mudata(data) else data).var_names, pd.Index(features)
    if found.equals(known):
        return slice(None)
    lacking, others = known.difference(found), found.difference(known)
    if not len(lacking) and not len(others):
        return known.get_indexer(found)
    if not named:
        of = "" if name is None else f" of {name!r}"
        shown = ", ".join(repr(str(feature)) for feature in [*lacking[:2], *others[:2]])
        warnings.warn(
            f"The data lack {len(lacking)} of the model's {len(known)} features{of} and have {len(others)} others "
            f"({shown}, for instance): the result has the model's features in the model's order. "
            "get_var_names() has their names, and get_normalized_expression(return_numpy=False) a table with names.",
            CellstillWarning,
            stacklevel=level_outside(),
        )
    return slice(None)


def in_order(counts: sp.csr_matrix, order: np.ndarray | slice) -> sp.csr_matrix:
    """Features of ``counts`` in an order of :func:`order_of`; without a copy if nothing changes."""
    if isinstance(order, slice):
        return counts
    ordered = counts[:, order]
    ordered.sort_indices()
    return ordered
