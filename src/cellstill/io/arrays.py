"""Where a getter writes its rows: into memory, into the caller's array, or to disk as Zarr."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from cellstill.errors import InvalidArgumentError, StoreError
from cellstill.io.store import atomic_directory

Out = np.ndarray | str | os.PathLike[str] | None

_ZARR_ROWS = 1024


@contextmanager
def output_array(out: Out, shape: tuple[int, int]) -> Iterator[Any]:
    """Give a float32 array of ``shape`` to fill.

    Parameters
    ----------
    out
        ``None`` for a new NumPy array; an array to fill; or the path of a Zarr array to create, which appears only
        when it is complete.
    shape
        Rows and columns.

    Raises
    ------
    InvalidArgumentError
        ``out`` is an array of another shape.
    StoreError
        ``out`` is a path that exists.
    """
    if out is None:
        yield np.empty(shape, dtype=np.float32)
    elif isinstance(out, (str, os.PathLike)):
        import zarr

        if os.path.lexists(out):
            raise StoreError(f"{out} exists. Choose another path for out, or remove it first.")
        with atomic_directory(out) as folder:
            yield zarr.create_array(
                store=folder, shape=shape, chunks=(min(_ZARR_ROWS, max(shape[0], 1)), shape[1]), dtype="float32"
            )
    else:
        if tuple(out.shape) != shape:
            raise InvalidArgumentError(f"out has shape {tuple(out.shape)}; {shape} is needed.")
        yield out
