"""Read h5ad and Zarr: tables at once, matrices when they are asked for, and a clear error for what is no AnnData."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellstill.errors import CellstillError, StoreError, check_key

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

_BLOCK = 1 << 20
_SPARSE = {"csr_matrix": "CSR", "csc_matrix": "CSC"}
_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_MUDATA_SIGNATURE = b"MuData"
_SUFFIXES = (".h5ad", ".h5mu", ".zarr")


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix on disk.

    Attributes
    ----------
    where
        ``"X"`` or ``"layers/<name>"``.
    format
        ``"CSR"``, ``"CSC"`` or ``"dense"``.
    shape, dtype
        Of the matrix.
    """

    where: str
    format: str
    shape: tuple[int, int]
    dtype: np.dtype
    _element: Any
    _path: Path

    @property
    def n_stored(self) -> int:
        """Number of values on disk: those that are not zero, for a sparse matrix."""
        return int(np.prod(self.shape)) if self.format == "dense" else int(self._element["data"].shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in memory, in its own format."""
        if self.format == "dense":
            return self.n_stored * self.dtype.itemsize
        arrays = (self._element[name] for name in ("data", "indices", "indptr"))
        return sum(int(array.shape[0]) * array.dtype.itemsize for array in arrays)

    def blocks(self, size: int = _BLOCK) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield ``(values, rows, columns)`` of the stored values, about ``size`` at a time, never the whole matrix.

        Raises
        ------
        StoreError
            The file is damaged.
        """
        with _clear_errors(self._path):
            if self.format == "dense":
                n_rows = max(size // max(self.shape[1], 1), 1)
                for start in range(0, self.shape[0], n_rows):
                    dense = np.asarray(self._element[start : start + n_rows])
                    rows, columns = np.nonzero(dense)
                    yield dense[rows, columns], rows + start, columns
                return
            indptr = np.asarray(self._element["indptr"][:])
            for start in range(0, self.n_stored, size):
                stop = min(start + size, self.n_stored)
                major = np.searchsorted(indptr, np.arange(start, stop), side="right") - 1
                minor = np.asarray(self._element["indices"][start:stop])
                values = np.asarray(self._element["data"][start:stop])
                yield (values, major, minor) if self.format == "CSR" else (values, minor, major)

    def to_csr(self) -> sp.csr_matrix:
        """Read the matrix into memory as CSR; a dense one is never held whole.

        Raises
        ------
        StoreError
            The file is damaged.
        """
        from cellstill.data.counts import as_csr

        with _clear_errors(self._path):
            return as_csr(self._element if self.format == "dense" else self.lazy().to_memory())

    def lazy(self) -> Any:
        """Return the array on disk: of HDF5 or Zarr, or anndata's sparse data set."""
        from anndata.io import sparse_dataset

        return self._element if self.format == "dense" else sparse_dataset(self._element)


@dataclass(frozen=True)
class StoredAnnData:
    """An AnnData on disk, whose file is open.

    Attributes
    ----------
    path
        Where it lies.
    obs
        Annotation of the cells.
    var_names
        Names of the genes.
    """

    path: Path
    obs: pd.DataFrame
    var_names: pd.Index
    _root: Any

    @property
    def shape(self) -> tuple[int, int]:
        """Number of cells and of genes."""
        return len(self.obs), len(self.var_names)

    @property
    def layers(self) -> list[str]:
        """Names of the layers that are matrices."""
        group = self._root.get("layers")
        return [] if group is None else [str(name) for name in sorted(group) if _is_matrix(group[name])]

    @property
    def obsm(self) -> dict[str, tuple[int, ...]]:
        """Shape of each embedding that is an array, by name."""
        group = self._root.get("obsm")
        names = [] if group is None else sorted(group)
        return {str(name): tuple(group[name].shape) for name in names if hasattr(group[name], "shape")}

    @property
    def raw_shape(self) -> tuple[int, int] | None:
        """Shape of ``raw.X``, if there is one."""
        raw = self._root.get("raw")
        return None if raw is None or "X" not in raw else self._stored("raw/X").shape

    def matrix(self, layer: str | None = None) -> StoredMatrix | None:
        """Return a layer, or ``X`` for ``None``; ``None`` where there is no ``X``.

        Raises
        ------
        MissingKeyError
            There is no such layer; the message lists those that exist.
        """
        if layer is None:
            return self._stored("X") if "X" in self._root and _is_matrix(self._root["X"]) else None
        check_key("layer", layer, "adata.layers", self.layers)
        return self._stored(f"layers/{layer}")

    def to_adata(self, obsm_keys: Sequence[str] = ()) -> AnnData:
        """Build an AnnData whose matrices stay on disk, to be read while the file is open.

        Parameters
        ----------
        obsm_keys
            Embeddings to read into memory; the others are left out.

        Raises
        ------
        MissingKeyError
            There is no such embedding.
        StoreError
            The file is damaged.
        """
        from anndata import AnnData
        from anndata.io import read_elem

        for key in obsm_keys:
            check_key("obsm_key", key, "adata.obsm", self.obsm)
        matrices = {layer: self.matrix(layer) for layer in (None, *self.layers)}
        with _clear_errors(self.path):
            on_disk = {layer: matrix.lazy() for layer, matrix in matrices.items() if matrix is not None}
            return AnnData(
                X=on_disk.pop(None, None),
                obs=self.obs,
                var=pd.DataFrame(index=self.var_names),
                layers=on_disk,
                obsm={key: np.asarray(read_elem(self._root[f"obsm/{key}"])) for key in obsm_keys},
            )

    def _stored(self, where: str) -> StoredMatrix:
        element = self._root[where]
        kind = _SPARSE.get(element.attrs.get("encoding-type", ""), "dense")
        if kind == "dense":
            shape, dtype = element.shape, element.dtype
        else:
            shape, dtype = element.attrs["shape"], element["data"].dtype
        return StoredMatrix(where, kind, (int(shape[0]), int(shape[1])), np.dtype(dtype), element, self.path)


@contextmanager
def open_anndata(path: str | os.PathLike[str]) -> Iterator[StoredAnnData]:
    """Open an h5ad or Zarr file: ``obs`` and the names of the genes are read, matrices are left on disk.

    Parameters
    ----------
    path
        ``.h5ad`` file or ``.zarr`` folder.

    Raises
    ------
    StoreError
        The file is absent, truncated or damaged, or holds no AnnData; the message says which.
    """
    from anndata.io import read_elem

    path = Path(path)
    if path.suffix == ".h5mu" and path.exists():
        raise StoreError(
            f"{path} holds a MuData. Write the modality with the counts as h5ad first: mdata['rna'].write_h5ad(...); "
            "or model all of it: cellstill vi."
        )
    _check_path(path)
    with _clear_errors(path):
        root = _open(path)
    try:
        missing = [name for name in ("obs", "var") if name not in root]
        if missing:
            raise StoreError(f"{path} holds no AnnData: it has no {' and no '.join(missing)}.")
        with _clear_errors(path):
            obs, var_names = read_elem(root["obs"]), read_elem(root["var"]).index
        yield StoredAnnData(path, obs, var_names, root)
    finally:
        if hasattr(root, "close"):
            root.close()


def read_anndata(path: str | os.PathLike[str]) -> AnnData:
    """Read an h5ad or Zarr file into memory, whole.

    Parameters
    ----------
    path
        ``.h5ad`` file or ``.zarr`` folder.

    Raises
    ------
    StoreError
        The file is absent, truncated or damaged, or holds no AnnData; the message says which.
    """
    import anndata

    path = Path(path)
    with open_anndata(path), _clear_errors(path):
        return anndata.read_zarr(path) if path.is_dir() else anndata.read_h5ad(path)


def read_mudata(path: str | os.PathLike[str]) -> MuData:
    """Read an h5mu file into memory, whole.

    Parameters
    ----------
    path
        ``.h5mu`` file.

    Raises
    ------
    StoreError
        The file is absent, truncated or damaged, or holds no MuData; the message says which.
    """
    import mudata

    path = Path(path)
    _check_path(path)
    with _clear_errors(path, "MuData"), warnings.catch_warnings():
        # Of how later versions will share columns between modalities, which nobody can act upon here.
        warnings.simplefilter("ignore", FutureWarning)
        return mudata.read_h5mu(path)


def _open(path: Path) -> Any:
    if path.is_dir():
        import zarr

        return zarr.open_group(path, mode="r")
    import h5py

    return h5py.File(path, "r")


def _is_matrix(element: Any) -> bool:
    kind = element.attrs.get("encoding-type", "array")
    return kind in _SPARSE or (kind == "array" and len(getattr(element, "shape", ())) == 2)


def _check_path(path: Path) -> None:
    if not path.exists():
        near = sorted(p.name for p in path.parent.glob("*") if p.suffix in _SUFFIXES) if path.parent.is_dir() else []
        shown = ", ".join(near[:5]) + (", ..." if len(near) > 5 else "")
        raise StoreError(f"{path} does not exist. " + (f"Beside it: {shown}." if near else "Check the path."))
    if path.is_dir():
        if not any((path / name).is_file() for name in (".zgroup", "zarr.json")):
            raise StoreError(f"{path} is a folder, but no Zarr store. Give an .h5ad file or a .zarr folder.")
        return
    _check_hdf5(path)


def _check_hdf5(path: Path) -> None:
    # mudata writes its name into 512 bytes before the HDF5 file proper.
    starts = (_HDF5_SIGNATURE, _MUDATA_SIGNATURE) if path.suffix == ".h5mu" else (_HDF5_SIGNATURE,)
    try:
        with path.open("rb") as file:
            start = file.read(len(_HDF5_SIGNATURE))
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}.") from error
    if not start:
        raise StoreError(f"{path} is empty. Copy or download it again.")
    if not start.startswith(starts):
        kind = "h5mu" if len(starts) > 1 else "h5ad"
        raise StoreError(
            f"{path} is not an HDF5 file, so it is no {kind}, or its beginning is damaged. Other formats can be read "
            "with scanpy (sc.read_10x_mtx, sc.read_text, ...) and written with adata.write_h5ad(...)."
        )


@contextmanager
def _clear_errors(path: Path, kind: str = "AnnData") -> Iterator[None]:
    """Turn what HDF5, Zarr and anndata raise into one sentence about the file."""
    try:
        yield
    except (CellstillError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        if "truncated file" in reason:
            raise StoreError(f"{path} is truncated: its end is missing. Copy or download it again.") from error
        raise StoreError(
            f"{path} cannot be read: it is damaged, or holds no {kind} ({type(error).__name__}: {reason[:200]}). "
            "Copy or download it again, or write it again with a present anndata."
        ) from error
