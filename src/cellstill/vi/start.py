"""Where a model starts: predicted counts match the observed ones before the first step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import scipy.sparse as sp
import torch

from cellstill.vi.module import Modality, RegularizedVAE
from cellstill.vi.parts import Background

BACKGROUND_SHARE = 0.2
"""Share of the mean expression that the background starts with."""

_OUTPUT_SD = 1e-2
_HALF_A_COUNT = 0.5


def start_from_data(
    module: RegularizedVAE,
    counts: Mapping[str, sp.csr_matrix],
    codes: Mapping[str, np.ndarray],
    present: Mapping[str, np.ndarray],
    cells: np.ndarray,
) -> None:
    r"""Set library priors, decoder biases and backgrounds.

    With the library sizes that the model starts from, :math:`l_n = s N_n / e^{\overline{\log N}}`, native expression
    starts at 0.8 and the background of each category at 0.2 of :math:`\sum_n x_{nf} / \sum_n l_n`; without background
    native expression starts at all of it. Totals then match, whatever the sensitivity s.

    Parameters
    ----------
    module
        Set in place.
    counts
        CSR by modality, cells x features.
    codes
        Codes by column, shape ``(n_obs,)``.
    present
        Mask of the cells that have a modality; modalities that all cells have may be left out.
    cells
        Positions of the training cells.
    """
    for name, matrix in counts.items():
        has = cells if name not in present else cells[present[name][cells]]
        own = {column: values[has] for column, values in codes.items()}
        _start_modality(module.modality(name), matrix[has], own)


def _start_modality(modality: Modality, counts: sp.csr_matrix, codes: Mapping[str, np.ndarray]) -> None:
    totals = np.maximum(np.asarray(counts.sum(axis=1), dtype=np.float64).ravel(), 1.0)
    library = modality.library
    log_totals = np.log(totals)
    center = log_totals.mean()
    group = np.zeros(len(totals), dtype=np.int64) if library.column is None else codes[library.column]
    n_groups = len(library.group_mean)
    n = np.bincount(group, minlength=n_groups)
    means = np.bincount(group, log_totals - center, n_groups) / np.maximum(n, 1)
    variances = np.bincount(group, (log_totals - center - means[group]) ** 2, n_groups) / np.maximum(n, 1)
    # A group of one cell, or of equal totals, has no variance of its own.
    variances = np.where(variances > 1e-3, variances, max(log_totals.var(), 1e-3))
    size = math.exp(library.log_sensitivity) * totals / math.exp(center)
    background = modality.background
    everywhere = _expression(counts, size, np.zeros(len(totals), dtype=np.int64), 1)[0]
    native = everywhere if background is None else (1 - BACKGROUND_SHARE) * everywhere
    with torch.no_grad():
        library.center.fill_(center)
        library.group_mean.copy_(torch.from_numpy(means))
        library.group_variance.copy_(torch.from_numpy(variances))
        torch.nn.init.normal_(modality.output.weight, std=_OUTPUT_SD)
        modality.output.bias.copy_(torch.from_numpy(native + np.log(-np.expm1(-native))))
        if background is not None:
            _start_background(background, counts, size, codes)


def _start_background(
    background: Background, counts: sp.csr_matrix, size: np.ndarray, codes: Mapping[str, np.ndarray]
) -> None:
    tables = background.beta.tables
    codes_of = [codes[column] for column in background.beta.columns] or [np.zeros(len(size), dtype=np.int64)]
    for code, table in zip(codes_of, tables, strict=True):
        mean = _expression(counts, size, code, len(table))
        table.copy_(torch.from_numpy(np.log(BACKGROUND_SHARE / len(tables) * mean)))


def _expression(counts: sp.csr_matrix, size: np.ndarray, group: np.ndarray, n_groups: int) -> np.ndarray:
    """Mean expression per unit of size by group and feature; half a count where a feature has none."""
    indicator = sp.csr_matrix((np.ones(len(size)), (group, np.arange(len(size)))), (n_groups, len(size)))
    sums = np.asarray((indicator @ counts).todense(), dtype=np.float64)
    sizes = np.bincount(group, size, n_groups)[:, None]
    overall = np.maximum(sums.sum(axis=0), _HALF_A_COUNT) / size.sum()
    # A gene that a group does not show gets what half a count would be, but not more than the average of all groups.
    floor = np.minimum(_HALF_A_COUNT / np.maximum(sizes, 1e-12), overall)
    return np.where(sizes > 0, np.maximum(sums / np.maximum(sizes, 1e-12), floor), overall)
