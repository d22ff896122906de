"""Where the stored counts of a minibatch stand among its cells and genes, and pieces of it that stay in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from cellstill.nn.sparse import CSRRows

# Entries that a thread of a CPU works on at once: the dozen arrays of stored counts, or four dense ones, fit its cache.
_PART, _BLOCK = 2**15, 2**16


class Part(NamedTuple):
    """Some stored counts, with their places in flat arrays of cells by genes and of groups by genes."""

    stored: slice
    counts: torch.Tensor
    genes: torch.Tensor
    where: torch.Tensor
    grouped: torch.Tensor | None

    def take(self, parameter: torch.Tensor) -> torch.Tensor:
        """Values of a parameter by gene or by entry."""
        if parameter.dim() == 1:
            return parameter.index_select(0, self.genes)
        return parameter.view(-1).index_select(0, self.where)

    def take_grouped(self, parameter: torch.Tensor) -> torch.Tensor:
        """As :meth:`take`, but by group and gene if there are groups."""
        return self.take(parameter) if self.grouped is None else parameter.view(-1).index_select(0, self.grouped)


class Block(NamedTuple):
    """Some rows, with the places of their stored counts in a flat array of these rows."""

    rows: slice
    stored: slice
    where: torch.Tensor
    is_zero: torch.Tensor
    group: torch.Tensor | None

    def take(self, parameter: torch.Tensor) -> torch.Tensor:
        """Values of a parameter by gene or by entry, to be broadcast against the rows."""
        return parameter if parameter.dim() == 1 else parameter[self.rows]

    def take_grouped(self, parameter: torch.Tensor) -> torch.Tensor:
        """As :meth:`take`, but by group and gene if there are groups."""
        return self.take(parameter) if self.group is None else parameter.index_select(0, self.group)

    def put(self, values: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
        """Write values of stored counts over the terms of zeros, in place. Explicit zeros keep their terms."""
        flat = terms.view(-1)
        kept = flat.index_select(0, self.where)
        flat.index_copy_(0, self.where, values[self.stored].lerp(kept, self.is_zero))
        return terms

    def add(self, terms: torch.Tensor, total: torch.Tensor) -> None:
        """Add gradients of entries to that of a parameter by gene or by entry."""
        if total.dim() == 1:
            total += terms.sum(dim=0)
        else:
            total[self.rows] = terms

    def add_grouped(self, terms: torch.Tensor, total: torch.Tensor) -> None:
        """As :meth:`add`, but by group and gene if there are groups."""
        if self.group is None:
            self.add(terms, total)
        else:
            total.index_add_(0, self.group, terms)


class Stored(NamedTuple):
    """The stored counts of a minibatch and their places. Explicit zeros are replaced by ones, to be ignored later.

    Work is cut into pieces that stay in a CPU's cache; another device, which would wait at each cut, gets all at once.
    """

    x: CSRRows
    group: torch.Tensor | None
    counts: torch.Tensor
    is_zero: torch.Tensor
    where: torch.Tensor
    grouped: torch.Tensor | None

    @classmethod
    def of(cls, x: CSRRows, group: torch.Tensor | None = None) -> Stored:
        """Find the places; ``group`` is the row of a grouped parameter for each cell."""
        rows = x.row_of_nonzeros()
        is_zero = 1 - x.data.sign()
        where = torch.add(x.indices, rows, alpha=x.n_vars)
        grouped = None if group is None else torch.add(x.indices, group.index_select(0, rows), alpha=x.n_vars)
        return cls(x, group, x.data + is_zero, is_zero, where, grouped)

    def parts(self) -> Iterator[Part]:
        """Cut the stored counts, wherever rows end."""
        total = len(self.counts)
        for stored in self._slices(total, _PART):
            grouped = None if self.grouped is None else self.grouped[stored]
            yield Part(stored, self.counts[stored], self.x.indices[stored], self.where[stored], grouped)

    def blocks(self) -> Iterator[Block]:
        """Cut the rows."""
        x = self.x
        slices = self._slices(x.n_rows, _BLOCK // max(1, x.n_vars))
        bounds = [0, len(x.data)]
        if len(slices) > 1:
            bounds = x.indptr[[rows.start for rows in slices] + [x.n_rows]].tolist()
        for rows, start, stop in zip(slices, bounds, bounds[1:], strict=False):
            where = self.where[start:stop] - rows.start * x.n_vars
            group = None if self.group is None else self.group[rows]
            yield Block(rows, slice(start, stop), where, self.is_zero[start:stop], group)

    def _slices(self, total: int, length: int) -> list[slice]:
        length = max(1, length * torch.get_num_threads()) if self.counts.device.type == "cpu" else max(1, total)
        return [slice(start, min(start + length, total)) for start in range(0, total, length)]
