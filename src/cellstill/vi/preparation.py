"""New data with the features of a model, in its order."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from cellstill._compat.anndata import become
from cellstill.data.counts import as_csr
from cellstill.data.genes import align_genes
from cellstill.errors import InvalidArgumentError, check_key

if TYPE_CHECKING:
    from mudata import MuData


def with_features(adata: AnnData, features: Sequence[str], *, min_overlap: float) -> AnnData:
    """Copy data with these features, in this order; those that the data lack are zero in ``X`` and all layers.

    Annotation of cells, ``uns`` and ``raw`` stay. Annotation of the features (``var``) is missing where they are; and
    ``varm`` and ``varp`` are left out if any is.

    Raises
    ------
    InvalidArgumentError
        The data are backed by a file.
    GeneMismatchError
        See :func:`~cellstill.data.genes.align_genes`.

    Warns
    -----
    CellstillWarning
        Some features are missing.
    """
    if adata.isbacked:
        raise InvalidArgumentError(
            "adata is backed by a file. Read it first, adata.to_memory(); or leave this out: load_query_data matches "
            "features by itself."
        )
    align_genes(sp.csr_matrix((0, adata.n_vars)), adata.var_names, features, min_overlap=min_overlap)
    wanted = pd.Index(features)
    position = adata.var_names.get_indexer(wanted)
    if (position >= 0).all():
        return adata[:, position].copy()
    # Truth values that may be missing can be written, and a mixture of both cannot.
    truth = adata.var.select_dtypes(bool).columns
    return AnnData(
        None if adata.X is None else _columns(adata.X, position),
        obs=adata.obs.copy(),
        var=adata.var.astype(dict.fromkeys(truth, "boolean")).reindex(wanted).rename_axis(adata.var.index.name),
        uns=adata.uns.copy(),
        obsm=dict(adata.obsm.copy()),
        obsp=dict(adata.obsp.copy()),
        layers={name: _columns(layer, position) for name, layer in adata.layers.items()},
        raw=adata.raw,
    )


def prepared_anndata(adata: AnnData, features: Sequence[str], *, inplace: bool, min_overlap: float) -> AnnData | None:
    """Give data the features of a model; see :func:`with_features`. ``None`` in place."""
    changed = with_features(adata, features, min_overlap=min_overlap)
    if not inplace:
        return changed
    become(adata, changed)
    return None


def prepared_mudata(
    mdata: MuData, features: Mapping[str, Sequence[str]], *, inplace: bool, min_overlap: float
) -> MuData | None:
    """Give the modalities of a model its features; ``None`` in place. Others stay as they are."""
    found = [name for name in features if name in mdata.mod]
    if not found:
        check_key("modality", next(iter(features)), "mdata.mod", mdata.mod.keys())
    changed = {name: with_features(mdata[name], features[name], min_overlap=min_overlap) for name in found}
    target = mdata if inplace else mdata.copy()
    for name, adata in changed.items():
        become(target[name], adata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        target.update_var()
    return None if inplace else target


def _columns(matrix: Any, position: np.ndarray) -> Any:
    """Columns at these positions, and zeros where they are -1."""
    if isinstance(matrix, np.ndarray):
        return np.where(position >= 0, matrix[:, position], np.zeros(1, dtype=matrix.dtype))
    matrix = matrix if sp.issparse(matrix) else as_csr(matrix)
    zeros = sp.csr_matrix((matrix.shape[0], 1), dtype=matrix.dtype)
    taken = sp.hstack([matrix, zeros], format=matrix.format)[:, np.where(position < 0, matrix.shape[1], position)]
    taken.sort_indices()
    return taken
