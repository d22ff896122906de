"""Synthetic beside real cells: figures, and the metrics of realism."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellstill.cli._condensed_evaluation import cells_of
from cellstill.cli._outputs import MAX_DRAWN, write_figure
from cellstill.cli._scores import sample_cells
from cellstill.condense import CondensationProblem, LabelledCells

if TYPE_CHECKING:
    from anndata import AnnData

    from cellstill import SCDD

N_GENERATED = 100
"""Most cells of a class that are generated to be compared with real ones."""

MIN_COMPARED = 10
"""Fewer matched cells than this tell nothing of realism."""

REALISTIC_SPC = 50
"""From so many cells of each class on, condensed cells themselves are compared."""


def generate_cells(model: SCDD, seed: int) -> LabelledCells | None:
    """Generate half as many cells of each class as are learned from, and no more than :data:`N_GENERATED`.

    Real cells of a class are halved for the control, so more could not be compared. ``None`` where all classes have one
    cell.
    """
    problem = model.problem
    sizes = np.minimum(np.bincount(problem.train.codes, minlength=problem.n_classes) // 2, N_GENERATED)
    made = [
        cells_of(model.generate(problem.classes[code], int(n), seed=seed), problem) for code, n in enumerate(sizes) if n
    ]
    if not made:
        return None
    counts = sp.csr_matrix(sp.vstack([cells.counts for cells in made], format="csr"))
    return LabelledCells(counts, np.concatenate([cells.codes for cells in made]))


def compare(problem: CondensationProblem, cells: LabelledCells, seed: int) -> dict[str, dict[str, float]] | None:
    """Metrics of realism: of synthetic cells, and of one half of the training cells against the other, the control.

    Returns
    -------
    ``"synthetic"`` and ``"control"`` by metric; ``None`` where too few cells can be compared.
    """
    from cellstill.metrics import realism_table

    real, synthetic, control = matched(problem, cells, seed)
    if len(real) < MIN_COMPARED:
        return None
    table = realism_table(
        real.counts,
        synthetic.counts,
        real.codes,
        synthetic.codes,
        control=control.counts,
        control_labels=control.codes,
        seed=seed,
    )
    found = {str(metric): {str(of): float(value) for of, value in row.items()} for metric, row in table.iterrows()}
    return found | {"n_cells": {"synthetic": table.attrs["n_cells"], "control": table.attrs["n_cells"]}}


def matched(
    problem: CondensationProblem, cells: LabelledCells, seed: int
) -> tuple[LabelledCells, LabelledCells, LabelledCells]:
    """Real cells, synthetic ones, and other real ones: sets of one size and composition.

    Of each class, the real cells are the one half of the training cells and the control the other; classes of a single
    training cell are left out.
    """
    train, rng = problem.train, np.random.default_rng(seed)
    rows: tuple[list[np.ndarray], ...] = ([], [], [])
    for code in range(problem.n_classes):
        real = rng.permutation(train.of_class(code))
        synthetic = rng.permutation(cells.of_class(code))
        n = min(len(real) // 2, len(synthetic))
        for part, own in zip(rows, (real[:n], synthetic[:n], real[n : 2 * n]), strict=True):
            part.append(own)
    first, made, second = (np.sort(np.concatenate(part)) for part in rows)
    return train[first], cells[made], train[second]


def draw_condensed(
    folder: Path,
    problem: CondensationProblem,
    condensed: LabelledCells,
    generated: LabelledCells | None,
    *,
    seed: int,
) -> int:
    """Draw real and condensed cells in one UMAP, and the most variable genes; zeros and variances; returns cells drawn.

    Zeros and variances are drawn of condensed cells, and of generated ones as ``generated_zeros`` and
    ``generated_mean_variance``, beside the control of :func:`matched`.
    """
    from cellstill.pl import (
        condensed_embedding_figure,
        gene_panels_figure,
        joint_umap,
        mean_variance_figure,
        zero_fraction_figure,
    )

    drawn = sample_cells(len(problem.train), MAX_DRAWN, seed)
    real = problem.train[drawn]
    n_neighbors = min(15, len(real) + len(condensed) - 1)
    places = joint_umap(real.counts, condensed.counts, n_neighbors=n_neighbors, seed=seed)
    for number, task in enumerate(problem.tasks):
        names = np.array(task.names)
        of_real, of_condensed = (
            pd.Categorical(names[task.of_class[cells.codes]], categories=names) for cells in (real, condensed)
        )
        stem = "umap" if number == 0 else f"umap_{number + 1}"
        write_figure(
            condensed_embedding_figure(*places, of_real, of_condensed, title=task.key, seed=seed), folder / stem
        )
        if number == 0:
            panels = gene_panels_figure(real.counts, condensed.counts, of_real, of_condensed, problem.genes, seed=seed)
            write_figure(panels, folder / "genes")
    for prefix, cells in (("", condensed), ("generated_", generated)):
        sets: Any = () if cells is None else matched(problem, cells, seed)
        if sets and len(sets[0]) > 1:
            first, made, second = (part.counts for part in sets)
            write_figure(zero_fraction_figure(first, made, control=second), folder / f"{prefix}zeros")
            write_figure(mean_variance_figure(first, made, control=second), folder / f"{prefix}mean_variance")
    return len(drawn)


def condensed_sizes(problem: CondensationProblem, condensed: AnnData, cells: LabelledCells) -> dict[str, Any]:
    """How many cells became how many, by class."""
    real, made = (np.bincount(part.codes, minlength=problem.n_classes) for part in (problem.train, cells))
    return {
        "n_real": len(problem.train),
        "n_synthetic": len(cells),
        "n_classes": problem.n_classes,
        "n_vars": condensed.n_vars,
        "compression": len(problem.train) / len(cells),
        "classes": {
            name: {"real": int(a), "synthetic": int(b)} for name, a, b in zip(problem.classes, real, made, strict=True)
        },
    }
