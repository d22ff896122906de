"""Genes are matched by name, never by position."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellstill.errors import CellstillWarning, GeneMismatchError, level_outside


def check_unique_genes(var_names: pd.Index) -> None:
    """Raise :class:`~cellstill.errors.GeneMismatchError` if a gene name occurs twice."""
    if not var_names.is_unique:
        twice = var_names[var_names.duplicated()].unique()
        shown = ", ".join(map(repr, twice[:3])) + (", ..." if len(twice) > 3 else "")
        raise GeneMismatchError(
            f"adata.var_names has {len(twice)} duplicated gene names ({shown}). "
            "Call adata.var_names_make_unique() first."
        )


def align_genes(
    counts: sp.csr_matrix, var_names: pd.Index, genes: Sequence[str], *, min_overlap: float = 0.5
) -> tuple[sp.csr_matrix, float]:
    """Bring the columns of ``counts`` into the order of ``genes``.

    Genes that ``genes`` does not list are dropped; genes that ``counts`` lacks become zeros.

    Parameters
    ----------
    counts
        Shape ``(n_obs, len(var_names))``.
    var_names
        Names of the columns.
    genes
        Names wanted, in order.
    min_overlap
        Smallest share of ``genes`` that must be present. Larger is safer.

    Returns
    -------
    The counts, shape ``(n_obs, len(genes))``, without a copy if nothing changes; and the share of ``genes`` present.

    Warns
    -----
    CellstillWarning
        Some genes are missing.

    Raises
    ------
    GeneMismatchError
        Duplicated names, or fewer genes in common than ``min_overlap``.
    """
    check_unique_genes(var_names)
    wanted = pd.Index(genes)
    if var_names.equals(wanted):
        return counts, 1.0
    column = wanted.get_indexer(var_names)
    present = int((column >= 0).sum())
    overlap = present / len(wanted)
    missing = wanted.difference(var_names)
    if overlap < min_overlap or present == 0:
        raise GeneMismatchError(
            f"Only {present} of the model's {len(wanted)} genes ({overlap:.0%}) are in adata.var_names; "
            f"at least {min_overlap:.0%} are needed. adata has no {str(missing[0])!r}, for instance, and names genes "
            f"like {str(var_names[0])!r}: check that both use the same identifiers."
        )
    if len(missing):
        shown = ", ".join(map(repr, missing[:3])) + (", ..." if len(missing) > 3 else "")
        warnings.warn(
            f"{len(missing)} of the model's {len(wanted)} genes are missing from adata and count as zero ({shown}).",
            CellstillWarning,
            stacklevel=level_outside(),
        )
    if not len(missing):
        aligned = counts[:, var_names.get_indexer(wanted)]
        aligned.sort_indices()
        return aligned, overlap
    target = column[counts.indices]
    kept = target >= 0
    indptr = np.concatenate([[0], np.cumsum(kept)])[counts.indptr]
    aligned = sp.csr_matrix((counts.data[kept], target[kept], indptr), shape=(counts.shape[0], len(wanted)), copy=False)
    aligned.sort_indices()
    return aligned, overlap
