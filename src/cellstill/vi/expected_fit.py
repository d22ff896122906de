"""Fit of the library sizes that cells without a modality are expected to have, by ridge regression."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch

from cellstill.vi.cells import Cells
from cellstill.vi.evaluation import blocks, to_numpy
from cellstill.vi.expected import Told
from cellstill.vi.module import RegularizedVAE

_MOST_CELLS, _FEWEST_CELLS = 2_000, 20
_STRENGTHS = np.geomspace(1e-6, 1e4, 41)


def fit_expected_libraries(module: RegularizedVAE, cells: Cells, batch_size: int = 1024) -> None:
    """Fit the expected library sizes of a trained module, in place, to cells that have the modality and others.

    The log library sizes of such cells are regressed on what is told by the other modalities, by ridge regression with
    the penalty of least leave-one-out error. The counts of each modality have as much weight as its total has. Of more
    than 2,000 cells as many are taken, evenly: the time is cubic in their number. A modality that fewer than 20 such
    cells have keeps the prior.

    Parameters
    ----------
    module
        In evaluation mode.
    cells
        Training cells.
    batch_size
        Cells at a time.
    """
    names = list(module.config.modalities)
    n_present = np.sum([cells.present[name] for name in names], axis=0)
    for name in names:
        chosen = np.flatnonzero(cells.present[name] & (n_present > 1))
        if len(chosen) < _FEWEST_CELLS:
            continue
        chosen = chosen[np.unique(np.linspace(0, len(chosen) - 1, _MOST_CELLS).astype(np.int64))]
        target, variance = [], []
        told: dict[str, list[Told]] = {other: [] for other in names if other != name}
        for block in blocks(module, cells[chosen], batch_size):
            with torch.inference_mode():
                library = module.library(name, block.counts[name], block.batch)
                for other, one in module.told(name, block.batch).items():
                    told[other].append(one)
            target.append(to_numpy(library.mean - library.prior_mean)[:, 0].astype(np.float64))
            variance.append(to_numpy(library.prior_variance)[:, 0])
        parts = {other: _Part(several) for other, several in told.items()}
        y = np.concatenate(target)
        coefficients, error = ridge(np.sum([part.gram for part in parts.values()], axis=0), y)
        expected = module.expected_library(name)
        expected.intercept.fill_(float(y.mean()))
        expected.unexplained.fill_(error / float(np.concatenate(variance).mean()))
        for other, part in parts.items():
            expected.fill(other, *part.weights(coefficients))


class _Part:
    """Standardised features of one modality, never dense: counts with total variance 1, and the total with 1."""

    def __init__(self, told: list[Told]) -> None:
        self.x = sp.vstack(
            [
                sp.csr_matrix(tuple(map(to_numpy, (x.data, x.indices, x.indptr))), (x.n_rows, x.n_vars))
                for x in (one.rows for one in told)
            ]
        ).astype(np.float64)
        self.has = np.concatenate([to_numpy(one.has) for one in told]).astype(np.float64)
        total = np.concatenate([to_numpy(one.log_total) for one in told]).astype(np.float64)
        n = max(self.has.sum(), 1.0)
        self.mean, self.mean_total = self.has @ self.x / n, self.has @ total / n
        self.total = (total - self.mean_total) * self.has
        along, own = self.x @ self.mean, np.outer(self.has, self.has)
        gram = (self.x @ self.x.T).toarray() - np.add.outer(along, along) * own + self.mean @ self.mean * own
        self.variance, self.variance_total = max(np.trace(gram) / n, 1e-12), max(self.total @ self.total / n, 1e-12)
        self.gram = gram / self.variance + np.outer(self.total, self.total) / self.variance_total

    def weights(self, coefficients: np.ndarray) -> tuple[np.ndarray, float, float]:
        """Weights of the counts, slope in the total, and what both make of the mean cell."""
        shown = coefficients * self.has
        weight = (shown @ self.x - shown.sum() * self.mean) / self.variance
        slope = float(coefficients @ self.total / self.variance_total)
        return weight, slope, float(weight @ self.mean + slope * self.mean_total)


def ridge(gram: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, float]:
    r"""Ridge regression on centred features F, with the penalty of least leave-one-out error, found without refitting.

    .. math::
        e_{-i} = \frac{y_i - \hat y_i}{1 - H_{ii}}, \qquad
        H = \tfrac1n 1 1^\top + F F^\top (F F^\top + \alpha I)^{-1}

    Parameters
    ----------
    gram, target
        :math:`F F^\top` and y, shapes ``(n, n)`` and ``(n,)``.

    Returns
    -------
    Coefficients c, of which the weights are :math:`F^\top c` and the intercept is the mean of y; and the mean squared
    leave-one-out error.
    """
    n, y = len(target), target - target.mean()
    values, vectors = np.linalg.eigh(gram)
    values = np.maximum(values, 0.0)
    along, squares = vectors.T @ y, vectors**2
    best = np.inf, np.zeros(n)
    for strength in _STRENGTHS * max(values.sum(), 1e-12):
        kept = values / (values + strength)
        left_out = (y - vectors @ (kept * along)) / np.maximum(1 - 1 / n - squares @ kept, 1e-6)
        error = float(np.mean(left_out**2))
        if error < best[0]:
            best = error, vectors @ (along / (values + strength))
    return best[1], best[0]
