"""Biology that must survive: covariates as a design, and whether they can be told apart from the batch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from cellstill.errors import CellstillWarning, InvalidArgumentError, MissingKeyError, check_key, level_outside

_MAX_LEVELS = 50


@dataclass(frozen=True)
class CovariateDesign:
    """How covariates become numbers: nominal levels one-hot, never ordinal; floats standardised.

    Attributes
    ----------
    levels
        Levels of each nominal covariate (category, string, boolean or integer), as strings, sorted.
    scales
        Mean and standard deviation of each continuous covariate (floating point).
    """

    levels: Mapping[str, tuple[str, ...]]
    scales: Mapping[str, tuple[float, float]]

    @classmethod
    def fit(cls, obs: pd.DataFrame, keys: Sequence[str]) -> CovariateDesign:
        """Learn levels and scales.

        Raises
        ------
        MissingKeyError
            A key is not in ``obs``.
        InvalidArgumentError
            A covariate has missing values, a single level, or more than 50 levels.
        """
        levels, scales = {}, {}
        for key in keys:
            values = obs_column(obs, key, "covariate_keys")
            if pd.api.types.is_float_dtype(values):
                mean, sd = float(values.mean()), float(values.std(ddof=0))
                if not np.isfinite([mean, sd]).all() or sd == 0:
                    raise InvalidArgumentError(f"covariate_keys: obs[{key!r}] is constant or not finite. Leave it out.")
                scales[key] = (mean, sd)
                continue
            found = tuple(sorted(values.astype(str).unique()))
            if len(found) < 2:
                raise InvalidArgumentError(
                    f"covariate_keys: obs[{key!r}] has only the level {found[0]!r}: there is nothing to protect. "
                    "Leave it out."
                )
            if len(found) > _MAX_LEVELS:
                raise InvalidArgumentError(
                    f"covariate_keys: obs[{key!r}] has {len(found)} levels. If it is a quantity, convert it to float; "
                    "if it names samples or cells, leave it out."
                )
            levels[key] = found
        return cls(levels, scales)

    @property
    def keys(self) -> list[str]:
        """The covariates' names."""
        return [*self.levels, *self.scales]

    @property
    def n_columns(self) -> int:
        """Number of columns of the encoded design."""
        return sum(map(len, self.levels.values())) + len(self.scales)

    def encode(self, obs: pd.DataFrame) -> np.ndarray:
        """Encode cells, float32, shape ``(n_obs, n_columns)``: one column per level, then the continuous ones.

        Raises
        ------
        InvalidArgumentError
            A level was not there when the design was fitted, or a value is missing.
        """
        ones, continuous = self.codes(obs)
        encoded = np.zeros((len(obs), self.n_columns), dtype=np.float32)
        np.put_along_axis(encoded, ones, 1.0, axis=1)
        encoded[:, self.n_columns - len(self.scales) :] = continuous
        return encoded

    def codes(self, obs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """What :meth:`encode` encodes, for those who gather by level instead of multiplying zeros and ones.

        Returns
        -------
        The columns of the encoded design that are 1, int64, shape ``(n_obs, len(levels))``; and its continuous columns,
        float32, shape ``(n_obs, len(scales))``.

        Raises
        ------
        InvalidArgumentError
            As in :meth:`encode`.
        """
        ones = np.empty((len(obs), len(self.levels)), dtype=np.int64)
        start = 0
        for i, (key, known) in enumerate(self.levels.items()):
            names = obs_column(obs, key, "covariate_keys").astype(str).to_numpy()
            codes = pd.Index(known).get_indexer(pd.Index(names))
            if (codes < 0).any():
                unknown = sorted(set(names[codes < 0]))
                raise InvalidArgumentError(
                    f"obs[{key!r}] has levels that the model does not know: {unknown}. It knows: {list(known)}."
                )
            ones[:, i] = start + codes
            start += len(known)
        continuous = np.empty((len(obs), len(self.scales)), dtype=np.float32)
        for i, (key, (mean, sd)) in enumerate(self.scales.items()):
            continuous[:, i] = (obs_column(obs, key, "covariate_keys").to_numpy(dtype=np.float64) - mean) / sd
        return ones, continuous

    def knows(self, obs: pd.DataFrame) -> bool:
        """Say whether cells can be encoded: no covariate is missing, and every level is known."""
        try:
            self.encode(obs)
        except (InvalidArgumentError, MissingKeyError):
            return False
        return True

    def to_dict(self) -> dict[str, Any]:
        """Return a form that JSON can hold."""
        return {
            "levels": {k: list(v) for k, v in self.levels.items()},
            "scales": {k: list(v) for k, v in self.scales.items()},
        }

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> CovariateDesign:
        """Build from :meth:`to_dict`."""
        return cls(
            {key: tuple(values) for key, values in config["levels"].items()},
            {key: (float(mean), float(sd)) for key, (mean, sd) in config["scales"].items()},
        )


def obs_column(obs: pd.DataFrame, key: str, argument: str) -> pd.Series:
    """Return a column of ``obs`` that has no missing value.

    Raises
    ------
    MissingKeyError
        There is no such column.
    InvalidArgumentError
        Some values are missing, or they are dates.
    """
    check_key(argument, key, "adata.obs", obs.columns)
    values = obs[key]
    dtype = values.cat.categories.dtype if isinstance(values.dtype, pd.CategoricalDtype) else values.dtype
    if dtype.kind in "mM":
        raise InvalidArgumentError(
            f"{argument}: adata.obs[{key!r}] holds {dtype}. Write dates as text, adata.obs[{key!r}] = "
            f"adata.obs[{key!r}].astype(str), or as numbers, such as days since the first."
        )
    missing = values.isna()
    if missing.any():
        shown = ", ".join(repr(str(name)) for name in obs.index[missing][:3])
        raise InvalidArgumentError(
            f"{argument}: adata.obs[{key!r}] is missing for {int(missing.sum())} of {len(values)} cells ({shown}"
            f"{', ...' if missing.sum() > 3 else ''}). Label those cells or remove them: "
            f"adata[adata.obs[{key!r}].notna()].copy()."
        )
    return values


def warn_if_confounded(batch: pd.Series, obs: pd.DataFrame, design: CovariateDesign) -> list[str]:
    """Warn, with the table, about nominal covariates that cannot be told apart from the batch.

    Their levels, given the batch, are not all free to vary: the rank of ``[batch, covariate]`` is below full.

    Returns
    -------
    Names of the confounded covariates.
    """
    confounded = []
    for key in design.levels:
        table = pd.crosstab(batch.astype(str), obs[key].astype(str), rownames=[batch.name], colnames=[key])
        if _n_components(table.to_numpy() > 0) > 1:
            confounded.append(key)
            warnings.warn(
                f"Batch ({batch.name!r}) and covariate {key!r} cannot be told apart: no chain of batches that share "
                f"levels joins them all. What differs between the unjoined parts may be either, so it cannot be "
                f"protected with confidence. Cells per combination:\n{table.to_string()}",
                CellstillWarning,
                stacklevel=level_outside(),
            )
    return confounded


def _n_components(shared: np.ndarray) -> int:
    # Batches and levels are the two sides of a graph with an edge where cells exist. The additive design has full
    # rank exactly when that graph is connected.
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    n_batches, n_levels = shared.shape
    rows, columns = np.nonzero(shared)
    graph = csr_matrix((np.ones(len(rows)), (rows, columns + n_batches)), shape=(n_batches + n_levels,) * 2)
    return int(connected_components(graph, directed=False)[0])
