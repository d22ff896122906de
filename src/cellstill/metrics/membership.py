"""Do synthetic cells tell whose cells they were made of? Attacks on donors, beside one that must succeed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from cellstill.errors import CellstillWarning, InvalidArgumentError, level_outside
from cellstill.metrics._donor_attacks import DonorAttacks, attack_success, paired_success
from cellstill.metrics._gene_agreement import check_integers, same_genes
from cellstill.metrics._inputs import category_codes

MIN_DONORS = 5
MIN_REFERENCE_DONORS = 2
_ROLES = {
    "member": "members",
    "non_member": "non-members",
    "reference": "references",
    "first": "members of the first release",
    "second": "members of the second release",
}
SYNTHETIC, CONTROL = "synthetic", "positive_control"


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
        \log \frac{d_k(x_n, \text{reference})}{d_k(x_n, \text{synthetic})}, \\
        \text{closest\_cell:} \quad & \max_{n \in N_i}
        \log \frac{d_k(x_n, \text{reference})}{d_k(x_n, \text{synthetic})},

    the second being the log ratio of the nearest-neighbour densities per dimension, up to a constant, and the third
    what a single cell that was copied tells; donors with more cells have a closer closest one. All are made a second
    time on the **positive control**: in place of the synthetic cells, as many real cells of the members, drawn at
    random. An attack that does not detect these tells nothing by failing on the synthetic cells.

    Donors differ, and with few non-members a release can look like more of the members than of the others by chance.
    Where a second release can be made, :func:`paired_membership_inference` compares each donor with itself.

    Parameters
    ----------
    synthetic, real
        Counts of the same genes, ``(n_synthetic, n_vars)`` and ``(n_obs, n_vars)``, sparse or dense; those of real
        cells are integers.
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
        One row for each ``release`` (``synthetic`` and ``positive_control``) and ``attack`` (``gan_leaks``,
        ``density_ratio`` and ``closest_cell``), with ``auroc`` and ``tpr`` (at 1 % false positives: with fewer than 100
        non-members, at none), their ``_low`` and ``_high``, ``detected`` (the interval of the AUROC is above 0.5),
        ``n_members`` and ``n_non_members``. Where nothing tells members, 95 % intervals of the AUROC covered 0.5 in
        91 % of simulations with 5 against 5 donors and in 95 % with 20 against 15; an interval of separated donors has
        no width.

    Raises
    ------
    InvalidArgumentError
        Real cells that are not counts, donors that do not exist or have two roles, or fewer than five members, five
        non-members or two reference donors.

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
    check_integers(real=x)
    codes, names = _donors(donors, x.shape[0])
    rng = np.random.default_rng(seed)
    role = _roles(names, {"member": ("members", members), "reference": ("reference", reference)})
    if reference is None:
        others = rng.permutation(np.flatnonzero(role == ""))
        role[others[: len(others) // 2]] = "reference"
    role[role == ""] = "non_member"
    _require(role, {"member": MIN_DONORS, "non_member": MIN_DONORS, "reference": MIN_REFERENCE_DONORS})
    _check_neighbors(n_neighbors, s)
    attacks = DonorAttacks(x, codes, len(names), role[codes] == "reference", n_comps, n_neighbors, seed)
    control = x[_drawn(rng, role[codes] == "member", s.shape[0])]
    rows = []
    for release, released in ((SYNTHETIC, s), (CONTROL, control)):
        for attack, score in attacks.scores(released).items():
            found = attack_success(
                score[role == "member"], score[role == "non_member"], n_bootstrap=n_bootstrap, seed=seed
            )
            rows.append({"release": release, "attack": attack} | found)
    return _told(pd.DataFrame(rows))


def paired_membership_inference(
    synthetic: tuple[Any, Any],
    real: Any,
    donors: Any,
    *,
    members: tuple[Iterable[Any], Iterable[Any]],
    reference: Iterable[Any] | None = None,
    n_comps: int = 30,
    n_neighbors: int = 1,
    n_bootstrap: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    r"""Attack donors through two releases, each made of one half of them: is a donor's own release the closer one.

    With the scores :math:`s_{iA}, s_{iB}` of :func:`membership_inference` for donor :math:`i` and the two releases,
    what the donor is like in itself cancels in the difference, and what the releases are like in the mean of both
    halves:

    .. math::

        \delta_i = \pm \left(s_{iA} - s_{iB} - \tfrac12 (\bar d_A + \bar d_B)\right),
        \quad \bar d_H = \operatorname{mean}_{i \in H} (s_{iA} - s_{iB})

    with + for the donors of A. The AUROC is that of the scores :math:`\delta_i / 2` of donors as members against
    :math:`-\delta_i / 2` as strangers, with both halves at equal weight; it is 0.5 if membership tells nothing, however
    much donors differ. Each donor is once a member and once not, so that fewer donors are needed than for
    :func:`membership_inference`. It audits a method, not a release: the data are condensed twice, from halves, for this
    alone.

    Parameters
    ----------
    synthetic
        Counts of the two releases, of the same genes.
    real, donors
        Counts of real cells and the donor of each, as in :func:`membership_inference`.
    members
        Donors that the first release was made of, and those of the second; no donor is in both.
    reference
        Donors of neither, to whose cells the coordinates and the density of the reference are fitted. Default: all
        donors of neither.
    n_comps, n_neighbors, n_bootstrap, seed
        As in :func:`membership_inference`; the bootstrap draws donors of each half.

    Returns
    -------
    DataFrame
        As that of :func:`membership_inference`, with ``n_members`` and ``n_non_members`` both the donors of A and B
        together. The positive control are real cells of each half in place of its release.

    Raises
    ------
    InvalidArgumentError
        Not two releases, real cells that are not counts, donors that do not exist or have two roles, fewer than five in
        a half, or fewer than two reference donors.

    Warns
    -----
    CellstillWarning
        No attack detects the positive control, or donors are closer to the other release, as they are if ``synthetic``
        and ``members`` are not in the same order.
    """
    pairs: dict[str, Any] = {"synthetic": synthetic, "members": members}
    for argument, pair in pairs.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InvalidArgumentError(
                f"{argument} has to be two: releases, and the donors that each was made of, in the same order. Found "
                f"{f'{len(pair)} of them' if isinstance(pair, tuple | list) else type(pair).__name__}."
            )
    first, second, x = same_genes(**{"synthetic[0]": synthetic[0], "synthetic[1]": synthetic[1], "real": real})
    check_integers(real=x)
    codes, names = _donors(donors, x.shape[0])
    named = {"first": ("members[0]", members[0]), "second": ("members[1]", members[1])}
    role = _roles(names, named | {"reference": ("reference", reference)})
    if reference is None:
        role[role == ""] = "reference"
    _require(role, {"first": MIN_DONORS, "second": MIN_DONORS, "reference": MIN_REFERENCE_DONORS})
    for release in (first, second):
        _check_neighbors(n_neighbors, release)
    used = role[codes] != ""
    x, codes = x[used], codes[used]
    attacks = DonorAttacks(x, codes, len(names), role[codes] == "reference", n_comps, n_neighbors, seed)
    rng = np.random.default_rng(seed)
    controls = [
        x[_drawn(rng, role[codes] == half, release.shape[0])]
        for half, release in (("first", first), ("second", second))
    ]
    rows = []
    for name, both in ((SYNTHETIC, [first, second]), (CONTROL, controls)):
        of_first, of_second = (attacks.scores(release) for release in both)
        for attack in of_first:
            halves = (of_first[attack][role == half] - of_second[attack][role == half] for half in ("first", "second"))
            found = paired_success(*halves, n_bootstrap=n_bootstrap, seed=seed)
            rows.append({"release": name, "attack": attack} | found)
    table = pd.DataFrame(rows)
    if (table.loc[table["release"] == SYNTHETIC, "auroc_high"] < 0.5).all():
        warnings.warn(
            "Donors are closer to the release that they are no members of. The first release has to be the one made of "
            "members[0]: check the order of synthetic and members.",
            CellstillWarning,
            stacklevel=level_outside(),
        )
    return _told(table)


def _donors(donors: Any, n_obs: int) -> tuple[NDArray, NDArray]:
    """Code of each cell's donor, and names in their order, which that of the cells does not change."""
    first_seen, known_as = category_codes("donors", donors, n_obs)
    names, rank = np.unique(np.array([str(name) for name in known_as]), return_inverse=True)
    return rank[first_seen], names


def _drawn(rng: np.random.Generator, of: NDArray, n: int) -> NDArray:
    """At most ``n`` of the cells, at random."""
    return rng.permutation(np.flatnonzero(of))[:n]


def _check_neighbors(n_neighbors: int, synthetic: sp.csr_matrix) -> None:
    if not 1 <= n_neighbors <= synthetic.shape[0]:
        raise InvalidArgumentError(
            f"n_neighbors={n_neighbors} must lie between 1 and the number of synthetic cells, {synthetic.shape[0]}."
        )


def _told(table: pd.DataFrame) -> pd.DataFrame:
    """Warn if no attack detects its positive control."""
    if not table.loc[table["release"] == CONTROL, "detected"].any():
        warnings.warn(
            "No attack detects the positive control, real cells of the members: with these donors and so few cells, "
            "not to detect the synthetic cells is no evidence of privacy. Bring more donors, or release more cells.",
            CellstillWarning,
            stacklevel=level_outside(),
        )
    return table


def _roles(names: NDArray, wanted: Mapping[str, tuple[str, Iterable[Any] | None]]) -> NDArray:
    """Role of each donor, "" for none; ``wanted`` gives for a role the argument and the donors that it names."""
    role = np.full(len(names), "", dtype=object)
    argument_of: dict[str, str] = {}
    for value, (argument, chosen) in wanted.items():
        if chosen is None:
            continue
        asked = sorted({str(name) for name in ([chosen] if isinstance(chosen, str) else chosen)})
        if unknown := [name for name in asked if name not in names]:
            raise InvalidArgumentError(
                f"{argument} names {unknown[:5]}, which are not among the donors ({', '.join(names[:10])}"
                f"{', ...' if len(names) > 10 else ''})."
            )
        at = np.isin(names, asked)
        for other, other_argument in argument_of.items():
            if (role[at] == other).any():
                both = ", ".join(names[at & (role == other)][:5])
                raise InvalidArgumentError(f"{argument} and {other_argument} share {both}. Each donor has one role.")
        role[at] = value
        argument_of[value] = argument
    return role


def _require(role: NDArray, least: Mapping[str, int]) -> None:
    for value, n in least.items():
        found = int((role == value).sum())
        if found < n:
            raise InvalidArgumentError(
                f"{found} of {len(role)} donors are {_ROLES[value]}; at least {n} are needed to judge an attack. "
                "Bring more donors, or hold more of them out."
            )
