"""Which candidates are kept: those that train the best classifiers of the validation cells."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cellstill.condense.cells import Features, LabelledCells
from cellstill.condense.evaluators import get_evaluators
from cellstill.condense.problem import CondensationProblem
from cellstill.metrics.condensation import classification_scores

JUDGES = ("logistic", "mlp_small", "knn", "forest")
"""Evaluators by which candidates are chosen: of each kind the quickest."""


def validation_score(
    problem: CondensationProblem, made: LabelledCells | Features, judges: Sequence[str] = JUDGES, seed: int = 0
) -> dict[str, float]:
    """Macro-F1 of the validation cells, for each judge trained on candidate cells or features.

    Without validation cells, the training cells are judged by.
    """
    judged = problem.validation if len(problem.validation) else problem.train
    seen = made.encode(judged)
    found = {}
    for judge in get_evaluators(judges):
        predicted = judge.fit(made, problem.n_classes, seed).predict(seen)
        found[judge.name] = classification_scores(judged.codes, predicted).macro_f1
    return found


def mean_score(scores: dict[str, float]) -> float:
    """Mean over judges."""
    return float(np.mean(list(scores.values())))
