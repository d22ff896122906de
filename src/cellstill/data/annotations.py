"""Columns of ``obs``, of an AnnData or of a MuData and its modalities."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cellstill._compat.pandas import categories_in_order
from cellstill.data.covariates import obs_column
from cellstill.errors import InvalidArgumentError, check_key

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

_log = logging.getLogger("cellstill")

_TWIN = "_copied_"
"""Before the name of a column that was copied to ``mdata.obs``: the copy as it was made."""


def is_mudata(data: AnnData | MuData) -> bool:
    """Say whether data have modalities."""
    return hasattr(data, "mod")


def modality_rows(mdata: MuData, name: str) -> np.ndarray:
    """Row of each cell in a modality, int64, shape ``(n_obs,)``; -1 where it lacks the modality.

    Raises
    ------
    MissingKeyError
        There is no such modality.
    InvalidArgumentError
        The MuData joins genes instead of cells, or a modality was changed without ``mdata.update()``.
    """
    check_key("modality", name, "mdata.mod", mdata.mod.keys())
    if mdata.axis != 0:
        raise InvalidArgumentError(f"mdata has axis={mdata.axis}: its modalities have to share cells (axis=0).")
    rows = np.asarray(mdata.obsmap[name]).ravel().astype(np.int64) - 1
    has = rows >= 0
    names = mdata[name].obs_names
    if has.sum() != len(names) or (names[rows[has]] != mdata.obs_names[has]).any():
        raise InvalidArgumentError(
            f"The cells of mdata[{name!r}] are not those that mdata knows. Call mdata.update() after changing a "
            "modality."
        )
    return rows


def gather_obs(data: AnnData | MuData, arguments: Mapping[str, str]) -> pd.DataFrame:
    """Collect columns of all cells.

    A column of a MuData is looked for in ``mdata.obs``, and then in ``obs`` of its modalities, which may each know some
    of the cells. ``"modality:column"`` names the column of one modality. What :func:`complete_obs` copied to
    ``mdata.obs`` is read from the modalities again, as long as nobody has changed the copy.

    Parameters
    ----------
    data
        Annotated data.
    arguments
        Columns wanted, each with the name of the argument that names it, for messages.

    Returns
    -------
    Shape ``(n_obs, len(arguments))``, without missing values.

    Raises
    ------
    MissingKeyError
        A column exists nowhere; the message lists those that exist.
    InvalidArgumentError
        A value is missing, or modalities contradict each other.
    """
    if not is_mudata(data):
        columns = {column: obs_column(data.obs, column, argument) for column, argument in arguments.items()}
        return pd.DataFrame(columns, index=data.obs_names)
    columns = {column: _mudata_column(data, column, argument) for column, argument in arguments.items()}
    return pd.DataFrame({name: values.array for name, values in columns.items()}, index=data.obs_names)


def complete_obs(data: AnnData | MuData, arguments: Mapping[str, str]) -> pd.DataFrame:
    """Collect columns like :func:`gather_obs`, and put those that only modalities have into ``mdata.obs``.

    There scvi-tools' registry finds them. The log names them. Each has a twin, by which it is later known for a copy:
    it follows the modalities until it is changed itself.
    """
    obs = gather_obs(data, arguments)
    added = [column for column in arguments if column not in data.obs or not _equal(data.obs[column], obs[column])]
    for column in added:
        data.obs[column] = data.obs[_TWIN + column] = obs[column].array
    if added:
        _log.info("Copied to mdata.obs from its modalities: %s.", ", ".join(map(repr, added)))
    return obs


def category_names(values: pd.Series) -> tuple[str, ...]:
    """Names of the categories that occur, in the order of the categories or sorted: as values, or as text if mixed."""
    return tuple(map(str, categories_in_order(values)))


def _mudata_column(mdata: MuData, column: str, argument: str) -> pd.Series:
    own = column in mdata.obs and not (_is_copy(mdata, column) and _sources(mdata, column))
    values = mdata.obs[column] if own else _from_modalities(mdata, column, argument)
    missing = values.isna().to_numpy()
    if missing.any():
        shown = ", ".join(repr(str(name)) for name in mdata.obs_names[missing][:3])
        raise InvalidArgumentError(
            f"{argument}: {column!r} is missing for {int(missing.sum())} of {len(values)} cells ({shown}"
            f"{', ...' if missing.sum() > 3 else ''}). Give every cell a value: mdata.obs[{column!r}] = ..."
        )
    return values


def _equal(one: pd.Series, other: pd.Series) -> bool:
    # Files and slices change types, not values.
    return one.equals(other) or list(one.astype(str)) == list(other.astype(str))


def _is_copy(mdata: MuData, column: str) -> bool:
    """Whether a column of ``mdata.obs`` is what :func:`complete_obs` put there."""
    return _TWIN + column in mdata.obs and _equal(mdata.obs[column], mdata.obs[_TWIN + column])


def _sources(mdata: MuData, column: str) -> dict[str, pd.Series]:
    """Columns of modalities that a name stands for."""
    prefix, _, rest = column.partition(":")
    if rest and prefix in mdata.mod and rest in mdata[prefix].obs:
        return {prefix: mdata[prefix].obs[rest]}
    return {name: mod.obs[column] for name, mod in mdata.mod.items() if column in mod.obs}


def _from_modalities(mdata: MuData, column: str, argument: str) -> pd.Series:
    sources = _sources(mdata, column)
    if not sources:
        inside = [f"{name}:{key}" for name, mod in mdata.mod.items() for key in mod.obs.columns]
        check_key(argument, column, "mdata.obs (and its modalities)", dict.fromkeys([*mdata.obs.columns, *inside]))
    rows = {name: modality_rows(mdata, name) for name in sources}
    if len(sources) == 1:
        name, values = next(iter(sources.items()))
        return values.reindex(mdata.obs_names) if (rows[name] < 0).any() else values.iloc[rows[name]]
    merged = np.full(mdata.n_obs, np.nan, dtype=object)
    known = np.zeros(mdata.n_obs, dtype=bool)
    for name, values in sources.items():
        cells = np.flatnonzero(rows[name] >= 0)
        here = values.to_numpy(dtype=object)[rows[name][cells]]
        told = ~pd.isna(here)
        cells, here = cells[told], here[told]
        other = known[cells] & (merged[cells] != here)
        if other.any():
            cell = cells[other][0]
            raise InvalidArgumentError(
                f"{argument}: modalities give cell {str(mdata.obs_names[cell])!r} different values of {column!r} "
                f"({merged[cell]!r} and {here[other][0]!r}). Set mdata.obs[{column!r}], or name one modality's: "
                f"{name + ':' + column!r}."
            )
        merged[cells], known[cells] = here, True
    return pd.Series(merged, index=mdata.obs_names).infer_objects()
