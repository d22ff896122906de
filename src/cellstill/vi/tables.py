"""Parameters of categories and features, gathered by code, and joined where several columns have a part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn


class CategoryTables(nn.Module):
    """One parameter per column of codes: categories x features.

    Parameters
    ----------
    categories
        Number of categories of each column; without any column, all cells are of one category.
    n_vars
        Features.
    start
        Value that all entries start with.
    """

    _ALL = "all_cells"

    def __init__(self, categories: Mapping[str, int], n_vars: int, start: float) -> None:
        super().__init__()
        self.columns = list(categories)
        sizes = list(categories.values()) or [1]
        # A parameter's name may not hold a dot, a column's may.
        self.tables = nn.ParameterList([nn.Parameter(torch.full((size, n_vars), start)) for size in sizes])

    def forward(
        self, codes: Mapping[str, torch.Tensor], transform: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows for cells: a table, groups x features, and the group of each cell.

        Parameters
        ----------
        codes
            Codes of each column, int64, shape ``(n,)``.
        transform
            Makes of each table what is added over columns.
        """
        tables = [transform(table) for table in self.tables]
        if not self.columns:
            return tables[0], None
        return join(tables, [codes[column] for column in self.columns])


def join(tables: Sequence[torch.Tensor], codes: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Add rows of several tables.

    Returns
    -------
    A table of groups x features, and the group of each cell. The groups are all combinations of categories, or the
    cells themselves where those are fewer.
    """
    if len(tables) == 1:
        return tables[0], codes[0]
    n_combinations = 1
    for table in tables:
        n_combinations *= len(table)
    if n_combinations > len(codes[0]):
        rows = [table.index_select(0, code) for table, code in zip(tables, codes, strict=True)]
        return torch.stack(rows).sum(dim=0), torch.arange(len(codes[0]), device=tables[0].device)
    joined, group = tables[0], codes[0]
    for table, code in zip(tables[1:], codes[1:], strict=True):
        joined = (joined[:, None] + table).flatten(0, 1)
        group = group * len(table) + code
    return joined, group
