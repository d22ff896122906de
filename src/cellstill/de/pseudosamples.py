"""Cells as replicates, where nothing is known of donors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd

from cellstill.de.result import Contrast
from cellstill.de.units import comparison_cells, text_column
from cellstill.errors import CellstillWarning, level_outside

_N_PER_GROUP = 10


def pseudo_sample_size(n_cells: int, min_cells: int) -> int:
    """Cells of a pseudo-sample of a group of ``n_cells``."""
    return max(min_cells, -(-n_cells // _N_PER_GROUP))


def shares_enough(group: np.ndarray, stratum: np.ndarray, min_cells: int) -> bool:
    """Whether two groups of cells can be compared inside the levels of a column.

    In the levels that have ``min_cells`` cells of each group, each group needs half of its cells or more, and two
    pseudo-samples.

    Parameters
    ----------
    group, stratum
        Group and level of each cell.
    min_cells
        Fewest cells of a pseudo-sample.
    """
    counts = pd.crosstab(stratum, group).to_numpy()
    totals = counts.sum(axis=0)
    shared = counts[(counts >= min_cells).all(axis=1)]
    sizes = np.array([pseudo_sample_size(int(total), min_cells) for total in totals])
    n_parts = np.maximum(shared // sizes, 1).sum(axis=0)
    return len(totals) == 2 and bool(((2 * shared.sum(axis=0) >= totals) & (n_parts >= 2)).all())


def deal_cells(
    obs: pd.DataFrame, contrast: Contrast, *, within: Sequence[str], min_cells: int, seed: int
) -> tuple[pd.DataFrame, str, str]:
    r"""Deal the cells of each group at random into pseudo-samples, about ten per group.

    The means of :math:`K` random parts of :math:`n` independent cells with variance :math:`\sigma^2` vary by
    :math:`\sigma^2 K / n`, so that the variance of their mean, :math:`\sigma^2 / n`, is that of the mean of all cells:
    what is computed from pseudo-samples is the inference with cells as the unit, with the degrees of freedom of
    :math:`K` parts. What the cells of a donor share is not in it.

    Parameters
    ----------
    obs
        Annotation of the cells.
    contrast
        Column and groups.
    within
        Columns of the design: a pseudo-sample has one value of each.
    min_cells
        Fewest cells of a pseudo-sample, where a group has that many in each combination of ``within``; groups of fewer
        than ten times that number get fewer pseudo-samples.
    seed
        Seed of the deal.

    Returns
    -------
    obs
        A copy, with the pseudo-samples.
    sample_key
        Their column.
    note
        What was done, for the result.
    """
    column, *groups = contrast
    cells = comparison_cells(obs, groupby=column, group1=contrast.group1, group2=contrast.group2)
    group = text_column(obs.iloc[cells], column, "groupby")
    levels = [group, *(text_column(obs.iloc[cells], key, "batch_key or covariate_keys") for key in within)]
    stratum = pd.Series(range(len(cells))).groupby([level.to_numpy() for level in levels]).ngroup().to_numpy()
    n_cells = group.value_counts()
    size = {name: pseudo_sample_size(int(n_cells[name]), min_cells) for name in groups}

    rng = np.random.default_rng(seed)
    names = np.full(len(obs), "", dtype=object)
    for code in range(stratum.max() + 1):
        members = rng.permutation(np.flatnonzero(stratum == code))
        name = group.iloc[members[0]]
        n_parts = max(1, len(members) // size[name])
        for part, rows in enumerate(np.array_split(members, n_parts)):
            names[cells[rows]] = f"{name} {code}.{part}"
    sample_key = "pseudo_sample"
    while sample_key in obs.columns:
        sample_key += "_"
    note = (
        "Cells, not donors, are the replicates (sample_key=None): intervals, probabilities and FDR speak of these "
        f"cells, dealt at random into {len(set(names[cells]))} pseudo-samples, and not of other donors. What the cells "
        "of a donor share passes for an effect of the group."
    )
    warnings.warn(
        "sample_key=None takes cells as the replicates. Cells of one donor are not replicates of the group: "
        "differences between donors will be called differences between groups. Name the column of the donors if there "
        "is one.",
        CellstillWarning,
        stacklevel=level_outside(),
    )
    return obs.assign(**{sample_key: names}), sample_key, note
