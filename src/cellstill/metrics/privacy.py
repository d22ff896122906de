"""Do synthetic cells tell whose cells they were made of? Attacks on donors, beside one that must succeed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from cellstill.data.expression import log_expression
from cellstill.errors import CellstillWarning, InvalidArgumentError
from cellstill.metrics._gene_agreement import same_genes
from cellstill.metrics._inputs import category_codes
from cellstill.metrics._search import exact_search

MIN_DONORS = 5
MIN_REFERENCE_DONORS = 2
_COPY = 1e-4  # of the median distance between real cells
_LEVEL = 0.95

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
    """
    s, t, h = same_genes(synthetic=synthetic, training=training, held_out=held_out)
    # Fitted to the records: components of the held-out cells would follow their noise, and set them apart.
    project = _Projection(t, n_comps, seed)
    records = project(t)
    of_synthetic, of_control = (_nearest(records, project(x), 1) for x in (s, h))
    (low, median), (control_low, control_median) = (np.quantile(d, [0.05, 0.5]) for d in (of_synthetic, of_control))
    return ClosestRecord(
        median=float(median),
        low=float(low),
        control_median=float(control_median),
        control_low=float(control_low),
        copies=float((of_synthetic <= _COPY * control_median).mean()),
    )


def membership_inference(
    synthetic: Any,
    real: Any,
    donors: Any,
    *,
    members: Iterable[Any],
    reference: Iterable[Any] | None = None,
    n_comps: int = 30,
    n_neighbors: int = 1,
    n_bootstrap: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    r"""Attack donors: do synthetic cells tell that they were made of a donor's cells, or not.

    The attacker has all cells of a donor, the synthetic cells, and cells of other donors for reference, and scores
    donors that are members and donors that are not. Distances :math:`d` are between principal components of
    :math:`\log(1 + 10^4 x / l)`, fitted to the reference cells. With :math:`N_i` the cells of donor :math:`i`, the
    scores are

    .. math::

        \text{gan\_leaks:} \quad & -\frac{1}{|N_i|} \sum_{n \in N_i} d_1(x_n, \text{synthetic}) \\
        \text{density\_ratio:} \quad & \frac{1}{|N_i|} \sum_{n \in N_i}
        \log \frac{d_k(x_n, \text{reference})}{d_k(x_n, \text{synthetic})},

    the second being the log ratio of the nearest-neighbour densities per dimension, up to a constant. Both attacks are
    made a second time on the **positive control**: in place of the synthetic cells, as many real cells of the members,
    drawn at random. An attack that does not detect these tells nothing by failing on the synthetic cells.

    Parameters
    ----------
    synthetic, real
        Counts of the same genes, ``(n_synthetic, n_vars)`` and ``(n_obs, n_vars)``, sparse or dense.
    donors
        Donor of each real cell, without NaN.
    members
        Donors whose cells the synthetic ones were made of.
    reference
        Donors, not members, that the attacker knows. Default: half of those that are not members, at random. All others
        that are not members are the non-members of the test.
    n_comps
        Principal components. More make copies stand out, and other likeness less.
    n_neighbors
        The :math:`k` of the density ratio. 1 finds single cells that were copied; more are steadier, and blind to them.
    n_bootstrap
        Resamples of the donors for the 95 % intervals (percentile, members and non-members each with replacement).
    seed
        Of the draws of reference donors, positive control and bootstrap.

    Returns
    -------
    DataFrame
        One row for each ``release`` (``synthetic`` and ``positive_control``) and ``attack`` (``gan_leaks`` and
        ``density_ratio``), with ``auroc`` and ``tpr`` (at 1 % false positives: with fewer than 100 non-members, at
        none), their ``_low`` and ``_high``, ``detected`` (the interval of the AUROC is above 0.5), ``n_members`` and
        ``n_non_members``. Where nothing tells members, 95 % intervals of the AUROC covered 0.5 in 91 %
        of simulations with 5 against 5 donors and in 95 % with 20 against 15; an interval of separated donors has no
        width.

    Raises
    ------
    InvalidArgumentError
        Donors that do not exist or have two roles, or fewer than five members, five non-members or two reference
        donors.

    Warns
    -----
    CellstillWarning
        No attack detects the positive control: nothing can be concluded from the rows of synthetic cells.

    References
    ----------
    Chen et al. (2020), GAN-Leaks, CCS; van Breugel et al. (2023), Membership inference attacks against synthetic data
    through overfitting detection (DOMIAS), AISTATS.
    """
    s, x = same_genes(synthetic=synthetic, real=real)
    first_seen, known_as = category_codes("donors", donors, x.shape[0])
    # Donors are drawn in the order of their names, which that of the cells does not change.
    names, rank = np.unique(np.array([str(name) for name in known_as]), return_inverse=True)
    codes = rank[first_seen]
    rng = np.random.default_rng(seed)
    role = _roles(names, members, reference, rng)
    known, is_member = role[codes] == "reference", role[codes] == "member"
    targets = np.flatnonzero(~known)
    project = _Projection(x[known], n_comps, seed)
    reference_points, points = project(x[known]), project(x[targets])
    if not 1 <= n_neighbors <= min(len(reference_points), s.shape[0]):
        raise InvalidArgumentError(
            f"n_neighbors={n_neighbors} must lie between 1 and the number of synthetic cells, {s.shape[0]}."
        )
    to_reference = _nearest(reference_points, points, n_neighbors)
    floor = _COPY * max(float(np.median(to_reference)), np.finfo(float).tiny)
    drawn = rng.permutation(np.flatnonzero(is_member))[: s.shape[0]]
    rows = []
    for release, released in (("synthetic", s), ("positive_control", x[drawn])):
        at = project(released)
        nearest = _nearest(at, points, 1)
        to_released = nearest if n_neighbors == 1 else _nearest(at, points, min(n_neighbors, len(at)))
        of_cell = {
            "gan_leaks": -nearest,
            "density_ratio": np.log(np.maximum(to_reference, floor)) - np.log(np.maximum(to_released, floor)),
        }
        for attack, values in of_cell.items():
            sums = np.bincount(codes[targets], values, len(names))
            score = sums / np.maximum(np.bincount(codes[targets], minlength=len(names)), 1)
            found = attack_success(
                score[role == "member"], score[role == "non_member"], n_bootstrap=n_bootstrap, seed=seed
            )
            rows.append({"release": release, "attack": attack} | found)
    table = pd.DataFrame(rows)
    if not table.loc[table["release"] == "positive_control", "detected"].any():
        warnings.warn(
            "No attack detects the positive control, real cells of the members: with these donors and so few cells, "
            "not to detect the synthetic cells is no evidence of privacy. Bring more donors, or release more cells.",
            CellstillWarning,
            stacklevel=2,
        )
    return table


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
    tail = (1 - _LEVEL) / 2
    (auroc_low, auroc_high), (tpr_low, tpr_high) = (np.quantile(v, [tail, 1 - tail]) for v in (auroc, tpr))
    return {
        "auroc": float(wins.mean()),
        "auroc_low": float(auroc_low),
        "auroc_high": float(auroc_high),
        "tpr": float(_tpr(a[None], b[None])[0]),
        "tpr_low": float(tpr_low),
        "tpr_high": float(tpr_high),
        "detected": bool(auroc_low > 0.5),
        "n_members": len(a),
        "n_non_members": len(b),
    }


class _Projection:
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


def _nearest(points: NDArray[np.float64], query: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Distance of each query to its ``k``-th nearest point."""
    return exact_search(points, query, k)[1][:, -1].astype(np.float64)


def _roles(
    names: NDArray, members: Iterable[Any], reference: Iterable[Any] | None, rng: np.random.Generator
) -> NDArray:
    """``"member"``, ``"reference"`` or ``"non_member"`` of each donor."""
    role = np.full(len(names), "non_member")
    for argument, chosen, value in (("members", members, "member"), ("reference", reference, "reference")):
        if chosen is None:
            others = rng.permutation(np.flatnonzero(role == "non_member"))
            role[others[: len(others) // 2]] = value
            continue
        wanted = sorted({str(name) for name in ([chosen] if isinstance(chosen, str) else chosen)})
        if unknown := [name for name in wanted if name not in names]:
            raise InvalidArgumentError(
                f"{argument} names {unknown[:5]}, which are not among the donors ({', '.join(names[:10])}"
                f"{', ...' if len(names) > 10 else ''})."
            )
        at = np.isin(names, wanted)
        if (role[at] == "member").any():
            both = ", ".join(names[at & (role == "member")][:5])
            raise InvalidArgumentError(f"{argument} and members share {both}. Each donor has one role.")
        role[at] = value
    for value, least in (("member", MIN_DONORS), ("non_member", MIN_DONORS), ("reference", MIN_REFERENCE_DONORS)):
        found = int((role == value).sum())
        if found < least:
            raise InvalidArgumentError(
                f"{found} of {len(names)} donors are {value.replace('_', '-')}s; at least {MIN_DONORS} members, "
                f"{MIN_DONORS} non-members and {MIN_REFERENCE_DONORS} reference donors are needed to judge an attack. "
                "Bring more donors, or hold more of them out."
            )
    return role


def _tpr(members: NDArray[np.float64], non_members: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of the members above the threshold that at most 1 % of the non-members pass; along the last axis."""
    n = non_members.shape[-1]
    threshold = np.sort(non_members, axis=-1)[..., n - 1 - n // 100]
    return (members > threshold[..., None]).mean(axis=-1)
