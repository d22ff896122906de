"""Cells scaled gene by gene before they are encoded, with the factors of their batches."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np

from cellstill.distill.cells import Cells
from cellstill.distill.fitted import Fitted
from cellstill.distill.student import MEAN_BATCH
from cellstill.errors import CellstillWarning, level_outside

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
    learned = [fitted.query_factors.get(name) for name in fitted.query_batches]
    nothing = np.ones(len(fitted.genes), dtype=np.float32)
    factors = [*fitted.scaling.factors, *(nothing if own is None else own for own in learned)]
    lacking = [len(fitted.batch_names) + i for i, own in enumerate(learned) if own is None]
    codes = np.where(np.isin(cells.batch, lacking), MEAN_BATCH, cells.batch)
    unseen = codes == MEAN_BATCH
    if batch_key in cells.obs:
        names = cells.obs[batch_key].astype(object).to_numpy()
        named = unseen & cells.obs[batch_key].notna().to_numpy()
    else:
        names, named = np.full(len(codes), None), np.zeros(len(codes), dtype=bool)
    if not named[unseen].all():
        _warn(
            f"{(unseen & ~named).sum()} cells have no {batch_key!r} in adata.obs, and are encoded without scaling. "
            "Name their batches in it."
        )
    few, blind = [], []
    for name in sorted({str(name) for name in names[named]}):
        members = named & (names.astype(str) == name)
        own = factors_of(fitted, cells[members])
        if own is None:
            few.append(name)
            continue
        codes[members] = len(factors)
        factors.append(own)
        if not fitted.design.knows(cells.obs[members]):
            blind.append(name)
    if few:
        _warn(
            f"Unseen batches with fewer than {FEWEST_CELLS} cells are encoded without scaling: {_listed(few)}. "
            "Map them with more of their cells."
        )
    if blind:
        _warn(
            f"The covariates {fitted.design.keys} of some cells of {_listed(blind)} are missing, or have levels that "
            "the model does not know: what differs with them between an unseen batch and the cells of training is "
            "scaled away. Add them to adata.obs if you can."
        )
    return replace(cells, scaled=fitted.scaling.apply(cells.counts, codes, np.stack(factors)))


def factors_of(fitted: Fitted, cells: Cells) -> np.ndarray | None:
    """Estimate factors of a batch's genes from its cells; ``None`` for fewer than 100 cells.

    Cells are compared with those of training that have the same covariates, if these are known of all of them.
    """
    if fitted.scaling is None or len(cells) < FEWEST_CELLS:
        return None
    known = fitted.design.knows(cells.obs)
    return fitted.scaling.of_new_batch(cells.counts, fitted.design.encode(cells.obs) if known else None)


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")


def _warn(message: str) -> None:
    warnings.warn(f'pca_method="scaled_residuals": {message}', CellstillWarning, stacklevel=level_outside())
