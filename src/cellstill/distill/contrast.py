"""Differential expression of a trained distiller: counts summed per sample, or posterior draws of its networks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch

from cellstill.de import (
    BayesianConfig,
    DEResult,
    PseudobulkConfig,
    StratifiedDEResult,
    bayesian_de,
    comparison_cells,
    pseudobulk_de,
    stratify,
)
from cellstill.distill.cells import Cells
from cellstill.distill.correction import batch_ratios, corrected_ratios
from cellstill.distill.fitted import Fitted


def compare_groups(
    fitted: Fitted,
    cells: Cells,
    target: list[int],
    obs: pd.DataFrame,
    *,
    groupby: str,
    group1: str,
    group2: str,
    sample_key: str | None,
    batch_key: str | None,
    within: str | None,
    how: PseudobulkConfig | BayesianConfig,
) -> DEResult | StratifiedDEResult:
    """Run the comparison that ``how`` configures; ``target`` are the batches to decode or correct as.

    ``obs`` are the cells with the groups, levels and batches to compare; what decoding needs is taken from ``cells``.
    """
    groups = {"groupby": groupby, "group1": group1, "group2": group2}
    terms: dict[str, Any] = {**groups, "sample_key": sample_key, "batch_key": batch_key}
    if isinstance(how, PseudobulkConfig):
        ratios = corrected_ratios(fitted, cells, target) if how.expression == "corrected" else None
        return pseudobulk_de(cells.counts, obs, fitted.genes, **terms, within=within, ratios=ratios, config=how)

    def compare(rows: np.ndarray | slice) -> DEResult:
        used, chosen = cells[rows], obs.iloc[rows]
        draws = posterior_draws(fitted, used, comparison_cells(chosen, **groups), target, how)
        return bayesian_de(draws, chosen, fitted.genes, **terms, counts=used.counts, config=how)

    return compare(slice(None)) if within is None else stratify(obs, within, lambda _, rows: compare(rows))


def posterior_draws(
    fitted: Fitted, cells: Cells, wanted: np.ndarray, target: list[int], how: BayesianConfig
) -> Iterator[Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Yield draws of the expected proportions of the ``wanted`` cells, corrected to the ``target`` batches.

    With them come the counts that the draw expects of these cells in their own batch and at their own depth, so that
    :func:`~cellstill.de.bayesian_de` can tell by how much the counts of each donor depart from what was decoded.

    In each draw both networks keep one dropout mask for all cells: a draw of the function, so that what the network is
    unsure of does not average out over cells.
    """
    subset = cells[wanted]
    covariates = fitted.design.encode(subset.obs)
    depth = np.asarray(subset.counts.sum(axis=1), dtype=np.float32)
    projected = fitted.project(subset)
    generator = torch.Generator().manual_seed(how.seed)
    for _ in range(how.n_samples):
        encoder_masks = fitted.encoder.correction.draw_masks(generator)
        masks = fitted.decoder.network.draw_masks(generator)
        latent = fitted.encode(subset, masks=encoder_masks, projected=projected)
        asked = (latent, covariates, subset.batch)
        decoded = fitted.rates(*asked, per_cell=True, batch_size=how.batch_size, masks=masks)
        ratios = batch_ratios(fitted, *asked, target, batch_size=how.batch_size, masks=masks)
        yield (
            (wanted[rows], _normalised(own * ratio), own * depth[rows])
            for (rows, own), (_, ratio) in zip(decoded, ratios, strict=True)
        )


def _normalised(rates: np.ndarray) -> np.ndarray:
    return rates / rates.sum(axis=1, keepdims=True)
