"""Known soup on real cells: batches drawn at random with a rate each, and what corrections make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from cellstill.data.soup import Contamination, add_soup
from cellstill.metrics.ambient import (
    absent_genes,
    denoising_error,
    marker_leak,
    oracle_denoise,
    rate_error,
    removed_share,
    subtract_soup,
)


@dataclass(frozen=True, eq=False)
class Contaminated:
    """Cells with known soup.

    Attributes
    ----------
    adata
        What a method is given: counts with soup, and the batch of the soup in ``obs``.
    clean
        Counts without it.
    labels
        Cell types.
    soup
        The soup.
    absent, types
        What :func:`~cellstill.metrics.ambient.absent_genes` finds in the clean counts.
    """

    BATCH_KEY: ClassVar[str] = "soup_batch"

    adata: AnnData
    clean: sp.csr_matrix
    labels: pd.Series
    soup: Contamination
    absent: np.ndarray
    types: list[Any]

    @property
    def rate(self) -> np.ndarray:
        """Rate of the batch of each cell."""
        return self.soup.rate[self.soup.batch_codes]

    @property
    def profile(self) -> np.ndarray:
        """Profile of the batch of each cell."""
        return self.soup.profile[self.soup.batch_codes]

    def oracle(self) -> sp.csr_matrix:
        """What is left of the counts by someone who knows types, rates and profile."""
        return oracle_denoise(self.adata.X, self.clean, self.labels, self.rate, self.profile)

    def subtraction(self) -> sp.csr_matrix:
        """Subtract a known rate times a known profile."""
        return subtract_soup(self.adata.X, self.rate, self.profile)


def contaminate(adata: AnnData, rates: Sequence[float], seed: int) -> Contaminated:
    """Put every cell into one of as many batches as there are rates, at random, and add soup of the batch's rate."""
    drawn = np.random.default_rng(seed + 100).integers(0, len(rates), adata.n_obs)
    batch = pd.Categorical([f"soup{code}" for code in drawn])
    clean = sp.csr_matrix(adata.X)
    soup = add_soup(clean, rates, batch=batch, seed=seed)
    obs = pd.DataFrame({Contaminated.BATCH_KEY: batch}, index=adata.obs_names)
    absent, types = absent_genes(clean, adata.obs["cell_type"])
    return Contaminated(
        adata=AnnData(soup.counts.astype(np.float32), obs=obs, var=adata.var[[]]),
        clean=clean,
        labels=adata.obs["cell_type"],
        soup=soup,
        absent=absent,
        types=types,
    )


def score_soup(cells: Contaminated, denoised: sp.csr_matrix, fraction: np.ndarray | None = None) -> dict[str, float]:
    """Score a correction, batch by batch.

    Returns
    -------
    For each rate in percent ``error_``, ``leak_`` and, with the share of background in each cell, ``rate_`` and
    ``rate_off_`` (relative, absolute value), both of all counts of a batch; ``removed`` of the batches without soup.
    """
    totals = np.asarray(cells.adata.X.sum(axis=1, dtype=np.float64)).ravel()
    scores: dict[str, float] = {}
    without = np.flatnonzero(cells.rate == 0)
    if len(without):
        scores["removed"] = removed_share(denoised[without], cells.adata.X[without])
    for code, rate in enumerate(cells.soup.rate):
        if rate == 0:
            continue
        rows, name = np.flatnonzero(cells.soup.batch_codes == code), f"{100 * rate:g}"
        found, given, labels = denoised[rows], cells.adata.X[rows], cells.labels.iloc[rows]
        scores[f"error_{name}"] = denoising_error(found, given, cells.clean[rows])
        scores[f"leak_{name}"] = marker_leak(found, given, labels, cells.absent, cells.types)
        if fraction is not None:
            estimated = float(np.average(fraction[rows], weights=totals[rows]))
            scores[f"rate_{name}"] = estimated
            scores[f"rate_off_{name}"] = abs(float(rate_error(estimated, cells.soup.realised_rate[code])))
    return scores
