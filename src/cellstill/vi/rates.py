"""Ambient rates that a model starts from: those the user knows, or those that counts tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, cast

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellstill.errors import InvalidArgumentError
from cellstill.vi.ambient import ProfileBackground
from cellstill.vi.config import VAEConfig
from cellstill.vi.soup import estimate_soup

ALL_CELLS = "all_cells"

Rate = float | Mapping[Any, float] | None
"""One rate of all cells, or rates by category; by tuple of categories where there are several ambient columns."""

Rates = Rate | Mapping[str, Rate]
"""A rate of all modalities, or rates by modality."""


def rates_of_modalities(
    known: Rates, config: VAEConfig, counted: Sequence[str], categories: Mapping[str, Sequence[str]], *, named: bool
) -> dict[str, Rate]:
    """Rates that a user states, by modality.

    A dictionary is by modality if its keys all are names of modalities and not all names of categories, or if one of
    its values is a dictionary or ``None``. Any other is by category, as is one number, of all modalities whose
    background is of the form ``"profile"``.

    Parameters
    ----------
    known
        What was stated.
    config
        Of the model.
    counted
        Modalities that the cells have.
    categories
        Names of the categories of each column.
    named
        Whether modalities can be named. Otherwise a dictionary is by category.

    Raises
    ------
    InvalidArgumentError
        A rate is no number in [0, 1), or of no use; or keys are names of modalities and categories alike, of both in
        turn, or of neither.
    """
    if known is None:
        return {}
    if not (named and isinstance(known, Mapping) and _is_by_modality(known, config, categories)):
        _check_values("ambient_rate", known)
        with_rate = [name for name in counted if config.modalities[name].background == "profile"]
        if not with_rate:
            raise InvalidArgumentError(
                f"ambient_rate={known!r} is of no use: none of the modalities {list(counted)} has a background of "
                "the form 'profile'. Leave it out."
            )
        return dict.fromkeys(with_rate, cast(Rate, known))
    for name, rate in known.items():
        argument = f"ambient_rate[{name!r}]"
        if name not in config.modalities:
            raise InvalidArgumentError(f"{argument}: there is no such modality. There are {list(config.modalities)}.")
        form = config.modalities[name].background
        if form != "profile":
            found = "no background" if form is None else f"a background of the form {form!r}"
            raise InvalidArgumentError(
                f"{argument} is of no use: the modality has {found}, and only one of the form 'profile' has a rate. "
                "Leave it out, or set background of the modality to 'profile'."
            )
        if name not in counted:
            raise InvalidArgumentError(f"{argument} is of no use: no cell has the modality. Leave it out.")
        _check_values(argument, rate)
    return dict(known)


def estimate_rates(
    background: ProfileBackground,
    counts: sp.csr_matrix,
    codes: Mapping[str, np.ndarray],
    categories: Mapping[str, Sequence[str]],
    given: np.ndarray,
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
    given
        Share of ambient RNA of each row of the background, NaN where it is to be estimated (:func:`known_rates`).
    seed
        Of the estimate.
    before
        Background of a trained model, whose combinations come first: they keep their rates, and their cells are not
        looked at.

    Raises
    ------
    InvalidArgumentError
        There are fewer than two cells or features to estimate a rate from.
    """
    names = _names(background, categories)
    n_before = 0 if before is None else len(before.combinations)
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


def known_rates(
    background: ProfileBackground,
    categories: Mapping[str, Sequence[str]],
    known: Rate,
    before: ProfileBackground | None = None,
) -> np.ndarray:
    """Rates of the rows of a background that a user states, and NaN for the others.

    Parameters
    ----------
    background, categories, before
        See :func:`estimate_rates`.
    known
        Share of ambient RNA, of all cells, or by category (a tuple of them where there are several columns).

    Raises
    ------
    InvalidArgumentError
        A rate is that of no category, or of none but those that a trained model knows.
    """
    names = _names(background, categories)
    n_before = 0 if before is None else len(before.combinations)
    new = names[n_before:]
    given = np.full(len(background.rate), np.nan)
    if isinstance(known, Mapping):
        values = {_name(key): value for key, value in known.items()}
        _check_names(known, values, names)
        kept = [name for name in values if name not in new]
        for name, value in values.items():
            given[names.index(name)] = value
    else:
        kept = ["all cells"] if known is not None and not new else []
        given[n_before:] = np.nan if known is None else known
    if kept:
        raise InvalidArgumentError(
            f"ambient_rate is stated of {kept[:5]}, whose soup the reference knows, and keeps. "
            + (f"State it of new categories: {new[:10]}." if new else "The cells have no new category: leave it out.")
        )
    return given


def _is_by_modality(known: Mapping[Any, Any], config: VAEConfig, categories: Mapping[str, Sequence[str]]) -> bool:
    """Whether keys are names of modalities, and not of categories."""
    if any(value is None or isinstance(value, Mapping) for value in known.values()):
        return True
    columns, modalities = config.ambient, list(config.modalities)
    several, one = len(columns) > 1, list(categories[columns[0]]) if columns else [ALL_CELLS]
    of_modality = [key for key in known if key in modalities]
    of_category = [key for key in known if (isinstance(key, tuple) if several else _name(key) in one)]
    by_modality, by_category = len(of_modality) == len(known), len(of_category) == len(known)
    if not known or by_modality != by_category:
        return bool(known) and by_modality
    if by_modality:
        first = of_modality[0]
        raise InvalidArgumentError(
            f"ambient_rate names {of_modality[:5]}, which are modalities and categories alike. Name both: "
            f"ambient_rate={{{first!r}: {{{first!r}: 0.1}}}}."
        )
    neither = [key for key in known if key not in of_modality and key not in of_category]
    found = f"{neither[:5]}" if neither else f"{of_modality[:5]} beside {of_category[:5]}"
    what = "combinations of categories, as tuples" if several else f"categories, {one[:10]}"
    example = tuple(categories[column][0] for column in columns) if several else one[0]
    with_rate = [name for name, modality in config.modalities.items() if modality.background == "profile"] or modalities
    raise InvalidArgumentError(
        f"ambient_rate names {found}. Name modalities, {with_rate}, or {what}, or both: "
        f"ambient_rate={{{with_rate[0]!r}: {{{example!r}: 0.1}}}}."
    )


def _check_values(argument: str, known: Any) -> None:
    """Refuse what is no share of counts."""
    if known is None:
        return
    if not _is_number(known) and not isinstance(known, Mapping):
        raise InvalidArgumentError(
            f"{argument} is {known!r}. Give one number for all cells, or a dictionary by category, {{...: 0.1}}."
        )
    each = {f"[{key!r}]": rate for key, rate in known.items()} if isinstance(known, Mapping) else {"": known}
    for key, rate in each.items():
        if not _is_number(rate) or not 0 <= rate < 1:
            raise InvalidArgumentError(f"{argument}{key}={rate!r} is no share of counts, which lies in [0, 1).")


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
