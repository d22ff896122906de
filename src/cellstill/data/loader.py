"""Minibatches of cells as CSR rows and integer codes."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch

from cellstill._compat.scipy import take_rows
from cellstill.data.ahead import default_prefetch, map_ahead
from cellstill.data.resident import ResidentCounts, as_device, to_device
from cellstill.errors import InvalidArgumentError, whole_number

_OWN = frozenset({"data", "indices", "indptr", "rows"})
"""Entries of every minibatch."""


class Share(NamedTuple):
    """The part of a minibatch that one of several processes trains on.

    Attributes
    ----------
    batch
        Its cells, consecutive in the minibatch; there may be none.
    n
        Number of its cells.
    n_whole
        Number of cells of the minibatch.
    """

    batch: Mapping[str, torch.Tensor]
    n: int
    n_whole: int


class CountsLoader:
    """Iterate over cells in minibatches of CSR rows.

    Each minibatch is a plain dictionary of tensors, so that Lightning moves it between devices by itself:
    ``data`` (float32, non-zeros), ``indices`` (their genes) and ``indptr`` (``n + 1``), both in the integer type of
    ``counts``, ``rows`` (int64, the cells' positions in ``counts``), and one entry for each of ``per_cell``.

    Parameters
    ----------
    counts
        CSR matrix, shape ``(n_obs, n_vars)``, any numeric dtype. Never made dense, and copied only to a ``device``.
    per_cell
        Arrays whose first axis is the cells: category codes, targets, cached embeddings. Rows are gathered with the
        counts. Integer arrays become int64, others float32.
    indices
        Cells to visit, as positions or a mask of all cells; ``None`` visits all of them.
    batch_size
        Cells in a minibatch. Larger batches use the machine better and take fewer, smoother steps.
        A last batch of a single cell is joined to the one before it, because nothing can be normalised over it.
    shuffle
        Visit the cells in a new random order in each epoch, each exactly once; otherwise in the order given.
    seed
        Epoch ``e`` is shuffled by the generator seeded with ``(seed, e)``: the order does not depend on history.
    prefetch
        Minibatches that a background thread makes ahead of the one in use; 0 makes each when it is asked for. Larger
        holds more of them in memory. ``None`` is 1 where the process may use a second CPU and torch a second thread,
        else 0. The minibatches and their order are the same.
    device
        Device of the minibatches. Counts that fit live there, and rows are gathered there without the host waiting;
        they fit if they take at most half of the free memory. Others are gathered on the host and sent. ``None``
        leaves minibatches in the host's memory.

    Attributes
    ----------
    epoch
        Number of the next shuffled epoch. Set it to go on where another loader ended.

    Raises
    ------
    InvalidArgumentError
        ``counts`` is no CSR matrix; ``batch_size``, ``seed`` or ``prefetch`` is out of range; there is no cell to visit
        or one that does not exist; an array of ``per_cell`` has another length, no numbers, or the name of an entry
        above; there is no such ``device``.
    """

    def __init__(
        self,
        counts: sp.csr_matrix,
        per_cell: Mapping[str, np.ndarray] | None = None,
        *,
        indices: np.ndarray | None = None,
        batch_size: int = 128,
        shuffle: bool = False,
        seed: int = 0,
        prefetch: int | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        if not (sp.issparse(counts) and counts.format == "csr"):
            raise InvalidArgumentError(
                f"counts is of type {type(counts).__name__}. Give a CSR matrix: scipy.sparse.csr_matrix(...) of a "
                "matrix, or of X or a layer of an AnnData."
            )
        batch_size, seed = whole_number("batch_size", batch_size, least=1), whole_number("seed", seed, least=0)
        prefetch = None if prefetch is None else whole_number("prefetch", prefetch, least=0)
        n_obs = counts.shape[0]
        self.cells = np.arange(n_obs) if indices is None else _positions(indices, n_obs)
        if self.cells.size == 0:
            raise InvalidArgumentError("indices is empty: there is no cell to visit.")
        for name, values in (per_cell or {}).items():
            if name in _OWN:
                raise InvalidArgumentError(f"per_cell names {name!r}, which is an entry of every minibatch. Rename it.")
            if len(values) != n_obs:
                raise InvalidArgumentError(f"per_cell[{name!r}] has {len(values)} rows for {n_obs} cells.")
            if np.asarray(values).dtype.kind not in "iubf":
                found = np.asarray(values).dtype
                raise InvalidArgumentError(f"per_cell[{name!r}] has dtype {found}. Give numbers, such as codes.")
        self.counts = counts
        self.per_cell = dict(per_cell or {})
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.prefetch = default_prefetch() if prefetch is None else prefetch
        self.epoch = 0
        self._stops = np.arange(batch_size, len(self.cells) + batch_size, batch_size)
        self._stops[-1] = len(self.cells)
        if batch_size > 1 and len(self._stops) > 1 and self._stops[-1] - self._stops[-2] == 1:
            self._stops = np.delete(self._stops, -2)
        self.device: torch.device | None = None
        self._resident: ResidentCounts | None = None
        self._resident_per_cell: dict[str, torch.Tensor] = {}
        if device is not None:
            self.to(device)

    def __len__(self) -> int:
        return len(self._stops)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self._iterate(np.append(0, self._stops[:-1]), self._stops)

    def shares(self, rank: int, n_ranks: int) -> Generator[Share]:
        """Iterate over one process's part of every minibatch: those of all processes together are what one would see.

        Parameters
        ----------
        rank, n_ranks
            Which part (:func:`share_of`), and of how many.
        """
        starts = np.append(0, self._stops[:-1])
        sizes = (self._stops - starts).tolist()
        parts = np.array([share_of(size, rank, n_ranks) for size in sizes])
        batches = self._iterate(starts + parts[:, 0], starts + parts[:, 1])
        with closing(batches):
            for batch, (start, stop), size in zip(batches, parts.tolist(), sizes, strict=True):
                yield Share(batch, stop - start, size)

    def _iterate(self, starts: np.ndarray, stops: np.ndarray) -> Generator[dict[str, torch.Tensor]]:
        """Yield the cells between positions in the order of the next epoch."""
        order = self.cells
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(order)
            self.epoch += 1
        if self._resident is not None:
            nnz = np.append(0, np.cumsum(np.diff(self.counts.indptr)[order], dtype=np.int64))
            rows = to_device(order, self.device)
            for start, stop in zip(starts, stops, strict=True):
                yield self._gather_there(rows[start:stop], int(nnz[stop] - nnz[start]))
            return
        parts = (order[start:stop] for start, stop in zip(starts, stops, strict=True))
        yield from map_ahead(self._gather_here, parts, self.prefetch)

    def to(self, device: str | torch.device | None) -> CountsLoader:
        """Yield minibatches on a device from now on, with the counts living there if they fit.

        Returns
        -------
        The loader itself.
        """
        self.device = None if device is None else as_device(device)
        self._resident = None if self.device is None else ResidentCounts.of(self.counts, self.device)
        self._resident_per_cell = {}
        if self._resident is not None:
            self._resident_per_cell = {
                name: to_device(_narrow(values), self.device) for name, values in self.per_cell.items()
            }
        return self

    @property
    def is_resident(self) -> bool:
        """The counts live on :attr:`device`."""
        return self._resident is not None

    def gather(self, cells: np.ndarray) -> dict[str, torch.Tensor]:
        """Build the minibatch of the given cells, in the order given.

        Raises
        ------
        InvalidArgumentError
            A cell does not exist.
        """
        cells = _positions(cells, self.counts.shape[0])
        if self._resident is None:
            return self._gather_here(cells)
        return self._gather_there(to_device(cells, self.device), int(np.diff(self.counts.indptr)[cells].sum()))

    def fingerprint(self) -> str:
        """Hash everything that decides what the loader yields, and in which order: counts, arrays, cells, settings."""
        found = hashlib.blake2b(digest_size=16)
        settings = (self.counts.shape, self.batch_size, self.shuffle, self.seed)
        found.update(repr(settings).encode())
        arrays = {"data": self.counts.data, "indices": self.counts.indices, "indptr": self.counts.indptr}
        for name, array in {**arrays, "cells": self.cells, **self.per_cell}.items():
            found.update(f"{name} {array.dtype} {array.shape}".encode())
            found.update(np.ascontiguousarray(array).view(np.uint8).data)
        return found.hexdigest()

    def _gather_here(self, cells: np.ndarray) -> dict[str, torch.Tensor]:
        counts = self.counts
        data, indices, indptr = take_rows(counts.data, counts.indices, counts.indptr, cells)
        batch = {"data": data.astype(np.float32, copy=False), "indices": indices, "indptr": indptr, "rows": cells}
        for name, values in self.per_cell.items():
            batch[name] = _narrow(values[cells])
        return {name: to_device(values, self.device) for name, values in batch.items()}

    def _gather_there(self, rows: torch.Tensor, nnz: int) -> dict[str, torch.Tensor]:
        assert self._resident is not None
        batch = self._resident.gather(rows, nnz)
        batch["rows"] = rows
        for name, values in self._resident_per_cell.items():
            batch[name] = values.index_select(0, rows)
        return batch


def share_of(n: int, rank: int, n_ranks: int) -> tuple[int, int]:
    """Where one process's part of a minibatch starts and stops.

    The parts differ by at most one cell. Of fewer than ``2 * n_ranks`` cells the last processes get none, so that no
    part is a single cell unless the minibatch is: nothing can be normalised over one.

    Parameters
    ----------
    n
        Number of cells in the minibatch.
    rank, n_ranks
        Which part, and of how many.
    """
    n_parts = max(min(n_ranks, n // 2), 1)
    return n * min(rank, n_parts) // n_parts, n * min(rank + 1, n_parts) // n_parts


def check_shares(train_size: float, validation_size: float | None) -> None:
    """Raise unless cells can be split in these shares."""
    for name, share in {"train_size": train_size, "validation_size": validation_size}.items():
        if share is not None and not isinstance(share, Real):
            raise InvalidArgumentError(f"{name}={share!r} has to be a share, a number from 0 to 1.")
    rest = 1 - train_size if validation_size is None else validation_size
    if not 0 < train_size <= 1 or rest < 0 or train_size + rest > 1 + 1e-9:
        raise InvalidArgumentError(
            f"train_size={train_size} and validation_size={validation_size} must be shares, "
            "train_size above 0 and both together at most 1."
        )


def split_cells(
    n_obs: int, train_size: float = 0.9, validation_size: float | None = None, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split cells at random into training, validation and test.

    Parameters
    ----------
    n_obs
        Number of cells.
    train_size
        Share of the cells to train on, above 0 and at most 1.
    validation_size
        Share kept for early stopping. ``None`` takes all the rest, so there are no test cells.
    seed
        Seed of the permutation.

    Returns
    -------
    Sorted positions of the training, validation and test cells: every cell in exactly one of them.
    """
    check_shares(train_size, validation_size)
    rest = 1 - train_size if validation_size is None else validation_size
    n_train = int(np.ceil(train_size * n_obs - 1e-9))
    n_validation = n_obs - n_train if validation_size is None else int(np.floor(rest * n_obs + 1e-9))
    order = np.random.default_rng(seed).permutation(n_obs)
    parts = np.split(order, [n_train, min(n_train + n_validation, n_obs)])
    return np.sort(parts[0]), np.sort(parts[1]), np.sort(parts[2])


def _positions(cells: Any, n_obs: int) -> np.ndarray:
    """Turn positions or a mask into positions that exist."""
    cells = np.asarray(cells)
    if cells.size and cells.dtype.kind not in "iub":
        raise InvalidArgumentError(f"indices has dtype {cells.dtype}. Give positions of cells, or a mask.")
    if cells.dtype == bool:
        if cells.shape != (n_obs,):
            raise InvalidArgumentError(f"indices is a mask of shape {cells.shape}; {n_obs} cells need ({n_obs},).")
        return np.flatnonzero(cells)
    cells = cells.astype(np.int64, copy=False)
    if cells.size and (cells.min() < 0 or cells.max() >= n_obs):
        wrong = cells[(cells < 0) | (cells >= n_obs)][0]
        raise InvalidArgumentError(f"indices holds {wrong}; the {n_obs} cells have positions 0 to {n_obs - 1}.")
    return cells


def _narrow(values: np.ndarray) -> np.ndarray:
    return values.astype(np.int64 if values.dtype.kind in "iub" else np.float32, copy=False)
