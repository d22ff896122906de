"""Real cells, chosen at random or to cover a class."""

from __future__ import annotations

import numpy as np

from cellstill.condense.baselines.base import baseline, chosen_cells, principal_components
from cellstill.condense.cells import LabelledCells
from cellstill.condense.problem import CondensationProblem


@baseline("random", reference="As many cells of each class, drawn at random.", limits="None chosen for any purpose.")
def random(problem: CondensationProblem, samples_per_class: int, seed: int = 0) -> LabelledCells:
    """Draw cells of each class at random, without replacement."""
    rng = np.random.default_rng(seed)
    return chosen_cells(problem, samples_per_class, lambda cells, n, code: rng.permutation(cells)[:n])


@baseline(
    "herding",
    reference="Welling (2009), 10.1145/1553374.1553517",
    limits="Keeps the mean of a class, not its spread; always the same cells, whatever the seed.",
)
def herding(problem: CondensationProblem, samples_per_class: int, seed: int = 0) -> LabelledCells:
    """Add to each class the cell that brings the mean of the chosen closest to the class mean, in PCA space."""
    scores = principal_components(problem)[0]

    def choose(cells: np.ndarray, n: int, code: int) -> np.ndarray:
        points = scores[cells] - scores[cells].mean(axis=0)
        total, free, chosen = np.zeros(points.shape[1]), np.ones(len(cells), dtype=bool), []
        for _ in range(n):
            off = ((total + points) ** 2).sum(axis=1)
            off[~free] = np.inf
            best = int(off.argmin())
            free[best] = False
            total += points[best]
            chosen.append(best)
        return cells[chosen]

    return chosen_cells(problem, samples_per_class, choose)


@baseline(
    "k_center",
    reference="Sener and Savarese (2018), arXiv:1708.00489; Gonzalez (1985), 10.1016/0304-3975(85)90224-5",
    limits="Outliers come first; always the same cells, whatever the seed.",
)
def k_center(problem: CondensationProblem, samples_per_class: int, seed: int = 0) -> LabelledCells:
    """Start at the cell closest to the class mean, then add the cell farthest from those chosen, in PCA space."""
    scores = principal_components(problem)[0]

    def choose(cells: np.ndarray, n: int, code: int) -> np.ndarray:
        points = scores[cells]
        chosen = [int(((points - points.mean(axis=0)) ** 2).sum(axis=1).argmin())]
        nearest = np.full(len(cells), np.inf)
        while len(chosen) < n:
            nearest = np.minimum(nearest, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
            nearest[chosen] = -1
            chosen.append(int(nearest.argmax()))
        return cells[chosen]

    return chosen_cells(problem, samples_per_class, choose)
