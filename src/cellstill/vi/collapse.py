"""A latent that says nothing of the cells, said aloud."""

from __future__ import annotations

import warnings

import numpy as np

from cellstill.errors import CellstillWarning
from cellstill.vi.cells import Cells
from cellstill.vi.evaluation import blocks, to_numpy
from cellstill.vi.module import RegularizedVAE

_LEAST_DIVERGENCE, _MIN_EPOCHS, _MOST_CELLS = 0.05, 20, 2_000


def warn_if_collapsed(module: RegularizedVAE, cells: Cells, n_epochs: int) -> None:
    """Warn if the posterior of z is the prior, in all cells, of a model that had the time to learn.

    Of two kinds of cells in equal shares z needs 0.69 nats, of one cell in a hundred 0.056; below 0.05 nats a cell it
    tells nobody from anybody.

    Parameters
    ----------
    module
        In evaluation mode.
    cells
        Of them 2,000 are looked at, evenly.
    n_epochs
        Epochs of training; below 20 nothing is expected of z yet.

    Warns
    -----
    CellstillWarning
        Mean divergence of z below 0.05 nats.
    """
    if n_epochs < _MIN_EPOCHS:
        return
    chosen = np.unique(np.linspace(0, len(cells) - 1, _MOST_CELLS).astype(np.int64))
    divergence = np.concatenate([to_numpy(block.latent.kl) for block in blocks(module, cells[chosen], 1024)]).mean()
    if divergence < _LEAST_DIVERGENCE:
        warnings.warn(
            f"The latent tells next to nothing of the cells ({divergence:.2g} nats each): what it could say did not "
            "make counts of cells that were set aside more likely. Either these cells are alike but for depth, soup "
            "and covariates, or they have too few counts. train(kl_warmup=0.1) lets a new model look for structure "
            "before it is charged for it; what it then finds may be noise.",
            CellstillWarning,
            stacklevel=3,
        )
