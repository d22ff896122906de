from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import zarr
from anndata import AnnData
from anndata.io import sparse_dataset

from cellstill.data.counts import as_csr, check_counts, count_layers, iter_rows
from cellstill.errors import InvalidCountsError, MissingKeyError


@pytest.fixture
def dense() -> np.ndarray:
    counts = np.random.default_rng(0).poisson(0.4, size=(50, 30))
    counts[:, 0] += 1
    return counts


FORMS = {
    "csr_matrix": sp.csr_matrix,
    "csr_array": sp.csr_array,
    "csc_matrix": sp.csc_matrix,
    "csc_array": sp.csc_array,
    "dense": np.asarray,
    "dense_fortran_order": np.asfortranarray,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "uint16", "float32", "float64"])
def test_every_form_and_type_reads_as_the_same_counts(dense, form, dtype):
    adata = AnnData(FORMS[form](dense.astype(dtype)))
    summary = check_counts(adata, chunk_size=7)
    np.testing.assert_array_equal(summary.library_size, dense.sum(axis=1))
    assert summary.nnz == (dense > 0).sum()
    assert summary.max_count == dense.max()
    np.testing.assert_array_equal(as_csr(adata.X).toarray(), dense)


@pytest.mark.parametrize("form", ["csr_matrix", "csc_matrix", "dense"])
@pytest.mark.parametrize("store", ["h5ad", "zarr"])
def test_data_on_disk_are_read_in_blocks(tmp_path, dense, form, store):
    adata = AnnData(FORMS[form](dense.astype(np.float32)))
    path = tmp_path / f"counts.{store}"
    if store == "h5ad":
        adata.write_h5ad(path)
        on_disk = ad.read_h5ad(path, backed="r").X
    else:
        adata.write_zarr(path)
        group = zarr.open(path, mode="r")
        on_disk = group["X"] if form == "dense" else sparse_dataset(group["X"])
    assert not isinstance(on_disk, np.ndarray)
    blocks = list(iter_rows(on_disk, 16))
    assert [start for start, _ in blocks] == [0, 16, 32, 48]
    np.testing.assert_array_equal(sp.vstack([rows for _, rows in blocks]).toarray(), dense)


def test_backed_h5ad_is_checked_whole(tmp_path, dense):
    adata = AnnData(sp.csr_matrix(dense.astype(np.float32)))
    adata.X[40, 0] = 0.5
    adata.write_h5ad(tmp_path / "counts.h5ad")
    with pytest.raises(InvalidCountsError, match="not integers .cell '40'"):
        check_counts(ad.read_h5ad(tmp_path / "counts.h5ad", backed="r"), chunk_size=16)


def test_csr_in_memory_is_not_copied(dense):
    matrix = sp.csr_matrix(dense.astype(np.float32))
    assert as_csr(matrix) is matrix
    assert np.shares_memory(as_csr(sp.csr_array(matrix)).data, matrix.data)


def test_duplicated_entries_are_summed():
    matrix = sp.csr_matrix((np.ones(2, np.float32), np.array([1, 1]), np.array([0, 2])), shape=(1, 3))
    np.testing.assert_array_equal(as_csr(matrix).data, [2.0])
    assert matrix.nnz == 2, "the caller's matrix is left alone"


@pytest.mark.parametrize(
    ("value", "problem"),
    [(np.nan, "non-finite"), (np.inf, "non-finite"), (-1.0, "negative"), (0.5, "not integers")],
)
@pytest.mark.parametrize("row", [0, 49], ids=["first_cell", "last_cell_of_the_last_chunk"])
def test_what_is_not_a_count_is_refused_wherever_it_is(dense, value, problem, row):
    matrix = sp.csr_matrix(dense.astype(np.float64))
    matrix[row, 0] = value
    adata = AnnData(matrix)
    with pytest.raises(InvalidCountsError, match=rf"adata\.X holds .*{problem}.*'{row}'; first values {value:g}\)"):
        check_counts(adata, chunk_size=8)


def test_first_offending_cells_are_named_and_the_rest_counted(dense):
    matrix = dense.astype(np.float32)
    matrix[[5, 6, 9, 12], 0] = 1.5
    with pytest.raises(InvalidCountsError, match=r"cells '5', '6', '9', \.\.\."):
        check_counts(AnnData(matrix))


def test_the_layer_that_looks_like_counts_is_named(dense):
    adata = AnnData(np.log1p(dense.astype(np.float32)), layers={"umi": dense.astype(np.float32)})
    with pytest.raises(InvalidCountsError, match=r"These look like counts: adata\.layers\['umi'\]"):
        check_counts(adata)
    assert count_layers(adata) == ["umi"]
    adata = AnnData(dense.astype(np.float32), layers={"log": np.log1p(dense.astype(np.float32))})
    with pytest.raises(InvalidCountsError, match=r"adata\.layers\['log'\].*layer=None"):
        check_counts(adata, "log")


def test_without_another_layer_raw_counts_are_asked_for(dense):
    with pytest.raises(InvalidCountsError, match="bring raw counts"):
        check_counts(AnnData(np.log1p(dense.astype(np.float32))))


def test_fractional_counts_can_be_allowed_but_not_negative_ones(dense):
    matrix = dense * 0.5
    assert check_counts(AnnData(matrix), allow_noninteger=True).max_count == dense.max() / 2
    matrix[3, 3] = -0.5
    with pytest.raises(InvalidCountsError, match="negative"):
        check_counts(AnnData(matrix), allow_noninteger=True)


def test_an_empty_cell_is_refused_with_the_remedy(dense):
    dense[17] = 0
    with pytest.raises(InvalidCountsError, match=r"without a single count .*'17'.*filter_cells"):
        check_counts(AnnData(sp.csr_matrix(dense)))


def test_a_wrong_layer_lists_those_that_exist(dense):
    adata = AnnData(dense, layers={"counts": dense})
    with pytest.raises(MissingKeyError, match=r"layer='raw' is not in adata\.layers.*'counts'"):
        check_counts(adata, "raw")


def test_no_matrix_at_all():
    with pytest.raises(InvalidCountsError, match=r"adata\.X is empty"):
        check_counts(AnnData(shape=(3, 2)))
