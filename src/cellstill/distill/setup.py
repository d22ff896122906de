"""What is checked before a data set is registered."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cellstill.data.counts import check_counts, get_layer, looks_like_counts
from cellstill.data.covariates import CovariateDesign, obs_column, warn_if_confounded
from cellstill.data.genes import check_unique_genes
from cellstill.distill.cells import Cells
from cellstill.errors import CellstillWarning, InvalidArgumentError, level_outside

if TYPE_CHECKING:
    from anndata import AnnData

_DEPTH_RATIO = 2.0


def find_counts(adata: AnnData, layer: str | None) -> str | None:
    """Return ``layer``; for ``None``, ``"counts"`` if there is such a layer of counts and ``X`` holds none."""
    if layer is not None or "counts" not in adata.layers:
        return layer
    if adata.X is not None and looks_like_counts(get_layer(adata)):
        return None
    if not looks_like_counts(adata.layers["counts"]):
        return None
    warnings.warn(
        "adata.X holds no counts, so adata.layers['counts'] is used. Pass layer='counts' to say so yourself.",
        CellstillWarning,
        stacklevel=level_outside(),
    )
    return "counts"


def check_setup(
    adata: AnnData,
    batch_key: str,
    layer: str | None,
    labels_key: str | None,
    covariate_keys: Sequence[str],
    *,
    allow_noninteger: bool,
) -> None:
    """Refuse data that cannot be distilled; warn about covariates that cannot be told from the batch."""
    if adata.is_view:
        raise InvalidArgumentError("adata is a view of another AnnData. Pass a copy: adata.copy().")
    batch = obs_column(adata.obs, batch_key, "batch_key")
    batches = batch.astype(str).unique()
    if len(batches) < batch.nunique():
        raise InvalidArgumentError(
            f"batch_key={batch_key!r}: different values have the same name ({sorted(batches)[:5]}), such as 1 and '1'. "
            "Convert the column to one type: adata.obs[key].astype(str)."
        )
    if len(batches) < 2:
        raise InvalidArgumentError(
            f"batch_key={batch_key!r}: all cells are of the batch {batches[0]!r}, so there is nothing to integrate. "
            "Name the column that tells batches apart."
        )
    if labels_key is not None:
        obs_column(adata.obs, labels_key, "labels_key")
    if batch_key in covariate_keys:
        raise InvalidArgumentError(f"covariate_keys: {batch_key!r} is the batch: it is to be removed, not protected.")
    check_unique_genes(adata.var_names)
    design = CovariateDesign.fit(adata.obs, covariate_keys)
    warn_if_confounded(batch, adata.obs, design)
    check_counts(adata, layer, allow_noninteger=allow_noninteger)


def warn_if_depths_differ(cells: Cells, pca_method: str) -> None:
    """Point to Pearson residuals where batches differ in depth: log CPM then differ in noise, which no shift mends."""
    if pca_method != "standard":
        return
    library = np.asarray(cells.counts.sum(axis=1)).ravel()
    medians = np.array([np.median(library[cells.batch == code]) for code in range(cells.batch.max() + 1)])
    ratio = medians.max() / medians.min()
    if ratio > _DEPTH_RATIO:
        warnings.warn(
            f"Median library sizes differ {ratio:.1f}-fold between batches. Their log CPM then differ in noise, which "
            "limits how well batches can mix: consider pca_method='pearson_residuals'.",
            CellstillWarning,
            stacklevel=level_outside(),
        )
