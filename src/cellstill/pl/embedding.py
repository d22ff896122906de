from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from cellstill.errors import InvalidArgumentError
from cellstill.pl._palette import MISSING, palettes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LEGEND = 20
_LEGEND_ROWS = 10
_GAP, _TITLE = 0.08, 0.18  # inches


def umap_coordinates(embedding: ArrayLike, *, n_neighbors: int = 15, seed: int = 0) -> NDArray[np.float32]:
    """Lay an embedding out in two dimensions by UMAP, with exact neighbours and scanpy's defaults.

    Parameters
    ----------
    embedding
        Coordinates of shape ``(n_obs, n_dims)``, used as they are: no further PCA.
    n_neighbors
        Neighbours of each cell in the graph, itself included. Smaller values show local detail and tear the picture
        into islands; larger ones favour the coarse layout.
    seed
        Seed of neighbour search and layout.

    Returns
    -------
    ndarray
        Shape ``(n_obs, 2)``, float32. Distances between islands and densities within them carry no meaning.

    Raises
    ------
    InvalidArgumentError
        If the embedding is not a finite two-dimensional array, or has no more than ``n_neighbors`` cells.

    References
    ----------
    McInnes, Healy and Melville (2018), UMAP: Uniform Manifold Approximation and Projection, arXiv:1802.03426.
    """
    points = np.asarray(embedding, dtype=np.float32)
    if points.ndim != 2 or not np.isfinite(points).all():
        raise InvalidArgumentError(
            f"embedding must be a finite array of shape (n_obs, n_dims); found shape {points.shape}"
            + (" with NaN or infinite values." if points.ndim == 2 else ".")
        )
    if not 2 <= n_neighbors < len(points):
        raise InvalidArgumentError(
            f"n_neighbors={n_neighbors} must lie between 2 and n_obs - 1 = {len(points) - 1}. Choose a smaller one."
        )
    import scanpy as sc
    from anndata import AnnData

    adata = AnnData(points)
    sc.pp.neighbors(adata, n_neighbors=n_neighbors, use_rep="X", transformer="sklearn", random_state=seed)
    sc.tl.umap(adata, random_state=seed)
    return np.asarray(adata.obsm["X_umap"], dtype=np.float32)


def embedding_figure(
    panels: Mapping[str, ArrayLike],
    colours: Mapping[str, Any],
    *,
    point_size: float | None = None,
    panel_size: float = 2.4,
    seed: int = 0,
) -> Figure:
    """Draw embeddings side by side, one column for each, coloured in one row for each labelling.

    Points are drawn in random order, so that no category hides another, and rasterised, so that a vector file stays
    small. Levels keep their colour in all columns.

    Parameters
    ----------
    panels
        Coordinates of shape ``(n_obs, 2)`` by title, for instance before and after integration; same cells throughout.
    colours
        One category per cell by name, for instance batch and cell type. Categoricals keep the order of their levels,
        others are sorted; cells without a category are grey.
    point_size
        Area of a point in square points; by default it shrinks with the number of cells.
    panel_size
        Side of a panel in inches.
    seed
        Seed of the order in which points are drawn.

    Returns
    -------
    matplotlib.figure.Figure
        Not shown and not registered with pyplot. Save it with ``figure.savefig(path, dpi=300)``.

    Raises
    ------
    InvalidArgumentError
        If nothing is given to draw, or shapes do not fit.
    """
    from matplotlib.figure import Figure

    coordinates = {title: np.asarray(array) for title, array in panels.items()}
    n_obs = _check_panels(coordinates, colours)
    order = np.random.default_rng(seed).permutation(n_obs)
    size = float(np.clip(8000 / n_obs, 0.3, 12)) * (panel_size / 2.4) ** 2 if point_size is None else point_size
    levels = {name: _categories(values) for name, values in colours.items()}
    shades = palettes([len(categories.categories) for categories in levels.values()])
    figure = Figure()
    grid = figure.subplots(len(colours), len(panels), squeeze=False)
    for row, (name, categories), shown in zip(grid, levels.items(), shades, strict=True):
        rgba = np.vstack([shown, MISSING])[categories.codes][order]
        for axes, points in zip(row, coordinates.values(), strict=True):
            axes.scatter(*points[order].T, c=rgba, s=size, linewidths=0, rasterized=True)
            _frame(axes, points)
        _legend(row[-1], name, categories, shown)
    for axes, title in zip(grid[0], coordinates, strict=True):
        axes.set_title(title, fontsize=9)
    _fit(figure, grid, panel_size)
    return figure


def _check_panels(panels: Mapping[str, NDArray], colours: Mapping[str, Any]) -> int:
    for argument, mapping in (("panels", panels), ("colours", colours)):
        if not mapping:
            raise InvalidArgumentError(f"{argument} is empty; give at least one entry by name.")
    n_obs = len(next(iter(panels.values())))
    for title, points in panels.items():
        if points.shape != (n_obs, 2) or not np.isfinite(points).all():
            raise InvalidArgumentError(
                f"panels[{title!r}] must be a finite array of shape ({n_obs}, 2), like the first panel's; "
                f"found shape {points.shape}. See umap_coordinates for embeddings of more dimensions."
            )
    for name, values in colours.items():
        if np.ndim(values) != 1 or len(values) != n_obs:
            raise InvalidArgumentError(
                f"colours[{name!r}] must give one category for each of the {n_obs} cells; "
                f"found shape {np.shape(values)}."
            )
    return n_obs


def _categories(values: Any) -> pd.Categorical[str]:
    """Levels that have cells, as text, in their own order."""
    categories = pd.Categorical(values).remove_unused_categories()
    return pd.Categorical.from_codes(categories.codes, pd.Index([str(level) for level in categories.categories]))


def _frame(axes: Axes, points: NDArray) -> None:
    """Square limits around the points, and nothing else: units of the axes carry no meaning."""
    low, high = points.min(axis=0), points.max(axis=0)
    half = max(0.54 * float((high - low).max()), 1e-6)
    centre = (low + high) / 2
    axes.set(xlim=(centre[0] - half, centre[0] + half), ylim=(centre[1] - half, centre[1] + half), aspect="equal")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color="0.75", linewidth=0.6)


def _fit(figure: Figure, grid: NDArray[np.object_], side: float) -> None:
    """Size the figure so that panels have the given side and the widest legend fits beside them."""
    rows, columns = grid.shape
    legend = max(row[-1].get_legend().get_window_extent().width for row in grid) / figure.dpi
    inner = columns * side + (columns - 1) * _GAP
    width = inner + legend + 3 * _GAP
    height = rows * side + (rows + 1) * _GAP + _TITLE
    figure.set_size_inches(width, height)
    figure.subplots_adjust(
        left=_GAP / width,
        right=(_GAP + inner) / width,
        bottom=_GAP / height,
        top=1 - (_GAP + _TITLE) / height,
        wspace=_GAP / side,
        hspace=_GAP / side,
    )


def _legend(axes: Axes, title: str, categories: pd.Categorical[str], shown: NDArray) -> None:
    """Legend outside the panel: all levels, or the commonest with a note of how many are left out."""
    from matplotlib.lines import Line2D

    def entry(label: str, colour: Any) -> Line2D:
        return Line2D([], [], marker="o", linestyle="", markersize=4.5, markeredgewidth=0, color=colour, label=label)

    names, codes = list(categories.categories), categories.codes
    kept = np.arange(len(names))
    if len(names) > MAX_LEGEND:
        counts = np.bincount(codes[codes >= 0], minlength=len(names))
        kept = np.sort(np.argsort(-counts, kind="stable")[:MAX_LEGEND])
    handles = [entry(names[code], shown[code]) for code in kept]
    if (codes < 0).any():
        handles.append(entry("missing", MISSING))
    if len(names) > MAX_LEGEND:
        handles.append(Line2D([], [], linestyle="", label=f"and {len(names) - MAX_LEGEND} more"))
    axes.legend(
        handles=handles,
        title=title,
        loc="center left",
        bbox_to_anchor=(1.02, 0.5),
        ncols=1 + (len(kept) > _LEGEND_ROWS),
        fontsize=7,
        title_fontsize=8,
        alignment="left",
        frameon=False,
        handletextpad=0.2,
        columnspacing=0.8,
        borderaxespad=0.2,
    )
