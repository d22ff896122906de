"""Sums of counts over groups of similar cells."""

from __future__ import annotations

import warnings

import numpy as np
import scipy.sparse as sp

from cellstill.condense.baselines.base import baseline, join, principal_components
from cellstill.condense.cells import LabelledCells
from cellstill.condense.problem import CondensationProblem

_N_NEIGHBORS = 10


@baseline(
    "metacells",
    reference="After SuperCell, Bilous et al. (2022), 10.1186/s12859-022-04861-1: merging along a kNN graph",
    limits="Sums are dominated by deep cells, and have fewer zeros than cells.",
)
def metacells(problem: CondensationProblem, samples_per_class: int, seed: int = 0) -> LabelledCells:
    """Merge each class along its kNN graph in PCA space (Ward) until the budget is left; counts are summed."""
    scores = principal_components(problem)[0]
    parts = []
    for code, n in enumerate(problem.budget(samples_per_class)):
        rows = problem.train.of_class(code)
        group = _partition(scores[rows], int(n))
        member = sp.csr_matrix((np.ones(len(rows), np.float32), (group, np.arange(len(rows)))), shape=(n, len(rows)))
        parts.append(LabelledCells(sp.csr_matrix(member @ problem.train.counts[rows]), np.full(n, code)))
    return join(parts)


def _partition(points: np.ndarray, n_groups: int) -> np.ndarray:
    """Group of each point, ``(n,)``: exactly ``n_groups``."""
    if n_groups == 1 or n_groups == len(points):
        return np.arange(len(points)) if n_groups > 1 else np.zeros(len(points), dtype=np.int64)
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.neighbors import kneighbors_graph

    graph = kneighbors_graph(points, min(_N_NEIGHBORS, len(points) - 1))
    with warnings.catch_warnings():
        # Parts that the graph leaves apart are joined by scikit-learn, which says so.
        warnings.filterwarnings("ignore", message="the number of connected components")
        return AgglomerativeClustering(n_groups, connectivity=graph, linkage="ward").fit(points).labels_
