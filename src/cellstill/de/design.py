"""The design matrix of a comparison, always of full rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cellstill.de.result import Contrast
from cellstill.de.units import Units, check_replicates, make_units, warn_left_out
from cellstill.errors import InvalidArgumentError

_TOLERANCE = 1e-6
_MIN_PER_LEVEL = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Design:
    """A design matrix and how it came about.

    Attributes
    ----------
    matrix
        Replicates x coefficients, of full rank: intercept first, and last the condition, 1 in group1 and 0 in group2,
        whose coefficient is the log fold change.
    formula
        The same in the names of ``obs``, such as ``"~ batch + condition"``.
    notes
        What was left out, and why.
    strata
        Combination of the levels of all other terms that each replicate has, as codes; ``None`` without such terms.
    paired
        Whether samples are among these terms, and so compared with themselves.
    common
        The columns of ``matrix`` but those of terms with a level for every pair of replicates or so, such as donors:
        what is fitted by the others is an average of several replicates.
    """

    matrix: np.ndarray
    formula: str
    notes: tuple[str, ...]
    strata: np.ndarray | None = None
    paired: bool = False
    common: np.ndarray | None = None


def make_design(
    obs: pd.DataFrame,
    contrast: Contrast,
    *,
    sample_key: str,
    batch_key: str | None,
    covariate_keys: Sequence[str],
    min_cells: int,
    called: str = "samples",
) -> tuple[Units, Design]:
    """Find the replicates, and build their design: :func:`~cellstill.de.units.make_units`, :func:`design_of_units`.

    Returns
    -------
    The replicates used, and the design.

    Warns
    -----
    CellstillWarning
        Samples were left out.

    Raises
    ------
    MissingKeyError, InvalidArgumentError
        What either of the two refuses.
    """
    units = make_units(
        obs,
        contrast,
        sample_key=sample_key,
        batch_key=batch_key,
        covariate_keys=covariate_keys,
        min_cells=min_cells,
        called=called,
    )
    return design_of_units(units, contrast, sample_key=sample_key, batch_key=batch_key, covariate_keys=covariate_keys)


def design_of_units(
    units: Units,
    contrast: Contrast,
    *,
    sample_key: str,
    batch_key: str | None,
    covariate_keys: Sequence[str],
) -> tuple[Units, Design]:
    """Build ``~ [sample] + batch + covariates + condition`` from what the replicates can tell apart.

    Text and booleans enter as levels, numbers as they are (standardised); ``batch_key`` is always a factor.

    *Pairs.* Where a sample lies in both groups (``sample_key`` names donors, and donors were measured under both
    conditions), its two replicates are a pair, and the sample itself becomes the first term: each donor is compared
    with itself. This is done when more than half of the samples are pairs; the others then carry no information and
    are left out. When fewer are, all replicates count as independent, which is conservative as far as the two
    replicates of a donor resemble each other, and a note says so. A donor column given as ``batch_key`` pairs in any
    case.

    *Full rank.* Columns enter one by one, and one that those before it determine is left out: a batch that is constant
    in the two groups, a covariate that is constant within batches. This changes neither the fold change nor its error.
    If they determine the condition itself there is nothing to estimate, which is an error.

    *Replicates fitted exactly*, such as the only one of its batch, tell nothing of the contrast; they are left out.

    Returns
    -------
    The replicates used, and the design.

    Warns
    -----
    CellstillWarning
        Samples were left out, here or before; the message names them and says why.

    Raises
    ------
    InvalidArgumentError
        Fewer than two replicates in a group (the message has the table of samples); condition confounded with other
        terms (the message has their cross table); no residual degrees of freedom.
    """
    check_replicates(units, contrast, sample_key)
    terms = [key for key in dict.fromkeys([batch_key, *covariate_keys]) if key is not None]
    notes: list[str] = []
    per_sample = units.table.groupby(sample_key).size()
    n_pairs = int((per_sample == 2).sum())
    if 2 * n_pairs > len(per_sample):
        terms = list(dict.fromkeys([sample_key, *terms]))
    elif n_pairs and sample_key not in terms:
        notes.append(
            f"{n_pairs} of {len(per_sample)} samples lie in both groups; their replicates were treated as independent, "
            "which is conservative. Keep only those samples for a paired comparison."
        )

    matrix, owners = _design_columns(units.table, contrast, terms)
    exact = _fitted_exactly(matrix)
    if exact.any():
        alone = exact & (units.table.groupby(sample_key)[sample_key].transform("size") == 1).to_numpy()
        if sample_key in terms:
            exact = exact[~alone]
            units = units.keep(~alone, "in one group only, while samples in both are compared with themselves")
        units = units.keep(~exact, "fitted exactly by a coefficient of its own")
        check_replicates(units, contrast, sample_key)
        matrix, owners = _design_columns(units.table, contrast, terms)
    if matrix.shape[0] <= matrix.shape[1]:
        raise InvalidArgumentError(
            f"The design ~ {' + '.join([*terms, contrast.column])} needs {matrix.shape[1]} coefficients for "
            f"{matrix.shape[0]} {units.called}: nothing is left to estimate their variation. Use fewer terms or more "
            f"{units.called}."
        )
    used = [term for term in terms if term in owners]
    for term in terms:
        if term not in used:
            constant = units.table[term].nunique() == 1
            why = f"it is constant in these {units.called}" if constant else f"{' + '.join(used)} already determines it"
            notes.append(f"{term!r} is not in the design: {why}.")
    warn_left_out(units)
    return units, Design(
        matrix=matrix,
        formula=f"~ {' + '.join([*used, contrast.column])}",
        notes=tuple(notes),
        strata=units.table.groupby(used).ngroup().to_numpy() if used else None,
        paired=sample_key in used,
        common=matrix[
            :, [_MIN_PER_LEVEL * (owners.count(owner) + 1) <= len(matrix) or owner == "" for owner in owners]
        ],
    )


def _design_columns(table: pd.DataFrame, contrast: Contrast, terms: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Columns of full rank, condition last, and the term that each belongs to."""
    matrix, owners = _independent_columns(table, terms)
    condition = (table[contrast.column] == contrast.group1).to_numpy(dtype=float)
    if _determined(matrix, condition):
        tried = [[term] for term in terms] + [list(terms[:stop]) for stop in range(2, len(terms) + 1)]
        blame = next(some for some in tried if _determined(_independent_columns(table, some)[0], condition))
        raise _confounded(table, contrast, blame)
    return np.column_stack([matrix, condition]), [*owners, contrast.column]


def _independent_columns(table: pd.DataFrame, terms: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    matrix, owners = np.ones((len(table), 1)), [""]
    for term in terms:
        for column in _encode(table[term]):
            if not _determined(matrix, column):
                matrix = np.column_stack([matrix, column])
                owners.append(term)
    return matrix, owners


def _encode(values: pd.Series) -> list[np.ndarray]:
    if pd.api.types.is_float_dtype(values):
        centred = values.to_numpy() - values.mean()
        return [centred / (centred.std() or 1.0)]
    return [(values == level).to_numpy(dtype=float) for level in sorted(values.unique())[1:]]


def _determined(matrix: np.ndarray, column: np.ndarray) -> bool:
    rest = column - matrix @ np.linalg.lstsq(matrix, column, rcond=None)[0]
    return bool(np.linalg.norm(rest) <= _TOLERANCE * np.sqrt(len(column)))


def _fitted_exactly(matrix: np.ndarray) -> np.ndarray:
    """Rows of leverage 1 on which the last coefficient does not depend."""
    q, _ = np.linalg.qr(matrix)
    weight = np.linalg.pinv(matrix)[-1]
    return (np.square(q).sum(axis=1) > 1 - _TOLERANCE) & (np.abs(weight) < _TOLERANCE)


def _confounded(table: pd.DataFrame, contrast: Contrast, blame: Sequence[str]) -> InvalidArgumentError:
    counts = pd.crosstab([table[term] for term in blame], table[contrast.column])
    names = " + ".join(repr(term) for term in blame)
    return InvalidArgumentError(
        f"groupby={contrast.column!r} cannot be told from {names}: they are confounded, and no design separates their "
        f"effects. Number of replicates:\n{counts.to_string()}\n"
        f"Compare groups that share levels of {names}, or leave {names} out of the design (batch_key=None, or "
        "batch_keys=[] of models of vi, or fewer covariate_keys) and accept that what is found may be its effect."
    )
