"""By how much the counts of a cell would differ if it had been measured in other batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cellstill.distill.cells import Cells
from cellstill.distill.fitted import Fitted
from cellstill.errors import InvalidArgumentError
from cellstill.nn.layers import Masks

LARGEST_RATIO = 16.0
"""Bound of ratios, upwards and downwards. Where one batch shows less than a sixteenth of a gene, it has hardly any
counts of it to correct, and a decoder that has seen none cannot tell a hundredth from a millionth."""


def corrected_ratios(
    fitted: Fitted, cells: Cells, target: list[int], batch_size: int = 1024
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    r"""Yield the factors that take counts from each cell's own batch to the target batches.

    The counts multiplied by them keep their own noise and what is particular to a donor. Decoded expression itself has
    neither: it is smooth, and a test that takes it for counts finds donors alike and nearly everything different.

    The error of a factor is common to the samples of a batch as far as it does not depend on the cell. Keep the batch
    in the design, which then accounts for it.

    Parameters
    ----------
    fitted
        Trained distiller, with a decoder that knows the batch.
    cells
        Cells; those of a batch that is not known are taken as of the mean of the batches of training.
    target
        Codes of the batches to correct to, averaged.
    batch_size
        Cells decoded at a time. Larger is faster until memory runs out.

    Yields
    ------
    Positions of the cells, shape ``(n,)``, ascending, every cell once; and their factors (:func:`batch_ratios`), shape
    ``(n, n_vars)``.

    Raises
    ------
    InvalidArgumentError
        The decoder does not know the batch: all factors would be 1.
    """
    if fitted.decoder.batches.embedding_dim == 0:
        raise InvalidArgumentError(
            'expression="corrected" needs a decoder that knows the batch: this model has use_batch_conditioning=False. '
            'Train one with use_batch_conditioning=True, or use expression="raw".'
        )
    latent, covariates = fitted.encode(cells), fitted.design.encode(cells.obs)
    ratios = batch_ratios(fitted, latent, covariates, cells.batch, target, batch_size=batch_size)
    return ((np.arange(rows.start, rows.stop), ratio) for rows, ratio in ratios)


def batch_ratios(
    fitted: Fitted,
    latent: np.ndarray,
    covariates: np.ndarray,
    batch: np.ndarray,
    target: list[int],
    *,
    batch_size: int,
    masks: Masks | None = None,
) -> Iterator[tuple[slice, np.ndarray]]:
    r"""Yield decoded proportions in the target batches over those in each cell's own batch.

    .. math::

        \frac{\frac1B \sum_b \rho_g(z_n, b, \bar c)}{\rho_g(z_n, b_n, \bar c)}

    over the :math:`B` targets, with the mean covariates :math:`\bar c` of all cells: what differs between batches is
    taken to be the same under all conditions. A decoder that is told the condition fits the noise in its effect as
    well, in each batch another, and with each cell's own covariates this noise would come back as a correction and
    inflate fold changes beyond their errors.

    Parameters
    ----------
    fitted
        Trained distiller.
    latent, covariates, batch
        Standardised latent, shape ``(n, n_latent)``, encoded covariates, shape ``(n, n_columns)``, and code of the
        batch of each cell.
    target
        Codes of the batches to correct to, averaged.
    batch_size, masks
        As in :meth:`Fitted.rates`.

    Yields
    ------
    Rows, and ratios from 1/16 to 16, shape ``(n_block, n_vars)``.
    """
    common = np.repeat(covariates.mean(axis=0, keepdims=True), len(covariates), axis=0)
    wanted = fitted.rates(latent, common, target, per_cell=False, batch_size=batch_size, masks=masks)
    measured = fitted.rates(latent, common, batch, per_cell=True, batch_size=batch_size, masks=masks)
    for (rows, other), (_, own) in zip(wanted, measured, strict=True):
        tiny = np.finfo(own.dtype).tiny
        ratio = np.maximum(other, tiny) / np.maximum(own, tiny)
        yield rows, np.clip(ratio, 1 / LARGEST_RATIO, LARGEST_RATIO, out=ratio)
