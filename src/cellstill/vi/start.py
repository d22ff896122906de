"""Where a model starts: predicted counts match the observed ones before the first step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import scipy.sparse as sp
import torch

from cellstill.vi.ambient import ProfileBackground
from cellstill.vi.modality import Modality
from cellstill.vi.module import RegularizedVAE
from cellstill.vi.moments import inverse_dispersion
from cellstill.vi.parts import Background, Dispersion
from cellstill.vi.rates import Rate, estimate_rates, known_rates

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
    categories: Mapping[str, Sequence[str]] | None = None,
    ambient_rates: Mapping[str, Rate] | None = None,
    seed: int = 0,
    reference: RegularizedVAE | None = None,
) -> None:
    r"""Set library priors, decoder biases and backgrounds.

    With the library sizes that the model starts from, :math:`l_n = s N_n / e^{\overline{\log N}}`, or s for all cells
    without the residual form, native expression starts at 0.8 and the background of each category at 0.2 of
    :math:`\sum_n x_{nf} / \sum_n l_n`; a background of the form ``"profile"``, which is a share of the observed totals
    in either case, at the share that it has been given, and native expression at the rest; without background native
    expression starts at all of it. Totals then match, those of cells or, without the residual form, their sum, whatever
    the sensitivity s.

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
    categories
        Names of the categories of each column.
    ambient_rates
        Known share of ambient RNA in the counts by modality, of all cells or by category; others are estimated.
    seed
        Of the estimate of ambient rates.
    reference
        Trained module, whose categories come first and keep their ambient rates.

    Raises
    ------
    InvalidArgumentError
        A rate is that of no category of the data.

    Warns
    -----
    CellstillWarning
        Counts do not identify an ambient rate.
    """
    profiles = {
        name: background
        for name in module.config.modalities
        if isinstance(background := module.modality(name).background, ProfileBackground)
    }
    before = (
        {name: cast(ProfileBackground, reference.modality(name).background) for name in profiles} if reference else {}
    )
    names, stated = categories or {}, ambient_rates or {}
    given = {}
    for name, profile in profiles.items():
        profile.occur(
            {column: codes[column] for column in profile.columns}, before[name].combinations if reference else None
        )
        given[name] = known_rates(profile, names, stated.get(name), before.get(name))
    for name in (name for name in module.config.modalities if name in counts):
        matrix = counts[name]
        has = cells if name not in present else cells[present[name][cells]]
        own = {column: values[has] for column, values in codes.items()}
        modality = module.modality(name)
        if name in profiles:
            estimate_rates(profiles[name], matrix[has], own, names, given[name], seed, before.get(name))
        _start_modality(modality, matrix[has], own, module.config.dispersion_start)


def _start_modality(
    modality: Modality, counts: sp.csr_matrix, codes: Mapping[str, np.ndarray], biological_fraction: float | None
) -> None:
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
    observed = math.exp(library.log_sensitivity) * totals / math.exp(center)
    size = observed if library.weight is not None else np.full(len(totals), math.exp(library.log_sensitivity))
    background = modality.background
    everywhere = _expression(counts, size, np.zeros(len(totals), dtype=np.int64), 1)[0]
    share = 0.0 if background is None else BACKGROUND_SHARE
    if isinstance(background, ProfileBackground):
        share = _start_soup(background, counts, observed, codes)
        background.typical.copy_(torch.from_numpy(everywhere))
    native = (1 - share) * everywhere
    with torch.no_grad():
        library.center.fill_(center)
        library.group_mean.copy_(torch.from_numpy(means))
        library.group_variance.copy_(torch.from_numpy(variances))
        torch.nn.init.normal_(modality.output.weight, std=_OUTPUT_SD)
        modality.output.bias.copy_(torch.from_numpy(native + np.log(-np.expm1(-native))))
        if isinstance(background, Background):
            _start_background(background, counts, size, codes)
        if biological_fraction is not None and isinstance(modality.dispersion, Dispersion):
            # Library sizes come to differ as the totals do: their spread is not the counts' own.
            _start_dispersion(modality.dispersion, counts, observed, codes, biological_fraction)


def _start_background(
    background: Background, counts: sp.csr_matrix, size: np.ndarray, codes: Mapping[str, np.ndarray]
) -> None:
    tables = background.beta.tables
    codes_of = [codes[column] for column in background.beta.columns] or [np.zeros(len(size), dtype=np.int64)]
    for code, table in zip(codes_of, tables, strict=True):
        mean = _expression(counts, size, code, len(table))
        table.copy_(torch.from_numpy(np.log(BACKGROUND_SHARE / len(tables) * mean)))


def _start_soup(
    background: ProfileBackground, counts: sp.csr_matrix, size: np.ndarray, codes: Mapping[str, np.ndarray]
) -> float:
    """Set the soup of each combination of categories to its rate; returns its mean share over cells."""
    row = background.rows_of_cells(codes, len(size))
    background.start(_expression(counts, size, row, len(background.rate)))
    return float(background.rate.numpy()[row] @ size / size.sum())


def _start_dispersion(
    dispersion: Dispersion,
    counts: sp.csr_matrix,
    size: np.ndarray,
    codes: Mapping[str, np.ndarray],
    biological_fraction: float,
) -> None:
    start = math.exp(float(dispersion.mean[0, 0]))
    group = np.zeros(len(size), dtype=np.int64) if dispersion.column is None else codes[dispersion.column]
    theta = inverse_dispersion(
        counts, size, group, len(dispersion.mean), biological_fraction=biological_fraction, otherwise=start
    )
    dispersion.mean.copy_(torch.from_numpy(np.log(theta)))


def _expression(counts: sp.csr_matrix, size: np.ndarray, group: np.ndarray, n_groups: int) -> np.ndarray:
    """Mean expression per unit of size by group and feature; half a count where a feature has none."""
    indicator = sp.csr_matrix((np.ones(len(size)), (group, np.arange(len(size)))), (n_groups, len(size)))
    sums = np.asarray((indicator @ counts).todense(), dtype=np.float64)
    sizes = np.bincount(group, size, n_groups)[:, None]
    overall = np.maximum(sums.sum(axis=0), _HALF_A_COUNT) / size.sum()
    # A gene that a group does not show gets what half a count would be, but not more than the average of all groups.
    floor = np.minimum(_HALF_A_COUNT / np.maximum(sizes, 1e-12), overall)
    return np.where(sizes > 0, np.maximum(sums / np.maximum(sizes, 1e-12), floor), overall)
