"""Counts that live on the device, and rows gathered there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import numpy as np
import scipy.sparse as sp
import torch

from cellstill.errors import InvalidArgumentError

_LARGEST_SHARE = 0.5
"""Counts stay on the host if they would take more than this share of the free memory: training needs the rest."""


class ResidentCounts:
    """A CSR matrix on a device.

    Parameters
    ----------
    counts
        CSR matrix; copied to the device, its data as float32. On the CPU, float32 data are shared.
    device
        Where it lives.

    Attributes
    ----------
    data, indices, indptr
        Tensors on the device; the integers of the matrix's own type.
    """

    _living: ClassVar[WeakValueDictionary[tuple[int, torch.device], ResidentCounts]] = WeakValueDictionary()

    def __init__(self, counts: sp.csr_matrix, device: torch.device) -> None:
        # Held, so that the matrix's id names it for as long as this copy is known by it.
        self.counts = counts
        self.data = to_device(counts.data.astype(np.float32, copy=False), device)
        self.indices = to_device(counts.indices, device)
        self.indptr = to_device(counts.indptr, device)

    @classmethod
    def of(cls, counts: sp.csr_matrix, device: torch.device) -> ResidentCounts | None:
        """Bring a matrix to a device, once for all loaders of it; ``None`` if it does not fit."""
        found = cls.of_all([counts], device)
        return None if found is None else found[0]

    @classmethod
    def of_all(cls, matrices: Sequence[sp.csr_matrix], device: torch.device) -> list[ResidentCounts] | None:
        """Bring matrices to a device; ``None``, and nothing brought, if they do not fit together."""
        new = sum(n_bytes(counts) for counts in matrices if (id(counts), device) not in cls._living)
        if new > _LARGEST_SHARE * free_memory(device):
            return None
        found = []
        for counts in matrices:
            known = cls._living.get((id(counts), device))
            if known is None:
                known = cls._living[id(counts), device] = cls(counts, device)
            found.append(known)
        return found

    def gather(self, rows: torch.Tensor, nnz: int) -> dict[str, torch.Tensor]:
        """Gather rows without waiting for the device.

        Parameters
        ----------
        rows
            Rows to take, int64, on the device.
        nnz
            Their non-zeros in total. The host knows it; asking the device would make the host wait.
        """
        starts = self.indptr[rows]
        lengths = self.indptr[rows + 1] - starts
        indptr = torch.zeros(len(rows) + 1, dtype=self.indptr.dtype, device=rows.device)
        torch.cumsum(lengths, 0, out=indptr[1:])
        positions = torch.repeat_interleave(starts - indptr[:-1], lengths, output_size=nnz)
        positions += torch.arange(nnz, dtype=positions.dtype, device=rows.device)
        return {
            "data": self.data.index_select(0, positions),
            "indices": self.indices.index_select(0, positions),
            "indptr": indptr,
        }


def n_bytes(counts: sp.csr_matrix) -> int:
    """Memory that the counts take on a device."""
    return 4 * counts.data.size + counts.indices.nbytes + counts.indptr.nbytes


def free_memory(device: torch.device) -> float:
    """Free memory of a device in bytes; no bound where counts are in memory already."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")


def to_device(values: np.ndarray, device: torch.device | None) -> torch.Tensor:
    """Make a tensor of an array; on the way to a CUDA device it is pinned, so that the host need not wait."""
    tensor: torch.Tensor = torch.from_numpy(np.require(values, requirements=["C", "W"]))
    if device is None or device.type == "cpu":
        return tensor
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def as_device(device: Any) -> torch.device:
    """Turn a name into a device; ``"cuda"`` becomes the current one, so that devices can be compared.

    Raises
    ------
    InvalidArgumentError
        No such device is known, or there is none here.
    """
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidArgumentError(f"device={device!r} is not known. Use 'cpu', 'cuda' or 'cuda:0'.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError(f"device={str(device)!r}, but torch finds no CUDA device. Use 'cpu'.")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device
