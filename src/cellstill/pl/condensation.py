"""Synthetic beside real cells: one embedding, the most variable genes, zeros, and variance against the mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from cellstill.data.counts import as_csr
from cellstill.data.expression import gene_moments, log_expression, sparse_moments
from cellstill.errors import InvalidArgumentError
from cellstill.pl._palette import palettes
from cellstill.pl.embedding import _categories, _fit, _frame, _legend, umap_coordinates

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_REAL, _CONTROL, _SYNTHETIC = "#94a4a2", "#ffa90e", "#3f90da"
_N_BINS = 20
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def joint_umap(
    real: Any, synthetic: Any, *, n_comps: int = 30, n_neighbors: int = 15, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    r"""Lay real and synthetic cells out together: UMAP of principal components of :math:`\log(1 + 10^4 x / l)`.

    The components are those of the real cells. The layout is made of all cells at once, so that both are treated alike.

    Parameters
    ----------
    real, synthetic
        Counts of the same genes, sparse or dense. With more than some ten thousand real cells, pass a sample.
    n_comps
        Principal components. More keep finer structure, and more noise.
    n_neighbors
        See :func:`~cellstill.pl.umap_coordinates`.
    seed
        Of solver and layout.

    Returns
    -------
    Coordinates of the real and of the synthetic cells, float32, two columns each.
    """
    from sklearn.decomposition import PCA

    r, s = _counts(real=real, synthetic=synthetic)
    if n_comps < 1:
        raise InvalidArgumentError(f"n_comps={n_comps} must be at least 1.")
    expression = [log_expression(x).astype(np.float64) for x in (r, s)]
    pca = PCA(min(n_comps, min(r.shape) - 1), svd_solver="arpack", random_state=seed).fit(expression[0])
    layout = umap_coordinates(np.vstack([pca.transform(x) for x in expression]), n_neighbors=n_neighbors, seed=seed)
    return layout[: r.shape[0]], layout[r.shape[0] :]


def condensed_embedding_figure(
    real: ArrayLike,
    synthetic: ArrayLike,
    real_labels: Any,
    synthetic_labels: Any,
    *,
    title: str = "class",
    panel_size: float = 3.6,
    seed: int = 0,
) -> Figure:
    """Draw synthetic cells, with an outline, over real ones, in the colours of their classes.

    Parameters
    ----------
    real, synthetic
        Coordinates in one plane, ``(n_real, 2)`` and ``(n_synthetic, 2)``; see :func:`joint_umap`.
    real_labels, synthetic_labels
        Class of each cell. Categoricals keep the order of the real ones' levels; cells without a class are grey.
    title
        Title of the legend, for instance the column of ``obs``.
    panel_size
        Side of the panel in inches.
    seed
        Of the order in which points are drawn.

    Returns
    -------
    matplotlib.figure.Figure
        Not shown and not registered with pyplot. Real cells are the first collection of the axes, synthetic ones the
        second.
    """
    from matplotlib.figure import Figure

    points = [np.asarray(real), np.asarray(synthetic)]
    for name, array in zip(("real", "synthetic"), points, strict=True):
        if array.ndim != 2 or array.shape[1] != 2 or not len(array) or not np.isfinite(array).all():
            raise InvalidArgumentError(
                f"{name} must be a finite array of shape (n_{name}, 2); found shape {array.shape}. See joint_umap."
            )
    real_names, synthetic_names = _labels(real_labels, synthetic_labels, *map(len, points))
    both = _categories(pd.Categorical(np.concatenate([real_names, synthetic_names]), categories=real_names.categories))
    (shades,) = palettes([len(both.categories)])
    rgba = np.vstack([shades, [0.87, 0.87, 0.87, 1.0]])[both.codes]
    n_real = len(points[0])
    rng = np.random.default_rng(seed)
    figure = Figure()
    grid = figure.subplots(1, 1, squeeze=False)
    axes = grid[0, 0]
    size = float(np.clip(8000 / n_real, 0.3, 12)) * (panel_size / 2.4) ** 2
    styles: tuple[dict[str, Any], ...] = (
        {"s": size, "linewidths": 0, "alpha": 0.45},
        {"s": max(1.6 * size, 14.0), "linewidths": 0.5, "edgecolors": "black"},
    )
    for array, colours, style in zip(points, (rgba[:n_real], rgba[n_real:]), styles, strict=True):
        order = rng.permutation(len(array))
        axes.scatter(*array[order].T, c=colours[order], rasterized=True, **style)
    _frame(axes, np.vstack(points))
    _legend(axes, title, both, shades)
    axes.set_title(f"{n_real:,} real cells, {len(points[1]):,} synthetic (outlined)", fontsize=9)
    _fit(figure, grid, panel_size)
    return figure


def gene_panels_figure(
    real: Any,
    synthetic: Any,
    real_labels: Any,
    synthetic_labels: Any,
    names: Sequence[str] | NDArray,
    *,
    n_genes: int = 8,
    genes: Sequence[str] | None = None,
    max_points: int = 50,
    seed: int = 0,
) -> Figure:
    r"""Draw the distribution of genes, class by class: boxes of real cells, and synthetic cells as points beside them.

    Boxes span the quartiles of :math:`\log(1 + 10^4 x / l)`, with whiskers from 5 to 95 %; the bars over the points
    are medians of the synthetic cells.

    Parameters
    ----------
    real, synthetic
        Counts of the same genes, sparse or dense.
    real_labels, synthetic_labels
        Class of each cell, without NaN.
    names
        Names of the genes, ``(n_vars,)``.
    n_genes
        Panels, of the genes of the highest variance in the real cells.
    genes
        Names of the genes to draw instead.
    max_points
        Synthetic cells drawn of each class, at random where there are more; medians are of all.
    seed
        Of the points' sideways jitter, and of the choice among them.

    Returns
    -------
    matplotlib.figure.Figure
        One panel for each gene, titled by its name. Not shown and not registered with pyplot.
    """
    from matplotlib.figure import Figure

    r, s = _counts(real=real, synthetic=synthetic)
    known = pd.Index(np.asarray(names).astype(str))
    if len(known) != r.shape[1]:
        raise InvalidArgumentError(f"names has {len(known)} entries; there are {r.shape[1]} genes. Give each its name.")
    expression = [log_expression(x) for x in (r, s)]
    columns = _chosen_genes(expression[0], known, n_genes, genes)
    of_real, of_synthetic = _labels(real_labels, synthetic_labels, r.shape[0], s.shape[0])
    if (of_real.codes < 0).any() or (of_synthetic.codes < 0).any():
        raise InvalidArgumentError("real_labels and synthetic_labels must not be missing (NaN). Drop these cells.")
    classes = list(of_real.categories)
    rng = np.random.default_rng(seed)
    n_columns = min(4, len(columns))
    n_rows = -(-len(columns) // n_columns)
    width = max(2.2, 0.5 + 0.3 * len(classes))
    figure = Figure(figsize=(width * n_columns, 1.9 * n_rows + 0.4), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True).ravel()
    for axes, column in zip(grid, columns, strict=False):
        values = [x[:, [column]].toarray().ravel() for x in expression]
        for k in range(len(classes)):
            _box(axes, k - 0.2, values[0][of_real.codes == k])
            _points(axes, k + 0.2, values[1][of_synthetic.codes == k], max_points, rng)
        axes.set_title(known[column], fontsize=8)
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(columns) :]:
        axes.remove()
    for axes in grid[max(len(columns) - n_columns, 0) : len(columns)]:
        axes.tick_params(labelbottom=True)
    figure.supylabel("log(1 + counts per 10,000)", fontsize=8)
    figure.suptitle("real cells (boxes) and synthetic cells (points)", fontsize=9)
    return figure


def zero_fraction_figure(real: Any, synthetic: Any, *, control: Any = None) -> Figure:
    """Draw each gene's share of zeros in synthetic against that in real cells, beside other real cells.

    Parameters
    ----------
    real, synthetic
        Counts of the same genes, sparse or dense. Sets of one composition, such as
        :func:`~cellstill.metrics.realism.match_classes` draws, or classes make the differences.
    control
        Counts of other real cells, drawn in a panel of their own: as far from the diagonal is what chance makes.

    Returns
    -------
    matplotlib.figure.Figure
        Titles have the mean absolute difference. Not shown and not registered with pyplot.
    """
    from matplotlib.figure import Figure

    sets = {"other real cells": control} if control is not None else {}
    sets |= {"synthetic cells": synthetic}
    r, *others = _counts(real=real, **sets)
    figure = Figure(figsize=(3.0 * len(sets), 3.0), layout="constrained")
    x = _zero_fraction(r)
    for axes, name, counts in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets, others, strict=True):
        y = _zero_fraction(counts)
        axes.plot([0, 1], [0, 1], color="black", linewidth=0.6, zorder=0)
        colour = _SYNTHETIC if name == "synthetic cells" else _CONTROL
        axes.scatter(x, y, s=4, color=colour, linewidths=0, alpha=0.6, rasterized=True)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        axes.set_title(f"{name}: mean difference {np.abs(x - y).mean():.3f}", fontsize=8)
        axes.set_xlabel("share of zeros in real cells", fontsize=8)
        axes.set_ylabel(f"share of zeros in {name}", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def mean_variance_figure(real: Any, synthetic: Any, *, control: Any = None) -> Figure:
    """Draw the variance of each gene against its mean, and the trend, in real and synthetic cells.

    Cells are scaled to the median depth of the real ones. The trend is the median of both over 20 bins of genes, sorted
    by their mean; the thin line is variance = mean, which Poisson noise alone would have.

    Parameters
    ----------
    real, synthetic
        Counts of the same genes, sparse or dense; sets of one composition, see :func:`zero_fraction_figure`.
    control
        Counts of other real cells, whose trend is drawn too.

    Returns
    -------
    matplotlib.figure.Figure
        Points and a trend for each set of cells, labelled. Not shown and not registered with pyplot.
    """
    from matplotlib.figure import Figure

    sets = {"real": real} | ({"other real cells": control} if control is not None else {}) | {"synthetic": synthetic}
    found = _counts(**sets)
    depth = float(np.median(np.asarray(found[0].sum(axis=1, dtype=np.float64))))
    figure = Figure(figsize=(3.6, 3.2), layout="constrained")
    axes = figure.subplots()
    colours = {"real": _REAL, "other real cells": _CONTROL, "synthetic": _SYNTHETIC}
    every = []
    for name, counts in zip(sets, found, strict=True):
        if counts.shape[0] < 2:
            raise InvalidArgumentError(f"{name} has one cell, which has no variance. Draw two cells at least.")
        mean, variance = gene_moments(counts, depth)
        drawn = variance > 1e-12 * np.square(mean)  # more than rounding leaves of equal counts
        if not drawn.any():
            raise InvalidArgumentError(f"{name}: no gene varies among these cells, so that there is no trend to draw.")
        mean, variance = mean[drawn], variance[drawn]
        every.append(mean)
        if name != "other real cells":
            axes.scatter(mean, variance, s=3, color=colours[name], linewidths=0, alpha=0.35, rasterized=True)
        bins = np.array_split(np.argsort(mean, kind="stable"), min(_N_BINS, len(mean)))
        trend = np.array([[np.median(mean[genes]), np.median(variance[genes])] for genes in bins])
        style = "--" if name == "other real cells" else "-"
        axes.plot(*trend.T, style, color=colours[name], linewidth=1.6, label=name, zorder=3)
    ends = [min(map(np.min, every)), max(map(np.max, every))]
    axes.plot(ends, ends, color="black", linewidth=0.6, label="variance = mean", zorder=2)
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel(f"mean of a gene, in cells of {depth:,.0f} counts", fontsize=8)
    axes.set_ylabel("variance", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    return figure


def _counts(**sets: Any) -> list[sp.csr_matrix]:
    found = {name: as_csr(counts) for name, counts in sets.items()}
    if len({x.shape[1] for x in found.values()}) > 1 or min(x.shape[0] for x in found.values()) < 1:
        shapes = ", ".join(f"{name} {x.shape}" for name, x in found.items())
        raise InvalidArgumentError(f"These must have the same genes, and at least one cell: {shapes}.")
    return list(found.values())


def _labels(
    real: Any, synthetic: Any, n_real: int, n_synthetic: int
) -> tuple[pd.Categorical[str], pd.Categorical[str]]:
    """Both as categories of one order: those of the real cells, then those that synthetic cells alone have."""
    for name, values, n_obs in (("real_labels", real, n_real), ("synthetic_labels", synthetic, n_synthetic)):
        if np.ndim(values) != 1 or len(values) != n_obs:
            raise InvalidArgumentError(
                f"{name} must give one class for each of the {n_obs} cells; found {len(values)}."
            )
    first, second = _categories(real), _categories(synthetic)
    order = [*first.categories, *(name for name in second.categories if name not in first.categories)]
    return first.set_categories(order), second.set_categories(order)


def _chosen_genes(
    expression: sp.csr_matrix, known: pd.Index, n_genes: int, genes: Sequence[str] | None
) -> NDArray[np.integer]:
    if genes is None:
        if n_genes < 1:
            raise InvalidArgumentError(f"n_genes={n_genes} must be at least 1.")
        return np.argsort(-sparse_moments(expression)[1], kind="stable")[:n_genes]
    if not len(genes) or (missing := [name for name in genes if name not in known]):
        raise InvalidArgumentError(
            f"genes names {missing[:5] if len(genes) else 'none'}; names has {', '.join(known[:5])}, ... Name genes "
            "that are there."
        )
    return np.array([int(np.argmax(known == name)) for name in genes])


def _box(axes: Axes, at: float, values: NDArray[np.floating]) -> None:
    if not len(values):
        return
    low, q1, median, q3, high = np.quantile(values, _QUANTILES)
    box = {"med": median, "q1": q1, "q3": q3, "whislo": low, "whishi": high, "fliers": []}
    line = {"color": "#717581", "linewidth": 0.7}
    axes.bxp(
        [box],
        positions=[at],
        widths=0.3,
        manage_ticks=False,
        showfliers=False,
        patch_artist=True,
        boxprops={"facecolor": _REAL, "linewidth": 0, "alpha": 0.6},
        medianprops={"color": "black", "linewidth": 1.0},
        whiskerprops=line,
        capprops=line,
    )


def _points(axes: Axes, at: float, values: NDArray[np.floating], max_points: int, rng: np.random.Generator) -> None:
    if not len(values):
        return
    shown = values if len(values) <= max_points else rng.choice(values, max_points, replace=False)
    x = at + rng.uniform(-0.13, 0.13, len(shown))
    axes.scatter(x, shown, s=5, color=_SYNTHETIC, linewidths=0, alpha=0.8)
    axes.hlines(np.median(values), at - 0.17, at + 0.17, color="#bd1f01", linewidth=1.0, zorder=4)


def _zero_fraction(counts: sp.csr_matrix) -> NDArray[np.float64]:
    return 1 - np.bincount(counts.indices[counts.data != 0], minlength=counts.shape[1]) / counts.shape[0]
