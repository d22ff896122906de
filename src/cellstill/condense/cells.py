"""Labelled cells, real or synthetic, and what classifiers see of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from cellstill.data.expression import log_expression
from cellstill.errors import InvalidArgumentError


@dataclass(frozen=True, eq=False)
class LabelledCells:
    """Counts of cells, and their classes.

    Attributes
    ----------
    counts
        CSR, float32, shape ``(n, n_vars)``. Those of synthetic cells may be expectations.
    codes
        Class of each cell, int64, shape ``(n,)``.
    """

    counts: sp.csr_matrix
    codes: np.ndarray

    def __post_init__(self) -> None:
        if self.counts.shape[0] != len(self.codes):
            raise InvalidArgumentError(
                f"codes has {len(self.codes)} entries; {self.counts.shape[0]} cells are counted. Give every cell one."
            )

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, cells: np.ndarray) -> LabelledCells:
        """Some of the cells, by positions or a mask."""
        return LabelledCells(self.counts[cells], self.codes[cells])

    @property
    def n_vars(self) -> int:
        """Number of genes."""
        return self.counts.shape[1]

    def of_class(self, code: int) -> np.ndarray:
        """Positions of the cells of a class."""
        return np.flatnonzero(self.codes == code)

    def expression(self) -> sp.csr_matrix:
        r"""What all networks and classifiers see, :math:`\log(1 + 10^4 x / l)`: CSR, float32, ``(n, n_vars)``."""
        return log_expression(self.counts)
