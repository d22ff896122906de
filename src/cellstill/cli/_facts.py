"""What a stored matrix holds, read once, in blocks of bounded size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cellstill.io.anndata import StoredMatrix


@dataclass(frozen=True)
class MatrixFacts:
    """What :func:`matrix_facts` saw.

    Attributes
    ----------
    where, format, dtype
        Place in the AnnData, ``"CSR"``, ``"CSC"`` or ``"dense"``, and type of the values.
    density
        Share of the entries that are not zero.
    low, high
        Smallest and largest value, among zeros too.
    problem
        Why these are no counts; empty if they are.
    totals
        Sum of each cell, shape ``(n_obs,)``: library sizes, for counts.
    n_empty_cells, n_empty_genes
        Cells and genes without a single value that is not zero.
    nbytes
        Size in memory.
    """

    where: str
    format: str
    dtype: str
    density: float
    low: float
    high: float
    problem: str
    totals: np.ndarray
    n_empty_cells: int
    n_empty_genes: int
    nbytes: int

    @property
    def is_counts(self) -> bool:
        """Whether every value can be a count."""
        return not self.problem

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Quartiles of the cells' totals."""
        low, middle, high = np.percentile(self.totals, (25, 50, 75)) if len(self.totals) else np.zeros(3)
        return float(low), float(middle), float(high)

    def to_dict(self) -> dict[str, Any]:
        """Return a form that JSON can hold."""
        return {
            "where": self.where,
            "format": self.format,
            "dtype": self.dtype,
            "density": self.density,
            "min": self.low,
            "max": self.high,
            "counts": self.is_counts,
            "problem": self.problem,
            "total_per_cell": dict(zip(("q25", "median", "q75"), self.quartiles, strict=True)),
            "n_empty_cells": self.n_empty_cells,
            "n_empty_genes": self.n_empty_genes,
            "megabytes": self.nbytes / 2**20,
        }


def matrix_facts(matrix: StoredMatrix) -> MatrixFacts:
    """Read a matrix once, in blocks.

    Raises
    ------
    StoreError
        The file is damaged.
    """
    n_obs, n_vars = matrix.shape
    totals = np.zeros(n_obs)
    cells, genes = np.zeros(n_obs, dtype=bool), np.zeros(n_vars, dtype=bool)
    n_nonzero, low, high = 0, 0.0, 0.0
    finite = whole = True
    for values, rows, columns in matrix.blocks():
        kept = values != 0
        n_nonzero += int(kept.sum())
        cells[rows[kept]] = True
        genes[columns[kept]] = True
        good = values[np.isfinite(values)]
        finite = finite and len(good) == len(values)
        if len(good):
            low, high = min(low, float(good.min())), max(high, float(good.max()))
            whole = whole and bool((good == np.floor(good)).all())
        totals += np.bincount(rows, weights=np.nan_to_num(values, posinf=0, neginf=0), minlength=n_obs)
    problems = {
        "all zero": n_nonzero == 0,
        "NaN or infinite": not finite,
        "negative": low < 0,
        "not integers": not whole,
    }
    return MatrixFacts(
        where=matrix.where,
        format=matrix.format,
        dtype=str(matrix.dtype),
        density=n_nonzero / max(n_obs * n_vars, 1),
        low=low,
        high=high,
        problem=next((name for name, found in problems.items() if found), ""),
        totals=totals,
        n_empty_cells=int((~cells).sum()),
        n_empty_genes=int((~genes).sum()),
        nbytes=matrix.nbytes,
    )
