"""From a file of labelled counts to a few synthetic cells: what ``cellstill condense`` runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellstill.cli._condensed_model import (
    CondensationSettings,
    build_model,
    check_keys,
    check_names,
    maker,
    only_needed,
    with_test_cells,
)
from cellstill.cli._memory import peak_mb, used_mb
from cellstill.cli._outputs import versions, write_figure, write_json
from cellstill.cli._pipeline import read_counts
from cellstill.cli._terminal import Terminal
from cellstill.io.anndata import open_anndata

if TYPE_CHECKING:
    from anndata import AnnData

    from cellstill import SCDD
    from cellstill.condense import Evaluation

RESULTS = ("condensed.h5ad", "evaluation.csv", "figures", "model", "summary.json", "test_cells.csv")
"""Names in a folder of results; one that holds anything else is never replaced."""


@dataclass(frozen=True)
class Condensation:
    """What a run made.

    Attributes
    ----------
    condensed
        Synthetic cells.
    model
        Trained, with its data.
    evaluation
        Scores on test cells, if they were asked for.
    summary
        Content of ``summary.json``.
    """

    condensed: AnnData
    model: SCDD
    evaluation: Evaluation | None
    summary: dict[str, Any]


def condense_file(settings: CondensationSettings, folder: Path, checkpoint: Path, term: Terminal) -> Condensation:
    """Condense a file, and write the results into an existing folder.

    Parameters
    ----------
    settings
        What to do.
    folder
        Where ``condensed.h5ad``, ``model/``, ``figures/`` and ``summary.json`` go, and with an evaluation
        ``evaluation.csv`` and ``test_cells.csv``: the cells that the model does not know.
    checkpoint
        Folder for the state of training and for results, from which the run goes on if it holds some.
    term
        Where to report.

    Raises
    ------
    CellstillError
        The file, a key, the labels or the counts cannot be used; raised before anything takes long.
    """
    started = time.perf_counter()
    with open_anndata(settings.path) as stored:
        check_keys(stored, settings)
        with term.stage("load", "Loading libraries"):
            from cellstill.cli import _condensed_evaluation as judging
            from cellstill.cli import _condensed_likeness as likeness
            from cellstill.cli._condensed_kept import Kept
            from cellstill.condense.capped import warn_about_capped_classes
        kept = Kept(checkpoint)
        kept.check_settings(settings)
        with term.stage("read", f"Reading {settings.path.name}: {stored.shape[0]:,} cells x {stored.shape[1]:,} genes"):
            adata, layer = read_counts(stored, settings.layer, [settings.obsm_key] if settings.obsm_key else [])
            adata = only_needed(adata, layer, settings)
    with term.stage("check", "Checking counts, labels and settings"):
        rest, test = np.arange(adata.n_obs), np.empty(0, dtype=np.int64)
        if settings.evaluate:
            check_names(settings)
            rest, test = judging.hold_out(
                adata, settings.label_keys, settings.donor_key, settings.test_size, settings.seed
            )
        model = build_model(adata[rest].copy() if settings.evaluate else adata, layer, settings)
    loaded = used_mb()
    with term.stage("train", f"Training latent space and generator on {len(rest):,} cells") as say:
        model.train(
            accelerator=settings.accelerator,
            progress=True
            if term.verbose and term.err.is_terminal
            else lambda phase, epoch, losses: say(f"{phase}, epoch {epoch + 1}"),
            checkpoint=checkpoint,
            resume=True,
        )
    problem = model.problem
    # Condensing says so too, but is not done again when a run goes on.
    warn_about_capped_classes(problem, settings.samples_per_class)
    make, evaluation = maker(model, settings), None
    judged = with_test_cells(model, adata, rest, test, layer, settings) if settings.evaluate else problem
    kept.check_cells(judged)
    if settings.evaluate:
        with term.stage("evaluate", "Condensing and judging") as say:
            evaluation, condensed = judging.evaluate_condensed(
                judged,
                lambda seed: make(seed, lambda words: say(f"scdd, seed {seed}, {words}")),
                samples_per_class=settings.samples_per_class,
                baselines=settings.baselines,
                evaluators=settings.evaluators,
                seeds=range(settings.seed, settings.seed + settings.n_seeds),
                kept=kept,
                say=say,
            )
    else:
        with term.stage("condense", f"Condensing to {settings.samples_per_class} cells of each class") as say:
            condensed = kept.cells(lambda: make(settings.seed, say))
    cells = judging.cells_of(condensed, problem)
    with term.stage("compare", "Comparing with real cells"):
        validation = _validation(model, cells, settings.seed)
        generated = likeness.generate_cells(model, settings.seed)
        compared = {"generated": generated}
        if settings.samples_per_class >= likeness.REALISTIC_SPC:
            compared["condensed"] = cells
        realism = {
            name: found
            for name, made in compared.items()
            if made is not None and (found := likeness.compare(problem, made, settings.seed)) is not None
        }
    with term.stage("draw", "Drawing the figures"):
        n_drawn = _draw(folder / "figures", model, cells, generated, evaluation, settings.seed)
    with term.stage("write", "Writing condensed.h5ad and the model"):
        model.save(folder / "model")
        condensed.write_h5ad(folder / "condensed.h5ad", compression="gzip")
        if evaluation is not None:
            evaluation.scores.to_csv(folder / "evaluation.csv", index=False)
            held_out = pd.DataFrame({"cell": adata.obs_names[test], "row": test})
            held_out.to_csv(folder / "test_cells.csv", index=False)
    peak = peak_mb()
    from cellstill.condense.output import provenance_of

    summary = {
        "input": _describe(adata, layer, settings),
        "settings": settings.to_dict(),
        "cells": {"train": len(problem.train), "validation": len(problem.validation), "test": len(test)},
        "training": {phase: _phase(losses) for phase, losses in model.history_.items()},
        "condensed": likeness.condensed_sizes(problem, condensed, cells),
        "provenance": provenance_of(condensed),
        "choice": _choice(condensed).to_dict(orient="records"),
        "validation": validation,
        "realism": realism,
        "evaluation": None if evaluation is None else judging.evaluation_summary(evaluation),
        "n_cells_drawn": n_drawn,
        "seconds": term.seconds | {"total": time.perf_counter() - started},
        "memory_mb": {"loaded": loaded, "peak": peak, "increase": max(peak - loaded, 0.0)},
        "versions": versions(),
        "warnings": list(term.warnings),
    }
    write_json(folder / "summary.json", summary)
    return Condensation(condensed, model, evaluation, summary)


def _validation(model: SCDD, cells: Any, seed: int) -> dict[str, Any]:
    """Macro-F1 of the cells that chose, by classifiers trained on synthetic cells and on all training cells."""
    from cellstill.condense.choice import mean_score, validation_score

    problem = model.problem
    found = {
        name: validation_score(problem, part, seed=seed)
        for name, part in (("condensed", cells), ("all_cells", problem.train))
    }
    return {
        "n_cells": len(problem.validation),
        **{name: mean_score(scores) for name, scores in found.items()},
        "by_judge": found,
    }


def _draw(folder: Path, model: SCDD, cells: Any, generated: Any, evaluation: Evaluation | None, seed: int) -> int:
    from cellstill.cli import _condensed_likeness as likeness
    from cellstill.pl import training_figure

    n_drawn = likeness.draw_condensed(folder, model.problem, cells, generated, seed=seed)
    write_figure(training_figure(model.history_), folder / "training")
    if evaluation is not None:
        for number, task in enumerate(evaluation.problem.tasks):
            stem = "retention" if number == 0 else f"retention_{number + 1}"
            write_figure(evaluation.plot(task=task.key), folder / stem)
    return n_drawn


def _describe(adata: AnnData, layer: str | None, settings: CondensationSettings) -> dict[str, Any]:
    counts = adata.X if layer is None else adata.layers[layer]
    return {
        "name": settings.path.name,
        "n_obs": adata.n_obs,
        "n_vars": adata.n_vars,
        "counts": "X" if layer is None else f"layers/{layer}",
        "median_library_size": float(np.median(np.asarray(counts.sum(axis=1)).ravel())),
        "labels": {key: adata.obs[key].astype(str).value_counts().to_dict() for key in settings.label_keys},
        "donors": None
        if settings.donor_key is None
        else adata.obs[settings.donor_key].astype(str).value_counts().to_dict(),
    }


def _choice(condensed: AnnData) -> pd.DataFrame:
    columns: Mapping[str, np.ndarray] = condensed.uns["scdd"]["choice"]
    return pd.DataFrame(dict(columns))


def _phase(losses: pd.DataFrame) -> dict[str, Any]:
    """Epochs of a training, and the best of them."""
    record: dict[str, Any] = {"epochs": len(losses)}
    if "validation_loss" in losses:
        record |= {
            "best_epoch": int(losses["validation_loss"].to_numpy().argmin()),
            "best_validation_loss": float(losses["validation_loss"].min()),
        }
    return record
