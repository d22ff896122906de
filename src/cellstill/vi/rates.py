"""Ambient rates that a model starts from: those the user knows, or those that counts tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellstill.errors import InvalidArgumentError
from cellstill.vi.ambient import ProfileBackground, Soup
from cellstill.vi.soup import estimate_soup

ALL_CELLS = "all_cells"

Rate = float | Mapping[str, float] | None


def estimate_rates(
    background: ProfileBackground,
    counts: sp.csr_matrix,
    codes: Mapping[str, np.ndarray],
    categories: Mapping[str, Sequence[str]],
    known: Rate,
    seed: int,
) -> None:
    """Set the rate of each category of a background.

    Parameters
    ----------
    background
        Set in place. Where several columns add up, each takes an equal part of what its categories show.
    counts, codes
        Counts of the cells, and their codes by column.
    categories
        Names of the categories of each column.
    known
        Share of ambient RNA, of all cells or by category; ``None``, and categories left out, are estimated.
    seed
        Of the estimate.

    Raises
    ------
    InvalidArgumentError
        A known rate lies outside [0, 1), or is that of no category.
    """
    columns: list[str | None] = [*background.columns] or [None]
    names_of = [
        [ALL_CELLS] if column is None else list(categories.get(column, map(str, range(len(background.of(k).rate)))))
        for k, column in enumerate(columns)
    ]
    _check(known, [name for names in names_of for name in names])
    for position, (column, names) in enumerate(zip(columns, names_of, strict=True)):
        code = np.zeros(counts.shape[0], dtype=np.int64) if column is None else codes[column]
        _of_column(background.of(position), counts, code, names, len(columns), known, seed)


def _of_column(
    soup: Soup, counts: sp.csr_matrix, code: np.ndarray, names: list[str], n_columns: int, known: Rate, seed: int
) -> None:
    given = np.array([known.get(name, np.nan) if isinstance(known, Mapping) else known for name in names], dtype=float)
    rate, interval = np.zeros(len(names)), np.tile([0.0, 1.0], (len(names), 1))
    identified = np.zeros(len(names), dtype=bool)
    open_ = np.isnan(given[code])
    if open_.any():
        batch = pd.Categorical(np.asarray(names, dtype=object)[code[open_]], categories=names)
        found = estimate_soup(counts if open_.all() else counts[open_], batch, seed=seed)
        occupied = np.unique(code[open_])
        rate[occupied], interval[occupied], identified[occupied] = found.start(), found.interval, found.identified
    stated = ~np.isnan(given)
    rate[stated], interval[stated], identified[stated] = given[stated], given[stated, None], True
    soup.set_rate(rate / n_columns, interval / n_columns, identified)


def _check(known: Rate, names: Sequence[str]) -> None:
    if known is None:
        return
    values = known if isinstance(known, Mapping) else {ALL_CELLS: known}
    unknown = [name for name in values if isinstance(known, Mapping) and name not in names]
    if unknown:
        raise InvalidArgumentError(
            f"ambient_rate names {unknown[:5]}, and the categories of the ambient covariates are {list(names)[:10]}. "
            "Name those, or give one number for all cells."
        )
    for name, value in values.items():
        if not 0 <= value < 1:
            raise InvalidArgumentError(f"ambient_rate of {name!r} is {value}; it is a share of counts, in [0, 1).")
