"""Scores of a comparison whose truth is known, gene by gene."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from cellstill.metrics.integration import ilisi, ilisi_ceiling, nmi

Genes = Mapping[str, np.ndarray]
"""Columns of a result, one value per gene: ``lfc, called, certainty`` and, where there is an interval, ``low, high``.

``certainty`` orders genes, the most certain highest."""


def columns_of(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Columns of the table of one of our results."""
    if "prob_de" in table:
        names = {"lfc": "lfc_mean", "called": "is_de", "certainty": "prob_de", "low": "ci_low", "high": "ci_high"}
        return {key: table[name].to_numpy() for key, name in names.items()}
    return {
        "lfc": table["lfc"].to_numpy(float),
        "called": table["is_de"].to_numpy(bool),
        "certainty": -table["p_value"].to_numpy(float),
    }


def de_scores(found: Genes, truth: np.ndarray, is_de: np.ndarray) -> dict[str, float | None]:
    """Score calls, ranking and fold changes.

    Returns
    -------
    ``n_called``; ``any_call``, 1 or 0; ``f1``, ``observed_fdr`` (0 where nothing is called) and ``recall`` of the
    calls; ``top_f1``, the share of true genes among as many of the most certain ones (a gene without a test comes last,
    equally certain ones go by the size of their fold change); ``correlation`` and ``correlation_de`` with the true fold
    changes, over all genes that have one and over those that differ; ``slope``, the regression of estimated on true
    fold changes over those that differ; ``coverage`` and ``coverage_de`` of the intervals, likewise. What no gene tells
    is None.
    """
    called, lfc = found["called"].astype(bool), found["lfc"]
    true_calls, n_true = int((called & is_de).sum()), int(is_de.sum())
    certainty = np.where(np.isnan(found["certainty"]), -np.inf, found["certainty"])
    order = np.lexsort((-np.abs(np.nan_to_num(lfc)), -certainty))
    known = np.isfinite(lfc)
    differing = known & is_de
    scores: dict[str, float | None] = {
        "n_called": float(called.sum()),
        "any_call": float(called.any()),
        "f1": 2 * true_calls / (called.sum() + n_true) if n_true else None,
        "observed_fdr": 1 - true_calls / called.sum() if called.any() else 0.0,
        "recall": true_calls / n_true if n_true else None,
        "top_f1": float(is_de[order[:n_true]].mean()) if n_true else None,
        "correlation": _correlation(truth[known], lfc[known]),
        "correlation_de": _correlation(truth[differing], lfc[differing]),
        "slope": float(np.polyfit(truth[differing], lfc[differing], 1)[0]) if differing.sum() > 1 else None,
    }
    if "low" in found:
        inside = (found["low"] <= truth) & (truth <= found["high"])
        scores["coverage"] = float(inside.mean())
        scores["coverage_de"] = float(inside[is_de].mean()) if n_true else None
    return scores


def latent_scores(embedding: np.ndarray, obs: pd.DataFrame) -> dict[str, float]:
    """Mixing of batches, as a share of what permuted batches give, and agreement with cell types."""
    mixing, ceiling = ilisi(embedding, obs["batch"]), ilisi_ceiling(embedding, obs["batch"])
    return {
        "ilisi": float(mixing),
        "ilisi_ceiling": float(ceiling),
        "ilisi_of_ceiling": float(mixing / ceiling),
        "nmi": nmi(embedding, obs["cell_type"]),
    }


def _correlation(truth: np.ndarray, found: np.ndarray) -> float | None:
    if len(truth) < 2 or not np.ptp(truth) or not np.ptp(found):
        return None
    return float(np.corrcoef(truth, found)[0, 1])


def pack(results: Mapping[str, Genes]) -> dict[str, np.ndarray]:
    """All columns of some results, by ``label/column``."""
    return {f"{label}/{key}": values for label, genes in results.items() for key, values in genes.items()}


def unpack(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """What :func:`pack` packed; other arrays are left out."""
    results: dict[str, dict[str, Any]] = {}
    for name, values in arrays.items():
        label, slash, key = name.partition("/")
        if slash:
            results.setdefault(label, {})[key] = values
    return results
