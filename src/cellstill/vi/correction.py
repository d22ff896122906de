"""By how much the counts of a cell would differ without background and in other batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from cellstill.vi.cells import Cells
from cellstill.vi.evaluation import blocks, expected_means, native_expression, to_numpy
from cellstill.vi.module import RegularizedVAE

LARGEST_RATIO = 16.0
"""Bound of ratios, upwards and downwards: where a cell is expected to show less than a sixteenth of a feature, it has
hardly any counts of it to correct."""


def corrected_ratios(
    module: RegularizedVAE,
    name: str,
    cells: Cells,
    targets: Sequence[Mapping[str, int]],
    batch_size: int = 512,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    r"""Yield the factors that take counts to what the cells would show natively, as the target categories.

    .. math::

        \frac{\bar\rho_{ng} / \sum_h \bar\rho_{nh}}{\mu_{ng} / \sum_h \mu_{nh}}

    with native expression :math:`\bar\rho_n`, decoded from the mean of the posterior of :math:`z_n` and averaged over
    the targets, and :math:`\mu_n` the counts expected of the cell as it was measured: in its own categories, with
    scaling and background. The counts multiplied by them keep their own noise and what is particular to a donor, which
    decoded expression lacks.

    Parameters
    ----------
    module, name, cells
        Module in evaluation mode, modality, and cells that have it.
    targets
        Categories of the conditioning covariates to correct to, averaged; none leaves the cells in their own.
    batch_size
        Cells decoded at a time. Larger is faster until memory runs out; the factors do not depend on it.

    Yields
    ------
    Positions of the cells, shape ``(n,)``, ascending, every cell once; and their factors, shape ``(n, n_vars)``, from
    1/16 to 16.
    """
    for block in blocks(module, cells, batch_size):
        native, background = expected_means(module, name, block)
        measured = native if background is None else native + background
        wanted = native_expression(module, name, block.latent.mean, block.batch, targets)
        ratio = _shares(wanted) / _shares(measured)
        yield (
            np.arange(block.rows.start, block.rows.stop),
            to_numpy(ratio.clamp_(1 / LARGEST_RATIO, LARGEST_RATIO)),
        )


def _shares(values: torch.Tensor) -> torch.Tensor:
    tiny = torch.finfo(values.dtype).tiny
    return (values / values.sum(dim=1, keepdim=True)).clamp_(min=tiny)
