"""Minibatches of cells with several kinds of counts."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from cellstill._compat.scipy import take_rows
from cellstill.data.loader import CountsLoader, _narrow, _positions
from cellstill.data.resident import ResidentCounts, as_device, to_device
from cellstill.errors import InvalidArgumentError


class ModalityLoader(CountsLoader):
    """Iterate over cells in minibatches of CSR rows of each modality.

    Order, prefetching, residence on a device and shares of processes are those of
    :class:`~cellstill.data.CountsLoader`. A minibatch is a plain dictionary of tensors: ``rows`` (int64, the cells'
    positions), ``"{modality}/data"``, ``"{modality}/indices"`` and ``"{modality}/indptr"``, and one entry for each of
    ``per_cell``. With one modality the keys are the same.

    Parameters
    ----------
    counts
        CSR matrices by modality, each of shape ``(n_obs, n_features)``. A cell that lacks a modality has an empty row.
    per_cell
        Arrays whose first axis is the cells; names must not be those of the counts.
    **settings
        Of :class:`~cellstill.data.CountsLoader`. Counts live on the ``device`` if all modalities together take at most
        half of its free memory.

    Attributes
    ----------
    modalities
        The matrices by modality, sorted by name.

    Raises
    ------
    InvalidArgumentError
        There is no modality, they have different numbers of cells, a name is taken, or as for
        :class:`~cellstill.data.CountsLoader`.
    """

    def __init__(
        self,
        counts: Mapping[str, sp.csr_matrix],
        per_cell: Mapping[str, np.ndarray] | None = None,
        **settings: Any,
    ) -> None:
        if not counts:
            raise InvalidArgumentError("counts is empty: give the counts of at least one modality.")
        self.modalities = dict(sorted(counts.items()))
        n_cells = {name: matrix.shape[0] for name, matrix in self.modalities.items()}
        if len(set(n_cells.values())) > 1:
            raise InvalidArgumentError(
                f"counts have different numbers of cells: {n_cells}. Give cells that lack a modality an empty row."
            )
        taken = {"rows", *(f"{name}/{part}" for name in self.modalities for part in ("data", "indices", "indptr"))}
        for name in per_cell or {}:
            if name in taken:
                raise InvalidArgumentError(f"per_cell[{name!r}] has the name of another entry. Rename it.")
        self._residents: dict[str, ResidentCounts] = {}
        super().__init__(next(iter(self.modalities.values())), per_cell, **settings)

    def to(self, device: str | torch.device | None) -> ModalityLoader:
        """Yield minibatches on a device from now on, with the counts living there if all of them fit.

        Returns
        -------
        The loader itself.
        """
        self.device = None if device is None else as_device(device)
        matrices = list(self.modalities.values())
        residents = None if self.device is None else ResidentCounts.of_all(matrices, self.device)
        self._residents = dict(zip(self.modalities, residents or (), strict=residents is not None))
        # The base class takes this one for a sign that rows are gathered there.
        self._resident = next(iter(self._residents.values()), None)
        self._resident_per_cell = {}
        if self._residents:
            self._resident_per_cell = {
                name: to_device(_narrow(values), self.device) for name, values in self.per_cell.items()
            }
        return self

    def gather(self, cells: np.ndarray) -> dict[str, torch.Tensor]:
        """Build the minibatch of the given cells, in the order given.

        Raises
        ------
        InvalidArgumentError
            A cell does not exist.
        """
        cells = _positions(cells, self.counts.shape[0])
        if not self._residents:
            return self._gather_here(cells)
        nnz = {name: int(np.diff(matrix.indptr)[cells].sum()) for name, matrix in self.modalities.items()}
        return self._gather_all_there(to_device(cells, self.device), nnz)

    def fingerprint(self) -> str:
        """Hash everything that decides what the loader yields, and in which order: counts, arrays, cells, settings."""
        found = hashlib.blake2b(super().fingerprint().encode(), digest_size=16)
        for name, matrix in self.modalities.items():
            found.update(f"{name} {matrix.shape}".encode())
            for array in (matrix.data, matrix.indices, matrix.indptr):
                found.update(f"{array.dtype} {array.shape}".encode())
                found.update(np.ascontiguousarray(array).view(np.uint8).data)
        return found.hexdigest()

    def _iterate(self, starts: np.ndarray, stops: np.ndarray) -> Generator[dict[str, torch.Tensor]]:
        if not self._residents:
            yield from super()._iterate(starts, stops)
            return
        order = self.cells
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(order)
            self.epoch += 1
        rows = to_device(order, self.device)
        until = {
            name: np.append(0, np.cumsum(np.diff(matrix.indptr)[order], dtype=np.int64))
            for name, matrix in self.modalities.items()
        }
        for start, stop in zip(starts, stops, strict=True):
            nnz = {name: int(counted[stop] - counted[start]) for name, counted in until.items()}
            yield self._gather_all_there(rows[start:stop], nnz)

    def _gather_here(self, cells: np.ndarray) -> dict[str, torch.Tensor]:
        batch: dict[str, np.ndarray] = {"rows": cells}
        for name, matrix in self.modalities.items():
            data, indices, indptr = take_rows(matrix.data, matrix.indices, matrix.indptr, cells)
            batch[f"{name}/data"] = data.astype(np.float32, copy=False)
            batch[f"{name}/indices"], batch[f"{name}/indptr"] = indices, indptr
        for name, values in self.per_cell.items():
            batch[name] = _narrow(values[cells])
        return {name: to_device(values, self.device) for name, values in batch.items()}

    def _gather_all_there(self, rows: torch.Tensor, nnz: Mapping[str, int]) -> dict[str, torch.Tensor]:
        batch = {"rows": rows}
        for name, matrix in self._residents.items():
            batch.update({f"{name}/{part}": values for part, values in matrix.gather(rows, nnz[name]).items()})
        for name, values in self._resident_per_cell.items():
            batch[name] = values.index_select(0, rows)
        return batch
