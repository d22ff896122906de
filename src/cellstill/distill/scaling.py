"""Cells scaled gene by gene before they are encoded, with the factors of their batches."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np

from cellstill.distill.cells import Cells
from cellstill.distill.fitted import Fitted
from cellstill.distill.student import MEAN_BATCH
from cellstill.errors import CellstillWarning

FEWEST_CELLS = 100
"""Cells from which the factors of a batch that was not trained on are estimated; fewer are encoded as they are."""


def scale_cells(fitted: Fitted, cells: Cells, batch_key: str) -> Cells:
    """Add the counts that the encoder reads, if the model scales counts.

    Cells of a batch of the model are scaled by its factors. Those of an unseen batch are scaled by factors estimated
    from themselves (:func:`factors_of`).

    Warns
    -----
    CellstillWarning
        Some cells are encoded as they are, because their batch is not named or has fewer than 100 cells; or they are of
        unseen batches and their covariates are not known, so that what differs with those is scaled away too.
    """
    if fitted.scaling is None:
        return cells
    codes, factors = cells.batch.copy(), [*fitted.scaling.factors, *fitted.query_factors.values()]
    unseen = codes == MEAN_BATCH
    if unseen.any() and batch_key not in cells.obs:
        _warn(f"adata.obs has no {batch_key!r}: all cells are encoded without scaling. Name their batches in it.")
    elif unseen.any():
        names = cells.obs[batch_key].astype(str).to_numpy()
        few = []
        for name in np.unique(names[unseen]):
            members = unseen & (names == name)
            if members.sum() < FEWEST_CELLS:
                few.append(str(name))
                continue
            codes[members] = len(factors)
            factors.append(factors_of(fitted, cells[members]))
        if few:
            _warn(
                f"Unseen batches with fewer than {FEWEST_CELLS} cells are encoded without scaling: "
                f"{', '.join(map(repr, few[:5]))}{', ...' if len(few) > 5 else ''}. Map them with more of their cells."
            )
        if len(few) < len(np.unique(names[unseen])) and not fitted.design.knows(cells.obs):
            _warn(
                f"The covariates {fitted.design.keys} of the new cells are missing, or have levels that the model does "
                "not know: what differs with them between an unseen batch and the cells of training is scaled away. "
                "Add them to adata.obs if you can."
            )
    return replace(cells, scaled=fitted.scaling.apply(cells.counts, codes, np.stack(factors)))


def factors_of(fitted: Fitted, cells: Cells) -> np.ndarray:
    """Estimate factors of a batch's genes from its cells; all 1 for fewer than 100 cells."""
    if fitted.scaling is None or len(cells) < FEWEST_CELLS:
        return np.ones(len(fitted.genes), dtype=np.float32)
    known = fitted.design.knows(cells.obs)
    return fitted.scaling.of_new_batch(cells.counts, fitted.design.encode(cells.obs) if known else None)


def _warn(message: str) -> None:
    warnings.warn(f'pca_method="scaled_residuals": {message}', CellstillWarning, stacklevel=5)
