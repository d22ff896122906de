"""Sparse rows times a dense matrix, with a gradient that is sparse too."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import scipy.sparse as sp
import torch
from torch.autograd.function import once_differentiable

from cellstill.nn.compiled import as_array, kernels, share_out
from cellstill.nn.sparse import CSRRows

_LARGE = 1 << 20
"""Entries of a matrix that no longer fits in the cache of a core."""


_IN_CACHE = 50_000
"""Numbers, 200 KB, that stay in the cache of a core."""


def sparse_pays(x: CSRRows, matrix: torch.Tensor) -> bool:
    """Whether rows of this density are multiplied faster as they are than as a dense matrix.

    Measured on one core, 128 and 1,024 rows, 128 columns, product and gradient: at 8 % non-zeros and 2,000 or 20,000
    genes 2 to 3 times faster, and less so in proportion to the density. At 25 % of 20,000 genes compiled loops are
    still 1.1 to 1.4 times as fast as the dense product, torch's sums no longer.
    """
    if matrix.is_cuda:
        return False
    density = x.data.numel() / max(1, x.n_rows * x.n_vars)
    return density < (0.15 if matrix.numel() > _LARGE and _loops(x, matrix) is None else 0.25)


def sparse_product(x: CSRRows, matrix: torch.Tensor) -> torch.Tensor:
    """Multiply CSR rows, ``(n, n_vars)``, with a matrix, ``(n_vars, n_columns)``.

    Differentiable in the matrix; its gradient is the product of the rows' transpose. Computed in float32, whatever
    autocast says.
    """
    return _SparseProduct.apply(matrix, x)


class _SparseProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: torch.Tensor, x: CSRRows) -> torch.Tensor:
        ctx.x = x
        return rows_times(x, matrix)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return columns_times(ctx.x, grads[0].contiguous()), None


def rows_times(x: CSRRows, matrix: torch.Tensor) -> torch.Tensor:
    """``x @ matrix``, without gradient."""
    loops = _loops(x, matrix)
    if loops is None:
        return _weighted_sums(matrix, x.data, x.indices, x.indptr)
    return _in_blocks(loops.rows_times, x, matrix, x.n_vars, x.n_rows)


def columns_times(x: CSRRows, matrix: torch.Tensor) -> torch.Tensor:
    """``x.T @ matrix``, without gradient."""
    loops = _loops(x, matrix)
    if loops is None:
        return _weighted_sums(matrix, *_columns(x))
    return _in_blocks(loops.columns_times, x, matrix, x.n_rows, x.n_vars)


def _loops(x: CSRRows, matrix: torch.Tensor) -> ModuleType | None:
    found = kernels(matrix.device)
    return None if found is None or {x.data.dtype, matrix.dtype} != {torch.float32} else found.products


def _in_blocks(loop: Callable[..., None], x: CSRRows, matrix: torch.Tensor, n: int, n_out: int) -> torch.Tensor:
    if matrix.shape[0] != n:
        # The loops look at no bounds.
        raise ValueError(f"a matrix of {matrix.shape[0]} rows cannot be multiplied; {n} are needed.")
    out = matrix.new_empty((n_out, matrix.shape[1]))
    # As many genes as have their rows, of the matrix or of the product, in the cache together.
    block = max(1, _IN_CACHE // max(1, matrix.shape[1]))
    rows = (x.data.numpy(), *x.places)
    known, made = as_array(matrix), out.numpy()
    share_out(lambda start, stop: loop(start, stop, *rows, known, block, made), n_out, x.data.numel() * matrix.shape[1])
    return out


def _weighted_sums(
    matrix: torch.Tensor, data: torch.Tensor, indices: torch.Tensor, indptr: torch.Tensor
) -> torch.Tensor:
    # Arguments by position: gradients scaled by frequency (no), mode (0 is the sum), sparse gradients (no).
    return torch.embedding_bag(matrix, indices, indptr, False, 0, False, data.to(matrix.dtype), True)[0]


def _columns(x: CSRRows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Order the non-zeros by column: data, rows, and where each column begins."""
    arrays = tuple(part.cpu().numpy() for part in (x.data, x.indices, x.indptr))
    columns = sp.csr_matrix(arrays, shape=(x.n_rows, x.n_vars)).tocsc()
    ordered = (columns.data, columns.indices, columns.indptr)
    return tuple(torch.from_numpy(part).to(x.data.device) for part in ordered)  # type: ignore[return-value]
