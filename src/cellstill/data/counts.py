"""Is it counts? One chunked pass over the whole matrix, wherever it lies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from cellstill.errors import InvalidArgumentError, InvalidCountsError, check_key

if TYPE_CHECKING:
    from anndata import AnnData

CHUNK_SIZE = 4096
"""Rows of one chunk: 4,096 x 20,000 at 8 % non-zero are about 50 MB."""

_WIDENED = (np.dtype(bool), np.dtype(np.float16))
"""Types of counts that arithmetic or SciPy does not take."""

_N_SHOWN = 3
_FRACTIONS = "values that are not integers"
_FRACTIONS_REMEDY = "Pass allow_noninteger=True only for counts that were corrected, never for log-normalised values."


@dataclass(frozen=True)
class CountsSummary:
    """What :func:`check_counts` saw.

    Attributes
    ----------
    n_obs, n_vars
        Cells and genes.
    nnz
        Number of non-zero counts.
    library_size
        Total count of each cell, shape ``(n_obs,)``, float64.
    max_count
        Largest count.
    """

    n_obs: int
    n_vars: int
    nnz: int
    library_size: np.ndarray
    max_count: float

    @property
    def density(self) -> float:
        """Share of the entries that are not zero."""
        return self.nnz / max(self.n_obs * self.n_vars, 1)


def get_layer(adata: AnnData, layer: str | None = None) -> Any:
    """Return ``adata.layers[layer]``, or ``adata.X`` for ``None``, in whatever form it is held.

    Raises
    ------
    MissingKeyError
        There is no such layer; the message lists those that exist.
    InvalidCountsError
        ``layer`` is ``None`` and ``adata.X`` is empty.
    """
    if layer is not None:
        check_key("layer", layer, "adata.layers", adata.layers.keys())
        return adata.layers[layer]
    if adata.X is None:
        layers = ", ".join(map(repr, adata.layers.keys())) or "none"
        raise InvalidCountsError(f"adata.X is empty. Name the layer that holds counts: layer=... (layers: {layers}).")
    return adata.X


def as_csr(matrix: Any) -> sp.csr_matrix:
    """Bring a matrix into memory as CSR; an in-memory CSR matrix is returned without a copy.

    Parameters
    ----------
    matrix
        CSR or CSC matrix or array, NumPy array, backed sparse data set (h5ad or Zarr), HDF5 or Zarr array, or
        dask array; shape ``(n_obs, n_vars)``.

    Returns
    -------
    Canonical CSR of the same shape and dtype, but float32 for truth values and float16: sorted indices, no duplicates.
    """
    if sp.issparse(matrix):
        csr = matrix if matrix.format == "csr" else matrix.tocsr()
        if not isinstance(csr, sp.csr_matrix):
            csr = sp.csr_matrix((csr.data, csr.indices, csr.indptr), shape=csr.shape, copy=False)
        if not csr.has_canonical_format:
            csr = csr.copy()
            csr.sum_duplicates()
        return csr.astype(np.float32) if csr.dtype in _WIDENED else csr
    if isinstance(matrix, np.ndarray):
        return sp.csr_matrix(matrix.astype(np.float32) if matrix.dtype in _WIDENED else matrix)
    if hasattr(matrix, "obs_names"):
        raise InvalidArgumentError("An AnnData was given where a matrix is read: pass adata.X or adata.layers[...].")
    if hasattr(matrix, "to_memory"):
        return as_csr(matrix.to_memory())
    return sp.vstack([rows for _, rows in iter_rows(matrix)], format="csr")


def iter_rows(matrix: Any, chunk_size: int = CHUNK_SIZE) -> Iterator[tuple[int, sp.csr_matrix]]:
    """Yield ``(start, rows)``: consecutive blocks of rows as CSR.

    Data on disk are read block by block. CSC, in memory or on disk, has no cheap rows and is turned into CSR once.
    """
    if getattr(matrix, "format", None) == "csc":
        matrix = as_csr(matrix if sp.issparse(matrix) else matrix.to_memory())
    if sp.issparse(matrix):
        matrix = as_csr(matrix)
    n_obs = matrix.shape[0]
    for start in range(0, n_obs, chunk_size):
        stop = min(start + chunk_size, n_obs)
        if isinstance(matrix, sp.csr_matrix):
            first, last = matrix.indptr[start], matrix.indptr[stop]
            yield (
                start,
                sp.csr_matrix(
                    (matrix.data[first:last], matrix.indices[first:last], matrix.indptr[start : stop + 1] - first),
                    shape=(stop - start, matrix.shape[1]),
                    copy=False,
                ),
            )
            continue
        rows = matrix[start:stop]
        if hasattr(rows, "compute"):
            rows = rows.compute()
        yield start, as_csr(rows if sp.issparse(rows) else np.asarray(rows))


def check_counts(
    adata: AnnData,
    layer: str | None = None,
    *,
    allow_noninteger: bool | None = False,
    set_up: bool = False,
    chunk_size: int = CHUNK_SIZE,
) -> CountsSummary:
    """Read the chosen layer once, whole, in chunks, and refuse it unless it holds counts.

    Counts are finite, non-negative and integer, in any dtype, and no cell is empty.

    Parameters
    ----------
    adata
        Annotated data; ``X`` and layers may be CSR, CSC, dense, backed or dask.
    layer
        Layer to read; ``None`` reads ``X``.
    allow_noninteger
        Accept fractional values, such as ambient-corrected counts. ``None`` does not, for callers that offer no such
        choice: the error does not speak of it.
    set_up
        The layer was chosen when the data were set up for a model: the error says what to put there.
    chunk_size
        Rows read at a time; larger is faster on disk and takes more memory.

    Raises
    ------
    InvalidCountsError
        Names the layer, what is wrong, the first offending cells, and a layer that looks like counts if there is one.
    MissingKeyError
        There is no such layer.
    """
    matrix = get_layer(adata, layer)
    n_obs, n_vars = matrix.shape
    if n_obs == 0 or n_vars == 0:
        raise InvalidCountsError(f"{_where(layer)} has shape {n_obs} x {n_vars}: there is nothing to read.")
    library_size = np.empty(n_obs)
    nnz, max_count = 0, 0.0
    for start, rows in iter_rows(matrix, chunk_size):
        problem, bad, values = _first_problem(rows, bool(allow_noninteger))
        if problem:
            remedy = _remedy(adata, layer, set_up)
            if problem == _FRACTIONS and allow_noninteger is not None and not set_up:
                remedy += f" {_FRACTIONS_REMEDY}"
            shown = ", ".join(f"{value:g}" for value in values[:_N_SHOWN])
            raise InvalidCountsError(
                f"{_where(layer)} holds {problem} ({_names(adata, start + bad)}; first values {shown}). {remedy}"
            )
        totals = np.asarray(rows.sum(axis=1, dtype=np.float64)).ravel()
        if not totals.all():
            empty = start + np.flatnonzero(totals == 0)
            raise InvalidCountsError(
                f"{_where(layer)} has cells without a single count ({_names(adata, empty)}). "
                "Remove them first: sc.pp.filter_cells(adata, min_counts=1)."
            )
        library_size[start : start + rows.shape[0]] = totals
        nnz += int(np.count_nonzero(rows.data))
        max_count = max(max_count, float(rows.data.max()))
    return CountsSummary(n_obs, n_vars, nnz, library_size, max_count)


def looks_like_counts(matrix: Any, n_cells: int = 256) -> bool:
    """Say whether the first ``n_cells`` rows are finite, non-negative integers, not all of them zero."""
    rows = _head(matrix, n_cells)
    return rows is not None and rows.nnz > 0 and not _first_problem(rows, allow_noninteger=False)[0]


def fault_of_first(matrix: Any, n_cells: int = 256) -> str:
    """Say what keeps the first ``n_cells`` rows from being counts, in a few words; nothing if they may be counts."""
    rows = _head(matrix, n_cells)
    return "" if rows is None else _first_problem(rows, allow_noninteger=False)[0]


def _head(matrix: Any, n_cells: int) -> sp.csr_matrix | None:
    return next(iter_rows(matrix[: min(n_cells, matrix.shape[0])], n_cells), (0, None))[1]


def count_layers(adata: AnnData) -> list[str | None]:
    """List the places that look like counts: layer names, and ``None`` for ``X``."""
    places: Iterable[str | None] = [None, *adata.layers.keys()] if adata.X is not None else adata.layers.keys()
    return [place for place in places if looks_like_counts(get_layer(adata, place))]


def _first_problem(rows: sp.csr_matrix, allow_noninteger: bool) -> tuple[str, np.ndarray, np.ndarray]:
    """Name the first thing wrong with a block, the rows (within the block) where it is, and the wrong values."""
    data = rows.data
    checks = [("non-finite values", lambda: ~np.isfinite(data)), ("negative values", lambda: data < 0)]
    if not allow_noninteger:
        checks.append((_FRACTIONS, lambda: data != np.floor(data)))
    if data.dtype.kind in "bui":
        checks = checks[1:2] if data.dtype.kind == "i" else []
    for problem, find in checks:
        bad = find()
        if bad.any():
            cells = np.unique(np.searchsorted(rows.indptr, np.flatnonzero(bad), side="right") - 1)
            return problem, cells, data[bad]
    return "", np.empty(0, dtype=np.intp), data[:0]


def _remedy(adata: AnnData, layer: str | None, set_up: bool) -> str:
    others = [place for place in count_layers(adata) if place != layer]
    if not others:
        return "No other layer looks like counts: bring raw counts."
    if set_up:
        return f"The model reads {_where(layer)}. Put counts there: {_where(layer)} = {_where(others[0])}.copy()."
    if others == [None]:
        return "adata.X looks like counts: choose it with layer=None."
    return "These look like counts: " + ", ".join(_where(place) for place in others) + "; choose with layer=..."


def _where(layer: str | None) -> str:
    return "adata.X" if layer is None else f"adata.layers[{layer!r}]"


def _names(adata: AnnData, cells: np.ndarray) -> str:
    names = ", ".join(repr(str(name)) for name in adata.obs_names[cells[:_N_SHOWN]])
    return f"cell{'s' if len(cells) > 1 else ''} {names}{', ...' if len(cells) > _N_SHOWN else ''}"
