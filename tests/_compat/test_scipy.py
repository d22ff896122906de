"""scipy's row gather, called directly: the same as indexing, whatever the types."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from cellstill._compat import scipy as compat


@pytest.mark.parametrize("gather", ["scipy", "numpy"])
@pytest.mark.parametrize("integers", [(np.int32, np.int32), (np.int64, np.int64), (np.int32, np.int64)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8, bool])
@pytest.mark.parametrize("rows", [[3, 0, 7], [2, 2, 2], [], [9], list(range(10))[::-1]], ids=str)
def test_rows_are_those_of_indexing(monkeypatch, gather, integers, dtype, rows):
    counts = sp.random(10, 30, 0.2, format="csr", random_state=0)
    counts.data = np.arange(1, counts.nnz + 1).astype(dtype)
    if gather == "numpy":
        monkeypatch.setattr(compat, "csr_row_index", None)
    rows = np.array(rows, dtype=np.int64)
    data, indices, indptr = compat.take_rows(
        counts.data, counts.indices.astype(integers[0]), counts.indptr.astype(integers[1]), rows
    )
    expected = counts[rows]
    np.testing.assert_array_equal(data, expected.data)
    np.testing.assert_array_equal(indices, expected.indices)
    np.testing.assert_array_equal(indptr, expected.indptr)
    assert (data.dtype, indices.dtype, indptr.dtype) == (np.dtype(dtype), *map(np.dtype, integers))


def test_scipy_has_it():
    assert compat.csr_row_index is not None
