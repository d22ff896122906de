# mypy: disable-error-code="no-untyped-def"
"""Compiled loops of the CPU for products of sparse rows, as in `_kernels`.

A matrix with a row for each gene is larger than the cache of a core, and a cell's genes lie far apart in it. So all
cells take their turn with a block of genes before the next block is looked at.
"""

from __future__ import annotations

import numpy as np

from cellstill.nn._kernels import _F, _compile, _inline


@_compile
def rows_times(start, stop, data, indices, indptr, matrix, block, out):
    """Fill the rows ``start`` to ``stop`` of ``out`` with those of ``x @ matrix``, ``block`` genes at a time.

    A cell whose genes are in no order waits at the first that is out of turn; the last block takes what is left.
    """
    n = matrix.shape[1]
    reached = indptr[:-1].copy()
    out[start:stop] = _F(0)
    for first in range(0, matrix.shape[0], block):
        for i in range(start, stop):
            k, end, row = reached[i], reached[i], out[i]
            while end < indptr[i + 1] and indices[end] < first + block:
                end += 1
            reached[i] = end
            while k + 3 < end:
                a, b, c, d = data[k], data[k + 1], data[k + 2], data[k + 3]
                of_a, of_b = matrix[indices[k]], matrix[indices[k + 1]]
                of_c, of_d = matrix[indices[k + 2]], matrix[indices[k + 3]]
                for j in range(n):
                    row[j] += a * of_a[j] + b * of_b[j] + c * of_c[j] + d * of_d[j]
                k += 4
            for last in range(k, end):
                _add(data[last], matrix[indices[last]], row)


@_compile
def columns_times(start, stop, data, indices, indptr, matrix, block, out):
    """Fill the rows ``start`` to ``stop`` of ``out`` with those of ``x.T @ matrix``, ``block`` genes at a time."""
    n = indptr.size - 1
    reached, is_sorted = indptr[:-1].copy(), np.ones(n, np.bool_)
    for i in range(n):
        for k in range(indptr[i] + 1, indptr[i + 1]):
            is_sorted[i] &= indices[k] >= indices[k - 1]
    for first in range(start, stop, block):
        end = min(first + block, stop)
        out[first:end] = _F(0)
        for i in range(n):
            k = reached[i]
            while is_sorted[i] and k < indptr[i + 1] and indices[k] < end:
                if indices[k] >= start:
                    _add(data[k], matrix[i], out[indices[k]])
                k += 1
            reached[i] = k
    for i in range(n):
        # Cells whose genes are in no order.
        for k in range(indptr[i], indptr[i] if is_sorted[i] else indptr[i + 1]):
            if start <= indices[k] < stop:
                _add(data[k], matrix[i], out[indices[k]])


@_inline
def _add(weight, row, total):
    for j in range(row.size):
        total[j] += weight * row[j]
