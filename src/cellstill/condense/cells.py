"""Labelled cells, real or synthetic, or features in their place, and what classifiers see of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from cellstill.data.expression import log_expression
from cellstill.errors import InvalidArgumentError
from cellstill.foundation.base import accepts, as_float32


@dataclass(frozen=True, eq=False)
class LabelledCells:
    """Counts of cells, and their classes.

    Attributes
    ----------
    counts
        CSR, float32, shape ``(n, n_vars)``. Those of synthetic cells may be expectations.
    codes
        Class of each cell, int64, shape ``(n,)``.

    Raises
    ------
    InvalidArgumentError
        ``counts`` is no CSR matrix, ``codes`` are no integers, or they are of different numbers of cells.
    """

    counts: sp.csr_matrix
    codes: np.ndarray

    def __post_init__(self) -> None:
        if not isinstance(self.counts, sp.csr_matrix):
            raise InvalidArgumentError(
                f"counts is of type {type(self.counts).__name__}, and a CSR matrix is needed: "
                "scipy.sparse.csr_matrix(counts)."
            )
        _check_codes(self.codes)
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

    @property
    def n_bytes(self) -> int:
        """Size of the counts as CSR in memory."""
        return self.counts.data.nbytes + self.counts.indices.nbytes + self.counts.indptr.nbytes

    def of_class(self, code: int) -> np.ndarray:
        """Positions of the cells of a class."""
        return np.flatnonzero(self.codes == code)

    def expression(self) -> sp.csr_matrix:
        r"""What all networks and classifiers see, :math:`\log(1 + 10^4 x / l)`: CSR, float32, ``(n, n_vars)``."""
        return log_expression(self.counts)

    def encode(self, cells: LabelledCells) -> sp.csr_matrix:
        """What classifiers that were trained on these see of other cells, as :meth:`Features.encode`: expression."""
        return cells.expression()


@dataclass(frozen=True, eq=False)
class Features:
    """Synthetic points of a feature space and their classes, on which classifiers are trained as they are.

    Such classifiers see features of real cells in place of genes, so the encoder has to go along with the points.

    Attributes
    ----------
    values
        Finite, float32, shape ``(n, n_features)``.
    codes
        Class of each point, int64, shape ``(n,)``.
    encoder
        From real cells to their features, ``(n_cells, n_features)``; called by :meth:`encode`.
    """

    values: np.ndarray
    codes: np.ndarray
    encoder: Callable[[LabelledCells], np.ndarray]

    def __post_init__(self) -> None:
        _check_codes(self.codes)
        if self.values.ndim != 2 or self.values.shape[0] != len(self.codes):
            raise InvalidArgumentError(
                f"values has shape {self.values.shape} and codes {len(self.codes)} entries. Give a row of values for "
                "each entry."
            )
        if not np.isfinite(self.values).all():
            raise InvalidArgumentError("values has NaN or infinity. Give finite features.")
        if not callable(self.encoder) or not accepts(self.encoder, None):
            raise InvalidArgumentError(
                f"encoder={self.encoder!r} cannot be called with cells. Give a function from LabelledCells to their "
                "features."
            )

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def n_bytes(self) -> int:
        """Size of the values in memory, without the encoder."""
        return self.values.nbytes

    def encode(self, cells: LabelledCells) -> np.ndarray:
        """Features of real cells, float32, shape ``(n_cells, n_features)``.

        Raises
        ------
        InvalidArgumentError
            The encoder gives another shape, NaN or infinity.
        """
        found = as_float32(self.encoder(cells))
        n_bad = int((~np.isfinite(found)).sum())
        if found.shape != (len(cells), self.values.shape[1]) or n_bad:
            raise InvalidArgumentError(
                f"encoder gives shape {found.shape} of {len(cells)} cells, {n_bad} values not finite; values has "
                f"{self.values.shape[1]} features. Give the encoder that these were made with."
            )
        return found


def _check_codes(codes: object) -> None:
    if not isinstance(codes, np.ndarray) or codes.dtype.kind not in "iu" or codes.ndim != 1:
        found = f"of type {type(codes).__name__}"
        if isinstance(codes, np.ndarray):
            found = f"an array of {codes.dtype} and shape {codes.shape}"
        raise InvalidArgumentError(
            f"codes is {found}, and an array of integers is needed, one for each cell: the positions of their classes "
            "in problem.classes."
        )
