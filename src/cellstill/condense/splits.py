"""Training, validation and test cells: within each class, or by donor."""

from __future__ import annotations

from numbers import Real

import numpy as np

from cellstill.errors import InvalidArgumentError, whole_number

_N_ORDERS = 200


def split_classes(
    codes: np.ndarray,
    donors: np.ndarray | None = None,
    *,
    train_size: float = 0.7,
    validation_size: float = 0.1,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Split cells at random, each class in the same shares.

    Parameters
    ----------
    codes
        Class of each cell, shape ``(n_obs,)``.
    donors
        Donor of each cell; each donor is then on one side only, and the shares are of donors. Of many random orders of
        the donors the one is taken that leaves training cells of the most classes, then test, then validation cells,
        and among those the one whose shares of cells are closest.
    train_size, validation_size
        Shares; the rest is for testing, and may be none. A class of one cell trains; of two, one trains and one tests
        (without a test part, chooses); of three or more, each part has one at least.
    seed
        Of the order.

    Returns
    -------
    Sorted positions by ``"train"``, ``"validation"`` and ``"test"``.

    Raises
    ------
    InvalidArgumentError
        Shares or a seed out of range, or fewer donors than parts.
    """
    seed = whole_number("seed", seed, least=0)
    numbers = all(isinstance(size, Real) and not isinstance(size, bool) for size in (train_size, validation_size))
    shares = np.array([train_size, validation_size, 1 - train_size - validation_size]) if numbers else np.zeros(3)
    if not ((shares[:2] > 0).all() and shares[2] >= -1e-9):
        raise InvalidArgumentError(
            f"train_size={train_size!r} and validation_size={validation_size!r} have to be above 0, and at most 1 "
            "together: some cells train, some choose, and the rest judge."
        )
    if shares[2] < 1e-9:
        shares = shares[:2]
    rng = np.random.default_rng(seed)
    if donors is None:
        part = np.empty(len(codes), dtype=np.int64)
        for code in np.unique(codes):
            cells = rng.permutation(np.flatnonzero(codes == code))
            part[cells] = _parts(len(cells), shares)
    else:
        names, of_cell = np.unique(donors, return_inverse=True)
        if len(names) < len(shares):
            raise InvalidArgumentError(
                f"donor_key has {len(names)} donors ({', '.join(names)}); {len(shares)} at least are needed, one for "
                "each part of the split. Leave donor_key out to split cells instead."
            )
        part = _by_donor(codes, of_cell, len(names), shares, rng)
    return {name: np.flatnonzero(part == k) for k, name in enumerate(("train", "validation", "test"))}


def _by_donor(
    codes: np.ndarray, donor: np.ndarray, n_donors: int, shares: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    cells = np.zeros((n_donors, codes.max() + 1))
    np.add.at(cells, (donor, codes), 1)
    parts = _parts(n_donors, shares)
    best: tuple[tuple[float, ...], np.ndarray | None] = ((), None)
    for _ in range(_N_ORDERS):
        of_donor = np.empty(n_donors, dtype=np.int64)
        of_donor[rng.permutation(n_donors)] = parts
        held = np.stack([cells[of_donor == k].sum(axis=0) for k in range(len(shares))])
        covered = (held > 0).sum(axis=1)
        off = float(np.abs(held.sum(axis=1) / len(codes) - shares).sum())
        worth = (covered[0], *covered[:0:-1], -off)
        if best[1] is None or worth > best[0]:
            best = (worth, of_donor)
    assert best[1] is not None
    return best[1][donor]


def _parts(n: int, shares: np.ndarray) -> np.ndarray:
    """Part of each of ``n`` things in random order."""
    if n < len(shares):
        return np.array([0, len(shares) - 1][:n], dtype=np.int64)
    sizes = np.maximum(np.floor(shares * n + 0.5).astype(np.int64), 1)
    sizes[0] = 1
    while sizes.sum() > n:
        sizes[1 + np.argmax(sizes[1:])] -= 1
    sizes[0] += n - sizes.sum()
    return np.repeat(np.arange(len(shares)), sizes)
