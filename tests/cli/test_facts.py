from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from cellstill.cli._facts import matrix_facts
from cellstill.io.anndata import open_anndata


def facts_of(values, here, form=sp.csr_matrix):
    ad.AnnData(X=form(values)).write_h5ad(here / "x.h5ad")
    with open_anndata(here / "x.h5ad") as file:
        return matrix_facts(file.matrix())


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_facts_of_counts(here, form):
    counts = np.random.default_rng(1).poisson(0.4, (50, 9)).astype(np.float32)
    counts[7] = 0
    counts[:, [2, 5]] = 0
    facts = facts_of(counts, here, form)
    assert facts.is_counts
    assert facts.format == {"csr_matrix": "CSR", "csc_matrix": "CSC"}.get(form.__name__, "dense")
    assert facts.density == pytest.approx((counts != 0).mean(), abs=1e-12)
    assert (facts.low, facts.high) == (0, counts.max())
    np.testing.assert_array_equal(facts.totals, counts.sum(axis=1))
    assert facts.quartiles == tuple(np.percentile(counts.sum(axis=1), [25, 50, 75]))
    assert facts.n_empty_cells == (counts.sum(axis=1) == 0).sum()
    assert facts.n_empty_genes == (counts.sum(axis=0) == 0).sum() >= 2


@pytest.mark.parametrize(
    ("bad", "problem"),
    [(0.5, "not integers"), (-1, "negative"), (np.nan, "NaN or infinite"), (np.inf, "NaN or infinite")],
)
@pytest.mark.parametrize("form", [sp.csr_matrix, np.asarray])
def test_one_bad_value_anywhere_is_found(here, bad, problem, form):
    counts = np.ones((3000, 3), dtype=np.float32)
    counts[2999, 1] = bad
    facts = facts_of(counts, here, form)
    assert facts.problem == problem
    assert not facts.is_counts
    assert np.isfinite(facts.totals).all()


def test_zeros_that_are_stored_do_not_count(here):
    matrix = sp.csr_matrix((np.array([0.0, 3.0], dtype=np.float32), ([0, 1], [0, 1])), shape=(2, 2))
    assert matrix.nnz == 2
    facts = facts_of(matrix, here)
    assert facts.density == 0.25
    assert (facts.n_empty_cells, facts.n_empty_genes) == (1, 1)


def test_all_zero_is_not_counts(here):
    assert facts_of(np.zeros((4, 3), dtype=np.float32), here).problem == "all zero"
