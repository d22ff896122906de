"""Whether what a few cells teach depends on the size of the classifier that learns from them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from _condense_store import OURS, Store
from torch import nn

from cellstill.condense import BASELINES, LabelledCells
from cellstill.condense.evaluators import Evaluator, train_network
from cellstill.metrics.condensation import classification_scores

SIZE = 1
"""Cells per class."""

HEADS: dict[str, tuple[int, ...]] = {
    "none: linear": (), "16": (16,), "64": (64,), "256": (256,), "1024": (1024,), "512-256": (512, 256),
}  # fmt: skip
"""Hidden layers, all trained as the networks among the evaluators are."""

BESIDE = ("kmeans_centroids", "herding", "random")
ALL = "all"

COLUMNS = {
    "head": "hidden units",
    "n_runs": "runs|d",
    OURS: f"{OURS}|.3f",
    **{name: f"{name}|.3f" for name in BESIDE},
    ALL: "all cells|.3f",
    "retention": f"retention of {OURS}|.3f",
}


def mlp(hidden: Sequence[int]) -> Evaluator:
    """Evaluator with hidden layers of these widths, ReLU."""

    def build(n_vars: int, n_classes: int) -> nn.Module:
        sizes = (n_vars, *hidden)
        layers = [part for pair in itertools.pairwise(sizes) for part in (nn.Linear(*pair), nn.ReLU())]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], n_classes))

    return Evaluator("mlp", "MLP", train_network(build))


def run(kept: Store, seed: int) -> dict[str, dict[str, float]]:
    """Macro-F1 of the test cells by method and head, unless that was done before; ours is condensed first."""
    kept.run(OURS, SIZE, seed)
    return kept.record(_name(seed), lambda: _scores(kept, seed))["macro_f1"]


def was_run(kept: Store, seed: int) -> bool:
    """Whether that was done before."""
    return kept.has(_name(seed))


def _name(seed: int) -> str:
    return f"heads-{SIZE}-{seed}"


def _scores(kept: Store, seed: int) -> dict[str, Any]:
    problem, ours = kept.problem, kept.cells(SIZE, seed)
    assert ours is not None
    released: dict[str, LabelledCells] = {OURS: ours, ALL: problem.train}
    released |= {name: BASELINES[name].condense(problem, SIZE, seed) for name in BESIDE}
    test = problem.test.expression()
    found: dict[str, dict[str, float]] = {name: {} for name in released}
    for head, hidden in HEADS.items():
        for name, cells in released.items():
            predicted = mlp(hidden).fit(cells, problem.n_classes, seed).predict(test)
            found[name][head] = classification_scores(problem.test.codes, predicted).macro_f1
    return {"macro_f1": found}


def rows(found: Mapping[str, Sequence[Mapping[str, Mapping[str, float]]]]) -> Iterable[dict[str, Any]]:
    """One row for each head: means over the seeds of each data set, then over data sets."""
    for head in HEADS if found else ():
        of = {
            name: float(np.mean([np.mean([run[name][head] for run in runs]) for runs in found.values()]))
            for name in (OURS, *BESIDE, ALL)
        }
        kept = [np.mean([run[OURS][head] / run[ALL][head] for run in runs]) for runs in found.values()]
        n_runs = sum(len(runs) for runs in found.values())
        yield {"head": head, "n_runs": n_runs, **of, "retention": float(np.mean(kept))}
