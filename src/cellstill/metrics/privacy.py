"""How close synthetic cells come to the cells they were made of."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from cellstill.errors import CellstillWarning, level_outside
from cellstill.metrics._donor_attacks import COPY, Projection, nearest
from cellstill.metrics._gene_agreement import check_integers, same_genes

CLOSEST_RECORD_NOTE = (
    "The distance to the closest record is not evidence of privacy: cells can be far from every record and still tell "
    "whose they were made of. Evidence is the membership inference of donors, beside its positive control."
)


@dataclass(frozen=True)
class ClosestRecord:
    """Distances to the closest training cell, of synthetic cells and of held-out real ones.

    Attributes
    ----------
    median, low
        Median and 5 % quantile over synthetic cells, in the units of principal components of log expression.
    control_median, control_low
        The same over held-out real cells: what cells that were copied from none have.
    copies
        Share of the synthetic cells that are training cells, up to rounding.
    note
        What the numbers do not say.
    """

    median: float
    low: float
    control_median: float
    control_low: float
    copies: float
    note: str = CLOSEST_RECORD_NOTE


def distance_to_closest_record(
    synthetic: Any, training: Any, held_out: Any, *, n_comps: int = 30, seed: int = 0
) -> ClosestRecord:
    r"""Measure how far synthetic cells are from the closest training cell. This is reported, and is not evidence.

    Parameters
    ----------
    synthetic, training, held_out
        Counts of the same genes, sparse or dense; ``held_out`` are real cells that synthetic ones were not made of.
    n_comps
        Principal components of :math:`\log(1 + 10^4 x / l)` of the training cells.
    seed
        Of the solver.

    Returns
    -------
    ClosestRecord

    Raises
    ------
    InvalidArgumentError
        The sets differ in genes, or real cells are not integer counts.

    Warns
    -----
    CellstillWarning
        Held-out cells are among those of training.
    """
    s, t, h = same_genes(synthetic=synthetic, training=training, held_out=held_out)
    check_integers(training=t, held_out=h)
    # Fitted to the records: components of the held-out cells would follow their noise, and set them apart.
    project = Projection(t, n_comps, seed)
    records = project(t)
    of_synthetic, of_control = (nearest(records, project(x), 1) for x in (s, h))
    # Not in shares of the distances of the control, which are 0 where all of it is copied.
    n_known = int((of_control <= COPY * np.median(np.linalg.norm(records - records.mean(axis=0), axis=1))).sum())
    if n_known:
        warnings.warn(
            f"{n_known} of {len(of_control)} held_out cells are cells of training: the control is too close, and "
            "copies are missed. Give held_out cells that the synthetic ones were not made of.",
            CellstillWarning,
            stacklevel=level_outside(),
        )
    (low, median), (control_low, control_median) = (np.quantile(d, [0.05, 0.5]) for d in (of_synthetic, of_control))
    return ClosestRecord(
        median=float(median),
        low=float(low),
        control_median=float(control_median),
        control_low=float(control_low),
        copies=float((of_synthetic <= COPY * control_median).mean()),
    )
