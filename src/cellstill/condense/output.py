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

CODES, POINTS = "X_scdd", "X_scdd_latent"
"""Keys of ``obsm``: what the generator was given, and points of the latent space."""


def to_anndata(
    cells: LabelledCells,
    classes: Sequence[str],
    tasks: Sequence[Task],
    genes: np.ndarray,
    provenance: Mapping[str, Any],
    *,
    obsm: Mapping[str, np.ndarray] | None = None,
    choices: Mapping[str, pd.DataFrame] | None = None,
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
    obsm
        Codes and points of the cells by key.
    choices
        Candidates and their scores by key; kept in ``uns["scdd"]``.

    Returns
    -------
    Counts in ``X`` (CSR), a categorical column in ``obs`` for each task, whose categories are integers or truth values
    if those of the real cells are and else text, genes in ``var_names``; in ``uns["scdd"]`` the provenance: JSON text,
    plain numbers and tables, which h5ad and Zarr hold.
    """
    number = np.zeros(len(cells), dtype=np.int64)
    for code in range(len(classes)):
        own = cells.of_class(code)
        number[own] = np.arange(len(own))
    names = [f"{classes[code]}-{k}" for code, k in zip(cells.codes, number, strict=True)]
    obs = pd.DataFrame(
        {
            task.key: pd.Categorical.from_codes(
                task.of_class[cells.codes], categories=task.categories, ordered=task.ordered
            )
            for task in tasks
        },
        index=pd.Index(names),
    )
    found: dict[str, Any] = {
        "provenance": json.dumps(
            {"cellstill_version": cellstill.__version__, **provenance}, sort_keys=True, default=_plain
        )
    }
    for key, table in (choices or {}).items():
        found[key] = {str(name): column.to_numpy() for name, column in table.items()}
    return AnnData(
        cells.counts,
        obs=obs,
        var=pd.DataFrame(index=pd.Index(genes.astype(str))),
        uns={KEY: found},
        obsm={key: values.astype(np.float32) for key, values in (obsm or {}).items()},
    )


def provenance_of(adata: AnnData) -> dict[str, Any]:
    """Read back the provenance of synthetic cells."""
    return json.loads(adata.uns[KEY]["provenance"])


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON serializable")
