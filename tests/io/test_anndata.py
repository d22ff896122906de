from __future__ import annotations

import warnings

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cellstill.errors import MissingKeyError, StoreError
from cellstill.io.anndata import open_anndata, read_anndata


@pytest.fixture
def adata():
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.5, (37, 11)).astype(np.float32)
    obs = pd.DataFrame({"batch": pd.Categorical(rng.choice(["a", "b"], 37))}, index=[f"c{i}" for i in range(37)])
    return ad.AnnData(
        X=sp.csr_matrix(counts),
        obs=obs,
        layers={"csc": sp.csc_matrix(counts * 2), "dense": counts * 3},
        obsm={"X_pca": rng.normal(size=(37, 4))},
    )


@pytest.fixture(params=["h5ad", "zarr"])
def stored(request, adata, tmp_path):
    path = tmp_path / f"x.{request.param}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.write_h5ad(path) if request.param == "h5ad" else adata.write_zarr(path)
    return path


@pytest.mark.parametrize(("layer", "form"), [(None, "CSR"), ("csc", "CSC"), ("dense", "dense")])
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_blocks_add_up_to_the_matrix(stored, adata, layer, form, size):
    held = adata.X if layer is None else adata.layers[layer]
    expected = held if form == "dense" else held.toarray()
    found = np.zeros(adata.shape)
    with open_anndata(stored) as file:
        matrix = file.matrix(layer)
        assert (matrix.format, matrix.shape, matrix.dtype) == (form, adata.shape, np.float32)
        n_values = []
        for values, rows, columns in matrix.blocks(size):
            np.add.at(found, (rows, columns), values)
            n_values.append(len(values))
        in_memory = matrix.to_csr()
    np.testing.assert_array_equal(found, expected)
    assert max(n_values) <= max(size, adata.n_vars)
    assert isinstance(in_memory, sp.csr_matrix)
    np.testing.assert_array_equal(in_memory.toarray(), expected)


def test_tables_and_names(stored, adata):
    with open_anndata(stored) as file:
        pd.testing.assert_frame_equal(file.obs, adata.obs)
        assert list(file.var_names) == list(adata.var_names)
        assert file.layers == ["csc", "dense"]
        assert file.obsm == {"X_pca": (37, 4)}
        assert file.raw_shape is None
        with pytest.raises(MissingKeyError, match=r"layer='x' is not in adata.layers.*'csc', 'dense'"):
            file.matrix("x")
        with pytest.raises(MissingKeyError, match=r"obsm_key='x' is not in adata.obsm.*'X_pca'"):
            file.to_adata(["x"])


def test_matrices_stay_on_disk_and_can_be_checked_there(stored, adata):
    from cellstill.data import check_counts

    adata_totals = adata.X.toarray().sum(axis=1)
    assert adata_totals.min() > 0
    with open_anndata(stored) as file:
        lazy = file.to_adata(["X_pca"])
        for matrix in (lazy.X, *lazy.layers.values()):
            assert not sp.issparse(matrix)
            assert not isinstance(matrix, np.ndarray)
        np.testing.assert_array_equal(lazy.obsm["X_pca"], adata.obsm["X_pca"])
        np.testing.assert_array_equal(check_counts(lazy, "csc").library_size, 2 * adata_totals)
        np.testing.assert_array_equal(check_counts(lazy, "dense").library_size, 3 * adata_totals)
        lazy.obs["more"] = 1
        assert "more" not in file.obs


def test_read_whole(stored, adata):
    whole = read_anndata(stored)
    np.testing.assert_array_equal(whole.layers["csc"].toarray(), adata.layers["csc"].toarray())
    pd.testing.assert_frame_equal(whole.obs, adata.obs)


def test_without_x(tmp_path, adata):
    del adata.X
    adata.write_h5ad(tmp_path / "x.h5ad")
    with open_anndata(tmp_path / "x.h5ad") as file:
        assert file.matrix() is None
        assert file.to_adata().X is None


def test_raw(tmp_path, adata):
    adata.raw = adata
    adata[:, :5].copy().write_h5ad(tmp_path / "x.h5ad")
    with open_anndata(tmp_path / "x.h5ad") as file:
        assert file.shape == (37, 5)
        assert file.raw_shape == (37, 11)


def test_the_file_is_closed(tmp_path, adata):
    adata.write_h5ad(tmp_path / "x.h5ad")
    with open_anndata(tmp_path / "x.h5ad") as file:
        root = file._root
    assert not root


def no_file(path, whole):
    (path.parent / "other.h5ad").touch()


def empty_file(path, whole):
    path.touch()


def text_file(path, whole):
    path.write_text("gene,cell\n1,2\n")


def truncated(path, whole):
    path.write_bytes(whole[: len(whole) // 2])


def damaged(path, whole):
    # Bytes of the compressed counts are overwritten.
    with h5py.File(path.parent / "whole.h5ad", "r") as file:
        start = file["X/data"].id.get_chunk_info(0).byte_offset
    path.write_bytes(whole[:start] + b"\xaa" * 50 + whole[start + 50 :])


def other_hdf5(path, whole):
    with h5py.File(path, "w") as file:
        file["x"] = [1]


def plain_folder(path, whole):
    path.mkdir()


SPOILT = {
    no_file: "does not exist. Beside it: other.h5ad, whole.h5ad",
    empty_file: "is empty. Copy or download it again",
    text_file: "is not an HDF5 file.*sc.read",
    truncated: "is truncated: its end is missing. Copy or download it again",
    damaged: "is damaged.*download it again",
    other_hdf5: "holds no AnnData: it has no obs and no var",
    plain_folder: "is a folder, but no Zarr store",
}


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_what_cannot_be_read_is_named(tmp_path, adata, spoil):
    adata.write_h5ad(tmp_path / "whole.h5ad", compression="gzip")
    path = tmp_path / "x.h5ad"
    spoil(path, (tmp_path / "whole.h5ad").read_bytes())

    def read():
        with open_anndata(path) as file:
            file.matrix().to_csr()

    with pytest.raises(StoreError, match=SPOILT[spoil]) as raised:
        read()
    assert str(raised.value).startswith(str(path))
    with pytest.raises(StoreError):
        read_anndata(path)


def test_mudata_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "x.h5mu").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(StoreError, match=r"mdata\['rna'\].write_h5ad"), open_anndata(tmp_path / "x.h5mu"):
        pass
