"""From expected expression to the counts of a synthetic cell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse as sp

from cellstill.errors import InvalidArgumentError, check_option

CountsForm = Literal["rounded", "mixed", "expected", "sampled"]
FORMS: tuple[CountsForm, ...] = ("rounded", "mixed", "expected", "sampled")
"""Whole counts first: of candidates that do as well, the first is taken."""


@dataclass(frozen=True)
class Rendering:
    """How synthetic cells become counts.

    Parameters
    ----------
    form
        ``"expected"``: whatever fraction of a count is expected. ``"rounded"``: expected counts at a depth of their
        own, in whole molecules, with as many genes detected as in a real cell. What is not expected is a zero, as most
        of a real cell is, which trees need; and nothing is noise. ``"sampled"``: draws from the negative binomial, at
        depths of real cells. ``"mixed"``: every other cell of a class rounded, the others expected.
    detection
        Number of genes that a rounded cell detects, over that of the median real cell of its class. Larger keeps more
        of what is expected of weak genes, and fewer zeros.
    """

    form: CountsForm
    detection: float = 1.0

    def __post_init__(self) -> None:
        check_option("counts", self.form, FORMS)
        if not 0 < self.detection < np.inf:
            raise InvalidArgumentError(f"detection={self.detection} has to be a finite number above 0.")

    @property
    def name(self) -> str:
        """In tables."""
        return f"{self.form}, {self.detection:g}" if self.form in ("rounded", "mixed") else self.form


def render(
    rendering: Rendering,
    expected: np.ndarray,
    rates: np.ndarray,
    theta: np.ndarray,
    library: np.ndarray,
    n_detected: np.ndarray,
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
    n_detected
        Number of genes that a median real cell of each cell's class detects, shape ``(n,)``.
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
            counts[rounded] = round_to_detection(share[rounded], rendering.detection * n_detected[rounded])
    empty = counts.sum(axis=1) == 0
    if empty.any():
        counts[empty, np.argmax(expected[empty], axis=1)] = 1
    return sp.csr_matrix(counts.astype(np.float32))


def round_to_detection(share: np.ndarray, n_genes: np.ndarray) -> np.ndarray:
    """Whole counts in proportion to shares, at the smallest depth at which so many genes have any.

    Parameters
    ----------
    share
        Shape ``(n, n_vars)``, at least 0.
    n_genes
        Genes wanted of each cell, shape ``(n,)``; fewer where fewer have a share.
    """
    n_vars = share.shape[1]
    wanted = np.clip(np.round(n_genes).astype(np.int64), 1, n_vars)
    least = np.take_along_axis(np.sort(share, axis=1), (n_vars - wanted)[:, None], axis=1)
    smallest = np.min(np.where(share > 0, share, np.inf), axis=1, keepdims=True)
    # From half a molecule on, counts are rounded up; a little more, because halves go to the even number.
    depth = 0.5 * (1 + 1e-9) / np.where(least > 0, least, smallest)
    return np.round(share * depth)


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
