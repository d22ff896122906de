r"""The ambient rate, from what cell types do not express.

In a batch with rate :math:`r` and soup profile :math:`\chi`, cluster :math:`k` with :math:`N_k` counts shows

.. math::

    O_{kf} \sim \mathrm{Poisson}(q_{kf} N_k \chi_f), \qquad q_{kf} = r + (1 - r)\, \rho_{kf} / \chi_f \ge r

so that every gene of every cluster bounds the rate from above, and genes that a cluster does not express attain it.
The rate is the lower end of the distribution of :math:`q`. That distribution, freed of the Poisson noise of the
counts, is fitted without assuming any form; genes expressed everywhere have :math:`q` near 1 and do no harm. Where no
cell type lacks a gene, as in data of one type, the lower end is ragged rather than a pile of genes at one value, and
the rate is bounded but not identified.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from cellstill.data.counts import as_csr
from cellstill.data.pca import fit_pca
from cellstill.data.soup import batch_codes
from cellstill.errors import CellstillWarning, InvalidArgumentError, InvalidCountsError, level_outside

# Quantiles of q that stand for its lower end: the estimate, and how far down and up it may be read. Where many genes
# pile up there, the first of them are those that spread and noise made low: the estimate moves into the pile.
_LEVEL, _LEVEL_IN_PILE = 0.005, 0.2
# Share of a pile in those near it from which noise alone has spread it: its median is then the rate.
_ALONE = 0.9
_LOWER, _UPPER = 0.4, 4.0
_GRID = np.concatenate([[1e-4, 3e-4, 1e-3], np.geomspace(0.002, 0.6, 80), np.geomspace(0.65, 30, 12)])
_MIN_EXPECTED = 20.0
_MIN_PAIRS = 300
_MAX_PAIRS = 20_000
_MIN_PILE = 0.025
_PILE_WIDTH = 1.5
# A lower end that is taken as it is, if the upper end of its interval is no more than the second number.
_NEGLIGIBLE, _NEGLIGIBLE_UPPER, _IMPLAUSIBLE = 0.02, 0.05, 0.35
_MIN_STEEPNESS = 0.3
# At a share that droplets often have, an interval whose ends are this factor apart does without a large pile. That of a
# lane of blood is 1.8 to 2.8 wide, in parts of it and all seeds that were tried (3.0 once); those of single types,
# at ends that low, from 4.4 on.
_COMMON, _NARROW = 0.12, 3.5
_N_COMPS = 20
_CELLS_PER_CLUSTER = 50
_CLUSTERS = (4, 20)
_N_ITER = 200
_MAX_CELLS = 30_000
_N_BOOTSTRAP, _N_ITER_BOOTSTRAP = 20, 25


@dataclass(frozen=True, eq=False)
class SoupEstimate:
    """What counts alone say about their soup.

    Attributes
    ----------
    rate
        Share of soup in the counts of each batch, ``(n_batches,)``; NaN where it is not identified.
    bound
        Lower end of the ratios, ``(n_batches,)``: the rate where it is identified, and what it cannot be above where it
        is not. 1 where counts are too few.
    interval
        About 95 % interval, ``(n_batches, 2)``. Where the rate is not identified it is ``(0, upper)``: a larger rate
        contradicts the counts, any smaller one does not.
    identified
        Whether enough genes agree on the rate, ``(n_batches,)``.
    pile
        Share of the pairs of gene and cluster that lie within a factor of 1.5 of the lower end, ``(n_batches,)``:
        part of the evidence for ``identified``.
    batches
        Names of the batches, in the order of the rows.
    """

    rate: np.ndarray
    bound: np.ndarray
    interval: np.ndarray
    identified: np.ndarray
    pile: np.ndarray
    batches: tuple[Any, ...]


def estimate_soup(
    counts: Any, batch: Any = None, *, clusters: Any = None, seed: int = 0, allow_noninteger: bool = False
) -> SoupEstimate:
    """Estimate the share of ambient RNA in each batch, without being told types, rates or profile.

    The counts are split in two by fair binomial thinning. Each half is clustered (principal components of Pearson
    residuals, k-means, all batches together), and the clusters of one half are judged on the counts of the other:
    clusters that were chosen for lacking a gene by chance do not lack it there. Pairs of gene and cluster where the
    soup would leave at least 20 counts at rate 1 enter a non-parametric maximum likelihood fit (Kiefer and Wolfowitz
    1956, by EM on a grid) of the distribution of their ratio to the profile. Its lower end is the rate: the 0.5 %
    quantile, or that at a fifth of the pairs piled up there (within a factor of 1.5) where this is more, or at half of
    them where nothing lies just above. The interval goes from the quantile of 0.4 to that of 4 times the level, widened
    by a bootstrap over genes.

    A lower end of at most 0.02 is taken as it is, since the rate can only be less, if the interval ends at 0.05 or
    below: of few genes or counts, some are low by chance. A higher one identifies the rate if it is at most 0.35, at
    least 2.5 % of the pairs pile up there, and they are at least 0.3 of those within a factor of 2.25: genes that are
    absent have an end, genes that are merely lower in one cluster than in another have a tail that keeps rising. A
    rate of at most 0.12, as droplets often have, is also identified if the ends of its interval are at most a factor of
    3.5 apart: in a lane of blood cells, most of whose genes all types express, soup shows in 1 to 3 % of the pairs, but
    these agree. Where every gene is expressed in every type at, say, an eighth of its highest level, that eighth
    looks like soup to this and any other method that knows the counts alone.

    Of more than 30,000 cells about as many are drawn, evenly from all batches.

    Counts of cells that were contaminated before anything was added to them contain that soup as well: the estimate
    is of all of it.

    Parameters
    ----------
    counts
        Raw counts, ``(n_obs, n_vars)``, sparse or dense. All genes: those of highest variance alone also work.
    batch
        Batch of each cell, without NaN; soup differs between droplet runs. ``None`` makes all cells one batch.
    clusters
        Clusters or types of the cells, if they are known; otherwise they are found. Purer clusters lack more genes.
        Those found from these same counts bias the rate low where cells differ in nothing but noise.
    seed
        Seed of the split, the clustering and the bootstrap.
    allow_noninteger
        Accept fractional values, such as corrected counts. Each is replaced by one of the two whole numbers beside it,
        drawn so that its expectation stays: rounding to the nearest would empty genes of small values.

    Returns
    -------
    SoupEstimate

    Warns
    -----
    CellstillWarning
        Some batch does not identify its rate.

    Raises
    ------
    InvalidArgumentError
        ``batch`` or ``clusters`` do not fit the cells, or there are fewer than 2 cells with counts.
    InvalidCountsError
        ``counts`` hold values that are not finite, negative, or (without ``allow_noninteger``) fractional.

    References
    ----------
    Young and Behjati (2020), GigaScience 9:giaa151, whose automatic estimate rests on the same genes.
    """
    x = as_csr(counts)
    _check_counts(x, allow_noninteger)
    codes, names = batch_codes(batch, x.shape[0])
    known = None if clusters is None else batch_codes(clusters, x.shape[0], argument="clusters")[0]
    rng = np.random.default_rng(seed)
    n = len(names)
    if x.shape[0] > _MAX_CELLS:
        kept = _some_of_each(codes, n, rng)
        x, codes, known = x[kept], codes[kept], None if known is None else known[kept]
    if allow_noninteger:
        x = _whole(x, rng)
    folds = list(_folds(x, rng)) if known is None else [(known, x)]
    rate, bound, pile = np.full(n, np.nan), np.ones(n), np.zeros(n)
    interval, identified = np.tile([0.0, 1.0], (n, 1)), np.zeros(n, dtype=bool)
    for e in range(n):
        members = np.flatnonzero(codes == e)
        own = [(cluster[members], half[members]) for cluster, half in folds]
        total = np.sum([np.asarray(half.sum(axis=0, dtype=np.float64)).ravel() for _, half in own], axis=0)
        profile = total / max(total.sum(), 1.0)
        observed, expected, gene = _pairs(own, profile, rng)
        if len(observed) < _MIN_PAIRS:
            continue
        likelihood = _likelihood(observed, expected)
        mixture = _fit(likelihood, np.ones(len(gene)), _N_ITER)
        first = _quantile(mixture, _LEVEL)
        pile[e] = mixture[_PILE_WIDTH * first >= _GRID].sum()
        wider = mixture[_PILE_WIDTH**2 * first >= _GRID].sum()
        level = max(_LEVEL, _LEVEL_IN_PILE * pile[e])
        alone = pile[e] > _ALONE * wider and first <= _IMPLAUSIBLE
        found = _quantile(mixture, max(level, 0.5 * pile[e]) if alone else level)
        low, high = _bootstrap(likelihood, gene, mixture, (_LOWER * level, _UPPER * level), rng)
        piled = pile[e] >= max(_MIN_PILE, _MIN_STEEPNESS * wider) and found <= _IMPLAUSIBLE
        high = max(high, found)
        narrow = high <= _NARROW * low and found <= _COMMON
        identified[e] = high <= _NEGLIGIBLE_UPPER if found <= _NEGLIGIBLE else piled or narrow
        bound[e] = found
        interval[e] = (min(low, found) if identified[e] else 0.0, high)
        if identified[e]:
            rate[e] = found
    result = SoupEstimate(rate, bound, interval, identified, pile, tuple(names))
    _warn(result)
    return result


def _check_counts(x: sp.csr_matrix, allow_noninteger: bool) -> None:
    data = x.data
    problem = (
        "values that are not finite" if not np.isfinite(data).all() else "negative values" if (data < 0).any() else ""
    )
    remedy = "Give raw counts."
    if not problem and not allow_noninteger and (data != np.floor(data)).any():
        problem = "values that are not integers"
        remedy = "Give raw counts, or pass allow_noninteger=True for counts that were corrected."
    if problem:
        raise InvalidCountsError(
            f"counts hold {problem} ({x.nnz} stored values, {data.min():g} to {data.max():g}). {remedy}"
        )


def _whole(x: sp.csr_matrix, rng: np.random.Generator) -> sp.csr_matrix:
    """Round each value up or down at random, without changing its expectation."""
    floor = np.floor(x.data)
    part = x.data - floor
    if not part.any():
        return x
    whole = x.copy()
    whole.data = (floor + (rng.random(len(part)) < part)).astype(x.dtype)
    whole.eliminate_zeros()
    return whole


def _some_of_each(codes: np.ndarray, n_batches: int, rng: np.random.Generator) -> np.ndarray:
    """Draw cells, as many of each batch as it has or as its share of the most."""
    most = max(_MAX_CELLS // n_batches, _CELLS_PER_CLUSTER * _CLUSTERS[1])
    order = rng.permutation(len(codes))
    order = order[np.argsort(codes[order], kind="stable")]
    size = np.bincount(codes, minlength=n_batches)
    place = np.arange(len(codes)) - np.repeat(np.cumsum(size) - size, size)
    return np.sort(order[place < most])


def _folds(x: sp.csr_matrix, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, sp.csr_matrix]]:
    """Clusters found in one half of the counts, and the other half."""
    half = x.copy()
    half.data = rng.binomial(x.data.astype(np.int64), 0.5).astype(x.dtype)
    halves = [half, as_csr(x - half)]
    for matrix in halves:
        matrix.eliminate_zeros()
    for seen, judged in (halves, halves[::-1]):
        yield _cluster(seen, int(rng.integers(2**31))), judged


def _cluster(x: sp.csr_matrix, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    # A cell may have no count in this half; it joins the cluster at the origin.
    filled = np.flatnonzero(np.diff(x.indptr))
    n_comps = min(_N_COMPS, len(filled) - 1, x.shape[1] - 1)
    if n_comps < 1:
        raise InvalidArgumentError(
            f"counts has {len(filled)} cells with counts and {x.shape[1]} genes; at least 2 of each are needed for "
            "clusters."
        )
    coordinates = np.zeros((x.shape[0], n_comps), dtype=np.float32)
    coordinates[filled] = fit_pca(x[filled], n_comps, method="pearson_residuals", seed=seed).transform(x[filled])
    n_clusters = min(int(np.clip(x.shape[0] // _CELLS_PER_CLUSTER, *_CLUSTERS)), len(filled))
    return KMeans(n_clusters, n_init=4, random_state=seed).fit_predict(coordinates)


def _pairs(
    folds: list[tuple[np.ndarray, sp.csr_matrix]], profile: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Observed counts, counts if all were soup, and gene, of the pairs of cluster and gene that tell something."""
    parts = []
    for cluster, half in folds:
        sums = _sums(half, cluster)
        expected = sums.sum(axis=1, keepdims=True) * profile
        row, gene = np.nonzero(expected >= _MIN_EXPECTED)
        parts.append((sums[row, gene], expected[row, gene], gene))
    observed, expected, gene = (np.concatenate(values) for values in zip(*parts, strict=True))
    if len(gene) > _MAX_PAIRS:
        kept = rng.choice(len(gene), _MAX_PAIRS, replace=False)
        observed, expected, gene = observed[kept], expected[kept], gene[kept]
    return observed, expected, gene


def _sums(matrix: sp.csr_matrix, codes: np.ndarray) -> np.ndarray:
    member = sp.csr_matrix((np.ones(len(codes)), (codes, np.arange(len(codes)))))
    return np.asarray((member @ matrix).todense(), dtype=np.float64)


def _likelihood(observed: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Poisson likelihood of each pair at each value of the grid, up to a factor per pair."""
    log = observed[:, None] * np.log(expected[:, None] * _GRID) - expected[:, None] * _GRID
    return np.exp(log - log.max(axis=1, keepdims=True))


def _fit(likelihood: np.ndarray, weight: np.ndarray, n_iter: int, start: np.ndarray | None = None) -> np.ndarray:
    """EM for the weights of the grid."""
    mixture = np.full(len(_GRID), 1 / len(_GRID)) if start is None else start
    drawn = weight > 0
    likelihood, weight = likelihood[drawn], weight[drawn] / weight.sum()
    for _ in range(n_iter):
        mixture = mixture * ((weight / (likelihood @ mixture)) @ likelihood)
    return mixture


def _quantile(mixture: np.ndarray, level: float) -> float:
    return float(np.interp(level, np.cumsum(mixture), _GRID))


def _bootstrap(
    likelihood: np.ndarray,
    gene: np.ndarray,
    mixture: np.ndarray,
    levels: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[float, float]:
    """Ends of the interval, from fits to resampled genes."""
    _, gene = np.unique(gene, return_inverse=True)
    n_genes = int(gene.max()) + 1
    # EM never gives back weight that it took from a value, so that each fit starts a little off the best one.
    start = 0.95 * mixture + 0.05 / len(_GRID)
    ends = []
    for _ in range(_N_BOOTSTRAP):
        weight = np.bincount(rng.integers(0, n_genes, n_genes), minlength=n_genes)[gene].astype(np.float64)
        fitted = _fit(likelihood, weight, _N_ITER_BOOTSTRAP, start)
        ends.append((_quantile(fitted, levels[0]), _quantile(fitted, levels[1])))
    low, high = np.array(ends).T
    return float(np.quantile(low, 0.025)), float(np.quantile(high, 0.975))


def _warn(estimate: SoupEstimate) -> None:
    if estimate.identified.all():
        return
    bounds = ", ".join(
        f"{name!r} (at most {upper:.2f})"
        for name, upper, known in zip(estimate.batches, estimate.interval[:, 1], estimate.identified, strict=True)
        if not known
    )
    warnings.warn(
        f"The share of ambient RNA is not identified in {int((~estimate.identified).sum())} of "
        f"{len(estimate.batches)} batches: {bounds}. Too few genes are absent from some cell type there, as in data of "
        "one type or of few counts. A model takes the median of the batches that identify theirs, and 0, which removes "
        "nothing, where none does. State the rate if you know it: ambient_rate=.",
        CellstillWarning,
        stacklevel=level_outside(),
    )
