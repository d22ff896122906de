"""Ambient rates that a model starts from: those the user knows, or those that counts tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellstill.errors import InvalidArgumentError
from cellstill.vi.ambient import ProfileBackground
from cellstill.vi.soup import estimate_soup

ALL_CELLS = "all_cells"

Rate = float | Mapping[Any, float] | None
"""One rate of all cells, or rates by category; by tuple of categories where there are several ambient columns."""


def estimate_rates(
    background: ProfileBackground,
    counts: sp.csr_matrix,
    codes: Mapping[str, np.ndarray],
    categories: Mapping[str, Sequence[str]],
    known: Rate,
    seed: int,
    before: ProfileBackground | None = None,
) -> None:
    """Set the rate of each combination of ambient categories.

    A rate that counts do not identify, and that of a combination without cells, is the median of the identified ones,
    but not more than counts allow, and 0 where none is identified.

    Parameters
    ----------
    background
        Set in place.
    counts, codes
        Counts of the cells, and their codes by column.
    categories
        Names of the categories of each column.
    known
        Share of ambient RNA, of all cells, or by category (a tuple of them where there are several columns); ``None``,
        and categories left out, are estimated.
    seed
        Of the estimate.
    before
        Background of a trained model, whose combinations come first: they keep their rates, and their cells are not
        looked at.

    Raises
    ------
    InvalidArgumentError
        A known rate lies outside [0, 1), is not a number, or is that of no category, or of none but those that a
        trained model knows.
    """
    names = _names(background, categories)
    n_before = 0 if before is None else len(before.combinations)
    given = np.full(len(background.rate), np.nan)
    stated = _stated(known, names, n_before)
    if isinstance(stated, dict):
        for name, value in stated.items():
            given[names.index(name)] = value
    elif stated is not None:
        given[n_before:] = stated
    rate, bound = np.full(len(given), np.nan), np.ones(len(given))
    interval, identified = np.tile([0.0, 1.0], (len(given), 1)), np.zeros(len(given), dtype=bool)
    if before is not None:
        rate[:n_before] = before.rate[:n_before].cpu().numpy()
        interval[:n_before] = before.interval[:n_before].cpu().numpy()
        identified[:n_before] = before.identified[:n_before].cpu().numpy()
    row = background.rows_of_cells(codes, counts.shape[0])
    open_ = np.isnan(given[row]) & (row >= n_before)
    if open_.any():
        occupied, batch = np.unique(row[open_], return_inverse=True)
        labels = pd.Index([names[one] for one in occupied], tupleize_cols=False)
        n_cells = int(open_.sum())
        if min(n_cells, counts.shape[1]) < 2:
            raise InvalidArgumentError(
                f"The share of ambient RNA of {list(labels[:5])} cannot be estimated: that needs at least 2 cells and "
                f"2 genes, and there are {n_cells} and {counts.shape[1]}. State it, ambient_rate="
                f"{{{names[occupied[0]]!r}: 0.1}}, or have no background: background=False."
            )
        found = estimate_soup(
            counts if open_.all() else counts[open_],
            pd.Categorical.from_codes(batch, categories=labels),
            seed=seed,
            allow_noninteger=True,
        )
        rate[occupied], bound[occupied] = found.rate, found.bound
        interval[occupied], identified[occupied] = found.interval, found.identified
    is_given = ~np.isnan(given)
    rate[is_given], interval[is_given], identified[is_given] = given[is_given], given[is_given, None], True
    shown = identified[: len(names)]
    median = float(np.median(rate[: len(names)][shown])) if shown.any() else 0.0
    unknown = ~identified
    unknown[:n_before] = False
    rate[unknown] = np.minimum(median, bound[unknown])
    background.set_rate(rate, interval, identified)


def _names(background: ProfileBackground, categories: Mapping[str, Sequence[str]]) -> list[Any]:
    """Name of each combination: a category, or a tuple where there are several columns."""
    if not background.columns:
        return [ALL_CELLS]
    of = [
        categories.get(column, [str(code) for code in range(size)])
        for column, size in zip(background.columns, background.sizes, strict=True)
    ]
    tuples = [tuple(own[code] for own, code in zip(of, row, strict=True)) for row in background.combinations.tolist()]
    return tuples if len(of) > 1 else [name for (name,) in tuples]


def _stated(known: Any, names: list[Any], n_before: int) -> dict[Any, float] | float | None:
    """Check rates that a user states."""
    if known is None:
        return None
    if not _is_number(known) and not isinstance(known, Mapping):
        raise InvalidArgumentError(
            f"ambient_rate is {known!r}. Give one number for all cells, or a dictionary by category: "
            f"{{{names[0]!r}: 0.1}}."
        )
    values = {_name(key): value for key, value in known.items()} if isinstance(known, Mapping) else {ALL_CELLS: known}
    for name, value in values.items():
        if not _is_number(value) or not 0 <= value < 1:
            raise InvalidArgumentError(f"ambient_rate of {name!r} is {value!r}; it is a share of counts, in [0, 1).")
    new = names[n_before:]
    if isinstance(known, Mapping):
        _check_names(known, values, names)
        kept = [name for name in values if name not in new]
    else:
        kept = [] if new else ["all cells"]
    if kept:
        raise InvalidArgumentError(
            f"ambient_rate is stated of {kept[:5]}, whose soup the reference knows, and keeps. "
            + (f"State it of new categories: {new[:10]}." if new else "The cells have no new category: leave it out.")
        )
    return values if isinstance(known, Mapping) else float(known)


def _check_names(known: Mapping[Any, float], values: Mapping[Any, float], names: list[Any]) -> None:
    if len(values) < len(known):
        raise InvalidArgumentError(f"ambient_rate names a category twice: {list(known)}.")
    unknown = [name for name in values if name not in names]
    if unknown:
        several = isinstance(names[0], tuple)
        what = (
            "combinations of the ambient covariates that occur" if several else "categories of the ambient covariates"
        )
        raise InvalidArgumentError(
            f"ambient_rate names {unknown[:5]}, and the {what} are {names[:10]}. "
            f"Name those{', as tuples' if several else ''}, or give one number for all cells."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _name(key: Any) -> Any:
    return tuple(map(str, key)) if isinstance(key, tuple) else str(key)
