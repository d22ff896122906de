"""What a baseline is, the registry of them, and what several share."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TypeVar

import numpy as np
import scipy.sparse as sp

from cellstill.condense.cells import Features, LabelledCells
from cellstill.condense.problem import CondensationProblem
from cellstill.errors import InvalidArgumentError, optional_dependency

N_COMPONENTS = 50
"""Principal components in which cells are compared."""

Condense = Callable[[CondensationProblem, int, int], LabelledCells | Features]
_C = TypeVar("_C", bound=Condense)


@dataclass(frozen=True)
class Baseline:
    """A known way to make few cells of many.

    Attributes
    ----------
    name
        In the registry and in tables.
    condense
        Called as ``condense(problem, samples_per_class, seed)``. Uses the training cells only, and returns as many
        cells of each class as the problem's ``budget`` says, or features in their place; fewer where cells of a class
        are identical.
    reference
        DOI or arXiv number of the paper, or a sentence.
    limits
        What it cannot do, in a sentence.
    trained_with
        Evaluators whose architecture it trained with; none if it trained no network.
    package, extra
        Optional package that it needs, and the extra of ours that installs it; both or neither.
    """

    name: str
    condense: Condense
    reference: str
    limits: str
    trained_with: tuple[str, ...] = ()
    package: str | None = None
    extra: str | None = None

    def check_installed(self) -> None:
        """Raise OptionalDependencyError if the package that it needs is not there, without importing it."""
        if self.package and self.extra and find_spec(self.package) is None:
            raise optional_dependency(self.package, self.extra, f"The baseline {self.name!r}")


BASELINES: dict[str, Baseline] = {}
"""Baselines by name."""


def baseline(
    name: str,
    *,
    reference: str,
    limits: str,
    trained_with: tuple[str, ...] = (),
    package: str | None = None,
    extra: str | None = None,
) -> Callable[[_C], _C]:
    """Register a function as a :class:`Baseline`.

    Raises
    ------
    InvalidArgumentError
        The name is taken.
    """

    def register(condense: _C) -> _C:
        if name in BASELINES:
            raise InvalidArgumentError(f"name={name!r} is taken by another baseline. Choose a new name.")
        BASELINES[name] = Baseline(name, condense, reference, limits, trained_with, package, extra)
        return condense

    return register


def chosen_cells(
    problem: CondensationProblem, samples_per_class: int, choose: Callable[[np.ndarray, int, int], np.ndarray]
) -> LabelledCells:
    """Real cells, chosen in each class.

    Parameters
    ----------
    choose
        From the positions of the training cells of a class, the number to choose (fewer than these) and the class to
        chosen positions. Not called where all cells of a class are kept.
    """
    kept = []
    for code, n in enumerate(problem.budget(samples_per_class)):
        cells = problem.train.of_class(code)
        kept.append(cells if n == len(cells) else np.sort(choose(cells, int(n), code)))
    return problem.train[np.concatenate(kept)]


def join(parts: list[LabelledCells]) -> LabelledCells:
    """Cells of several parts, one after the other."""
    counts = sp.csr_matrix(sp.vstack([part.counts for part in parts], format="csr"), dtype=np.float32)
    return LabelledCells(counts, np.concatenate([part.codes for part in parts]))


def principal_components(problem: CondensationProblem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores ``(n_train, n_comps)``, loadings ``(n_comps, n_vars)`` and means ``(n_vars,)`` of the training expression.

    Log-normalised, centred, not scaled. Kept as long as the problem is, as several baselines need them.
    """
    if problem not in _components:
        from sklearn.decomposition import PCA

        dense = problem.train.expression().toarray()
        n_components = min(N_COMPONENTS, *(size - 1 for size in dense.shape))
        pca = PCA(max(n_components, 1), svd_solver="randomized", random_state=0)
        scores = pca.fit_transform(dense)
        _components[problem] = (scores, pca.components_, pca.mean_)
    return _components[problem]


_components: weakref.WeakKeyDictionary[CondensationProblem, tuple[np.ndarray, np.ndarray, np.ndarray]] = (
    weakref.WeakKeyDictionary()
)


def kmeans(points: np.ndarray, n_clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cluster of each point, ``(n,)``, and centres, ``(k, n_dims)``: k-means++, the best of three starts.

    ``k`` is ``n_clusters``, or less where fewer points differ.
    """
    if n_clusters == 1:
        return np.zeros(len(points), dtype=np.int64), points.mean(axis=0, keepdims=True)
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = KMeans(n_clusters, n_init=3, random_state=seed).fit(points)
    used, labels = np.unique(found.labels_, return_inverse=True)
    return labels, found.cluster_centers_[used]


def closest(points: np.ndarray, labels: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Of each cluster of :func:`kmeans`, the position of the member closest to the centre."""
    distance = ((points - centres[labels]) ** 2).sum(axis=1)
    members = [np.flatnonzero(labels == k) for k in range(len(centres))]
    return np.array([rows[distance[rows].argmin()] for rows in members])


def medoids(problem: CondensationProblem, samples_per_class: int, points: np.ndarray, seed: int) -> LabelledCells:
    """Real cells: of each cluster of the points ``(n_train, n_dims)`` of a class, the one closest to the centre."""

    def choose(cells: np.ndarray, n: int, code: int) -> np.ndarray:
        return cells[closest(points[cells], *kmeans(points[cells], n, seed))]

    return chosen_cells(problem, samples_per_class, choose)
