"""Data that can be set up for a model: an AnnData or a MuData of their own."""

from __future__ import annotations

from typing import Any

from cellstill.data.annotations import is_mudata
from cellstill.errors import InvalidArgumentError


def check_anndata(adata: Any) -> None:
    """Raise :class:`~cellstill.errors.InvalidArgumentError` unless it is an AnnData, and not a view."""
    if is_mudata(adata):
        names = list(adata.mod)
        one = "rna" if "rna" in names else names[0]
        raise InvalidArgumentError(
            f"adata is a MuData with the modalities {names}, and an AnnData is needed. Give one of them, "
            f"mdata[{one!r}]; or use RegularizedMultimodalVI.setup_mudata for all."
        )
    check_whole(adata, "adata")


def check_mudata(mdata: Any) -> None:
    """Raise :class:`~cellstill.errors.InvalidArgumentError` unless it is a MuData, and not a view."""
    if not is_mudata(mdata):
        raise InvalidArgumentError(
            f"mdata is of type {type(mdata).__name__}, not a MuData. Give one: mudata.MuData({{'rna': adata, ...}}); "
            "or use AmbientRegularizedSCVI."
        )
    check_whole(mdata, "mdata")


def check_whole(data: Any, argument: str) -> None:
    """Raise :class:`~cellstill.errors.InvalidArgumentError` for a view, and for what is no annotated data at all."""
    if not hasattr(data, "obs_names"):
        raise InvalidArgumentError(
            f"{argument} is of type {type(data).__name__}, not an AnnData or a MuData. Read files first, with "
            "anndata.read_h5ad or mudata.read."
        )
    if data.is_view:
        raise InvalidArgumentError(f"{argument} is a view of other data. Pass a copy: {argument}.copy().")
