"""A minibatch of CSR rows on the device of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import numpy as np
import torch

from cellstill.nn.compiled import kernels, share_out


@dataclass(frozen=True, eq=False)
class CSRRows:
    """Rows of a count matrix.

    Attributes
    ----------
    data
        Non-zeros, float32, shape ``(nnz,)``.
    indices
        Genes of the non-zeros, int32 or int64, shape ``(nnz,)``.
    indptr
        Where each row starts in ``data``, of the same type, shape ``(n + 1,)``.
    n_vars
        Number of genes.
    """

    data: torch.Tensor
    indices: torch.Tensor
    indptr: torch.Tensor
    n_vars: int

    @classmethod
    def of(cls, batch: Mapping[str, torch.Tensor], n_vars: int) -> CSRRows:
        """Take the rows out of a minibatch of :class:`~cellstill.data.CountsLoader`."""
        return cls(batch["data"], batch["indices"], batch["indptr"], n_vars)

    @property
    def n_rows(self) -> int:
        """Number of cells."""
        return self.indptr.shape[0] - 1

    @cached_property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """``indices`` and ``indptr`` as compiled loops take them, int32; converted once, also for :meth:`with_data`."""
        return self.indices.int().numpy(), self.indptr.int().numpy()

    def with_data(self, data: torch.Tensor) -> CSRRows:
        """Return rows with other values of the non-zeros."""
        rows = CSRRows(data, self.indices, self.indptr, self.n_vars)
        if self._loops() is not None:
            # The cache of a cached property, whether or not the class is frozen.
            rows.__dict__["places"] = self.places
        return rows

    def rows(self, block: slice) -> CSRRows:
        """Return a block of neighbouring rows, as views."""
        start, stop, _ = block.indices(self.n_rows)
        first, last = (int(at) for at in self.indptr[[start, stop]])
        indptr = self.indptr[start : stop + 1] - first
        return CSRRows(self.data[first:last], self.indices[first:last], indptr, self.n_vars)

    def row_of_nonzeros(self) -> torch.Tensor:
        """Return the row of each non-zero, shape ``(nnz,)``."""
        rows = torch.arange(self.n_rows, device=self.data.device)
        return torch.repeat_interleave(rows, self.indptr.diff(), output_size=len(self.data))

    def sum_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a value per non-zero over each row, shape ``(n,)``."""
        return torch.segment_reduce(values, "sum", offsets=self.indptr, unsafe=True)

    def library_size(self) -> torch.Tensor:
        """Total count of each cell, shape ``(n,)``."""
        loops = self._loops()
        if loops is None:
            return self.sum_rows(self.data)
        totals = self.data.new_empty(self.n_rows)
        known, out = (self.data.numpy(), self.places[1]), totals.numpy()
        share_out(lambda start, stop: loops.totals(start, stop, *known, out), self.n_rows, self.data.numel())
        return totals

    def log1p(self, factor: torch.Tensor | None = None) -> CSRRows:
        """``log(1 + factor x)``, computed on the non-zeros; zeros stay zero.

        Parameters
        ----------
        factor
            Of each cell, shape ``(n,)``, without gradient; ``None`` is 1.
        """
        if factor is not None and factor.shape != (self.n_rows,):
            raise ValueError(f"factor has shape {tuple(factor.shape)}; {(self.n_rows,)} is needed.")
        loops = self._loops()
        if loops is None:
            data = self.data
            if factor is not None:
                data = data * factor.detach().repeat_interleave(self.indptr.diff(), output_size=len(data))
            return self.with_data(torch.log1p(data))
        factor = self.data.new_ones(self.n_rows) if factor is None else factor.to(self.data.dtype)
        logged = torch.empty_like(self.data)
        known, out = (self.data.numpy(), self.places[1], factor.detach().numpy()), logged.numpy()
        share_out(lambda start, stop: loops.log1p(start, stop, *known, out), self.n_rows, self.data.numel())
        return self.with_data(logged)

    def _loops(self) -> ModuleType | None:
        """Compiled loops, where they can work on the non-zeros."""
        loops = kernels(self.data.device)
        return None if loops is None or self.data.dtype != torch.float32 or self.data.requires_grad else loops.rows

    def log2_cpm(self) -> CSRRows:
        """``log2(1 + 1e6 x / library size)``, computed on the non-zeros; zeros stay zero."""
        logged = self.log1p(1e6 / self.library_size().clamp(min=1e-12))
        return logged.with_data(logged.data / 0.6931471805599453)

    def to_dense(self) -> torch.Tensor:
        """Fill a dense tensor, shape ``(n, n_vars)``."""
        dense = self.data.new_zeros(self.n_rows, self.n_vars)
        dense[self.row_of_nonzeros(), self.indices] = self.data
        return dense
