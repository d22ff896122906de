"""Attacks on donors: scores by which those whose cells were used stand out, and how well they do."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from cellstill.data.expression import log_expression
from cellstill.errors import InvalidArgumentError
from cellstill.metrics._search import exact_search

COPY = 1e-4
"""Distance, as a share of the median between real cells, below which a cell is a copy."""

_LEVEL = 0.95


class DonorAttacks:
    """Score each donor by how much a release looks as if it was made of the donor's cells.

    Parameters
    ----------
    counts, codes
        Real cells, CSR, and the donor of each, from 0 to ``n_donors - 1``.
    n_donors
        Number of donors.
    known
        Cells of reference donors, shape ``(n_obs,)``: the attacker's coordinates are fitted to them.
    n_comps, n_neighbors, seed
        See :func:`~cellstill.metrics.membership_inference`.
    """

    def __init__(
        self,
        counts: sp.csr_matrix,
        codes: NDArray,
        n_donors: int,
        known: NDArray,
        n_comps: int,
        n_neighbors: int,
        seed: int,
    ) -> None:
        self._codes, self._n_donors, self._n_neighbors = codes[~known], n_donors, n_neighbors
        self._project = Projection(counts[known], n_comps, seed)
        reference, self._points = self._project(counts[known]), self._project(counts[~known])
        if not 1 <= n_neighbors <= len(reference):
            raise InvalidArgumentError(
                f"n_neighbors={n_neighbors} must lie between 1 and the number of reference cells, {len(reference)}."
            )
        self._to_reference = nearest(reference, self._points, n_neighbors)
        self._floor = COPY * max(float(np.median(self._to_reference)), np.finfo(float).tiny)

    def scores(self, released: sp.csr_matrix) -> dict[str, NDArray[np.float64]]:
        """Scores by attack, shape ``(n_donors,)`` each; those of reference donors mean nothing."""
        at = self._project(released)
        closest = nearest(at, self._points, 1)
        n_neighbors = min(self._n_neighbors, len(at))
        to_released = closest if n_neighbors == 1 else nearest(at, self._points, n_neighbors)
        ratio = np.log(np.maximum(self._to_reference, self._floor)) - np.log(np.maximum(to_released, self._floor))
        highest = np.full(self._n_donors, -np.inf)
        np.maximum.at(highest, self._codes, ratio)
        return {"gan_leaks": self._mean(-closest), "density_ratio": self._mean(ratio), "closest_cell": highest}

    def _mean(self, values: NDArray) -> NDArray[np.float64]:
        sums = np.bincount(self._codes, values, self._n_donors)
        return np.asarray(sums / np.maximum(np.bincount(self._codes, minlength=self._n_donors), 1))


def attack_success(
    members: ArrayLike, non_members: ArrayLike, *, n_bootstrap: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """AUROC and true positive rate at 1 % false positives of donors' scores, with 95 % bootstrap intervals.

    Parameters
    ----------
    members, non_members
        Scores, larger for donors that look like members; shapes ``(n_members,)`` and ``(n_non_members,)``.
    n_bootstrap
        Resamples of both, with replacement.
    seed
        Of the resamples.

    Returns
    -------
    ``auroc``, ``auroc_low``, ``auroc_high``, ``tpr``, ``tpr_low``, ``tpr_high``, ``detected``, ``n_members`` and
    ``n_non_members``.
    """
    a, b = np.asarray(members, dtype=np.float64), np.asarray(non_members, dtype=np.float64)
    if n_bootstrap < 1:
        raise InvalidArgumentError(f"n_bootstrap={n_bootstrap} must be at least 1.")
    rng = np.random.default_rng(seed)
    wins = (a[:, None] > b) + 0.5 * (a[:, None] == b)
    in_a, in_b = (rng.integers(0, len(v), (n_bootstrap, len(v))) for v in (a, b))
    weights = [
        np.stack([np.bincount(r, minlength=len(v)) / len(v) for r in rows]) for rows, v in ((in_a, a), (in_b, b))
    ]
    auroc = ((weights[0] @ wins) * weights[1]).sum(axis=1)
    tpr = _tpr(a[in_a], b[in_b])
    return _summary(auroc, tpr, float(wins.mean()), float(_tpr(a[None], b[None])[0]), len(a), len(b))


def paired_success(first: ArrayLike, second: ArrayLike, *, n_bootstrap: int = 2000, seed: int = 0) -> dict[str, Any]:
    """The same as :func:`attack_success` of donors as members against themselves as strangers.

    Parameters
    ----------
    first, second
        Score of one release less that of the other, of the donors that the first was made of and of those that the
        second was made of. What all have in common is the mean of both means; less it, and with its sign turned for
        the second, it is by how much a donor's own release scores higher. Both groups weigh one half, whatever their
        sizes, so that nothing is found where the two differ in nothing else.
    n_bootstrap, seed
        Resamples of the donors of each group, with replacement.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if n_bootstrap < 1:
        raise InvalidArgumentError(f"n_bootstrap={n_bootstrap} must be at least 1.")
    weights = np.concatenate([np.full(len(v), 0.5 / len(v)) for v in (a, b)])
    rng = np.random.default_rng(seed)
    in_a, in_b = (rng.integers(0, len(v), (n_bootstrap, len(v))) for v in (a, b))
    resampled = np.array([_paired_rates(a[i], b[j], weights) for i, j in zip(in_a, in_b, strict=True)])
    auroc, tpr = _paired_rates(a, b, weights)
    return _summary(resampled[:, 0], resampled[:, 1], auroc, tpr, len(weights), len(weights))


def _paired_rates(a: NDArray[np.float64], b: NDArray[np.float64], weights: NDArray[np.float64]) -> tuple[float, float]:
    """AUROC and true positive rate, with weights of the donors."""
    common = (a.mean() + b.mean()) / 2
    own = np.concatenate([a - common, common - b])
    sums = own[:, None] + own
    n = len(own)
    passed = own > np.sort(-own)[n - 1 - n // 100]
    return float(weights @ ((sums > 0) + 0.5 * (sums == 0)) @ weights), float(weights @ passed)


def _summary(
    aurocs: NDArray[np.float64], tprs: NDArray[np.float64], auroc: float, tpr: float, n_members: int, n_others: int
) -> dict[str, Any]:
    tail = (1 - _LEVEL) / 2
    (auroc_low, auroc_high), (tpr_low, tpr_high) = (np.quantile(v, [tail, 1 - tail]) for v in (aurocs, tprs))
    return {
        "auroc": auroc,
        "auroc_low": float(auroc_low),
        "auroc_high": float(auroc_high),
        "tpr": tpr,
        "tpr_low": float(tpr_low),
        "tpr_high": float(tpr_high),
        "detected": bool(auroc_low > 0.5),
        "n_members": n_members,
        "n_non_members": n_others,
    }


def _tpr(members: NDArray[np.float64], non_members: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of the members above the threshold that at most 1 % of the non-members pass; along the last axis."""
    n = non_members.shape[-1]
    threshold = np.sort(non_members, axis=-1)[..., n - 1 - n // 100]
    return (members > threshold[..., None]).mean(axis=-1)


class Projection:
    """Principal components of the log expression of some cells, for any cells.

    The attacker's reference cells are neither members nor non-members, so that the components favour none of them.
    """

    def __init__(self, counts: sp.csr_matrix, n_comps: int, seed: int) -> None:
        from sklearn.decomposition import PCA

        if n_comps < 1:
            raise InvalidArgumentError(f"n_comps={n_comps} must be at least 1.")
        n_comps = min(n_comps, min(counts.shape) - 1)
        # float64, so that the distance of a copy is 0 up to 1e-8 of the coordinates.
        self._pca = PCA(n_comps, svd_solver="arpack", random_state=seed).fit(log_expression(counts).astype(np.float64))

    def __call__(self, counts: sp.csr_matrix) -> NDArray[np.float64]:
        return np.asarray(self._pca.transform(log_expression(counts).astype(np.float64)))


def nearest(points: NDArray[np.float64], query: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Distance of each query to its ``k``-th nearest point."""
    return exact_search(points, query, k)[1][:, -1].astype(np.float64)
