"""What we touch of anndata that is private: an object that becomes another one in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anndata import AnnData


def become(adata: AnnData, other: AnnData) -> None:
    """Make ``adata`` hold what ``other`` holds, as anndata's own subsetting in place does."""
    adata._init_as_actual(other)
