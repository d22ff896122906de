from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cellstill.errors import InvalidArgumentError, check_key
from cellstill.pl._palette import palettes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import BboxBase

_EFFECTS = {
    "lfc_borrowed": "borrowed log2 fold change",
    "lfc_shrunken": "shrunken log2 fold change",
    "lfc": "log2 fold change",
    "lfc_mean": "log2 fold change (posterior mean)",
}
_UNCALLED = "#94a4a2"
_N_COLUMNS = 4
_HEADROOM = 1.08
_OFFSET = 3.0
_PLACES = [(1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1)]


def volcano_figure(
    tables: Mapping[str, pd.DataFrame], *, fdr: float, threshold: float = 0.0, n_labels: int = 10
) -> Figure:
    """Draw how certain each gene is against how much it changes, one panel for each comparison.

    The height of a gene is -log10 of its FDR (adjusted p-value, or posterior expected FDR), so that the genes called
    are those above the dashed line. Genes whose FDR is 0 are triangles above all others; genes without one, which were
    not tested, are not drawn.

    Parameters
    ----------
    tables
        Tables of results (:attr:`cellstill.de.DEResult.table`) by title. Borrowed or shrunken fold changes are
        drawn where there are any.
    fdr
        FDR of the dashed line.
    threshold
        Effect floor of the test, log2; dotted lines mark it on both sides if it is above 0.
    n_labels
        Genes to name in each panel, most certain first; a name that would lie on another, or outside of the panel, is
        left out.

    Returns
    -------
    matplotlib.figure.Figure
        Not shown and not registered with pyplot. Save it with ``figure.savefig(path, dpi=300)``.

    Raises
    ------
    InvalidArgumentError, MissingKeyError
        Nothing to draw, or a table without a column that is needed.
    """

    def draw(axes: Axes, table: pd.DataFrame) -> pd.DataFrame:
        height = -np.log10(table["fdr"].where(table["fdr"] > 0))
        line = -np.log10(fdr)
        top = _HEADROOM * max(line, height.max() if height.notna().any() else 0.0)
        at_top = table["fdr"] == 0
        points = table.assign(x=table[_effect(table)], y=height.mask(at_top, top)).dropna(subset=["x", "y"])
        _scatter(axes, points, at_top.loc[points.index])
        axes.axhline(line, color="0.4", lw=0.8, ls="--", zorder=0)
        axes.annotate(
            f"FDR {fdr:g}", (1, line), (-2, 2), axes.get_yaxis_transform(), "offset points", ha="right", fontsize=6
        )
        for floor in (-threshold, threshold) if threshold > 0 else ():
            axes.axvline(floor, color="0.4", lw=0.8, ls=":", zorder=0)
        axes.set_ylim(0, _HEADROOM * top)
        axes.set_xlabel(_EFFECTS[_effect(table)], fontsize="small")
        axes.set_ylabel("-log10 FDR", fontsize="small")
        return points

    return _panels(tables, draw, ("fdr",), n_labels)


def ma_figure(tables: Mapping[str, pd.DataFrame], *, threshold: float = 0.0, n_labels: int = 10) -> Figure:
    """Draw how much each gene changes against how much of it there is, one panel for each comparison.

    Genes without a fold change, or without a count, are not drawn.

    Parameters
    ----------
    tables
        Tables with ``base_mean`` (:attr:`cellstill.de.DEResult.table`) by title. Borrowed or shrunken fold changes
        are drawn where there are any.
    threshold, n_labels
        As in :func:`volcano_figure`; floors are horizontal here.

    Returns
    -------
    matplotlib.figure.Figure
        Not shown and not registered with pyplot. Save it with ``figure.savefig(path, dpi=300)``.

    Raises
    ------
    InvalidArgumentError, MissingKeyError
        Nothing to draw, or a table without a column that is needed, such as one without ``base_mean``.
    """

    def draw(axes: Axes, table: pd.DataFrame) -> pd.DataFrame:
        points = table.assign(x=table["base_mean"].where(table["base_mean"] > 0), y=table[_effect(table)])
        points = points.dropna(subset=["x", "y"])
        _scatter(axes, points, pd.Series(False, index=points.index))
        axes.set_xscale("log")
        axes.axhline(0, color="0.4", lw=0.8, zorder=0)
        for floor in (-threshold, threshold) if threshold > 0 else ():
            axes.axhline(floor, color="0.4", lw=0.8, ls=":", zorder=0)
        axes.set_xlabel("mean expression", fontsize="small")
        axes.set_ylabel(_EFFECTS[_effect(table)], fontsize="small")
        return points

    return _panels(tables, draw, ("base_mean",), n_labels)


def _panels(
    tables: Mapping[str, pd.DataFrame],
    draw: Callable[[Axes, pd.DataFrame], pd.DataFrame],
    needed: tuple[str, ...],
    n_labels: int,
) -> Figure:
    from matplotlib.figure import Figure

    if not tables:
        raise InvalidArgumentError("tables is empty: give the table of at least one comparison.")
    for title, table in tables.items():
        for column in ("gene", "is_de", "direction", *needed):
            check_key("column", column, f"the table of {title!r}", table.columns)
    n_columns = min(_N_COLUMNS, len(tables))
    n_rows = -(-len(tables) // n_columns)
    figure = Figure(figsize=(3.2 * n_columns + 0.4, 3.0 * n_rows + 0.4), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    drawn = []
    for axes, (title, table) in zip(grid, tables.items(), strict=False):
        drawn.append(draw(axes, table.reset_index(drop=True)))
        axes.set_title(title, fontsize="small", pad=16)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(tables) :]:
        axes.remove()
    # Where names collide is known once the panels have their final place.
    figure.draw_without_rendering()
    for axes, points in zip(grid, drawn, strict=False):
        _label(axes, points, n_labels)
    return figure


def _effect(table: pd.DataFrame) -> str:
    for name in _EFFECTS:
        if name in table:
            return name
    raise InvalidArgumentError(f"The table has no fold change: none of {', '.join(map(repr, _EFFECTS))}.")


def _scatter(axes: Axes, points: pd.DataFrame, off_scale: pd.Series) -> None:
    colours = palettes([3])[0]
    for way, colour in (("none", _UNCALLED), ("down", colours[0]), ("up", colours[2])):
        for marker, rows in (("o", ~off_scale), ("^", off_scale)):
            some = points[(points["direction"] == way) & rows]
            if len(some) == 0:
                continue
            called = way != "none"
            axes.scatter(
                some["x"].to_numpy(),
                some["y"].to_numpy(),
                s=10 if called else 5,
                color=[colour],
                marker=marker,
                linewidths=0,
                alpha=0.9 if called else 0.5,
                label=f"{way} ({len(some):,})" if called else f"not called ({len(some):,})",
                rasterized=True,
                zorder=3 if called else 2,
            )
    if axes.collections:
        axes.legend(
            loc="lower center",
            bbox_to_anchor=(0.5, 0.98),
            ncols=3,
            fontsize=6,
            frameon=False,
            columnspacing=0.8,
            handletextpad=0.0,
        )


def _label(axes: Axes, points: pd.DataFrame, n_labels: int) -> None:
    """Name the most certain of the genes called, each beside its point where there is room."""
    certain = -points["prob_de"] if "prob_de" in points else points["p_value"] if "p_value" in points else points["fdr"]
    called = points.assign(certain=certain, size=-points[_effect(points)].abs())[points["is_de"].astype(bool)]
    called = called.sort_values(["certain", "size"], kind="stable")
    spots = axes.transData.transform(points[["x", "y"]].to_numpy())
    taken: list[BboxBase] = [text.get_window_extent() for text in axes.texts]
    for _, gene in called.head(n_labels).iterrows():
        text = axes.annotate(str(gene["gene"]), (gene["x"], gene["y"]), (0, 0), textcoords="offset points", fontsize=6)
        text.set(zorder=4, in_layout=False)
        free: list[tuple[int, int, tuple[int, int]]] = []
        for place in _PLACES:
            _move(text, place)
            box = text.get_window_extent()
            inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
            if inside and not any(box.overlaps(other) for other in taken):
                hidden = int(((spots >= box.min) & (spots <= box.max)).all(axis=1).sum())
                free.append((hidden, len(free), place))
        if not free:
            text.remove()
            continue
        _move(text, min(free)[2])
        taken.append(text.get_window_extent())


def _move(text: Annotation, place: tuple[int, int]) -> None:
    """Put a name beside its point, in units of a small distance: the corner nearest to the point touches it."""
    x, y = place
    text.set_position((_OFFSET * x, _OFFSET * y))
    text.set(ha={-1: "right", 0: "center", 1: "left"}[x], va={-1: "top", 0: "center", 1: "bottom"}[y])
