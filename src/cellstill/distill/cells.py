"""Cells as a trained student reads them: counts in its order of genes, batches as its codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellstill.data.counts import as_csr, check_counts, get_layer
from cellstill.data.genes import align_genes
from cellstill.data.selection import cell_positions
from cellstill.distill.student import MEAN_BATCH

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True)
class Cells:
    """Cells, aligned with a model.

    Attributes
    ----------
    counts
        CSR, shape ``(n_obs, n_vars)``, in the model's order of genes.
    batch
        Code of each cell's batch, int64; :data:`~cellstill.distill.student.MEAN_BATCH` where the model has not seen it.
    obs
        Annotations.
    gene_overlap
        Share of the model's genes that the data have.
    scaled
        Counts as the encoder reads them, where it reads others than ``counts``: scaled gene by gene.
    """

    counts: sp.csr_matrix
    batch: np.ndarray
    obs: pd.DataFrame
    gene_overlap: float = 1.0
    scaled: sp.csr_matrix | None = None

    def __len__(self) -> int:
        return self.counts.shape[0]

    @property
    def encoded(self) -> sp.csr_matrix:
        """Counts as the encoder reads them."""
        return self.counts if self.scaled is None else self.scaled

    @classmethod
    def read(
        cls,
        adata: AnnData,
        layer: str | None,
        genes: Sequence[str],
        batch_key: str,
        batch_codes: Mapping[str, int],
        *,
        allow_noninteger: bool = False,
        min_gene_overlap: float = 0.5,
    ) -> Cells:
        """Read any data set for a model.

        Parameters
        ----------
        adata
            Data set; its genes are matched by name.
        layer
            Layer with counts.
        genes
            The model's genes.
        batch_key
            Column with the batch; cells are of an unseen batch where it is absent.
        batch_codes
            Code of every batch that the model knows.
        allow_noninteger, min_gene_overlap
            See :func:`~cellstill.data.check_counts` and :func:`~cellstill.data.genes.align_genes`.
        """
        check_counts(adata, layer, allow_noninteger=allow_noninteger, set_up=True)
        counts, overlap = align_genes(
            as_csr(get_layer(adata, layer)), adata.var_names, genes, min_overlap=min_gene_overlap
        )
        batch = np.full(adata.n_obs, MEAN_BATCH, dtype=np.int64)
        if batch_key in adata.obs:
            names = adata.obs[batch_key].astype(str)
            batch = names.map(batch_codes).fillna(MEAN_BATCH).to_numpy(dtype=np.int64)
        return cls(counts, batch, adata.obs, overlap)

    def __getitem__(self, indices: np.ndarray | slice | None) -> Cells:
        if indices is None:
            return self
        indices = cell_positions(indices, len(self))
        scaled = None if self.scaled is None else self.scaled[indices]
        return Cells(self.counts[indices], self.batch[indices], self.obs.iloc[indices], self.gene_overlap, scaled)
