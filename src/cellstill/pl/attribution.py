from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from cellstill.errors import InvalidArgumentError
from cellstill.pl._palette import palettes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def attribution_figure(attribution: Mapping[str, ArrayLike], parts: Mapping[str, slice]) -> Figure:
    """Draw how much two modalities depend on each latent dimension, one against the other.

    A dimension on the diagonal matters alike to both; far from it, to one of them. Axes are logarithmic, because
    dimensions that are not used lie orders of magnitude below the others.

    Parameters
    ----------
    attribution
        Mean attribution by modality, shape ``(n_latent,)`` each. With one modality, against the rank of the dimension;
        with more than two, one panel for each pair.
    parts
        Dimensions of each modality's own part of the latent space, which colours show.

    Returns
    -------
    matplotlib.figure.Figure
        Not shown and not registered with pyplot.

    Raises
    ------
    InvalidArgumentError
        There is no modality, or shapes differ.
    """
    from matplotlib.figure import Figure

    if not attribution:
        raise InvalidArgumentError("attribution is empty: give that of at least one modality.")
    values = {name: np.asarray(array, dtype=np.float64).ravel() for name, array in attribution.items()}
    if len({len(array) for array in values.values()}) > 1:
        raise InvalidArgumentError(
            f"attribution has { ({k: len(v) for k, v in values.items()}) } dimensions by modality."
        )
    names = list(values)
    pairs: list[tuple[str, str | None]] = list(itertools.combinations(names, 2)) or [(names[0], None)]
    (colours,) = palettes([len(parts)])
    figure = Figure(figsize=(3.2 * len(pairs), 3.0), layout="constrained")
    for axes, (first, second) in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        x = values[first] if second is not None else np.arange(1, len(values[first]) + 1)
        y = values[second] if second is not None else np.sort(values[first])[::-1]
        for (part, columns), colour in zip(parts.items(), colours, strict=True):
            axes.scatter(x[columns], y[columns], s=12, color=colour, linewidths=0, label=f"z of {part}")
        axes.set_yscale("log")
        axes.set_xlabel(f"attribution to {first}" if second is not None else "rank of the dimension", fontsize=8)
        axes.set_ylabel(f"attribution to {second if second is not None else first}", fontsize=8)
        if second is not None:
            axes.set_xscale("log")
            low, high = min(x.min(), y.min()), max(x.max(), y.max())
            axes.plot([low, high], [low, high], color="#94a4a2", linewidth=0.8, zorder=0)
        axes.tick_params(which="both", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False)
    return figure
