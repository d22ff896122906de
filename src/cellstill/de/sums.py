"""Sums of counts over the cells of each sample, read in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellstill.de.units import check_lengths, column_names, text_column
from cellstill.errors import InvalidArgumentError, InvalidCountsError

_CHUNK_SIZE = 4096

Ratios = Iterable[tuple[np.ndarray, np.ndarray]]
"""Chunks ``(rows, ratios)``: positions of cells, ascending, shape ``(n,)``, and the factor that corrects each of their
counts, positive, shape ``(n, n_genes)``; together every cell that is summed, once."""


def pseudobulk_sums(
    counts: Any,
    obs: pd.DataFrame,
    sample_key: str | Sequence[str],
    *,
    gene_names: Sequence[str] | None = None,
    chunk_size: int = _CHUNK_SIZE,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Sum counts over the cells of each sample, reading the matrix once, in chunks of rows.

    Parameters
    ----------
    counts
        Raw counts, shape ``(n_obs, n_vars)``: CSR, CSC, dense, or backed by a file.
    obs
        Annotation of the cells, in the order of the rows.
    sample_key
        Column that names the samples; several columns give one row per combination found, such as donor and cell type.
    gene_names
        Names of the columns of the result; numbers if not given.
    chunk_size
        Rows read at a time; larger is faster on disk and takes more memory.

    Returns
    -------
    sums
        Samples x genes, int64, indexed by sample as text (a ``MultiIndex`` for several columns), sorted.
    metadata
        The same index, with ``n_cells`` and ``total_counts``.

    Raises
    ------
    MissingKeyError, InvalidArgumentError
        A column is absent or has missing values, or lengths disagree.
    InvalidCountsError
        Values that are not finite, non-negative integers.
    """
    keys = column_names("sample_key", [sample_key] if isinstance(sample_key, str) else sample_key)
    labels = pd.DataFrame({key: text_column(obs, key, "sample_key") for key in keys})
    by_sample = labels.groupby(keys[0] if len(keys) == 1 else list(keys), sort=True)
    n_cells = by_sample.size()
    sums = pd.DataFrame(sum_rows(counts, by_sample.ngroup().to_numpy(), len(n_cells), chunk_size), index=n_cells.index)
    if gene_names is not None:
        check_lengths("gene_names", gene_names, "columns of counts", sums.shape[1])
        sums.columns = pd.Index(gene_names)
    return sums, pd.DataFrame({"n_cells": n_cells, "total_counts": sums.sum(axis=1)})


def sum_rows(counts: Any, codes: np.ndarray, n_units: int, chunk_size: int = _CHUNK_SIZE) -> np.ndarray:
    """Sum the rows of each unit, (units x cells) @ (cells x genes) chunk by chunk; code -1 is left out."""
    from cellstill.data.counts import iter_rows  # its package imports torch, which reading a result does not need

    check_lengths("obs", codes, "rows of counts", counts.shape[0])
    sums = np.zeros((n_units, counts.shape[1]), dtype=np.int64)
    for start, rows in iter_rows(counts, chunk_size):
        unit = codes[start : start + rows.shape[0]]
        used = np.flatnonzero(unit >= 0)
        rows = rows[used]
        bad = ~(np.isfinite(rows.data) & (rows.data >= 0) & (rows.data == np.floor(rows.data)))
        if bad.any():
            row = used[np.searchsorted(rows.indptr, np.flatnonzero(bad)[0], side="right") - 1] + start
            raise InvalidCountsError(
                f"counts holds {rows.data[bad][0]:g} in row {row}: pseudobulk needs raw counts, which are finite, "
                "non-negative integers. Choose the layer that holds them."
            )
        indicator = sp.csr_matrix(
            (np.ones(len(used), np.int64), (unit[used], np.arange(len(used)))), (n_units, len(used))
        )
        sums += (indicator @ rows.astype(np.int64)).toarray()
    return sums


def corrected_sums(counts: Any, codes: np.ndarray, sums: np.ndarray, ratios: Ratios) -> np.ndarray:
    """Sum counts times their ratios, scale each sum to its total in ``sums``, and round.

    Parameters
    ----------
    counts
        Raw counts, shape ``(n_obs, n_vars)``; CSR or dense.
    codes
        Unit of each cell, shape ``(n_obs,)``; -1 for cells that are not used.
    sums
        Sums of the raw counts, units x genes.
    ratios
        See :data:`Ratios`; consumed once.

    Raises
    ------
    InvalidArgumentError
        A cell is missing or comes twice, or ratios are not positive, finite, or of another shape.
    """
    corrected = np.zeros(sums.shape)
    seen = np.zeros(len(codes), dtype=np.int64)
    for rows, ratio in ratios:
        check_lengths("ratios", ratio, "rows", len(rows))
        check_lengths("genes of ratios", ratio[0], "columns of counts", counts.shape[1])
        np.add.at(seen, rows, 1)
        unit = codes[rows]
        used = np.flatnonzero(unit >= 0)
        chunk = sp.csr_matrix(counts[rows[used]], dtype=np.float64, copy=True)
        factor = np.asarray(ratio[used[np.repeat(np.arange(len(used)), np.diff(chunk.indptr))], chunk.indices])
        if not (np.isfinite(factor) & (factor > 0)).all():
            raise InvalidArgumentError("ratios have to be finite and positive: each multiplies the count of a gene.")
        chunk.data *= factor
        indicator = sp.csr_matrix((np.ones(len(used)), (unit[used], np.arange(len(used)))), (len(sums), len(used)))
        corrected += (indicator @ chunk).toarray()
    wrong = np.flatnonzero((codes >= 0) & (seen != 1))
    if len(wrong):
        raise InvalidArgumentError(
            f"ratios held cell {wrong[0]} {seen[wrong[0]]} times: every cell of the two groups has to come once."
        )
    totals = np.maximum(corrected.sum(axis=1, keepdims=True), np.finfo(float).tiny)
    return np.rint(corrected * (sums.sum(axis=1, keepdims=True) / totals)).astype(np.int64)
