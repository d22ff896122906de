"""From draws of the expression of cells to that of replicates, as the model expects it and as their counts say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp

from cellstill.de.units import Units, check_lengths
from cellstill.errors import InvalidArgumentError

Draw = Iterable[tuple[np.ndarray, ...]]
"""One posterior draw, chunk by chunk: ``(rows, rates)``, positions in ``obs``, shape ``(n,)``, and the expected share
of each gene in those cells' counts, shape ``(n, n_genes)``, all under the same dropout mask; or
``(rows, rates, expected)``, with the counts that the same draw expects of the cells as they were measured, in their own
batch and at their own depth, shape ``(n, n_genes)``."""

PRIOR_COUNTS = 0.5
"""Weight of what the model expects of a replicate, in counts."""

_CHUNK_SIZE = 4096


def replicate_counts(counts: Any, units: Units) -> np.ndarray:
    """Sum the counts over the cells of each replicate, shape ``(n_replicates, n_genes)``, float64."""
    from cellstill.data.counts import iter_rows  # its package imports torch, which reading a result does not need

    check_lengths("obs", units.codes, "rows of counts", counts.shape[0])
    sums = np.zeros((len(units.table), counts.shape[1]))
    for start, block in iter_rows(counts, _CHUNK_SIZE):
        indicator, _ = _indicator(units, np.arange(start, start + block.shape[0]))
        sums += (indicator @ block).toarray()
    return sums


def replicate_rates(
    draw: Draw, units: Units, gene_names: Sequence[str], counts: np.ndarray | None = None
) -> np.ndarray:
    r"""Expression of each replicate in one draw, after checking that the draw is whole.

    Without ``counts``, the mean of the rates over the cells of the replicate. What the model has not learned of a
    replicate is then lost: a decoder that sees 50 coordinates of a cell knows little of what is particular to a donor,
    which would make donors look alike and the fold change far surer than it is. With counts :math:`x_{ug}`, of which
    the draw expects :math:`m_{ug}`, the mean rate is multiplied by what they say of this departure,

    .. math::

        E(r_{ug} \mid x) = \frac{x_{ug} + k}{m_{ug} + k}, \quad
        x_{ug} \sim \mathrm{Poisson}(m_{ug} r_{ug}), \quad r_{ug} \sim \mathrm{Gamma}(k, k), \quad k = 1/2

    so that counts decide where there are some, and the model where there are none. The mean, and not a draw: the
    scatter of the replicates' counts, which is in :math:`x_{ug}` already, must not enter twice.

    Parameters
    ----------
    draw
        Chunks of a draw.
    units
        Replicates.
    gene_names
        Names of the genes.
    counts
        :func:`replicate_counts`, if the draw has expected counts.

    Returns
    -------
    Shape ``(n_replicates, n_genes)``.
    """
    n_units = len(units.table)
    rates = np.zeros((n_units, len(gene_names)))
    expected = np.zeros_like(rates) if counts is not None else None
    seen = np.zeros(n_units, dtype=np.int64)
    for rows, *values in draw:
        _check_chunk(rows, values, gene_names, with_expected=expected is not None)
        indicator, n_cells = _indicator(units, rows)
        rates += indicator @ values[0]
        if expected is not None:
            expected += indicator @ values[1]
        seen += n_cells
    if (seen != units.n_cells).any():
        wrong = np.flatnonzero(seen != units.n_cells)[0]
        name = tuple(units.table.iloc[wrong, :2])
        raise InvalidArgumentError(
            f"A draw has {seen[wrong]} cells of {name}, which has {units.n_cells[wrong]} in obs: "
            "each draw has to yield every cell of the two groups once."
        )
    _check_sums("rates", "expected shares of the counts", rates)
    rates /= units.n_cells[:, None]
    if counts is None or expected is None:
        return rates
    _check_sums("expected", "expected counts", expected)
    return rates * (counts + PRIOR_COUNTS) / (expected + PRIOR_COUNTS)


def _indicator(units: Units, rows: np.ndarray) -> tuple[sp.csr_matrix, np.ndarray]:
    """Matrix that sums cells into replicates, and how many cells of each replicate there are."""
    unit = units.codes[rows]
    used = np.flatnonzero(unit >= 0)
    n_units = len(units.table)
    indicator = sp.csr_matrix((np.ones(len(used)), (unit[used], used)), (n_units, len(rows)))
    return indicator, np.bincount(unit[used], minlength=n_units)


def _check_chunk(
    rows: np.ndarray, values: Sequence[np.ndarray], gene_names: Sequence[str], *, with_expected: bool
) -> None:
    if len(values) != 1 + with_expected:
        raise InvalidArgumentError(
            "With counts, draws have to yield (rows, rates, expected), and without counts (rows, rates); "
            f"they yield {1 + len(values)} values."
        )
    for name, array in zip(("rates", "expected"), values, strict=False):
        check_lengths("rows", rows, f"rows of {name}", array.shape[0])
        check_lengths("gene_names", gene_names, f"columns of {name}", array.shape[1])


def _check_sums(name: str, meaning: str, sums: np.ndarray) -> None:
    if not (np.isfinite(sums) & (sums >= 0)).all():
        raise InvalidArgumentError(f"{name} have to be finite and non-negative: they are {meaning}.")
