"""Centroids and medoids of k-means within each class, in gene space and in principal components."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cellstill.condense.baselines.base import baseline, closest, join, kmeans, medoids, principal_components
from cellstill.condense.baselines.profiles import counts_of_profiles, unit_length
from cellstill.condense.cells import LabelledCells
from cellstill.condense.problem import CondensationProblem

_LLOYD = "Lloyd (1982), 10.1109/TIT.1982.1056489"


@baseline(
    "kmeans_centroids",
    reference=_LLOYD,
    limits="Smooth profiles without zeros: forests, which split at zero, learn little from them.",
)
def kmeans_centroids(problem: CondensationProblem, samples_per_class: int, seed: int = 0) -> LabelledCells:
    """Centroids of log-normalised cells of unit length, as expected counts of the median depth of their cells."""
    return of_each_class(problem, samples_per_class, lambda cells, n: _centroids(cells, n, seed)[0])


@baseline("kmeans_medoids", reference=_LLOYD, limits="Single cells, with the noise of a single cell.")
def kmeans_medoids(problem: CondensationProblem, samples_per_class: int, seed: int = 0) -> LabelledCells:
    """Real cells, of each cluster of :func:`kmeans_centroids` the one closest to the centroid."""
    return of_each_class(problem, samples_per_class, lambda cells, n: cells[_centroids(cells, n, seed)[1]])


@baseline(
    "half_centroids",
    reference=_LLOYD,
    limits="The real half is released as it is, so that privacy is that of real cells.",
)
def half_centroids(problem: CondensationProblem, samples_per_class: int, seed: int = 0) -> LabelledCells:
    """Half centroids, half medoids of the same clusters, the largest first; of an odd number one more centroid."""

    def halves(cells: LabelledCells, n: int) -> LabelledCells:
        centroids, nearest = _centroids(cells, (n + 1) // 2, seed)
        return join([centroids, cells[nearest[: n // 2]]])

    return of_each_class(problem, samples_per_class, halves)


@baseline(
    "kmeans_pca",
    reference=_LLOYD,
    limits="What 50 components do not hold is lost: centroids of small clusters are smoother than in gene space.",
)
def kmeans_pca(problem: CondensationProblem, samples_per_class: int, seed: int = 0) -> LabelledCells:
    """Centroids in the principal components of all training cells, mapped back, negative expression set to zero."""
    scores, loadings, mean = principal_components(problem)
    depth = _depth(problem.train)
    parts = []
    for code, n in enumerate(problem.budget(samples_per_class)):
        rows = problem.train.of_class(code)
        labels, centres = kmeans(scores[rows], int(n), seed)
        profiles = np.maximum(centres @ loadings + mean, 0)
        counts = counts_of_profiles(profiles, _medians(depth[rows], labels))
        parts.append(LabelledCells(counts, np.full(counts.shape[0], code)))
    return join(parts)


@baseline("kmeans_pca_medoids", reference=_LLOYD, limits="Single cells, with the noise of a single cell.")
def kmeans_pca_medoids(problem: CondensationProblem, samples_per_class: int, seed: int = 0) -> LabelledCells:
    """Real cells, of each cluster of :func:`kmeans_pca` the one closest to the centroid."""
    return medoids(problem, samples_per_class, principal_components(problem)[0], seed)


def of_each_class(
    problem: CondensationProblem, samples_per_class: int, condense: Callable[[LabelledCells, int], LabelledCells]
) -> LabelledCells:
    """Condense the cells of each class; those of a class that is within its budget stay as they are."""
    parts = []
    for code, n in enumerate(problem.budget(samples_per_class)):
        cells = problem.train[problem.train.of_class(code)]
        parts.append(cells if n == len(cells) else condense(cells, int(n)))
    return join(parts)


def _centroids(cells: LabelledCells, n: int, seed: int) -> tuple[LabelledCells, np.ndarray]:
    """Centroids of the cells of one class, and positions of their medoids, those of the largest cluster first."""
    points = unit_length(cells.expression())
    labels, centres = kmeans(points, n, seed)
    order = np.argsort(-np.bincount(labels), kind="stable")
    nearest = closest(points, labels, centres)
    depth = _medians(_depth(cells), labels)
    counts = counts_of_profiles(np.maximum(centres, 0)[order], depth[order])
    return LabelledCells(counts, np.full(len(order), cells.codes[0])), nearest[order]


def _depth(cells: LabelledCells) -> np.ndarray:
    return np.asarray(cells.counts.sum(axis=1), dtype=np.float64).ravel()


def _medians(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.array([np.median(values[labels == k]) for k in range(labels.max() + 1)])
