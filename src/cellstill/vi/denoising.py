"""What of observed counts is native, and what is ambient background."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cellstill.data.soup import draw_native, expected_native
from cellstill.vi.evaluation import Block, expected_means, to_numpy
from cellstill.vi.module import RegularizedVAE


@dataclass(frozen=True)
class Parts:
    """Expected native and background counts of stored entries.

    Attributes
    ----------
    native, background
        Expected counts, shape ``(n_entries,)``.
    theta
        Inverse dispersion of the native counts; ``None`` if the background shares their fluctuations.
    """

    native: np.ndarray
    background: np.ndarray
    theta: np.ndarray | None

    def native_counts(self, observed: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """Native part of the observed counts: its expectation, or a draw with ``rng``, of whole counts."""
        if rng is not None:
            # Fractional counts, which users may allow, are thinned in their whole part.
            whole = np.floor(observed).astype(np.int64)
            if self.theta is not None:
                return draw_native(whole, self.native, self.background, self.theta, rng)
            return rng.binomial(whole, self.native / (self.native + self.background))
        if self.theta is not None:
            return np.minimum(expected_native(observed, self.native, self.background, self.theta), observed)
        return np.minimum(observed * (self.native / (self.native + self.background)), observed)


def expected_parts(module: RegularizedVAE, name: str, block: Block, rows: np.ndarray) -> Parts:
    """Split the counts of a block.

    Parameters
    ----------
    module
        In evaluation mode, with a background in the modality.
    name
        Modality.
    block
        Cells.
    rows
        Cell of each stored entry of the block.
    """
    modality, counts = module.modality(name), block.counts[name]
    native, background = expected_means(module, name, block)
    assert background is not None
    genes, cells = counts.indices.long(), torch.from_numpy(rows).to(counts.indices.device)
    theta = None
    if modality.has_profile:
        table, group = modality.dispersion(block.batch, counts.n_rows)
        table = table if table.ndim == 2 else table[None]
        theta = to_numpy(table[torch.zeros_like(cells) if group is None else group[cells], genes])
    # float64: where both parts are tiny, their ratio still counts.
    return Parts(
        native=to_numpy(native[cells, genes]).astype(np.float64),
        background=to_numpy(background[cells, genes]).astype(np.float64),
        theta=None if theta is None else theta.astype(np.float64),
    )
