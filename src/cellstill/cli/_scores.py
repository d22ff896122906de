"""Batch mixing and label conservation, before and after."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellstill.errors import CellstillWarning, level_outside

if TYPE_CHECKING:
    from rich.table import Table

MAX_SCORED = 20_000
"""More cells than this are sampled for metrics."""

_NAMES = {
    "ilisi": "batch mixing: iLISI",
    "ilisi_of_ceiling": "  as share of its ceiling",
    "clisi": "label purity: cLISI",
    "cross_batch_knn_accuracy": "label kNN across batches",
    "knn_accuracy": "label kNN",
    "nmi": "label NMI of clusters",
}


@dataclass(frozen=True)
class Scores:
    """Metrics of several embeddings of the same cells.

    Attributes
    ----------
    table
        One row per embedding: the columns of :func:`~cellstill.metrics.integration_table`, and ``ilisi_of_ceiling``.
    covariates
        One row per embedding, one column per covariate: accuracy of its level among the 15 nearest neighbours.
    n_cells
        Number of cells scored.
    """

    table: pd.DataFrame
    covariates: pd.DataFrame
    n_cells: int

    def to_dict(self) -> dict[str, Any]:
        """Return a form that JSON can hold."""
        return {
            "n_cells_scored": self.n_cells,
            "embeddings": self.table.to_dict(orient="index"),
            "covariate_knn_accuracy": self.covariates.to_dict(orient="index"),
        }

    def to_table(self) -> Table:
        """Lay out for a terminal: one column per embedding."""
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("")
        for name in self.table.index:
            table.add_column(str(name), justify="right")
        for column, name in _NAMES.items():
            if column in self.table:
                form = "{:.1%}" if column == "ilisi_of_ceiling" else "{:.3f}"
                table.add_row(name, *map(form.format, self.table[column]))
        for key in self.covariates:
            table.add_row(f"{key} kNN", *map("{:.3f}".format, self.covariates[key]))
        return table


def sample_cells(n_obs: int, most: int, seed: int) -> np.ndarray:
    """Positions of at most ``most`` cells, in order: all of them, or a random sample."""
    if n_obs <= most:
        return np.arange(n_obs)
    return np.sort(np.random.default_rng(seed).choice(n_obs, most, replace=False))


def scorable_labels(obs: pd.DataFrame, batch_key: str, label_key: str | None) -> str | None:
    """Return ``label_key`` unless its labels cannot be scored, which is warned about."""
    if label_key is None:
        return None
    batches = obs[batch_key].astype(str)
    labels = obs[label_key].astype(str)
    reason = ""
    if labels.nunique() < 2:
        reason = f"holds only {labels.iloc[0]!r}"
    elif batches.groupby(labels).nunique().max() < 2:
        reason = "has no label that occurs in two batches"
    if reason:
        warnings.warn(
            f"labels_key={label_key!r} {reason}, so that the conservation of labels is not scored.",
            CellstillWarning,
            stacklevel=level_outside(),
        )
        return None
    return label_key


def score(
    embeddings: Mapping[str, np.ndarray],
    obs: pd.DataFrame,
    *,
    batch_key: str,
    label_key: str | None,
    covariate_keys: Sequence[str],
    seed: int,
) -> Scores:
    """Score embeddings of the cells of ``obs``.

    Parameters
    ----------
    embeddings
        Coordinates by name, shape ``(n_obs, n_dims)``.
    obs
        Annotation of these cells.
    batch_key, label_key
        Columns with batch and, unless ``None``, label.
    covariate_keys
        Columns with nominal covariates.
    seed
        Seed of what is random in the metrics.
    """
    from cellstill.metrics import integration_table, knn_accuracy

    labels = None if label_key is None else obs[label_key].astype(str).to_numpy()
    table = integration_table(embeddings, obs[batch_key].astype(str).to_numpy(), labels, seed=seed)
    table.insert(2, "ilisi_of_ceiling", table["ilisi"] / table["ilisi_ceiling"])
    covariates = pd.DataFrame(
        {
            key: {name: knn_accuracy(array, obs[key].astype(str).to_numpy()) for name, array in embeddings.items()}
            for key in covariate_keys
        },
        index=table.index,
    )
    return Scores(table, covariates, len(obs))
