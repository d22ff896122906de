"""Do synthetic cells look like real ones? Every number stands beside what other real cells reach."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from cellstill.data.expression import log_expression
from cellstill.errors import CellstillWarning, InvalidArgumentError, level_outside
from cellstill.metrics._gene_agreement import (
    N_CORRELATED,
    check_integers,
    class_mean_correlation,
    common_classes,
    fold_change_slope,
    gene_correlation_agreement,
    mean_variance_error,
    same_genes,
    zero_fraction_error,
    zero_fraction_excess,
)
from cellstill.metrics._inputs import category_codes
from cellstill.metrics._point_agreement import mixing, mmd, within_class_variance_ratio

__all__ = [
    "class_mean_correlation",
    "class_recovery",
    "fold_change_slope",
    "forest_auroc",
    "gene_correlation_agreement",
    "match_classes",
    "mean_variance_error",
    "mixing",
    "mmd",
    "realism_table",
    "within_class_variance_ratio",
    "zero_fraction_error",
    "zero_fraction_excess",
]

_MIN_CELLS = 10
_N_FOLDS = 5


def realism_table(
    real: Any,
    synthetic: Any,
    real_labels: Any,
    synthetic_labels: Any,
    *,
    control: Any = None,
    control_labels: Any = None,
    n_genes: int = N_CORRELATED,
    n_comps: int = 30,
    n_estimators: int = 100,
    max_cells: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    r"""Compare synthetic with real cells, and held-out real cells with the same real cells.

    Of each class, as many real, synthetic and control cells are drawn as the smallest of the three sets has: all
    comparisons are of sets of one size and composition, and only what the cells are can differ. Principal components
    are of :math:`\log(1 + 10^4 x / l)` of the three sets together, so that none of them is the one they fit best.
    Synthetic cells that were made of the ``real`` ones share their noise, and may come closer than the control.

    Parameters
    ----------
    real, synthetic
        Counts of the same genes, ``(n_real, n_vars)`` and ``(n_synthetic, n_vars)``, sparse or dense. Choose genes
        before; a thousand or two is usual.
    real_labels, synthetic_labels
        Class of each cell, without NaN.
    control, control_labels
        Counts and classes of real cells that are not among ``real``. Default: half of each class of ``real``, drawn at
        random, is the control, and the other half is what all are compared with.
    n_genes
        Most variable genes whose correlations are compared.
    n_comps
        Principal components. More keep finer structure, and more noise.
    n_estimators
        Trees of the forest, which takes most of the time.
    max_cells
        Largest number of cells in each set; more are thinned, alike in all classes.
    seed
        Of the draws, the forest and the solver.

    Returns
    -------
    DataFrame
        Columns ``synthetic`` and ``control``; one row for each of ``class_mean_correlation``,
        ``gene_correlation_agreement``, ``class_recovery``, ``forest_auroc``, ``mixing``, ``mmd``,
        ``zero_fraction_error``, ``zero_fraction_excess``, ``mean_variance_error``, ``within_class_variance_ratio`` and
        ``fold_change_slope``: the functions of these names. ``attrs`` has ``n_cells`` of each set, ``n_classes``,
        ``n_genes`` (correlated) and ``n_comps``.

    Raises
    ------
    InvalidArgumentError
        The sets differ in genes, share no class, or have fewer than ten cells in common classes, or real cells are not
        integer counts.
    """
    r, s = same_genes(real=real, synthetic=synthetic)
    check_integers(real=r)
    labels = [_text("real_labels", real_labels, r), _text("synthetic_labels", synthetic_labels, s)]
    if control is None:
        reference, held_out = _halves(labels[0], seed)
        r, c = r[reference], r[held_out]
        labels = [labels[0][reference], labels[1], labels[0][held_out]]
    else:
        r, c = same_genes(real=r, control=control)
        check_integers(control=c)
        labels.append(_text("control_labels", control_labels, c))
    rows = match_classes(labels, max_cells=max_cells, seed=seed)
    if len(rows[0]) < _MIN_CELLS:
        raise InvalidArgumentError(
            f"real, synthetic and control have {len(rows[0])} cells of like classes; at least {_MIN_CELLS} of each are "
            "needed. Make more synthetic cells: realism is judged from about 50 of a class."
        )
    r, s, c = (x[mine] for x, mine in zip((r, s, c), rows, strict=True))
    labels = [label[mine] for label, mine in zip(labels, rows, strict=True)]
    at, *places = _components((r, s, c), n_comps, seed)

    def compared(x: sp.csr_matrix, points: NDArray, classes: NDArray) -> dict[str, float]:
        return {
            "class_mean_correlation": class_mean_correlation(r, x, labels[0], classes),
            "gene_correlation_agreement": gene_correlation_agreement(r, x, n_genes=n_genes),
            "class_recovery": class_recovery(r, x, labels[0], classes),
            "forest_auroc": forest_auroc(r, x, n_estimators=n_estimators, seed=seed),
            "mixing": mixing(at, points),
            "mmd": mmd(at, points),
            "zero_fraction_error": zero_fraction_error(r, x),
            "zero_fraction_excess": zero_fraction_excess(r, x),
            "mean_variance_error": mean_variance_error(r, x),
            "within_class_variance_ratio": within_class_variance_ratio(at, points, labels[0], classes),
            "fold_change_slope": fold_change_slope(r, x, labels[0], classes),
        }

    table = pd.DataFrame({"synthetic": compared(s, places[0], labels[1]), "control": compared(c, places[1], labels[2])})
    table.attrs = {
        "n_cells": len(rows[0]),
        "n_classes": len(np.unique(labels[0])),
        "n_genes": min(n_genes, r.shape[1]),
        "n_comps": at.shape[1],
    }
    return table.rename_axis("metric")


def class_recovery(real: Any, synthetic: Any, real_labels: Any, synthetic_labels: Any) -> float:
    r"""Share of synthetic cells whose class a classifier finds that was trained on real cells.

    The classifier is multinomial logistic regression of :math:`\log(1 + 10^4 x / l)` with scikit-learn's defaults,
    but up to 1,000 iterations.

    Parameters
    ----------
    real, synthetic
        Counts of the same genes, ``(n_real, n_vars)`` and ``(n_synthetic, n_vars)``, sparse or dense. Both are made
        dense.
    real_labels, synthetic_labels
        Class of each cell, without NaN. Classes that are in one set only are left out.

    Returns
    -------
    float
        Best is what other real cells reach. Less: some cells are of no class, or of another one. More: they are more
        typical of their class than real ones. Chance is at most the share of the commonest class.

    Raises
    ------
    InvalidArgumentError
        The sets differ in genes, or share fewer than two classes.
    """
    from sklearn.linear_model import LogisticRegression

    r, s = same_genes(real=real, synthetic=synthetic)
    codes, n_classes = common_classes(r, s, real_labels, synthetic_labels)
    if n_classes < 2:
        raise InvalidArgumentError("real_labels and synthetic_labels share one class; to be told apart it takes two.")
    learned, asked = ((log_expression(x[c >= 0]).toarray(), c[c >= 0]) for x, c in zip((r, s), codes, strict=True))
    return float(LogisticRegression(max_iter=1000).fit(*learned).score(*asked))


def forest_auroc(real: Any, synthetic: Any, *, n_estimators: int = 100, seed: int = 0) -> float:
    r"""AUROC of a random forest that tells synthetic from real cells, by five-fold cross-validation.

    Parameters
    ----------
    real, synthetic
        Counts of the same genes, sparse or dense; the forest sees :math:`\log(1 + 10^4 x / l)`, which hides depth but
        not zeros. Both are made dense. Sets of like size and composition, or it tells classes apart instead.
    n_estimators
        Trees. More are steadier, and take longer.
    seed
        Of folds and trees.

    Returns
    -------
    float
        0.5 cannot be told apart, 1 always. Less than 0.5 beyond chance tells of copies: the twin of a cell has the
        other label.
    """
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    r, s = same_genes(real=real, synthetic=synthetic)
    if min(r.shape[0], s.shape[0]) < _N_FOLDS:
        raise InvalidArgumentError(
            f"real has {r.shape[0]} and synthetic {s.shape[0]} cells; {_N_FOLDS}-fold cross-validation takes "
            f"{_N_FOLDS} of each at least."
        )
    expression = np.vstack([log_expression(x).toarray() for x in (r, s)])  # trees take sparse data at twice the time
    is_synthetic = np.repeat([0, 1], [r.shape[0], s.shape[0]])
    forest = RandomForestClassifier(n_estimators=n_estimators, random_state=seed)
    folds = StratifiedKFold(_N_FOLDS, shuffle=True, random_state=seed)
    return float(cross_val_score(forest, expression, is_synthetic, scoring="roc_auc", cv=folds).mean())


def match_classes(labels: Sequence[Any], *, max_cells: int | None = None, seed: int = 0) -> list[NDArray[np.integer]]:
    """Draw as many cells of each class from every set as the smallest has, at random.

    Parameters
    ----------
    labels
        Class of each cell, for each set of cells.
    max_cells
        Largest number drawn from a set; the classes are thinned alike, to one cell at least.
    seed
        Of the draw.

    Returns
    -------
    Sorted positions of the cells drawn, for each set. Classes that some set lacks are left out, with a warning.
    """
    sets = [np.asarray(pd.Series(values).astype(str)) for values in labels]
    counted = [dict(zip(*np.unique(values, return_counts=True), strict=True)) for values in sets]
    every = sorted(set().union(*counted))
    size = {name: min(known.get(name, 0) for known in counted) for name in every}
    missing = [name for name in every if not size[name]]
    if len(missing) == len(every):
        raise InvalidArgumentError("labels: no class is in all sets of cells, so that none can be compared.")
    if missing:
        warnings.warn(
            f"The classes {missing} are not in all sets of cells, and are not compared.",
            CellstillWarning,
            stacklevel=level_outside(),
        )
    total = sum(size.values())
    if max_cells is not None and total > max_cells:
        size = {name: max(1, n * max_cells // total) if n else 0 for name, n in size.items()}
    rng = np.random.default_rng(seed)
    return [
        np.sort(np.concatenate([rng.permutation(np.flatnonzero(values == name))[: size[name]] for name in every]))
        for values in sets
    ]


def _components(sets: Sequence[sp.csr_matrix], n_comps: int, seed: int) -> list[NDArray[np.float64]]:
    """Principal components of the log expression of all cells together, for each set of them.

    Components fitted to one of the sets would follow its noise, and find less variance in any other.
    """
    from sklearn.decomposition import PCA

    expression = log_expression(sp.vstack(sets, format="csr")).astype(np.float64)
    if n_comps < 1:
        raise InvalidArgumentError(f"n_comps={n_comps} must be at least 1.")
    n_comps = min(n_comps, min(expression.shape) - 1)
    points = PCA(n_comps, svd_solver="arpack", random_state=seed).fit_transform(expression)
    return np.split(points, np.cumsum([x.shape[0] for x in sets])[:-1])


def _halves(labels: NDArray, seed: int) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Two halves of every class; the odd cell goes to the first."""
    rng = np.random.default_rng(seed)
    is_second = np.zeros(len(labels), dtype=bool)
    for name in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == name))
        is_second[members[: len(members) // 2]] = True
    return np.flatnonzero(~is_second), np.flatnonzero(is_second)


def _text(argument: str, labels: Any, counts: sp.csr_matrix) -> NDArray:
    codes, names = category_codes(argument, labels, counts.shape[0])
    return np.array([str(name) for name in names])[codes]
