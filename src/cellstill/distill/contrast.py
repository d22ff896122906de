"""Differential expression of a trained distiller: raw counts summed per sample, or posterior draws of its networks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from cellstill.de import BayesianConfig, DEResult, PseudobulkConfig, bayesian_de, comparison_cells, pseudobulk_de
from cellstill.distill.cells import Cells
from cellstill.distill.fitted import Fitted


def compare_groups(
    fitted: Fitted,
    cells: Cells,
    target: list[int] | None,
    *,
    groupby: str,
    group1: str,
    group2: str,
    sample_key: str,
    batch_key: str,
    how: PseudobulkConfig | BayesianConfig,
) -> DEResult:
    """Run the comparison that ``how`` configures; ``target`` are the batches that posterior draws decode as."""
    contrast = {"groupby": groupby, "group1": group1, "group2": group2, "sample_key": sample_key}
    if isinstance(how, PseudobulkConfig):
        return pseudobulk_de(cells.counts, cells.obs, fitted.genes, **contrast, batch_key=batch_key, config=how)
    wanted = comparison_cells(cells.obs, groupby=groupby, group1=group1, group2=group2)
    draws = posterior_draws(fitted, cells, wanted, target or [], how)
    return bayesian_de(draws, cells.obs, fitted.genes, **contrast, batch_key=batch_key, config=how)


def posterior_draws(
    fitted: Fitted, cells: Cells, wanted: np.ndarray, target: list[int], how: BayesianConfig
) -> Iterator[Iterator[tuple[np.ndarray, np.ndarray]]]:
    """Yield draws of the expected proportions of the ``wanted`` cells, decoded as the ``target`` batches.

    In each draw both networks keep one dropout mask for all cells: a draw of the function, so that what the network is
    unsure of does not average out over cells.
    """
    subset = cells[wanted]
    covariates = fitted.design.encode(subset.obs)
    generator = torch.Generator().manual_seed(how.seed)
    for _ in range(how.n_samples):
        encoder_masks = fitted.encoder.correction.draw_masks(generator)
        decoder_masks = fitted.decoder.network.draw_masks(generator)
        latent = fitted.encode(subset, masks=encoder_masks)
        blocks = fitted.rates(
            latent, covariates, target, per_cell=False, batch_size=how.batch_size, masks=decoder_masks
        )
        yield ((wanted[rows], rates) for rows, rates in blocks)
