# mypy: disable-error-code="no-untyped-def"
"""Compiled loops of the CPU for the non-zeros of sparse rows, as in `_kernels`."""

from __future__ import annotations

from cellstill.nn._kernels import _F, _compile, _log1p


@_compile
def totals(start, stop, data, indptr, out):
    """Fill ``out`` with the sums of the rows ``start`` to ``stop``."""
    for i in range(start, stop):
        row, total = data[indptr[i] : indptr[i + 1]], _F(0)
        for k in range(row.size):
            total += row[k]
        out[i] = total


@_compile
def log1p(start, stop, data, indptr, factor, out):
    """Fill ``out`` with log1p of the non-zeros of the rows ``start`` to ``stop``, each times the factor of its row."""
    for i in range(start, stop):
        row, logged, own = data[indptr[i] : indptr[i + 1]], out[indptr[i] : indptr[i + 1]], factor[i]
        for k in range(row.size):
            logged[k] = _log1p(own * row[k])
