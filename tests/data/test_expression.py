from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from cellstill.data.expression import gene_moments, log_expression, scaled_counts, sparse_moments


@pytest.fixture
def counts():
    x = np.random.default_rng(0).poisson(0.8, (40, 12)).astype(np.float32)
    x[3] = 0
    return x


def test_every_cell_with_counts_gets_the_library_size(counts):
    scaled = scaled_counts(sp.csr_matrix(counts), 500.0).toarray()
    totals = counts.sum(axis=1)
    np.testing.assert_allclose(scaled.sum(axis=1), np.where(totals > 0, 500, 0))
    np.testing.assert_allclose(scaled[5], 500 * counts[5].astype(float) / totals[5])


def test_log_expression_is_the_formula_and_an_empty_cell_is_zero(counts):
    found = log_expression(sp.csr_matrix(counts))
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.toarray(), np.log1p(1e4 * counts / totals), rtol=1e-6)
    assert not found[3].toarray().any()


def test_moments_are_those_of_the_dense_matrix(counts):
    mean, variance = gene_moments(sp.csr_matrix(counts), 100.0)
    dense = scaled_counts(sp.csr_matrix(counts), 100.0).toarray()
    np.testing.assert_allclose(mean, dense.mean(axis=0))
    np.testing.assert_allclose(variance, dense.var(axis=0, ddof=1))


def test_moments_do_not_cancel_far_from_zero():
    values = np.array([[1e9], [1e9 + 1], [1e9 + 2]])
    assert sparse_moments(sp.csr_matrix(values))[1] == pytest.approx([1.0])


def test_counts_are_left_as_they_were(counts):
    x = sp.csr_matrix(counts)
    log_expression(x), gene_moments(x, 10.0)
    np.testing.assert_array_equal(x.toarray(), counts)
