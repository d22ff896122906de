from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cellstill.errors import InvalidArgumentError, check_option
from cellstill.pl._palette import palettes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KEYS = ("method", "samples_per_class", "seed", "evaluator")
_N_COLUMNS = 4
_MARGIN = 1.3


def retention_figure(scores: pd.DataFrame, score: str = "retention") -> Figure:
    """Draw a score against the number of synthetic cells per class: the mean over evaluators, then each of them.

    Of one evaluator there is no mean. Points are means over seeds, bars reach from the lowest seed to the highest. With
    ``retention``, a line marks 1: nothing lost.

    Parameters
    ----------
    scores
        One row for each ``method``, ``samples_per_class``, ``seed`` and ``evaluator``, with the column ``score``.
    score
        What is drawn.

    Returns
    -------
    matplotlib.figure.Figure
        Not shown and not registered with pyplot. Save it with ``figure.savefig(path, dpi=300)``.

    Raises
    ------
    InvalidArgumentError
        No rows, or a column that is not there or holds no numbers.
    """
    from matplotlib.figure import Figure

    check_option("score", score, [name for name in scores.select_dtypes("number").columns if name not in _KEYS])
    if scores.empty:
        raise InvalidArgumentError("scores has no rows: evaluate at least one method.")
    methods, evaluators = list(scores["method"].unique()), list(scores["evaluator"].unique())
    rows_of = {name: scores[scores["evaluator"] == name] for name in evaluators}
    panels = rows_of if len(evaluators) == 1 else {f"mean of {len(evaluators)}": scores, **rows_of}
    n_columns = min(_N_COLUMNS, len(panels))
    n_rows = -(-len(panels) // n_columns)
    figure = Figure(figsize=(2.6 * n_columns + 1.6, 2.4 * n_rows), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False).ravel()
    sizes = sorted(scores["samples_per_class"].unique())
    for axes, (title, rows) in zip(grid, panels.items(), strict=False):
        for method, colour in zip(methods, palettes([len(methods)])[0], strict=True):
            seeds = rows[rows["method"] == method].groupby(["samples_per_class", "seed"])[score].mean().unstack()
            mean = seeds.mean(axis=1)
            spread = np.stack([mean - seeds.min(axis=1), seeds.max(axis=1) - mean])
            axes.errorbar(
                mean.index.to_numpy(),
                mean.to_numpy(),
                spread,
                color=colour,
                marker="o",
                markersize=3,
                lw=1.2,
                label=method,
            )
        axes.set_title(title, fontsize="small")
        axes.set_xscale("log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_xlim(sizes[0] / _MARGIN, sizes[-1] * _MARGIN)
        if score.startswith("retention"):
            axes.axhline(1, color="0.6", lw=0.8, zorder=0)
    for axes in grid[len(panels) :]:
        axes.remove()
    grid[0].set_ylabel(score.replace("_", " "))
    figure.supxlabel("synthetic cells per class", fontsize="small")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small", frameon=False)
    return figure
