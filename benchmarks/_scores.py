"""One yardstick for all methods: cellstill.metrics, and what is left of the condition."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pandas as pd

from cellstill.data.pca import PCAMethod, fit_pca
from cellstill.metrics import integration_table, knn_accuracy, nearest_neighbours

_FEWEST_CELLS = 50


def score(
    embedding: np.ndarray, obs: pd.DataFrame, batch_key: str, labels_key: str, condition_key: str | None
) -> dict[str, Any]:
    """Score one embedding: mixing, purity, accuracy across batches, clusters and, if there is one, the condition."""
    table = integration_table({"": embedding}, obs[batch_key], obs[labels_key])
    scores: dict[str, Any] = {str(name): float(value) for name, value in table.iloc[0].items()}
    scores["ilisi_of_ceiling"] = scores["ilisi"] / scores["ilisi_ceiling"]
    if condition_key is not None:
        scores["condition_knn"] = knn_accuracy(embedding, obs[condition_key])
        scores["condition_knn_in_types"] = accuracy_within(embedding, obs[condition_key], obs[labels_key])
    return scores


def neighbourhood_scores(embedding: np.ndarray, batch: pd.Series, labels: pd.Series) -> dict[str, float]:
    """Graph connectivity and kBET of scib-metrics; a cell is its own first neighbour there.

    Returns
    -------
    ``graph_connectivity`` of 15 neighbours; ``kbet``, the share of cells whose neighbourhood within their label
    is not told from a sample of the label's batches at 5 %, mean over labels, by diffusion distances on the graph of 50
    neighbours (what scib-metrics' Benchmarker reports); ``kbet_15`` and ``kbet_50``, the same share of the 15 and 50
    nearest of all cells.
    """
    import scib_metrics
    from scib_metrics.nearest_neighbors import NeighborsResults

    found = nearest_neighbours(embedding, min(_FEWEST_CELLS, len(embedding)) - 1)
    indices = np.column_stack([np.arange(len(embedding)), found.indices])
    distances = np.column_stack([np.zeros(len(embedding)), found.distances])
    few, many = (NeighborsResults(indices=indices[:, :k], distances=distances[:, :k]) for k in (15, 50))
    batches, types = batch.astype(str).to_numpy(), labels.astype(str).to_numpy()
    return {
        "graph_connectivity": float(scib_metrics.graph_connectivity(few, types)),
        "kbet": float(scib_metrics.kbet_per_label(many, batches, types)),
        "kbet_15": float(scib_metrics.kbet(few, batches)[0]),
        "kbet_50": float(scib_metrics.kbet(many, batches)[0]),
    }


def prediction_scores(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Correlation over cells of log1p of predicted with log1p of true counts, and of their ranks; means over features.

    A feature without any count has no correlation and is left out; one that is predicted to be constant has 0.
    """
    frames = pd.DataFrame(np.log1p(predicted)), pd.DataFrame(np.log1p(true))
    varies = frames[1].std() > 0
    return {
        method: float(frames[0].corrwith(frames[1], method=method)[varies].fillna(0.0).mean())
        for method in ("pearson", "spearman")
    }


def accuracy_within(embedding: np.ndarray, condition: pd.Series, labels: pd.Series) -> float:
    """Accuracy (kNN) of the condition among the cells of a label, mean over cells; rare labels are left out."""
    values, sizes = [], []
    for label in labels.unique():
        cells = (labels == label).to_numpy()
        if cells.sum() >= _FEWEST_CELLS:
            values.append(knn_accuracy(embedding[cells], condition[cells]))
            sizes.append(cells.sum())
    return float(np.average(values, weights=sizes))


def without_batches(counts: Any, same_cells: Any, *, method: str = "standard", seed: int = 0) -> np.ndarray:
    """Principal coordinates, fitted to ``counts``, of the same cells simulated without batch effect."""
    return fit_pca(counts, 50, method=cast(PCAMethod, method), seed=seed).transform(same_cells)


def condition_direction(
    embedding: np.ndarray, truth: np.ndarray, obs: pd.DataFrame, *, within_batches: bool = False
) -> dict[str, float]:
    """Compare the shift from control to treated cells, type by type, with the same shift without batch effect.

    ``within_batches`` takes the shift of ``embedding`` by least squares on type, batch and condition: the mean of the
    shifts within the batches, weighted by what they tell.

    Returns
    -------
    Means over cell types: ``direction_cosine``; ``direction_slope``, the shift along the true one (1 is all of it);
    ``direction_error``, the length of what is wrong relative to the true shift.
    """
    cosine, slope, error = [], [], []
    for cells in obs.groupby("cell_type", observed=True).indices.values():
        true = _shift(truth[cells], obs.iloc[cells])
        batches = obs["batch"].iloc[cells].to_numpy() if within_batches else np.zeros(len(cells))
        found = _shift(embedding[cells], obs.iloc[cells], batches)
        cosine.append(found @ true / np.linalg.norm(found) / np.linalg.norm(true))
        slope.append(found @ true / (true @ true))
        error.append(np.linalg.norm(found - true) / np.linalg.norm(true))
    return {
        "direction_cosine": float(np.mean(cosine)),
        "direction_slope": float(np.mean(slope)),
        "direction_error": float(np.mean(error)),
    }


def oracle(embedding: np.ndarray, batch: pd.Series, labels: pd.Series, *, rescale: bool) -> np.ndarray:
    """Move each label of each batch onto the label's common mean, using the true labels.

    No correction by shifts within groups can do better than this one. ``rescale`` also gives each dimension of each
    group the label's common standard deviation.
    """
    frame = pd.DataFrame(np.asarray(embedding, dtype=np.float64))
    label = labels.astype(str).to_numpy()
    groups = frame.groupby([label, batch.astype(str).to_numpy()])
    centred = frame - groups.transform("mean")
    if rescale:
        common = np.sqrt((centred**2).groupby(label).transform("mean"))
        centred *= common / groups.transform("std", ddof=0)
    return (centred + frame.groupby(label).transform("mean")).to_numpy()


def standardised_cells(embedding: np.ndarray) -> np.ndarray:
    """Give every cell mean 0 and standard deviation 1 over its dimensions, as scdistill does to its teacher.

    What is dropped is the distance from the origin, in which cells of different depth differ.
    """
    return (embedding - embedding.mean(axis=1, keepdims=True)) / embedding.std(axis=1, keepdims=True)


def _shift(points: np.ndarray, obs: pd.DataFrame, batches: np.ndarray | None = None) -> np.ndarray:
    """Mean shift from control to treated cells, at equal batch."""
    treated = (obs["condition"] == "treat").to_numpy()
    batches = np.zeros(len(points)) if batches is None else batches
    shifts, weights = [], []
    for batch in np.unique(batches):
        first, second = points[(batches == batch) & treated], points[(batches == batch) & ~treated]
        if len(first) and len(second):
            shifts.append(first.mean(axis=0) - second.mean(axis=0))
            weights.append(len(first) * len(second) / (len(first) + len(second)))
    return np.average(shifts, axis=0, weights=weights)
