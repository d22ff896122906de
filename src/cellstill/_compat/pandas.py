"""What pandas' columns leave open: the categories of a column of any type, in order."""

from __future__ import annotations

import numpy as np
import pandas as pd


def categories_in_order(values: pd.Series) -> np.ndarray:
    """The values that occur, in the order of the categories or sorted: as values, or as text if types are mixed."""
    present = values.unique()
    if isinstance(values.dtype, pd.CategoricalDtype):
        known = values.cat.categories
        return known[known.isin(present)].to_numpy()
    try:
        return np.sort(np.asarray(present))
    except TypeError:
        return np.array(sorted(present, key=str), dtype=object)
