"""Which genes are kept."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from cellstill.errors import InvalidArgumentError


def variable_genes(counts: sp.csr_matrix, n_top_genes: int | None) -> np.ndarray:
    """Positions of the most variable genes, in their order.

    By the variance of Pearson residuals of a negative binomial with inverse dispersion 100 (Lause, Berens & Kobak
    2021). Genes without counts are never kept.

    Parameters
    ----------
    counts
        Shape ``(n, n_vars)``.
    n_top_genes
        How many; ``None`` keeps all that have counts.
    """
    counted = np.flatnonzero(np.asarray(counts.sum(axis=0)).ravel() > 0)
    if n_top_genes is None or len(counted) <= n_top_genes:
        return counted
    if n_top_genes < 2:
        raise InvalidArgumentError(f"n_top_genes={n_top_genes} has to be at least 2, or None for all genes.")
    import scanpy as sc
    from anndata import AnnData

    table = sc.experimental.pp.highly_variable_genes(
        AnnData(counts[:, counted]), n_top_genes=n_top_genes, flavor="pearson_residuals", inplace=False
    )
    return counted[table["highly_variable"].to_numpy()]
