"""From expected expression to the counts of a synthetic cell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse as sp

from cellstill.errors import InvalidArgumentError, check_option

CountsForm = Literal["expected", "rounded", "sampled", "mixed"]
FORMS: tuple[CountsForm, ...] = ("expected", "rounded", "sampled", "mixed")


@dataclass(frozen=True)
class Rendering:
    """How synthetic cells become counts.

    Parameters
    ----------
    form
        ``"expected"``: whatever fraction of a count is expected. ``"rounded"``: expected counts at a chosen depth, to
        whole molecules: what is expected less than half a time is a zero, as most genes of a real cell are, which trees
        need, and nothing is noise. ``"sampled"``: draws from the negative binomial, at depths of real cells.
        ``"mixed"``: every other cell of a class rounded, the others expected.
    depth
        Total of a rounded cell, before rounding. Smaller gives more zeros.
    """

    form: CountsForm
    depth: float = 0.0

    def __post_init__(self) -> None:
        check_option("counts", self.form, FORMS)
        if self.form in ("rounded", "mixed") and self.depth < 1:
            raise InvalidArgumentError(f"depth={self.depth} of counts={self.form!r} has to be at least 1.")

    @property
    def name(self) -> str:
        """In tables."""
        return f"{self.form}, {self.depth:,.0f}" if self.depth else self.form


def render(
    rendering: Rendering,
    expected: np.ndarray,
    rates: np.ndarray,
    theta: np.ndarray,
    library: np.ndarray,
    codes: np.ndarray,
    seed: int = 0,
) -> sp.csr_matrix:
    r"""Counts of synthetic cells.

    Parameters
    ----------
    rendering
        Form of the counts.
    expected
        Expected log expression, at least 0, shape ``(n, n_vars)``. Counts that are not sampled are in proportion to its
        exponential less 1, so that networks see what they would see of the mean of real cells.
    rates, theta
        Expected proportions ``(n, n_vars)`` and inverse dispersions ``(n_vars,)``, from which counts are sampled.
    library
        Total of each cell that is not rounded, shape ``(n,)``.
    codes
        Class of each cell, shape ``(n,)``.
    seed
        Of the draws.

    Returns
    -------
    CSR, float32, shape ``(n, n_vars)``, without stored zeros; no cell is empty.
    """
    if rendering.form == "sampled":
        counts = _draw(rates, theta, library, np.random.default_rng(seed))
    else:
        share = np.expm1(expected.astype(np.float64))
        share /= np.maximum(share.sum(axis=1, keepdims=True), 1e-12)
        counts = share * library[:, None]
        if rendering.form != "expected":
            rounded = np.ones(len(codes), dtype=bool) if rendering.form == "rounded" else _every_other(codes)
            counts[rounded] = np.round(share[rounded] * rendering.depth)
    empty = counts.sum(axis=1) == 0
    if empty.any():
        counts[empty, np.argmax(expected[empty], axis=1)] = 1
    return sp.csr_matrix(counts.astype(np.float32))


def _draw(rates: np.ndarray, theta: np.ndarray, library: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    mean = rates.astype(np.float64) * library[:, None]
    return rng.poisson(rng.gamma(theta, mean / theta)).astype(np.float64)


def _every_other(codes: np.ndarray) -> np.ndarray:
    """Second, fourth, ... cell of each class; the first of a class of one."""
    chosen = np.zeros(len(codes), dtype=bool)
    for code in np.unique(codes):
        cells = np.flatnonzero(codes == code)
        chosen[cells[1::2] if len(cells) > 1 else cells] = True
    return chosen
