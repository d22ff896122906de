"""Train classifiers on what methods leave of the training cells, and score them on the test cells."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np

from cellstill.condense.baselines import BASELINES
from cellstill.condense.cells import Features, LabelledCells
from cellstill.condense.evaluated import Condensed, Evaluation, FullData
from cellstill.condense.evaluators import Evaluator, get_evaluators
from cellstill.condense.problem import CondensationProblem, Task
from cellstill.condense.progress import bars
from cellstill.errors import InvalidArgumentError, check_option, whole_number
from cellstill.foundation.base import accepts

_log = logging.getLogger("cellstill")

Method = Callable[[CondensationProblem, int, int], LabelledCells | Features]
"""From problem, samples per class and seed to synthetic cells: those the problem's ``budget`` allows, or fewer.

Features in place of cells count as so many cells; classifiers are trained on them, and see features of the test cells.
"""


def evaluate(
    problem: CondensationProblem,
    methods: str | Iterable[str] | Mapping[str, Method | str],
    *,
    samples_per_class: int | Iterable[int] = (1, 10, 50),
    seeds: Iterable[int] = (0, 1, 2),
    evaluators: str | Iterable[str] | None = None,
    trained_with: Mapping[str, str | Collection[str]] | None = None,
    full: FullData | None = None,
    progress: bool | None = None,
) -> Evaluation:
    """Score methods of condensation by what classifiers learn from their cells.

    Each method condenses the training cells with each budget and seed; each evaluator is trained on the result, once
    for each task of the problem, and predicts the test cells. The same evaluators trained on all training cells, once
    for each seed, are what retention refers to.

    Parameters
    ----------
    problem
        Cells, labels and their split.
    methods
        Names in :data:`~cellstill.condense.baselines.BASELINES`, or functions (or such names) by the name they get in
        the tables. A function is called as ``method(problem, samples_per_class, seed)``; use no test cells in it, and
        work on a copy of what it changes: ``AnnData(problem.train.counts)`` is none. It returns cells, or
        :class:`~cellstill.condense.cells.Features`, whose classifiers see features in place of genes.
    samples_per_class
        Budgets, or one; a class with fewer training cells is kept whole, and the compression is reported.
    seeds
        Of the methods and of the evaluators, as a list or range. Three tell a large difference, five or more a small
        one.
    evaluators
        Names in :data:`~cellstill.condense.evaluators.EVALUATORS`, or one; all six by default.
    trained_with
        Evaluators whose architecture a method trained with, by the method's name, for the cross-architecture gap. Those
        of the baselines are known.
    full
        Predictions after training on all cells, from an earlier evaluation of the same problem (``Evaluation.full``);
        what is missing in it is computed.
    progress
        Show a progress bar; ``None`` shows it in a terminal. Methods with bars of their own, such as
        :meth:`~cellstill.SCDD.condense`, should not show them then.

    Raises
    ------
    InvalidArgumentError
        A problem without test cells, an unknown method or evaluator, ``full`` of another problem, or a method that
        changes the problem, or returns anything but cells or features, or other genes, unknown classes, one class
        alone, no cells, or more cells than its budget.
    OptionalDependencyError
        A baseline needs a package that is not installed.
    """
    if not len(problem.test):
        raise InvalidArgumentError(
            "problem has no test cells, so nothing can be scored. Split it with train_size and validation_size that "
            "leave some: CondensationProblem.from_anndata(..., train_size=0.7, validation_size=0.1)."
        )
    named = _methods(methods)
    judges = get_evaluators(evaluators)
    if isinstance(seeds, Integral):
        raise InvalidArgumentError(f"seeds={seeds} may be one seed or so many. Give seeds=[{seeds}] or range({seeds}).")
    budgets, repeats = _distinct("samples_per_class", samples_per_class, least=1), _distinct("seeds", seeds, least=0)
    seen = known_training(named, trained_with or {})
    if full is not None and not full.belongs_to(problem):
        raise InvalidArgumentError("full holds predictions of another problem: its cells, labels or split differ.")
    n_steps = len(judges) * len(repeats) * (1 + len(named) * len(budgets))
    with _bar(progress, n_steps) as advance:
        condensed: list[Condensed] = []
        for name, method in named.items():
            for size in budgets:
                for seed in repeats:
                    advance(f"{name}, {size} per class", 0)
                    condensed.append(_condense(problem, name, method, size, seed, judges, advance))
        # Last, because a method that fails should do so before this, which takes longest.
        full = train_full(problem, judges, repeats, full, advance)
    return Evaluation(problem, tuple(condensed), full, tuple(judge.name for judge in judges), seen)


def train_full(
    problem: CondensationProblem,
    evaluators: Sequence[Evaluator],
    seeds: Sequence[int],
    known: FullData | None = None,
    advance: Callable[[str, int], None] = lambda label, n: None,
) -> FullData:
    """Predictions of the test cells by evaluators trained on all training cells; ``known`` ones are taken over."""
    predictions = {} if known is None else dict(known.predictions)
    for seed in seeds:
        for evaluator in evaluators:
            advance(f"all cells, {evaluator.name}", 0)
            for task in problem.tasks:
                key = (evaluator.name, seed, task.key)
                if key not in predictions:
                    predictions[key] = predict_test(problem, problem.train, task, evaluator, seed)
            advance(f"all cells, {evaluator.name}", 1)
    return FullData(problem, predictions)


def known_training(methods: Collection[str], stated: Mapping[str, str | Collection[str]]) -> dict[str, tuple[str, ...]]:
    """Evaluators whose architecture methods trained with: as stated, and as the registry has it of baselines.

    Raises
    ------
    InvalidArgumentError
        ``stated`` names none of the methods, or an unknown evaluator.
    """
    for name in stated:
        check_option("trained_with", name, methods)
    known = {name: BASELINES[name].trained_with for name in methods if name in BASELINES}
    return {
        name: tuple(judge.name for judge in get_evaluators(names, "trained_with")) if names else ()
        for name, names in {**known, **stated}.items()
    }


def predict_test(
    problem: CondensationProblem, cells: LabelledCells | Features, task: Task, evaluator: Evaluator, seed: int
) -> np.ndarray:
    """Codes that an evaluator trained on ``cells`` gives to the test cells in a task, int64, shape ``(n_test,)``."""
    own = replace(cells, codes=task.of_class[cells.codes])
    return evaluator.fit(own, len(task.names), seed).predict(cells.encode(problem.test))


def _condense(
    problem: CondensationProblem,
    name: str,
    method: Method,
    samples_per_class: int,
    seed: int,
    evaluators: Sequence[Evaluator],
    advance: Callable[[str, int], None],
) -> Condensed:
    before = problem.fingerprint()
    with _memory() as memory:
        start = time.perf_counter()
        cells = method(problem, samples_per_class, seed)
        seconds = time.perf_counter() - start
    _check_unchanged(problem, name, before)
    _check(problem, name, cells, samples_per_class)
    predictions = {}
    for evaluator in evaluators:
        for task in problem.tasks:
            predictions[evaluator.name, task.key] = predict_test(problem, cells, task, evaluator, seed)
        advance(f"{name}, {samples_per_class} per class", 1)
    _check_unchanged(problem, name, before)  # by an encoder, which was given the test cells
    _log.info("%s, %d per class, seed %d: %d cells in %.1f s.", name, samples_per_class, seed, len(cells), seconds)
    return Condensed(name, samples_per_class, seed, len(cells), seconds, memory["added_mb"], cells.n_bytes, predictions)


def _check_unchanged(problem: CondensationProblem, name: str, fingerprint: str) -> None:
    if problem.fingerprint() != fingerprint:
        raise InvalidArgumentError(
            f"{name!r} changed the cells of the problem in place, on which all scores rest. Let it work on a copy, "
            "such as AnnData(problem.train.counts.copy()), and build the problem anew."
        )


def _check(problem: CondensationProblem, name: str, cells: object, samples_per_class: int) -> None:
    if not isinstance(cells, LabelledCells | Features):
        raise InvalidArgumentError(
            f"{name!r} returned {type(cells).__name__}. A method has to return LabelledCells(counts, codes), with "
            "codes of problem.classes, or Features."
        )
    allowed = int(problem.budget(samples_per_class).sum())
    if isinstance(cells, LabelledCells) and cells.n_vars != problem.train.n_vars:
        raise InvalidArgumentError(f"{name!r} returned {cells.n_vars} genes; the problem has {problem.train.n_vars}.")
    if not 0 < len(cells) <= allowed:
        raise InvalidArgumentError(
            f"{name!r} returned {len(cells)} cells; samples_per_class={samples_per_class} allows 1 to {allowed}."
        )
    if cells.codes.min() < 0 or cells.codes.max() >= problem.n_classes:
        raise InvalidArgumentError(f"{name!r} returned classes outside 0 .. {problem.n_classes - 1}.")
    for task in problem.tasks:
        found = np.unique(task.of_class[cells.codes])
        if len(found) < 2:
            raise InvalidArgumentError(
                f"{name!r} returned cells of one category of {task.key!r} only, {task.names[found[0]]!r}. Classifiers "
                "need two at least: return cells of every class."
            )


def _methods(methods: str | Iterable[str] | Mapping[str, Method | str]) -> dict[str, Method]:
    given: dict[Any, Any] = dict(methods) if isinstance(methods, Mapping) else {name: name for name in _listed(methods)}
    if not given:
        raise InvalidArgumentError(
            f"methods is empty. Name some of: {', '.join(BASELINES)}; or give functions by name."
        )
    found: dict[str, Method] = {}
    for name, method in given.items():
        if isinstance(method, str):
            check_option("methods", method, BASELINES)
            BASELINES[method].check_installed()
            method = BASELINES[method].condense
        elif not (isinstance(name, str) and callable(method) and accepts(method, None, 1, 0)):
            raise InvalidArgumentError(
                f"methods has {method!r} under the name {name!r}. Give functions of problem, samples per class and "
                "seed by name: methods={'mine': function}."
            )
        found[name] = method
    return found


def _distinct(argument: str, values: int | Iterable[int], *, least: int) -> list[int]:
    found = [whole_number(argument, value, least=least) for value in _listed(values)]
    if not found or len(set(found)) < len(found):
        raise InvalidArgumentError(f"{argument}={found} has to hold at least one number, each once.")
    return found


def _listed(values: Any) -> list[Any]:
    return list(values) if isinstance(values, Iterable) and not isinstance(values, str) else [values]


@contextmanager
def _memory(every: float = 0.02) -> Iterator[dict[str, float]]:
    """Note how far the memory of the process rises inside the block, in MB, looked at every so many seconds."""
    import psutil

    process, done, found = psutil.Process(), threading.Event(), {"added_mb": 0.0}
    start = process.memory_info().rss

    def look() -> None:
        found["added_mb"] = max(found["added_mb"], (process.memory_info().rss - start) / 2**20)

    def watch() -> None:
        while not done.wait(every):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        look()


@contextmanager
def _bar(progress: bool | None, n_steps: int) -> Iterator[Callable[[str, int], None]]:
    with bars(progress) as shown:
        if shown is None:
            yield lambda label, n: None
            return
        task = shown.add_task("", total=n_steps)
        yield lambda label, n: shown.update(task, description=label, advance=n)
