"""Synthetic cells as an AnnData that any tool reads, with all that tells where they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

import cellstill
from cellstill.condense.cells import LabelledCells
from cellstill.condense.problem import Task

KEY = "scdd"
"""Key of ``uns`` with the provenance."""


def to_anndata(
    cells: LabelledCells,
    classes: Sequence[str],
    tasks: Sequence[Task],
    genes: np.ndarray,
    provenance: Mapping[str, Any],
    *,
    codes: np.ndarray | None = None,
    choice: pd.DataFrame | None = None,
) -> AnnData:
    """Build an AnnData of synthetic cells.

    Parameters
    ----------
    cells
        Counts and classes.
    classes, tasks, genes
        Of the problem.
    provenance
        What JSON can hold.
    codes
        Codes of the cells; kept in ``obsm["X_scdd"]``.
    choice
        Candidates and their scores; kept as ``uns["scdd"]["choice"]``.

    Returns
    -------
    Counts in ``X`` (CSR), a categorical column in ``obs`` for each task, genes in ``var_names``; in ``uns["scdd"]`` the
    provenance: JSON text, plain numbers and tables, which h5ad and Zarr hold.
    """
    number = np.zeros(len(cells), dtype=np.int64)
    for code in range(len(classes)):
        own = cells.of_class(code)
        number[own] = np.arange(len(own))
    names = [f"{classes[code]}-{k}" for code, k in zip(cells.codes, number, strict=True)]
    obs = pd.DataFrame(
        {
            task.key: pd.Categorical([task.names[k] for k in task.of_class[cells.codes]], categories=list(task.names))
            for task in tasks
        },
        index=pd.Index(names),
    )
    found: dict[str, Any] = {
        "provenance": json.dumps(
            {"cellstill_version": cellstill.__version__, **provenance}, sort_keys=True, default=_plain
        )
    }
    if choice is not None:
        found["choice"] = {str(name): column.to_numpy() for name, column in choice.items()}
    adata = AnnData(cells.counts, obs=obs, var=pd.DataFrame(index=pd.Index(genes.astype(str))), uns={KEY: found})
    if codes is not None:
        adata.obsm["X_scdd"] = codes.astype(np.float32)
    return adata


def provenance_of(adata: AnnData) -> dict[str, Any]:
    """Read back the provenance of synthetic cells."""
    return json.loads(adata.uns[KEY]["provenance"])


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON serializable")
