"""Latent coordinates and expression of a trained distiller, streamed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from cellstill.data.order import order_of
from cellstill.data.selection import gene_positions
from cellstill.distill.cells import Cells
from cellstill.distill.trained import Trained
from cellstill.errors import InvalidArgumentError
from cellstill.io.arrays import Out, output_array

if TYPE_CHECKING:
    from anndata import AnnData


class Latent:
    """Latent coordinates of a trained :class:`Distiller`'s cells, computed when asked for."""

    def __init__(self, model: Getters) -> None:
        self._model = model

    @property
    def teacher(self) -> np.ndarray:
        """The teacher's coordinates z*, shape ``(n_obs, n_latent)``."""
        return self._model._teacher_latent()

    @property
    def student(self) -> np.ndarray:
        """The student's latent, in the teacher's coordinates, shape ``(n_obs, n_latent)``."""
        return self._model.get_latent_representation()


class Getters(Trained):
    """The getters of :class:`~cellstill.Distiller`."""

    @property
    def latent(self) -> Latent:
        """Latent coordinates of the cells: ``latent.teacher`` and ``latent.student``."""
        self._fitted()
        return Latent(self)

    def get_latent_representation(
        self, adata: AnnData | None = None, indices: np.ndarray | None = None, *, batch_size: int = 4096
    ) -> np.ndarray:
        """Student latent of cells, in the teacher's coordinates.

        Parameters
        ----------
        adata
            Any cells with the model's genes, in any order; ``None`` takes the model's own. No batch is needed, except
            by ``pca_method="scaled_residuals"``, which without it, or with fewer than 100 cells of a batch that it has
            not seen, warns and encodes counts as they are.
        indices
            Positions of the cells wanted, or a mask; ``None`` takes all.
        batch_size
            Cells encoded at a time. Larger is faster until memory runs out.

        Returns
        -------
        float32, shape ``(n, n_latent)``.
        """
        fitted = self._fitted()
        return fitted.to_teacher(fitted.encode(self._cells(adata)[indices], batch_size))

    def get_normalized_expression(
        self,
        adata: AnnData | None = None,
        indices: np.ndarray | None = None,
        *,
        transform_batch: str | Sequence[str] | None = None,
        gene_list: Sequence[str] | None = None,
        library_size: float | Literal["observed"] = 1.0,
        batch_size: int = 1024,
        out: Out = None,
        return_numpy: bool = False,
    ) -> Any:
        """Expected expression, decoded.

        Parameters
        ----------
        adata, indices
            As in :meth:`get_latent_representation`.
        transform_batch
            Decode every cell as this batch, or as each of several and average; ``None`` decodes each cell as its own
            batch, or with the mean embedding where the model does not know it.
        gene_list
            Genes wanted, in order; ``None`` takes all, in the order of the cells' data, or in the model's where those
            of the data are others, which a warning says if the result has no names.
        library_size
            Total of a cell over all genes: 1 gives proportions, 1e4 counts per 10,000, ``"observed"`` expected counts
            at the cell's own depth.
        batch_size
            Cells decoded at a time. Larger is faster until memory runs out.
        out
            Where to write: an array of the right shape, or the path of a Zarr array to create, which is then returned
            open for reading. Of the result, memory then holds one block of cells at a time.
        return_numpy
            Return an array instead of a DataFrame.

        Returns
        -------
        DataFrame of cells x genes; an array with ``return_numpy``; what was written to, with ``out``.
        """
        return self._decode(
            self.adata if adata is None else adata,
            self._cells(adata)[indices],
            self._batch_codes(transform_batch, "transform_batch"),
            gene_list,
            library_size=library_size,
            log=False,
            batch_size=batch_size,
            out=out,
            frame=not return_numpy,
        )

    def corrected_expression(
        self,
        target_batch: str | Sequence[str] | None = None,
        *,
        genes: Sequence[str] | None = None,
        indices: np.ndarray | None = None,
        batch_size: int = 1024,
        out: Out = None,
    ) -> np.ndarray:
        """Batch-corrected expression of the model's cells: log2(CPM + 1) of the decoded proportions.

        Parameters
        ----------
        target_batch
            Batch as which every cell is decoded, or several, whose proportions are averaged; ``None`` averages over all
            batches of training.
        genes
            Genes wanted, in order; ``None`` takes all, as ``gene_list`` of :meth:`get_normalized_expression`.
        indices, batch_size, out
            As in :meth:`get_normalized_expression`.

        Returns
        -------
        float32, shape ``(n, n_genes)``; dense, so name ``genes`` or give ``out`` where that is too much.
        """
        return self._decode(
            self.adata,
            self._cells()[indices],
            self._batch_codes(self.batch_names if target_batch is None else target_batch, "target_batch"),
            genes,
            library_size=1e6,
            log=True,
            batch_size=batch_size,
            out=out,
            frame=False,
        )

    def _decode(
        self,
        adata: AnnData,
        cells: Cells,
        batches: list[int] | None,
        genes: Sequence[str] | None,
        *,
        library_size: float | Literal["observed"],
        log: bool,
        batch_size: int,
        out: Out,
        frame: bool,
    ) -> Any:
        fitted = self._fitted()
        columns = gene_positions(fitted.genes, genes, "gene_list" if frame else "genes")
        if genes is None:
            columns = order_of(adata, fitted.genes, named=frame and out is None)
        names = np.asarray(fitted.genes, dtype=object)[columns]
        if library_size == "observed":
            scale = np.asarray(cells.counts.sum(axis=1), dtype=np.float32)
        elif isinstance(library_size, str):
            raise InvalidArgumentError(f"library_size={library_size!r} is not known. Use a number or 'observed'.")
        else:
            scale = np.full((len(cells), 1), library_size, dtype=np.float32)
        blocks = fitted.rates(
            fitted.encode(cells),
            fitted.design.encode(cells.obs),
            cells.batch if batches is None else batches,
            per_cell=batches is None,
            batch_size=batch_size,
        )
        with output_array(out, (len(cells), len(names))) as result:
            for rows, rates in blocks:
                values = rates[:, columns] * scale[rows]
                result[rows] = np.log2(values + 1) if log else values
        if isinstance(out, (str, os.PathLike)):
            import zarr

            return zarr.open_array(out, mode="r")
        if out is None and frame:
            return pd.DataFrame(result, index=cells.obs.index, columns=names)
        return result
