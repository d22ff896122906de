"""What a batch does to each gene, estimated from sums and taken out of the counts, which stay sparse."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from cellstill.data.counts import as_csr, iter_rows
from cellstill.errors import InvalidArgumentError

PRIOR_COUNTS = 10.0
"""Counts that the prior of a gene's rate in a batch, with mean 1, is worth: its standard deviation is 0.32."""
MAX_FACTOR = 10.0
"""No count is multiplied, or divided, by more: what is rare in one batch only is not made of single counts."""

_QUARTILES = (-0.6745, 0.0, 0.6745)
_MAX_ITER = 1000
_TOLERANCE = 1e-8


@dataclass(frozen=True, kw_only=True)
class GeneScaling:
    r"""Factors that bring the counts of each gene in each batch to a composition that all batches share.

    With :math:`N_{bl}` the counts of all genes in batch b and stratum l (cells that agree in what is protected), the
    sums over cells are taken as Poisson with main effects of batch and stratum on every gene,

    .. math:: \mu_{blg} = N_{bl}\, a_{bg}\, c_{lg}, \qquad \textstyle\sum_b N_b a_{bg} = \sum_b N_b,

    fitted through iterative proportional scaling of all genes at once, the rates under a gamma prior of mean 1 that is
    worth 10 counts:

    .. math:: a_{bg} = (x_{bg} + 10) / (e_{bg} + 10), \qquad e_{bg} = \textstyle\sum_l N_{bl} c_{lg},

    with :math:`x_{bg}` the gene's counts in the batch: a gene that is expected 10 times goes half the way, one that is
    expected once hardly moves. Only what one stratum has more of in one batch than in another is ascribed to the batch;
    what differs between strata is left. Without strata :math:`e_{bg} / x_{bg}` is the gene's share of all counts over
    its share of the batch's. Batches that no chain of shared strata joins are scaled among those that are joined:
    between the others, batch and stratum cannot be told apart, and nothing is scaled. Counts are multiplied by
    :math:`1 / a_{bg}`, within 1/10 and 10.

    Attributes
    ----------
    factors
        By what the counts of a batch are multiplied, float32, shape ``(n_batches, n_vars)``.
    shares
        Composition of each stratum without the batches' effects c, float64, shape ``(n_strata, n_vars)``.
    strata
        Encoded levels of each stratum, int64, shape ``(n_strata, n_columns)``; a single one without columns.
    totals
        Counts of each stratum, float64, shape ``(n_strata,)``.
    """

    factors: np.ndarray
    shares: np.ndarray
    strata: np.ndarray
    totals: np.ndarray

    @classmethod
    def fit(cls, counts: sp.csr_matrix, batch: np.ndarray, covariates: np.ndarray | None = None) -> GeneScaling:
        """Estimate factors.

        Parameters
        ----------
        counts
            Raw counts, CSR, shape ``(n_obs, n_vars)``.
        batch
            Code of each cell's batch, shape ``(n_obs,)``; every code from 0 to the largest occurs.
        covariates
            What must not be scaled away, as :meth:`CovariateDesign.encode` gives it, shape ``(n_obs, n_columns)``: a
            stratum holds the cells that agree in all levels; a quantity is cut where a normal one has its quartiles.

        Raises
        ------
        InvalidArgumentError
            Lengths disagree, or a batch has no cell or no count.
        """
        n_obs = counts.shape[0]
        bins = _bins(np.empty((n_obs, 0)) if covariates is None else covariates)
        batch = np.asarray(batch)
        if not len(bins) == len(batch) == n_obs:
            raise InvalidArgumentError(
                f"{n_obs} cells, {len(batch)} batch codes and {len(bins)} rows of covariates have to be as many."
            )
        if n_obs == 0 or not np.array_equal(np.unique(batch), np.arange(batch.max() + 1)):
            raise InvalidArgumentError("batch has to hold every code from 0 to the largest.")
        strata, stratum = np.unique(bins, axis=0, return_inverse=True)
        stratum = stratum.ravel()
        by_batch, by_stratum = _sums(counts, batch, batch.max() + 1), _sums(counts, stratum, len(strata))
        library = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
        totals = np.zeros((len(by_batch), len(strata)))
        np.add.at(totals, (batch, stratum), library)
        empty = np.flatnonzero(totals.sum(axis=1) == 0)
        if len(empty):
            raise InvalidArgumentError(f"The batches {empty.tolist()} (codes) have no counts. Leave them out.")
        shares = _fit_shares(by_batch, by_stratum, totals)
        return cls(factors=_factors(by_batch, totals @ shares), shares=shares, strata=strata, totals=totals.sum(axis=0))

    def apply(self, counts: sp.csr_matrix, batch: np.ndarray, factors: np.ndarray | None = None) -> sp.csr_matrix:
        """Multiply counts by the factors of their batches, or by those given; -1 leaves a cell as it is.

        Returns
        -------
        float32, CSR; index arrays are shared with ``counts``.
        """
        counts = as_csr(counts)
        factors = self.factors if factors is None else factors
        factors = np.concatenate([factors, np.ones((1, factors.shape[1]), dtype=np.float32)])
        data = np.empty(counts.nnz, dtype=np.float32)
        for start, rows in iter_rows(counts):
            of_row = np.repeat(batch[start : start + rows.shape[0]], np.diff(rows.indptr))
            first = counts.indptr[start]
            np.multiply(rows.data, factors[of_row, rows.indices], out=data[first : first + rows.nnz], casting="unsafe")
        return sp.csr_matrix((data, counts.indices, counts.indptr), shape=counts.shape, copy=False)

    def of_new_batch(self, counts: sp.csr_matrix, covariates: np.ndarray | None = None) -> np.ndarray:
        """Estimate the factors of a batch that was not there, from its cells, against the composition of all others.

        Genes that it has no count of, perhaps because they were not measured, are left out, and their factor is 1.

        Parameters
        ----------
        counts
            Raw counts of the batch's cells, CSR, shape ``(n_obs, n_vars)``.
        covariates
            As in :meth:`fit`; ``None`` if they are not known. A cell of a stratum that was not there, or of an unknown
            one, is compared with all strata together.

        Returns
        -------
        float32, shape ``(n_vars,)``.
        """
        n_obs = counts.shape[0]
        bins = np.full((n_obs, self.strata.shape[1]), -1) if covariates is None else _bins(covariates)
        codes = {tuple(row): code for code, row in enumerate(self.strata.tolist())}
        stratum = np.array([codes.get(tuple(row), -1) for row in bins.tolist()], dtype=np.int64)
        library = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
        known = stratum >= 0
        totals = np.bincount(stratum[known], library[known], minlength=len(self.strata)).astype(np.float64)
        totals += library[~known].sum() * self.totals / self.totals.sum()
        found = _sums(counts, np.zeros(n_obs, dtype=np.int64), 1)
        seen = found[0] > 0
        whole, shares = self.shares.sum(axis=1), self.shares[:, seen]
        factors = np.ones(counts.shape[1], dtype=np.float32)
        factors[seen] = _factors(found[:, seen], (totals * _divided(whole, shares.sum(axis=1)))[None] @ shares)[0]
        return factors


def _sums(counts: sp.csr_matrix, group: np.ndarray, n_groups: int) -> np.ndarray:
    """Sum counts over the cells of each group, float64, shape ``(n_groups, n_vars)``."""
    total = np.zeros((n_groups, counts.shape[1]))
    for start, rows in iter_rows(counts):
        n = rows.shape[0]
        member = sp.csr_matrix((np.ones(n), (group[start : start + n], np.arange(n))), shape=(n_groups, n))
        total += (member @ rows).toarray()
    return total


def _bins(covariates: np.ndarray) -> np.ndarray:
    # Levels are coded 0 and 1, which lie in different quarters; quantities are standardised.
    return np.ascontiguousarray(np.digitize(covariates, _QUARTILES), dtype=np.int64)


def _factors(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    factors = (expected + PRIOR_COUNTS) / (found + PRIOR_COUNTS)
    return np.clip(factors, 1 / MAX_FACTOR, MAX_FACTOR).astype(np.float32)


def _fit_shares(by_batch: np.ndarray, by_stratum: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Fit ``c`` of the model in :class:`GeneScaling`, shape ``(n_strata, n_vars)``, from the sums of both margins."""
    weights = totals.sum(axis=1)
    # The rows of this matrix average over the batches that are joined to a batch.
    joined = _joined(totals > 0)
    average = joined * weights / (joined @ weights)[:, None]
    rates = np.ones_like(by_batch)
    for _ in range(_MAX_ITER):
        fitted = totals @ _divided(by_stratum, totals.T @ rates)
        changed = (by_batch + PRIOR_COUNTS) / (fitted + PRIOR_COUNTS)
        level = average @ changed
        changed /= np.where(level == 0, 1.0, level)
        settled = (weights @ np.abs(changed - rates)).max() <= _TOLERANCE * weights.sum()
        rates = changed
        if settled:
            break
    return _divided(by_stratum, totals.T @ rates)


def _joined(shared: np.ndarray) -> np.ndarray:
    """Which batches a chain of shared strata joins, boolean, shape ``(n_batches, n_batches)``."""
    _, part = sp.csgraph.connected_components(sp.csr_matrix(shared @ shared.T), directed=False)
    return part[:, None] == part


def _divided(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
