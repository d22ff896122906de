"""Sparse rows of a minibatch: totals and logarithms of the non-zeros, against the dense array in float64."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cellstill.nn.compiled import compiled
from cellstill.nn.sparse import CSRRows


@pytest.fixture(params=[False, True], ids=["torch", "compiled"], autouse=True)
def mode(request):
    with compiled(request.param):
        yield request.param


@pytest.fixture(params=[np.int32, np.int64])
def counts(request):
    dense = np.random.default_rng(0).negative_binomial(0.4, 0.02, (31, 77)).astype(np.float32)
    dense[[0, 7, 30]] = 0
    dense[3, 5] = 3e6
    x = sp.csr_matrix(dense)
    parts = (x.data, x.indices.astype(request.param), x.indptr.astype(request.param))
    return dense.astype(np.float64), CSRRows(*(torch.from_numpy(part) for part in parts), dense.shape[1])


def test_library_size_is_the_total_of_each_cell(counts):
    dense, rows = counts
    np.testing.assert_allclose(rows.library_size(), dense.sum(axis=1), rtol=1e-6)


def test_log1p_of_counts_and_of_counts_times_a_factor_of_their_cell(counts):
    dense, rows = counts
    factor = np.random.default_rng(1).lognormal(0, 3, len(dense))
    np.testing.assert_allclose(rows.log1p().to_dense(), np.log1p(dense), rtol=1e-6)
    scaled = rows.log1p(torch.from_numpy(factor.astype(np.float32)))
    np.testing.assert_allclose(scaled.to_dense(), np.log1p(factor[:, None] * dense), rtol=1e-6)
    assert scaled.indices is rows.indices


def test_a_block_of_rows_has_its_own(counts):
    dense, rows = counts
    block = rows.rows(slice(2, 9))
    np.testing.assert_allclose(block.library_size(), dense[2:9].sum(axis=1), rtol=1e-6)
    factor = torch.linspace(1, 2, 7)
    np.testing.assert_allclose(
        block.log1p(factor).to_dense(), np.log1p(factor.numpy()[:, None] * dense[2:9]), rtol=1e-6
    )


def test_other_values_stand_in_the_same_places_and_have_totals_of_their_own(counts, mode):
    dense, rows = counts
    before = rows.library_size()
    doubled = rows.with_data(2 * rows.data)
    np.testing.assert_allclose(doubled.to_dense(), 2 * dense)
    torch.testing.assert_close(doubled.library_size(), 2 * before)
    torch.testing.assert_close(doubled.log1p().data, torch.log1p(2 * rows.data))
    if mode:
        assert all(own is known for own, known in zip(doubled.places, rows.places, strict=True))


def test_log2_cpm(counts):
    dense, rows = counts
    expected = np.log2(1 + 1e6 * dense / np.maximum(dense.sum(axis=1, keepdims=True), 1e-12))
    np.testing.assert_allclose(rows.log2_cpm().to_dense(), expected, rtol=1e-5)


def test_several_threads_give_the_same(counts, monkeypatch):
    _, rows = counts
    with compiled(True):
        once = rows.library_size(), rows.log1p().data
        monkeypatch.setattr("cellstill.nn.compiled._MIN_SHARE", 1)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
        torch.testing.assert_close((rows.library_size(), rows.log1p().data), once, rtol=0, atol=0)


def test_a_factor_for_other_cells_is_refused(counts):
    with pytest.raises(ValueError, match=r"factor has shape \(30,\); \(31,\) is needed"):
        counts[1].log1p(torch.ones(30))


def test_double_precision_is_kept():
    rows = CSRRows(torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([0, 2]), torch.tensor([0, 1, 2]), 3)
    assert rows.library_size().dtype == torch.float64
    torch.testing.assert_close(rows.log1p().data, torch.log1p(rows.data))
