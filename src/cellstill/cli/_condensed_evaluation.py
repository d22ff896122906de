"""What condensed cells are worth: test cells that are set aside first, and classifiers that predict them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellstill.cli._condensed_kept import Kept
from cellstill.condense import (
    BASELINES,
    TRAINED_WITH,
    CondensationProblem,
    Evaluation,
    FullData,
    LabelledCells,
    evaluate,
    get_evaluators,
)
from cellstill.condense.evaluate import Method, known_training, train_full
from cellstill.condense.evaluated import Condensed
from cellstill.condense.problem import _warn_about_small_classes, read_donors, read_labels
from cellstill.condense.splits import split_classes
from cellstill.errors import InvalidArgumentError

if TYPE_CHECKING:
    from anndata import AnnData
    from rich.table import Table

OURS = "scdd"
"""Name of our method in tables."""

_COLUMNS = {
    "retention": ("retention", "{:.3f}"),
    "retention_sd": ("sd", "{:.3f}"),
    "macro_f1": ("macro-F1", "{:.3f}"),
    "rare_recall": ("rare", "{:.3f}"),
    "cross_architecture_gap": ("gap", "{:.3f}"),
    "label_robust_score": ("robust", "{:.3f}"),
    "compression": ("fewer", "{:.1f}x"),
    "seconds": ("seconds", "{:.1f}"),
}
"""Headings and forms of the columns of a summary."""

_SPARED = ("compression", "seconds", "label_robust_score", "cross_architecture_gap", "retention_sd", "rare_recall")
"""Columns left out where a terminal is too narrow, in this order."""


def hold_out(
    adata: AnnData, keys: Sequence[str], donor_key: str | None, test_size: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split off test cells, within each class or by donor, before anything else is done.

    Returns
    -------
    Sorted positions of the cells to condense, and of those to test with.

    Raises
    ------
    InvalidArgumentError
        A column of one category, fewer than three donors, or donors without whom a class has no cell to condense.
    """
    codes, classes, _ = read_labels(adata, keys)
    donors = None
    if donor_key is not None:
        donors = read_donors(adata, donor_key)
        names = np.unique(donors)
        if len(names) < 3:
            raise InvalidArgumentError(
                f"donor_key={donor_key!r} has {len(names)} donors ({', '.join(names)}); an evaluation takes 3 at "
                "least, one to learn from, one to choose and one to judge. Leave --donor-key or --evaluate out."
            )
    parts = split_classes(codes, donors, train_size=1 - test_size, validation_size=test_size, seed=seed)
    rest, test = parts["train"], parts["validation"]
    if not len(test):
        raise InvalidArgumentError("Every class has one cell, so that no test cell can be set aside.")
    _warn_about_small_classes(codes, classes, {"train": rest, "test": test})
    return rest, test


def cells_of(adata: AnnData, problem: CondensationProblem) -> LabelledCells:
    """Counts and classes of synthetic cells."""
    known = np.stack([task.of_class for task in problem.tasks], axis=1)
    code_of = {tuple(row): code for code, row in enumerate(known.tolist())}
    named = [pd.Index(task.names).get_indexer(pd.Index(adata.obs[task.key].astype(str))) for task in problem.tasks]
    codes = [code_of[row] for row in zip(*(column.tolist() for column in named), strict=True)]
    return LabelledCells(adata.X, np.array(codes, dtype=np.int64))


def evaluate_condensed(
    problem: CondensationProblem,
    make: Callable[[int], AnnData],
    *,
    samples_per_class: int,
    baselines: Sequence[str],
    evaluators: Sequence[str],
    seeds: Sequence[int],
    kept: Kept,
    say: Callable[[str], None],
) -> tuple[Evaluation, AnnData]:
    """Score ours and baselines on the test cells of a problem.

    Parameters
    ----------
    problem
        With test cells; its training and validation cells are those that ``make`` uses.
    make
        From a seed to synthetic cells.
    samples_per_class, baselines, evaluators, seeds
        See :func:`~cellstill.condense.evaluate.evaluate`; no evaluators stand for all.
    kept
        Where results are kept, and those there already.
    say
        Told which method runs.

    Returns
    -------
    The evaluation, and our cells of the first seed.
    """

    def ours(_: CondensationProblem, size: int, seed: int) -> LabelledCells:
        made[seed] = make(seed)
        return cells_of(made[seed], problem)

    def trained_on_all(seed: int) -> Mapping[tuple[str, int, str], np.ndarray]:
        return train_full(problem, judges, [seed]).predictions

    made: dict[int, AnnData] = {}
    judges = get_evaluators(list(evaluators) or None)
    names = tuple(judge.name for judge in judges)
    predictions: dict[tuple[str, int, str], np.ndarray] = {}
    for seed in seeds:
        say(f"training on all cells, seed {seed}")
        predictions |= kept.predictions(f"all_cells-{seed}", partial(trained_on_all, seed))
    full = FullData(problem, predictions)

    def judge(name: str, method: Method, seed: int) -> Condensed:
        say(f"{name}, seed {seed}")
        how: dict[str, Any] = {"samples_per_class": [samples_per_class], "seeds": [seed], "evaluators": names}
        found = evaluate(problem, {name: method}, **how, full=full, progress=False).condensed[0]
        # Not in the method, whose time and memory are measured.
        if (cells := made.pop(seed, None)) is not None and seed == seeds[0]:
            kept.keep_cells(cells)
        return found

    methods = {OURS: ours, **{name: BASELINES[name].condense for name in baselines}}
    runs = [(name, method, seed) for name, method in methods.items() for seed in seeds]
    found = [kept.result(name, seed, partial(judge, name, method, seed)) for name, method, seed in runs]
    trained_with = known_training(methods, {OURS: TRAINED_WITH})
    evaluation = Evaluation(problem, tuple(found), full, names, trained_with)
    return evaluation, kept.cells(lambda: make(seeds[0]))


def evaluation_summary(evaluation: Evaluation) -> dict[str, Any]:
    """Return a form that JSON can hold."""
    return {
        "n_test": len(evaluation.problem.test),
        "evaluators": list(evaluation.evaluators),
        "methods": evaluation.summary().to_dict(orient="records"),
        "all_cells": evaluation.full_scores.to_dict(orient="records"),
        "differences": evaluation.compare(OURS).to_dict(orient="records"),
    }


def evaluation_tables(evaluation: Evaluation, width: int) -> list[tuple[str, Table]]:
    """Lay out for a terminal: a title and a table of methods for each task, best retention first.

    ``sd`` is that of retention over seeds, ``rare`` the recall of the rarest quarter of the classes, ``gap`` how much
    more evaluators retain whose architecture the method trained with, ``robust`` the label-robust score. Columns for
    which ``width`` has no room are left out, those of :data:`_SPARED` first to last.
    """
    from rich.console import Console

    summary, full = evaluation.summary(), evaluation.full_scores
    differences = evaluation.compare(OURS).set_index(["task", "baseline"])
    unbounded = Console(width=1000)
    found = []
    for task in summary["task"].unique():
        rows = summary[summary["task"] == task]
        for n_spared in range(len(_SPARED) + 1):
            shown = [column for column in _COLUMNS if column not in _SPARED[:n_spared]]
            table = _table(rows, differences.loc[task], shown)
            if unbounded.measure(table).maximum <= width:
                break
        reached = full.loc[full["task"] == task, "macro_f1"].mean()
        n = len(evaluation.evaluators)
        judges = "1 evaluator, which reaches" if n == 1 else f"{n} evaluators, which reach"
        title = (
            f"{task}: {len(evaluation.problem.test):,} test cells, {judges} a macro-F1 of {reached:.3f} with all cells"
        )
        found.append((title, table))
    return found


def _table(rows: pd.DataFrame, differences: pd.DataFrame, columns: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    table.add_column("")
    for heading in (*(_COLUMNS[column][0] for column in columns), "scdd is ahead by"):
        table.add_column(heading, justify="right", no_wrap=True)
    for _, row in rows.iterrows():
        method = row["method"]
        cells = ["" if pd.isna(row[column]) else _COLUMNS[column][1].format(row[column]) for column in columns]
        ahead = ""
        if method != OURS and (difference := differences.loc[method]).notna().all():
            ahead = "{:+.3f} ({:+.3f}, {:+.3f})".format(*difference[["difference", "low", "high"]])
        table.add_row(f"[bold]{method}[/]" if method == OURS else method, *cells, ahead)
    return table
