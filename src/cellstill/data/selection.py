"""Cells by position or mask, genes by name."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from cellstill.errors import InvalidArgumentError, UnknownCellError, check_option


def cell_positions(indices: np.ndarray | Sequence[int] | slice, n_obs: int) -> np.ndarray:
    """Turn positions, a slice, or a mask of all cells into positions, in the order given.

    Raises
    ------
    InvalidArgumentError
        No cell is selected, or ``indices`` are no list of integers or truth values, such as names or a number.
    UnknownCellError
        A cell does not exist, or a mask is of another length. It is an ``IndexError``, too.
    """
    if not isinstance(indices, slice):
        chosen = np.asarray(indices)
        if chosen.dtype == object:
            # A mask that once held missing values; taken as positions it would be cells 0 and 1.
            chosen = np.array(chosen.tolist())
        whole = chosen.dtype.kind in "biu" or (
            chosen.dtype.kind == "f" and (np.isfinite(chosen) & (chosen == np.floor(chosen))).all()
        )
        if chosen.size and not whole:
            raise InvalidArgumentError(
                f"indices holds {chosen.dtype.name} values, such as {chosen.flat[0]!r}. Give positions (integers), a "
                "slice, or a mask of all cells; names become positions with adata.obs_names.get_indexer(names)."
            )
        if chosen.ndim != 1:
            raise InvalidArgumentError(
                f"indices={indices!r} has {chosen.ndim} dimensions, not 1. Give a list of positions, such as [0, 3], a "
                "slice, or a mask of all cells."
            )
        indices = chosen if chosen.dtype == bool else chosen.astype(np.intp)
    # Masks and slices become positions; NumPy refuses a mask of another length.
    try:
        positions = np.arange(n_obs)[indices]
    except IndexError as error:
        raise UnknownCellError(
            f"indices does not fit the {n_obs} cells there are ({error}). Give positions from 0 to {n_obs - 1}, a "
            "slice, or a mask of all cells."
        ) from error
    if positions.size == 0:
        raise InvalidArgumentError("indices selects no cell. Give positions, a slice, or a mask of all cells.")
    return positions


def gene_positions(genes: Sequence[str], wanted: Sequence[str] | str | None, argument: str) -> np.ndarray | slice:
    """Positions of genes by name; ``None`` means all of them.

    Raises
    ------
    InvalidArgumentError
        A gene does not exist.
    """
    if wanted is None:
        return slice(None)
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    positions = pd.Index(genes).get_indexer(pd.Index(wanted))
    if (positions < 0).any():
        unknown = [gene for gene, position in zip(wanted, positions, strict=True) if position < 0]
        check_option(argument, unknown[0], [*genes[:5], "..."])
    return positions
