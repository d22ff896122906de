from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from cellstill.errors import InvalidArgumentError, check_key

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOG_FROM_RATIO = 10
_TRAIN, _VALIDATION, _BEST = "#717581", "#3f90da", "#bd1f01"


def training_figure(history: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw the losses of training, one panel for each phase, and mark the epoch of the lowest validation loss.

    The loss axis is logarithmic where all losses are positive and span more than a factor of ten, which a linear axis
    would squeeze against the floor.

    Parameters
    ----------
    history
        One table by phase, for instance ``encoder`` and ``decoder``, indexed by epoch with the column ``train_loss``
        and, if there was a validation split, ``validation_loss``. Epochs without a value (NaN) are skipped.

    Returns
    -------
    matplotlib.figure.Figure
        Not shown and not registered with pyplot. Save it with ``figure.savefig(path, dpi=300)``.

    Raises
    ------
    InvalidArgumentError
        If there is no phase, or a phase without epochs.
    MissingKeyError
        If a table has no column ``train_loss``.
    """
    from matplotlib.figure import Figure

    if not history:
        raise InvalidArgumentError("history is empty; train the model first, or give one table of losses by phase.")
    figure = Figure(figsize=(3.2 * len(history), 2.5), layout="constrained")
    for axes, (phase, table) in zip(figure.subplots(1, len(history), squeeze=False)[0], history.items(), strict=True):
        check_key("train_loss", "train_loss", f"history[{phase!r}]", table.columns)
        _draw(axes, phase, table)
    return figure


def _draw(axes: Axes, phase: str, table: pd.DataFrame) -> None:
    from matplotlib.ticker import MaxNLocator

    train = table["train_loss"].dropna()
    validation = table.get("validation_loss", train[:0]).dropna()
    if train.empty:
        raise InvalidArgumentError(f"history[{phase!r}] has no epochs with a train_loss.")
    _curve(axes, train, "train", _TRAIN)
    if len(validation):
        _curve(axes, validation, "validation", _VALIDATION)
        row = int(np.argmin(validation.to_numpy()))
        best, lowest = validation.index.to_numpy()[row], validation.to_numpy()[row]
        axes.plot([best], [lowest], "o", markersize=4, color=_BEST, label=f"best: epoch {best}")
    values = np.concatenate([train.to_numpy(), validation.to_numpy()])
    if values.min() > 0 and values.max() > _LOG_FROM_RATIO * values.min():
        axes.set_yscale("log")
    axes.set_title(phase, fontsize=9)
    axes.set_xlabel("epoch", fontsize=8)
    axes.set_ylabel("loss", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)


def _curve(axes: Axes, losses: pd.Series, label: str, colour: str) -> None:
    marker = "." if len(losses) == 1 else ""  # a line of one point would not be seen
    axes.plot(losses.index.to_numpy(), losses.to_numpy(), label=label, color=colour, linewidth=1.2, marker=marker)
