"""Scores of condensed cells over several data sets, and differences of methods with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cellstill.condense.evaluated import Evaluation
from cellstill.metrics.condensation import mean_macro_f1, rarest_classes

N_RESAMPLES = 1000
KEYS = ["set", "method", "samples_per_class", "seed", "evaluator"]


@dataclass(frozen=True)
class Difference:
    """Ours minus another method, mean over data sets, where both were run.

    Attributes
    ----------
    value, low, high
        Difference, and its 95 % bootstrap interval over the test cells of all sets.
    n_runs
        Pairs of data set and seed.
    """

    value: float
    low: float
    high: float
    n_runs: int


class Scores:
    """Evaluations of several data sets.

    Attributes
    ----------
    table
        One row for each data set, method, budget, seed and evaluator.
    """

    def __init__(self, evaluations: Mapping[str, Evaluation]) -> None:
        self._evaluations = evaluations
        parts = [found.scores.assign(set=name) for name, found in evaluations.items() if found.condensed]
        self.table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=KEYS)
        self._resampled: dict[tuple[str, str, int, int, str], np.ndarray] = {}

    def runs(self, method: str, size: int) -> set[tuple[str, int]]:
        """Pairs of data set and seed of which there are results."""
        rows = self.of(method, size)
        return set(zip(rows["set"], rows["seed"], strict=True))

    def of(self, method: str, size: int) -> pd.DataFrame:
        """Rows of a method and a budget."""
        return self.table[(self.table["method"] == method) & (self.table["samples_per_class"] == size)]

    def mean(self, method: str, size: int, column: str, runs: set[tuple[str, int]] | None = None) -> float | None:
        """Mean of a score over evaluators and seeds, then over data sets."""
        rows = self.of(method, size)
        if runs is not None:
            rows = rows[[pair in runs for pair in zip(rows["set"], rows["seed"], strict=True)]]
        return None if rows.empty else float(rows.groupby("set")[column].mean().mean())

    def gap(self, method: str, size: int, column: str = "retention", *, judges_of: str | None = None) -> float | None:
        """Mean score of the evaluators that a method trained with or chose by, minus that of the others.

        ``judges_of`` takes the evaluators that another method trained with or chose by.
        """
        seen = next(iter(self._evaluations.values())).trained_with.get(judges_of or method, ())
        found = self.of(method, size).groupby(["set", "evaluator"])[column].mean().groupby("evaluator").mean()
        inside = found.index.isin(seen)
        return None if inside.all() or not inside.any() else float(found[inside].mean() - found[~inside].mean())

    def difference(self, method: str, other: str, size: int, *, score: str = "retention") -> Difference | None:
        """Difference of two methods over the data sets and seeds that both have results of.

        ``score`` is ``"retention"``, ``"macro_f1"`` or ``"rare_recall"``.
        """
        runs = self.runs(method, size) & self.runs(other, size)
        if not runs:
            return None
        of_sets = []
        for name in sorted({name for name, _ in runs}):
            seeds = [seed for of, seed in runs if of == name]
            both = [
                np.mean([self._of_run(name, each, size, seed, score) for seed in seeds], axis=0)
                for each in (method, other)
            ]
            of_sets.append(both[0] - both[1])
        found = np.mean(of_sets, axis=0)
        low, high = np.nanquantile(found[1:], [0.025, 0.975])
        return Difference(float(found[0]), float(low), float(high), len(runs))

    def _of_run(self, name: str, method: str, size: int, seed: int, score: str) -> np.ndarray:
        """Mean over evaluators: of the test cells as they are, then of resamples, the same for all methods."""
        key = (name, method, size, seed, score)
        if key not in self._resampled:
            found = self._evaluations[name]
            task = found.problem.tasks[0].key
            truth = found.problem.test.codes
            run = next(c for c in found.condensed if (c.method, c.samples_per_class, c.seed) == (method, size, seed))
            predicted = np.stack([run.predictions[each, task] for each in found.evaluators])
            draws = np.random.default_rng(0).multinomial(
                len(truth), np.full(len(truth), 1 / len(truth)), size=N_RESAMPLES
            )
            weights = np.concatenate([np.ones((1, len(truth))), draws])
            if score == "rare_recall":
                trained = np.bincount(found.problem.train.codes, minlength=truth.max() + 1)
                self._resampled[key] = _rare_recall(weights, truth, predicted, trained)
            else:
                full = np.stack([found.full.predictions[each, seed, task] for each in found.evaluators])
                self._resampled[key] = mean_macro_f1(weights, truth, predicted, full if score == "retention" else None)
        return self._resampled[key]


def _rare_recall(weights: np.ndarray, truth: np.ndarray, predicted: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Recall of the rarest quarter of the classes with cells in the test, mean over predictions, by weighting."""
    right = (predicted == truth).mean(axis=0)
    recalls = []
    for code in rarest_classes(np.where(np.isin(np.arange(len(sizes)), truth), sizes, -1)):
        cells = truth == code
        total = weights[:, cells].sum(axis=1, dtype=np.float64)
        reached = weights[:, cells] @ right[cells]
        recalls.append(np.divide(reached, total, out=np.full(len(total), np.nan), where=total > 0))
    # A class that no cell was drawn of is left out of that resample's mean.
    return np.nanmean(recalls, axis=0)


def closest(
    scores: Scores, ours: str, others: Sequence[str], size: int, *, score: str = "retention"
) -> tuple[str, Difference] | None:
    """The method that ours is least ahead of, and by how much."""
    differences = {name: scores.difference(ours, name, size, score=score) for name in others}
    found = [(name, difference) for name, difference in differences.items() if difference is not None]
    return min(found, key=lambda pair: pair[1].value) if found else None
