"""A latent that says next to nothing of the cells, said aloud."""

from __future__ import annotations

import warnings

import numpy as np

from cellstill.errors import CellstillWarning, level_outside
from cellstill.vi.cells import Cells
from cellstill.vi.evaluation import blocks, to_numpy
from cellstill.vi.module import RegularizedVAE

_LEAST_DIVERGENCE, _MIN_STEPS, _MOST_CELLS = 0.05, 300, 2_000


def warn_if_collapsed(module: RegularizedVAE, cells: Cells, indices: np.ndarray, n_steps: int) -> None:
    """Warn if the posterior of z is about the prior, in a model that had the time to learn.

    To tell two kinds of cells in equal shares takes 0.69 nats, to tell one cell in a hundred from the others 0.056 on
    average over cells. Rarer kinds may be told below 0.05 nats, but nothing else is.

    Parameters
    ----------
    module
        In evaluation mode.
    cells
        Data.
    indices
        Cells to look at; of more than 2,000 as many, evenly.
    n_steps
        Steps of training; before 300 nothing is expected of z yet, which starts at its prior.

    Warns
    -----
    CellstillWarning
        Mean divergence of z below 0.05 nats.
    """
    if n_steps < _MIN_STEPS:
        return
    chosen = indices[np.unique(np.linspace(0, len(indices) - 1, _MOST_CELLS).astype(np.int64))]
    divergence = np.concatenate([to_numpy(block.latent.kl) for block in blocks(module, cells[chosen], 1024)]).mean()
    if divergence < _LEAST_DIVERGENCE:
        warnings.warn(
            f"The latent tells next to nothing of the cells: its divergence from the prior is {divergence:.2g} nats a "
            "cell. Perhaps these cells are alike but for depth, soup and covariates, or have too few counts to tell; "
            "perhaps training did not find what there is. A larger n_hidden and n_latent, another lr or "
            "kl_warmup=0.1 may help; compare get_elbo() of validation cells, as what a warm-up finds may be noise.",
            CellstillWarning,
            stacklevel=level_outside(),
        )
