from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cellstill.data.genes import align_genes
from cellstill.errors import CellstillWarning, GeneMismatchError

GENES = ["a", "b", "c", "d"]
COUNTS = sp.csr_matrix(np.arange(12, dtype=np.float32).reshape(3, 4))


def test_same_genes_are_not_copied():
    aligned, overlap = align_genes(COUNTS, pd.Index(GENES), GENES)
    assert aligned is COUNTS
    assert overlap == 1


def test_permuted_and_additional_genes():
    order = [2, 0, 3, 1]
    shuffled = sp.csr_matrix(np.c_[COUNTS.toarray()[:, order], [7, 7, 7]])
    aligned, overlap = align_genes(shuffled, pd.Index([*np.array(GENES)[order], "extra"]), GENES)
    np.testing.assert_array_equal(aligned.toarray(), COUNTS.toarray())
    assert aligned.has_canonical_format
    assert overlap == 1


def test_missing_genes_count_as_zero_and_warn():
    with pytest.warns(CellstillWarning, match=r"1 of the model's 4 genes are missing .*'b'"):
        aligned, overlap = align_genes(COUNTS[:, [0, 2, 3]], pd.Index(["a", "c", "d"]), GENES)
    expected = COUNTS.toarray()
    expected[:, 1] = 0
    np.testing.assert_array_equal(aligned.toarray(), expected)
    assert overlap == 0.75


def test_too_little_in_common_shows_both_kinds_of_names():
    with pytest.raises(
        GeneMismatchError, match=r"Only 1 of the model's 4 genes \(25%\).*adata has no 'b', for instance, .*'ENSG1'"
    ):
        align_genes(COUNTS, pd.Index(["ENSG1", "ENSG2", "ENSG3", "a"]), GENES)


def test_duplicated_names():
    with pytest.raises(GeneMismatchError, match=r"1 duplicated gene names \('a'\).*var_names_make_unique"):
        align_genes(COUNTS, pd.Index(["a", "a", "b", "c"]), GENES)
