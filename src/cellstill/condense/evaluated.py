"""What an evaluation found: scores, predictions, and comparisons of methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cellstill.condense.problem import CondensationProblem
from cellstill.errors import InvalidArgumentError, check_option
from cellstill.metrics.condensation import (
    classification_scores,
    cross_architecture_gap,
    label_robust_score,
    paired_bootstrap,
    retention,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MEANS = ["retention", "retention_of_best", "macro_f1", "accuracy", "balanced_accuracy", "rare_recall"]
_COSTS = ["n_cells", "compression", "seconds", "added_mb", "bytes"]


@dataclass(frozen=True, eq=False)
class FullData:
    """What evaluators predict that were trained on all training cells.

    Attributes
    ----------
    problem
        Whose cells they are.
    predictions
        Codes of the test cells by evaluator, seed and task.
    """

    problem: CondensationProblem = field(repr=False)
    predictions: Mapping[tuple[str, int, str], np.ndarray] = field(repr=False)

    def belongs_to(self, problem: CondensationProblem) -> bool:
        """Whether cells, genes, labels and split are those of the problem."""
        own = self.problem
        return own is problem or (
            [task.key for task in own.tasks] == [task.key for task in problem.tasks]
            and all(np.array_equal(own.rows[part], problem.rows[part]) for part in ("train", "test"))
            and np.array_equal(own.genes, problem.genes)
            and all(
                np.array_equal(mine.codes, other.codes) and np.array_equal(mine.counts.data, other.counts.data)
                for mine, other in ((own.train, problem.train), (own.test, problem.test))
            )
        )


@dataclass(frozen=True, eq=False)
class Condensed:
    """What became of one method, budget and seed.

    Attributes
    ----------
    method, samples_per_class, seed
        Which.
    n_cells
        Synthetic cells.
    seconds, added_mb
        Wall time of the method, and how far it raised the memory of the process.
    n_bytes
        Of the counts as CSR in memory; of features in their place, without the encoder.
    predictions
        Codes of the test cells by evaluator and task.
    """

    method: str
    samples_per_class: int
    seed: int
    n_cells: int
    seconds: float
    added_mb: float
    n_bytes: int
    predictions: Mapping[tuple[str, str], np.ndarray]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores of methods of condensation; see :func:`~cellstill.condense.evaluate.evaluate`.

    Attributes
    ----------
    problem
        That was condensed.
    condensed
        One for each method, budget and seed, with the predictions.
    full
        Predictions after training on all cells.
    evaluators
        Their names.
    trained_with
        Evaluators whose architecture a method trained with, by method.
    """

    problem: CondensationProblem = field(repr=False)
    condensed: tuple[Condensed, ...] = field(repr=False)
    full: FullData = field(repr=False)
    evaluators: tuple[str, ...]
    trained_with: Mapping[str, tuple[str, ...]]

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods, in their order."""
        return tuple(dict.fromkeys(found.method for found in self.condensed))

    @property
    def scores(self) -> pd.DataFrame:
        """One row for each method, budget, seed, evaluator and task; a copy.

        ``retention`` is macro-F1 as a share of that of the same evaluator and seed trained on all cells,
        ``retention_of_best`` as a share of the best evaluator's, mean over seeds. ``compression`` is training cells per
        synthetic cell, ``seconds`` and ``added_mb`` are what the method took, ``bytes`` the size of its counts
        (of features in their place, without the encoder).
        """
        return self._scores.copy()

    @property
    def full_scores(self) -> pd.DataFrame:
        """Scores after training on all cells: one row for each evaluator, seed and task; a copy."""
        return self._full_scores.copy()

    def summary(self) -> pd.DataFrame:
        """Mean scores by task, budget and method, over evaluators and seeds, best retention first.

        ``retention_sd`` is the standard deviation over seeds of the mean over evaluators. ``label_robust_score``
        compares accuracies with all cells and with the method ``"random"``, and is NaN if that was not evaluated.
        ``cross_architecture_gap`` is in retention, and NaN for methods that trained no network.
        """
        groups = ["task", "samples_per_class", "method"]
        table = self._scores.groupby(groups, sort=False)
        found = table[_MEANS].mean()
        by_seed = self._scores.groupby([*groups, "seed"])["retention"].mean()
        found.insert(1, "retention_sd", by_seed.groupby(groups).std(ddof=1))
        found["label_robust_score"] = self._label_robust().groupby(groups)["label_robust_score"].mean()
        by_evaluator = self._scores.groupby([*groups, "evaluator"])["retention"].mean()
        found["cross_architecture_gap"] = [
            self._gap(method, by_evaluator[t, s, method]) for t, s, method in found.index
        ]
        found = found.join(table[_COSTS].mean()).reset_index()
        order = ["task", "samples_per_class", "retention"]
        return found.sort_values(order, ascending=[True, True, False], ignore_index=True)

    def compare(
        self,
        method: str,
        baseline: str | None = None,
        *,
        score: str = "retention",
        n_resamples: int = 2000,
        level: float = 0.95,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Difference to another method, or to each, with a paired bootstrap interval over the test cells.

        Parameters
        ----------
        method, baseline
            Names; without ``baseline`` all other methods are compared with.
        score
            ``"retention"`` or ``"macro_f1"``, each the mean over evaluators and seeds.
        n_resamples, level, seed
            See :func:`~cellstill.metrics.condensation.paired_bootstrap`.

        Returns
        -------
        One row by task, budget and baseline: ``difference``, ``low`` and ``high``, above 0 where ``method`` is better.
        """
        check_option("score", score, ("retention", "macro_f1"))
        check_option("method", method, self.methods)
        others = [name for name in self.methods if name != method] if baseline is None else [baseline]
        for other in others:
            check_option("baseline", other, self.methods)
        if not others:
            raise InvalidArgumentError(f"{method!r} is the only method that was evaluated: nothing to compare with.")
        rows = []
        for task, truth in self._truth.items():
            for size in dict.fromkeys(found.samples_per_class for found in self.condensed):
                predicted, full = self._predictions(method, size, task)
                for other in others:
                    against, other_full = self._predictions(other, size, task)
                    references = {"full": full, "baseline_full": other_full} if score == "retention" else {}
                    interval = paired_bootstrap(
                        truth, predicted, against, **references, n_resamples=n_resamples, level=level, seed=seed
                    )
                    rows.append((task, size, method, other, interval.difference, interval.low, interval.high))
        return pd.DataFrame(
            rows, columns=["task", "samples_per_class", "method", "baseline", "difference", "low", "high"]
        )

    def plot(self, score: str = "retention", task: str | None = None) -> Figure:
        """Draw a score against the budget: the mean over evaluators, then each of them.

        Parameters
        ----------
        score
            A column of :attr:`scores`.
        task
            Which; the first by default.
        """
        from cellstill.pl.retention import retention_figure

        task = next(iter(self._truth)) if task is None else task
        check_option("task", task, self._truth)
        return retention_figure(self._scores[self._scores["task"] == task], score)

    @cached_property
    def _truth(self) -> dict[str, np.ndarray]:
        return {task.key: task.of_class[self.problem.test.codes] for task in self.problem.tasks}

    @cached_property
    def _class_sizes(self) -> dict[str, np.ndarray]:
        codes = self.problem.train.codes
        return {task.key: np.bincount(task.of_class[codes], minlength=len(task.names)) for task in self.problem.tasks}

    def _score(self, task: str, predicted: np.ndarray) -> dict[str, float]:
        return vars(classification_scores(self._truth[task], predicted, self._class_sizes[task]))

    @cached_property
    def _full_scores(self) -> pd.DataFrame:
        rows = [
            {"evaluator": name, "seed": seed, "task": task, **self._score(task, predicted)}
            for (name, seed, task), predicted in self.full.predictions.items()
            if name in self.evaluators
        ]
        return pd.DataFrame(rows)

    @cached_property
    def _scores(self) -> pd.DataFrame:
        reached = self._full_scores.set_index(["evaluator", "seed", "task"])["macro_f1"]
        best = reached.groupby(["task", "evaluator"]).mean().groupby("task").max()
        rows = []
        for found in self.condensed:
            for (evaluator, task), predicted in found.predictions.items():
                scores = self._score(task, predicted)
                rows.append(
                    {
                        "method": found.method,
                        "samples_per_class": found.samples_per_class,
                        "seed": found.seed,
                        "evaluator": evaluator,
                        "task": task,
                        **scores,
                        "retention": retention(scores["macro_f1"], reached[evaluator, found.seed, task]),
                        "retention_of_best": retention(scores["macro_f1"], best[task]),
                        "n_cells": found.n_cells,
                        "compression": len(self.problem.train) / found.n_cells,
                        "seconds": found.seconds,
                        "added_mb": found.added_mb,
                        "bytes": found.n_bytes,
                    }
                )
        return pd.DataFrame(rows)

    def _label_robust(self) -> pd.DataFrame:
        keys = ["samples_per_class", "seed", "evaluator", "task"]
        full = self._full_scores.rename(columns={"accuracy": "full"})[["evaluator", "seed", "task", "full"]]
        random = self._scores[self._scores["method"] == "random"]
        random = random.rename(columns={"accuracy": "random"})[[*keys, "random"]]
        table = self._scores.merge(full, on=["evaluator", "seed", "task"]).merge(random, on=keys, how="left")
        table["label_robust_score"] = [
            label_robust_score(*row) if row[2] == row[2] else np.nan
            for row in zip(table["accuracy"], table["full"], table["random"], strict=True)
        ]
        return table

    def _gap(self, method: str, scores: pd.Series) -> float:
        by_name = {str(name): float(score) for name, score in scores.items()}
        seen = by_name.keys() & set(self.trained_with.get(method, ()))
        return cross_architecture_gap(by_name, seen) if 0 < len(seen) < len(by_name) else float("nan")

    def _predictions(self, method: str, samples_per_class: int, task: str) -> tuple[np.ndarray, np.ndarray]:
        """Predictions of a method, one row by seed and evaluator, and those after training on all cells."""
        runs = [c for c in self.condensed if (c.method, c.samples_per_class) == (method, samples_per_class)]
        predicted = [run.predictions[name, task] for run in runs for name in self.evaluators]
        full = [self.full.predictions[name, run.seed, task] for run in runs for name in self.evaluators]
        return np.stack(predicted), np.stack(full)
