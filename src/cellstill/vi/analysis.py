"""What is read off a trained model beyond its getters: which latent dimensions matter to which modality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cellstill.pl.attribution import attribution_figure
from cellstill.vi.attribution import ModalityAttribution, attribute
from cellstill.vi.evaluation import blocks, to_numpy
from cellstill.vi.minification import Minification

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.figure import Figure
    from mudata import MuData


class Analysis(Minification):
    """The analyses of both regularised models."""

    def get_modality_attribution(
        self,
        adata: AnnData | MuData | None = None,
        indices: np.ndarray | Sequence[int] | None = None,
        *,
        batch_size: int = 1024,
    ) -> dict[str, ModalityAttribution]:
        """How much the expected counts of each modality depend on each latent dimension, exactly, cell by cell.

        Taken at the posterior means of z and library size, so that two calls agree bit for bit.

        Parameters
        ----------
        adata, indices
            As in :meth:`get_normalized_expression`.
        batch_size
            Cells encoded at a time.

        Returns
        -------
        By modality.
        """
        self._require_trained()
        cells = self._cells(adata, counts=False)[indices]
        config = self.module.config
        parts, order = config.parts_of_z, config.columns_of_z
        shape = (len(cells), config.n_latent)
        z = np.empty(shape, dtype=np.float32)
        means = {name: np.empty(shape, dtype=np.float32) for name in self.modality_names}
        norms = {name: {part: np.empty(len(cells), dtype=np.float32) for part in parts} for name in means}
        for block in blocks(self.module, cells, batch_size):
            z[block.rows] = to_numpy(block.latent.mean)[:, order]
            for name, mean in means.items():
                each, found = attribute(self.module, name, block, parts)
                mean[block.rows] = each[:, order]
                for part, norm in found.items():
                    norms[name][part][block.rows] = norm
        return {name: ModalityAttribution(mean, z * mean, norms[name]) for name, mean in means.items()}

    def plot_attribution_scatter(
        self, adata: AnnData | MuData | None = None, indices: np.ndarray | Sequence[int] | None = None
    ) -> Figure:
        """Draw the mean attribution of every latent dimension (:func:`~cellstill.pl.attribution_figure`).

        Parameters
        ----------
        adata, indices
            As in :meth:`get_modality_attribution`.
        """
        found = self.get_modality_attribution(adata, indices)
        parts = self.module.config.parts_of_z
        stops = np.cumsum([len(columns) for columns in parts.values()])
        shown = {name: slice(stop - len(parts[name]), stop) for name, stop in zip(parts, stops.tolist(), strict=True)}
        return attribution_figure({name: one.attribution.mean(axis=0) for name, one in found.items()}, shown)
