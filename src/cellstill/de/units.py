"""From cells to replicates: a replicate is one sample in one of the two groups."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from cellstill.de.result import Contrast
from cellstill.errors import CellstillWarning, InvalidArgumentError, check_key, check_option, level_outside

RESERVED = ("n_cells", "total_counts", "size_factor", "reason")
"""Columns that are added to tables of samples."""

_N_NAMED = 5
_N_SHOWN = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Units:
    """The replicates of one comparison.

    Attributes
    ----------
    codes
        Replicate of each cell, shape ``(n_obs,)``; -1 for cells that are not used.
    table
        One row per replicate: ``sample_key``, ``groupby`` and the other columns of the design.
    n_cells
        Cells of each replicate.
    left_out
        Samples that were not used: ``sample_key``, ``groupby``, ``n_cells``, ``reason``.
    called
        What messages call them.
    """

    codes: np.ndarray
    table: pd.DataFrame
    n_cells: np.ndarray
    left_out: pd.DataFrame
    called: str = "samples"

    def keep(self, used: np.ndarray, reason: str) -> Units:
        """Leave out the replicates that are not ``used`` (a mask), and write down why.

        Whoever calls this has :func:`warn_left_out` called when all is done, as
        :func:`~cellstill.de.design.design_of_units` does.
        """
        if used.all():
            return self
        gone = self.table.iloc[~used, :2].assign(n_cells=self.n_cells[~used], reason=reason)
        renumbered = np.append(np.where(used, np.cumsum(used) - 1, -1), -1)
        return replace(
            self,
            codes=renumbered[self.codes],
            table=self.table[used].reset_index(drop=True),
            n_cells=self.n_cells[used],
            left_out=pd.concat([self.left_out, gone], ignore_index=True) if len(self.left_out) else gone,
        )


def comparison_cells(obs: pd.DataFrame, *, groupby: str, group1: str, group2: str) -> np.ndarray:
    """Positions of the cells of the two groups, ascending.

    Raises
    ------
    MissingKeyError, InvalidArgumentError
        No such column, no such group, twice the same group, or cells without a group.
    """
    levels = text_column(obs, groupby, "groupby")
    known = levels.unique().tolist()
    check_option("group1", str(group1), known)
    check_option("group2", str(group2), known)
    if str(group1) == str(group2):
        raise InvalidArgumentError(f"group1 and group2 are both {group1!r}: name two groups of obs[{groupby!r}].")
    return np.flatnonzero(levels.isin([str(group1), str(group2)]))


def make_units(
    obs: pd.DataFrame,
    contrast: Contrast,
    *,
    sample_key: str,
    batch_key: str | None,
    covariate_keys: Sequence[str],
    min_cells: int,
    called: str = "samples",
) -> Units:
    """Group the cells of the two groups into replicates, one per sample and group; messages call samples ``called``.

    Raises
    ------
    MissingKeyError, InvalidArgumentError
        A column is absent or has missing values, or a batch or covariate is not one value per replicate.
    """
    column, group1, group2 = contrast
    cells = comparison_cells(obs, groupby=column, group1=group1, group2=group2)
    if sample_key == column:
        raise InvalidArgumentError(
            f"sample_key and groupby are both {column!r}: each group would be a single sample. "
            "Name the column of the donors or samples, which are the replicates."
        )
    named = [("sample_key", sample_key), ("groupby", column), ("batch_key", batch_key)]
    for argument, key in [*named, *(("covariate_keys", key) for key in covariate_keys)]:
        if key == column and argument != "groupby":
            raise InvalidArgumentError(
                f"{argument}={key!r} is the groupby column, whose groups are compared. Leave it out."
            )
        if key in RESERVED:
            raise InvalidArgumentError(
                f"{argument}={key!r}: the table of samples has columns {', '.join(RESERVED)} of its own. "
                f"Rename obs[{key!r}]."
            )
    used = obs.iloc[cells]
    columns = {sample_key: text_column(used, sample_key, "sample_key"), column: text_column(used, column, "groupby")}
    if batch_key is not None:
        columns.setdefault(batch_key, text_column(used, batch_key, "batch_key"))
    for key in covariate_keys:
        columns.setdefault(key, _covariate(used, key))
    frame = pd.DataFrame(columns)

    by_unit = frame.groupby([sample_key, column], sort=True)
    unit = by_unit.ngroup().to_numpy()
    table = frame.iloc[np.unique(unit, return_index=True)[1]].reset_index(drop=True)
    for key in table.columns[2:]:
        varies = by_unit[key].nunique().to_numpy() > 1
        if varies.any():
            where = table.iloc[np.flatnonzero(varies)[0]]
            values = frame[key][unit == np.flatnonzero(varies)[0]].unique()[:3].tolist()
            raise InvalidArgumentError(
                f"obs[{key!r}] is not one value per replicate: sample {where[sample_key]!r} in group "
                f"{where[column]!r} has {values}. Choose a sample_key whose samples lie in one {key!r} each, "
                f"or leave {key!r} out of the design."
            )
    codes = np.full(len(obs), -1)
    codes[cells] = unit
    n_cells = np.bincount(unit, minlength=len(table))
    nothing = pd.DataFrame(columns=[sample_key, column, "n_cells", "reason"])
    units = Units(codes=codes, table=table, n_cells=n_cells, left_out=nothing, called=called)
    return units.keep(n_cells >= min_cells, f"fewer than {min_cells} cells")


def check_replicates(units: Units, contrast: Contrast, sample_key: str) -> None:
    """Raise unless both groups have two replicates or more: without them there is no variation to compare with."""
    counts = {group: int((units.table[contrast.column] == group).sum()) for group in contrast[1:]}
    if min(counts.values()) >= 2:
        return
    found = " and ".join(f"{group!r} has {count}" for group, count in counts.items())
    raise InvalidArgumentError(
        f"{units.called.capitalize()} are the replicates, and each group needs at least 2 of them: of "
        f"obs[{sample_key!r}], {found}. Check sample_key; if small {units.called} were left out, lower "
        "min_cells_per_sample or min_counts_per_sample.\n" + _sample_table(units, contrast)
    )


def warn_left_out(units: Units) -> None:
    """Warn of the samples that were left out, once, by name and reason."""
    if not len(units.left_out):
        return
    lines = []
    for reason, rows in units.left_out.groupby("reason", sort=False):
        names = [f"{row[0]!r} in {row[1]!r} ({row[2]} cells)" for row in rows.to_numpy()[:_N_NAMED]]
        more = f" and {len(rows) - _N_NAMED} more" if len(rows) > _N_NAMED else ""
        lines.append(f"{', '.join(names)}{more}: {reason}.")
    n_gone, n_used = len(units.left_out), len(units.table)
    found = f"{n_gone} of {n_gone + n_used} {units.called} left out: {' '.join(lines)}"
    warnings.warn(found, CellstillWarning, stacklevel=level_outside())


def _sample_table(units: Units, contrast: Contrast) -> str:
    """All samples, used or not, a few of each group."""
    used = units.table.iloc[:, :2].assign(n_cells=units.n_cells, reason="")
    samples = pd.concat([used, units.left_out.astype(used.dtypes)]).rename(columns={"reason": "left out because"})
    shown = samples.groupby(contrast.column, sort=False).head(_N_SHOWN).sort_values(contrast.column, kind="stable")
    more = f"\n... and {len(samples) - len(shown)} more" if len(shown) < len(samples) else ""
    return shown.to_string(index=False) + more


def _covariate(obs: pd.DataFrame, key: str) -> pd.Series:
    values = complete_column(obs, key, "covariate_keys")
    numeric = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
    return values.astype(float) if numeric else values.astype(str)


def complete_column(obs: pd.DataFrame, key: str, argument: str) -> pd.Series:
    """Return a column of ``obs``, or raise if it is absent or has missing values."""
    check_key(argument, key, "obs", obs.columns)
    values = obs[key]
    missing = values.isna().to_numpy()
    if missing.any():
        first = ", ".join(repr(str(name)) for name in obs.index[missing][:3])
        raise InvalidArgumentError(
            f"{argument}={key!r}: obs[{key!r}] has missing values in {missing.sum()} of {len(obs)} cells "
            f"(first: {first}). Fill them in, or remove those cells."
        )
    return values


def text_column(obs: pd.DataFrame, key: str, argument: str) -> pd.Series:
    """Return a column of ``obs`` as text, or raise if it is absent or has missing values."""
    return complete_column(obs, key, argument).astype(str)


def column_names(argument: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return names of columns as a tuple, or raise if a single string was given, which would be taken apart."""
    if isinstance(names, str):
        raise InvalidArgumentError(f"{argument}={names!r} is a string. Write [{names!r}] for a single column.")
    return tuple(names)


def check_lengths(argument: str, values: Sequence[object] | np.ndarray, other: str, n_other: int) -> None:
    """Raise unless ``values`` has one entry per row or column of the matrix."""
    if len(values) != n_other:
        raise InvalidArgumentError(f"{argument} has {len(values)} entries, but there are {n_other} {other}.")
