"""What the entry points share: the groups to compare, the levels to compare them in, and the batches of the design."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd

from cellstill.de.bayesian import BayesianConfig
from cellstill.de.pseudobulk_config import PseudobulkConfig
from cellstill.de.pseudosamples import shares_enough
from cellstill.de.result import Contrast
from cellstill.de.units import comparison_cells, text_column
from cellstill.errors import CellstillWarning, InvalidArgumentError, check_key, check_option, level_outside

REST = "rest"
_MOSTLY = 0.9
_ONE_EACH = "one per sample"
_NOT_SHARED = "not shared by the groups"
_COLUMNS = (
    *("gene", "base_mean", "lfc", "lfc_se", "p_value", "fdr", "is_de", "direction", "lfc_shrunken"),
    *("lfc_borrowed", "prob_de", "fdr_alone", "lfc_mean", "ci_low", "ci_high", "reason"),
)


def choose_groups(
    obs: pd.DataFrame, groupby: str, group1: str, group2: str | None = None
) -> tuple[pd.DataFrame, Contrast]:
    """Find the two groups of a comparison.

    Parameters
    ----------
    obs
        Annotation of the cells.
    groupby, group1, group2
        Column, and the two of its values to compare; without ``group2``, group1 is compared with all other cells.

    Returns
    -------
    ``obs`` with the column as text, and the comparison. Without ``group2``, all other cells are called ``"rest"`` in a
    copy of ``obs``.

    Raises
    ------
    MissingKeyError, InvalidArgumentError
        No such column, no such group, twice the same group, or cells without a group.
    """
    values = text_column(obs, groupby, "groupby")
    if group2 is None:
        check_option("group1", str(group1), sorted(set(values)))
        if str(group1) == REST:
            raise InvalidArgumentError(
                f"group1={group1!r} is also what all other cells are called if there is no group2. Name group2, or "
                "rename the group."
            )
        values, group2 = values.where(values == str(group1), REST), REST
    obs = obs.assign(**{groupby: values})
    comparison_cells(obs, groupby=groupby, group1=group1, group2=group2)
    return obs, Contrast(groupby, str(group1), str(group2))


def choose_cells(
    obs: pd.DataFrame, idx1: np.ndarray | Sequence[int], idx2: np.ndarray | Sequence[int] | None = None
) -> tuple[pd.DataFrame, Contrast]:
    """Make groups ``"idx1"`` and ``"idx2"`` in a column ``"idx"`` from positions or masks of cells.

    Parameters
    ----------
    obs
        Annotation of the cells.
    idx1, idx2
        Cells of the first group, and of the second; without ``idx2``, all others.

    Returns
    -------
    A copy of ``obs`` with the column, and the comparison.

    Raises
    ------
    InvalidArgumentError
        A group has no cell, or they have cells in common.
    IndexError
        A cell does not exist, or a mask is of another length.
    """
    from cellstill.data.selection import cell_positions  # its package imports torch, which nothing else here needs

    first = cell_positions(idx1, len(obs))
    second = np.setdiff1d(np.arange(len(obs)), first) if idx2 is None else cell_positions(idx2, len(obs))
    both = np.intersect1d(first, second)
    if len(both):
        raise InvalidArgumentError(
            f"idx1 and idx2 have {len(both)} cells in common (position {both[0]}, ...). A cell can be in one group."
        )
    groups = np.full(len(obs), "neither", dtype=object)
    groups[first], groups[second] = "idx1", "idx2"
    return choose_groups(obs.assign(idx=groups), "idx", "idx1", "idx2")


def check_within(obs: pd.DataFrame, within: str | None, *, groupby: str, sample_key: str | None) -> None:
    """Raise unless ``within`` is ``None`` or a column of its own."""
    if within is None:
        return
    check_key("within", within, "obs", obs.columns)
    if within in _COLUMNS:
        raise InvalidArgumentError(f"within={within!r} is the name of a column of the results. Rename it in obs.")
    for argument, column in (("groupby", groupby), ("sample_key", sample_key)):
        if within == column:
            raise InvalidArgumentError(
                f"within and {argument} are both {within!r}: inside each of its levels there would be nothing left to "
                "compare. Name the column of the cell types, or of what else the comparison is to be made inside."
            )


def require_samples(sample_key: str | None) -> str:
    """Return the column of the samples, or raise if none was named."""
    if sample_key is None:
        raise InvalidArgumentError(
            "sample_key is missing. Name the column of obs with the samples or donors, which are the replicates: "
            "cells of one sample share what is particular to it, and tested as if they were independent they turn "
            "differences between donors into differences between groups."
        )
    if not isinstance(sample_key, str):
        raise InvalidArgumentError(
            f"sample_key={sample_key!r} has to name one column of obs. Join several into one: "
            "obs['sample'] = obs['donor'].astype(str) + '-' + obs['region'].astype(str)."
        )
    return sample_key


def chosen_how(how: PseudobulkConfig | BayesianConfig | None) -> PseudobulkConfig | BayesianConfig:
    """Return how to compare, by default by pseudobulk; raise for anything that is no configuration."""
    if how is None:
        return PseudobulkConfig()
    if not isinstance(how, PseudobulkConfig | BayesianConfig):
        raise InvalidArgumentError(
            f"how={how!r} is no configuration. Write how=PseudobulkConfig(method='ttest') or how=BayesianConfig(), for "
            "instance, from cellstill.de."
        )
    return how


def codes_of_both(codes: np.ndarray, groups: pd.Series, contrast: Contrast) -> np.ndarray:
    """Codes, such as those of batches, that both groups of a comparison have; all of them if there is none.

    As these a model decodes all cells of a comparison, or corrects them to: how a batch differs from others is known of
    cells like those that were measured in it. Decoded as of a batch that has one of the groups only, the other group is
    an extrapolation, whose errors are not noise between samples but come back as fold changes.

    Parameters
    ----------
    codes
        Integers, shape ``(n_obs,)``; below 0 for cells without one.
    groups
        Group of each cell.
    contrast
        The comparison.
    """
    known, labels = codes >= 0, groups.to_numpy()
    first, second = (np.unique(codes[known & (labels == group)]) for group in contrast[1:])
    shared = first[np.isin(first, second)]
    return shared if len(shared) else np.unique(codes[known])


def batch_terms(
    obs: pd.DataFrame,
    keys: Sequence[str],
    contrast: Contrast,
    *,
    sample_key: str | None,
    within: str | None,
    min_cells: int,
) -> tuple[pd.DataFrame, list[str]]:
    """Choose the batches of a model that the design of a comparison can use.

    Batches that have one sample each, as is common, only tell samples apart; the samples stand for them, and a term of
    the design would leave nothing to compare. Such a column is left out. Inside the levels of ``within`` this is
    decided for each level: where it would only tell samples apart its value becomes ``"one per sample"``, so that the
    design of that level drops it.

    Batches over which samples are spread, such as lanes, are left out in the same way, with a warning: the sums of a
    sample are over its batches. A sample that has nine tenths of its cells in one batch is not spread but mislabelled,
    which the design refuses.

    Without samples, cells are the replicates, and a column is used if, with those before it, the groups share enough of
    its levels (:func:`~cellstill.de.pseudosamples.shares_enough`); inside levels of ``within`` that do not, its value
    becomes ``"not shared by the groups"``, again with a warning.

    Parameters
    ----------
    obs
        Annotation of the cells.
    keys
        Columns with batches.
    contrast
        The comparison; only cells of its groups count.
    sample_key
        Column with the samples; ``None`` where cells are the replicates.
    within
        Column with the levels inside which the comparison is made.
    min_cells
        Samples with fewer cells (in their group and level) do not count.

    Returns
    -------
    ``obs`` with the columns of batches as text, and the names of those to use.

    Warns
    -----
    CellstillWarning
        A column differs within samples, or, without samples, the groups hardly share its levels.

    Raises
    ------
    MissingKeyError, InvalidArgumentError
        A column does not exist, or a cell has no batch.
    """
    keys = [key for key in dict.fromkeys(keys) if key not in (contrast.column, sample_key, within)]
    obs = obs.assign(**{key: text_column(obs, key, "batch_key") for key in keys})
    level = pd.Series("", index=obs.index) if within is None else obs[within].astype(str)
    if sample_key is None:
        return obs, _terms_among_cells(obs, keys, contrast, level, within, min_cells)
    check_key("sample_key", sample_key, "obs", obs.columns)
    group, sample = (obs[key].astype(str) for key in (contrast.column, sample_key))
    frame = pd.DataFrame({"level": level, "group": group, "sample": sample} | {f"key/{key}": obs[key] for key in keys})
    frame = frame[frame["group"].isin(contrast[1:])]
    frame = frame[frame.groupby(["level", "group", "sample"])["level"].transform("size") >= min_cells]
    used = []
    for key in keys:
        samples = frame.groupby(["level", "group", "sample"])[f"key/{key}"]
        largest = samples.agg(lambda values: values.value_counts(normalize=True).iloc[0])
        spread = largest.index[largest < _MOSTLY]
        if len(spread):
            levels = "" if within is None else f" of {within} in {', '.join(map(repr, spread.unique('level')[:5]))}"
            warnings.warn(
                f"{key!r} is no term of the design{levels}: it differs within samples ({spread[0][2]!r} in group "
                f"{spread[0][1]!r}). Samples are compared over all of their {key!r}; where their shares differ between "
                "the groups, give a sample_key whose samples lie in one each.",
                CellstillWarning,
                stacklevel=level_outside(),
            )
        n_samples = frame.groupby(["level", f"key/{key}"])["sample"].nunique()
        spanning = n_samples[n_samples > 1].index.unique("level").difference(spread.unique("level"))
        if len(spanning):
            used.append(key)
            obs[key] = np.where(level.isin(spanning), obs[key], _ONE_EACH)
    return obs, used


def _terms_among_cells(
    obs: pd.DataFrame, keys: Sequence[str], contrast: Contrast, level: pd.Series, within: str | None, min_cells: int
) -> list[str]:
    """Batches for a design of cells; overwrites those of levels that cannot use them."""
    group = obs[contrast.column].astype(str).to_numpy()
    in_groups = np.isin(group, contrast[1:])
    used: set[str] = set()
    unused: dict[str, list[str]] = {}
    for name in sorted(set(level)):
        rows = np.flatnonzero(in_groups & (level == name).to_numpy())
        stratum = np.full(len(rows), "", dtype=object)
        comparable = shares_enough(group[rows], stratum, min_cells)
        for key in keys:
            finer = stratum + "\0" + obs[key].to_numpy(dtype=object)[rows]
            if shares_enough(group[rows], finer, min_cells):
                stratum = finer
                used.add(key)
            else:
                obs[key] = obs[key].mask(np.isin(np.arange(len(obs)), rows), _NOT_SHARED)
                if comparable:
                    unused.setdefault(key, []).append(name)
    for key, names in unused.items():
        levels = "" if within is None else f" of {within} in {', '.join(map(repr, names[:5]))}"
        warnings.warn(
            f"{key!r} is no term of the design{levels}: {contrast.group1!r} and {contrast.group2!r} share too few of "
            "its levels to be compared inside them. What differs between these levels passes for an effect of the "
            "group.",
            CellstillWarning,
            stacklevel=level_outside(),
        )
    return [key for key in keys if key in used]
