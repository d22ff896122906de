"""Known ambient RNA on top of real cells: what a correction should find is then written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellstill.data.counts import as_csr
from cellstill.errors import InvalidArgumentError, InvalidCountsError


@dataclass(frozen=True, eq=False)
class Contamination:
    r"""Cells with known soup, as :func:`add_soup` made them.

    Attributes
    ----------
    counts
        Contaminated counts, the clean ones plus the soup; CSR, ``(n_obs, n_vars)``, the dtype of the clean counts.
    soup
        The counts that were added, CSR of the same shape and dtype. ``counts - soup`` is the clean matrix exactly.
    profile
        Composition of the soup of each batch, ``(n_batches, n_vars)``; rows sum to 1.
    rate
        Rate of each batch as it was asked for, ``(n_batches,)``.
    cell_rate
        Expected share of soup in the total of each cell, ``(n_obs,)``.
    batch_codes
        Batch of each cell as a row of ``profile``, ``(n_obs,)``.
    batches
        Names of the batches, in the order of ``profile`` and ``rate``.
    """

    counts: sp.csr_matrix
    soup: sp.csr_matrix
    profile: np.ndarray
    rate: np.ndarray
    cell_rate: np.ndarray
    batch_codes: np.ndarray
    batches: tuple[Any, ...]

    @property
    def realised_rate(self) -> np.ndarray:
        """Share of soup in all the counts of each batch as they were drawn, ``(n_batches,)``."""
        soup = np.bincount(self.batch_codes, np.asarray(self.soup.sum(axis=1, dtype=np.float64)).ravel())
        return soup / np.bincount(self.batch_codes, np.asarray(self.counts.sum(axis=1, dtype=np.float64)).ravel())


def add_soup(
    counts: Any,
    rate: float | Sequence[float],
    *,
    batch: Any = None,
    profile: Any = None,
    spread: float = 0.3,
    seed: int = 0,
) -> Contamination:
    r"""Add ambient RNA of known rate and composition to real counts.

    A droplet catches the soup besides its cell, so that soup is *added*: no native count is lost, the clean counts
    are the truth of every entry, and a correction never has to give back more than it is given. In batch :math:`e`
    with rate :math:`r_e` and the pooled expression :math:`\chi_{ef}` of its cells as profile,

    .. math::

        o_n &= \frac{r_e}{1 - r_e} \exp(\sigma \varepsilon_n - \sigma^2 / 2), \quad \varepsilon_n \sim N(0, 1), \qquad
        r_n = \frac{o_n}{1 + o_n} \\
        s_{nf} &\sim \mathrm{Poisson}(o_n N_n \chi_{ef}), \qquad
        x_{nf} = \mathrm{clean}_{nf} + s_{nf}, \qquad N_n = \textstyle\sum_f \mathrm{clean}_{nf}

    so that the soup is expected to be the share :math:`r_n` of a cell's new total, and :math:`r_e` of that of its
    batch. Only what is not zero is ever held: time and memory grow with the number of counts.

    Parameters
    ----------
    counts
        Clean counts, ``(n_obs, n_vars)``: sparse, dense, or on disk. Real cells have soup of their own already,
        which stays with the truth.
    rate
        Share of soup in the contaminated totals: one number, or one per batch in the order in which the batches
        first appear (for a categorical ``batch``, in the order of its categories). 0.05 is common in droplets of
        fresh blood, 0.2 in those of dissociated tissue. 0 adds nothing.
    batch
        Batch of each cell, without NaN. ``None`` makes all cells one batch.
    profile
        Composition of the soup: ``(n_vars,)`` for all batches, or ``(n_batches, n_vars)``; scaled to sum to 1.
        ``None`` pools the clean cells of each batch, what the cells that burst would leave.
    spread
        Standard deviation of the log odds between the cells of a batch. 0 gives every cell the rate of its batch;
        0.3 makes two cells of three lie within a factor of 1.35.
    seed
        Seed of the draws. The same seed gives the same counts bit for bit.

    Returns
    -------
    Contamination

    Raises
    ------
    InvalidArgumentError
        A rate lies outside ``[0, 1)``, the spread is negative, or the shape of rates, batch or profile does not fit.
    InvalidCountsError
        The counts are not finite non-negative integers, or a batch has none.

    Examples
    --------
    >>> from cellstill.data import simulate_counts
    >>> adata = simulate_counts(n_obs=300, n_vars=100, n_batches=3, seed=1)
    >>> dirty = add_soup(adata.X, [0.05, 0.1, 0.2], batch=adata.obs["batch"], seed=1)
    >>> dirty.counts.sum() == adata.X.sum() + dirty.soup.sum()
    True
    """
    clean = as_csr(counts)
    if not np.isfinite(clean.data).all() or (clean.data < 0).any() or (clean.data != np.floor(clean.data)).any():
        raise InvalidCountsError("counts must be finite non-negative integers. Pass raw counts, not normalised values.")
    if not isinstance(spread, Real) or not 0 <= float(spread) < np.inf:
        raise InvalidArgumentError(f"spread={spread!r} must be a finite number of at least 0.")
    n_obs = clean.shape[0]
    codes, names = batch_codes(batch, n_obs)
    rates = _rates(rate, names)
    library = np.asarray(clean.sum(axis=1, dtype=np.float64)).ravel()
    chi = _profiles(profile, clean, codes, names)

    noise, draws = np.random.default_rng(seed).spawn(2)
    log_spread = spread * noise.standard_normal(n_obs) - spread**2 / 2
    odds = (rates / (1 - rates))[codes] * np.exp(log_spread)
    totals = draws.poisson(odds * library)
    soup = _draw(totals, chi, codes, draws).astype(clean.dtype)
    return Contamination(
        counts=as_csr(clean + soup),
        soup=soup,
        profile=chi,
        rate=rates,
        cell_rate=odds / (1 + odds),
        batch_codes=codes,
        batches=tuple(names),
    )


def batch_codes(batch: Any, n_obs: int, *, argument: str = "batch") -> tuple[np.ndarray, list[Any]]:
    """Codes of the batches and their names, in order of appearance or of the categories that have cells.

    ``None`` makes all cells one batch. Raises InvalidArgumentError, naming ``argument``, for missing values or another
    number of cells than ``n_obs``.
    """
    if batch is None:
        return np.zeros(n_obs, dtype=np.intp), ["all cells"]
    values = pd.Series(batch)
    if len(values) != n_obs or values.isna().any():
        raise InvalidArgumentError(
            f"{argument} must give one category for each of the {n_obs} cells, without NaN; found {len(values)} "
            f"values, {int(values.isna().sum())} of them missing. Pass a column of adata.obs."
        )
    if isinstance(values.dtype, pd.CategoricalDtype):
        values = values.cat.remove_unused_categories()
        return values.cat.codes.to_numpy().astype(np.intp), list(values.cat.categories)
    codes, names = pd.factorize(values)
    return codes.astype(np.intp), list(names)


def _rates(rate: float | Sequence[float], names: list[Any]) -> np.ndarray:
    rates = np.asarray(rate, dtype=np.float64)
    if rates.ndim > 1 or (rates.ndim == 1 and len(rates) != len(names)):
        raise InvalidArgumentError(
            f"rate has shape {rates.shape}; give one number, or one for each of the {len(names)} batches "
            f"({', '.join(map(repr, names))})."
        )
    if not ((rates >= 0) & (rates < 1)).all():
        raise InvalidArgumentError(f"rate={rate!r} must lie in [0, 1): it is the share of soup in a cell's counts.")
    return np.broadcast_to(rates, len(names)).copy()


def _profiles(profile: Any, clean: sp.csr_matrix, codes: np.ndarray, names: list[Any]) -> np.ndarray:
    """Composition of the soup, one row per batch; the rows sum to 1."""
    shape = (len(names), clean.shape[1])
    if profile is None:
        member = sp.csr_matrix((np.ones(len(codes)), (codes, np.arange(len(codes)))), shape=(len(names), len(codes)))
        chi = (member @ clean.astype(np.float64)).toarray()
        empty = chi.sum(axis=1) == 0
        if empty.any():
            raise InvalidCountsError(
                f"batch {names[int(np.argmax(empty))]!r} has no counts at all, so its cells give no profile. "
                "Drop its cells or pass profile=..."
            )
    else:
        given = np.asarray(profile, dtype=np.float64)
        if given.shape not in (shape[1:], shape):
            raise InvalidArgumentError(f"profile has shape {given.shape}; it must be {shape[1:]} or {shape}.")
        chi = np.broadcast_to(given, shape).copy()
        if not np.isfinite(chi).all() or (chi < 0).any() or (chi.sum(axis=1) == 0).any():
            raise InvalidArgumentError("profile must be finite and non-negative, with a positive sum for each batch.")
    return chi / chi.sum(axis=1, keepdims=True)


def _draw(totals: np.ndarray, chi: np.ndarray, codes: np.ndarray, rng: np.random.Generator) -> sp.csr_matrix:
    """Genes of the soup counts: given its total, a cell's Poisson counts are multinomial."""
    cells = np.repeat(np.arange(len(totals)), totals)
    genes = np.empty(len(cells), dtype=np.intp)
    uniform = rng.random(len(cells))
    for batch, profile in enumerate(chi):
        cumulative = profile.cumsum()
        mine = codes[cells] == batch
        # u < 1, but rounding may lift u times the sum to the sum itself; side="right" skips genes of weight 0.
        found = np.searchsorted(cumulative, uniform[mine] * cumulative[-1], side="right")
        genes[mine] = np.minimum(found, np.flatnonzero(profile)[-1])
    # Duplicate coordinates add up.
    return sp.csr_matrix((np.ones(len(cells)), (cells, genes)), shape=(len(totals), chi.shape[1]))


def expected_native(x: np.ndarray, native: np.ndarray, soup: np.ndarray, theta: np.ndarray | float) -> np.ndarray:
    r"""Expected native part of counts that are a sum of native and soup counts.

    With :math:`x = y + s`, :math:`y \sim \mathrm{NB}(\mu, \theta)` and :math:`s \sim \mathrm{Poisson}(\beta)`,

    .. math::

        E[y \mid x] = x - \frac{\sum_{k=0}^{x} k\, w_k}{\sum_{k=0}^{x} w_k}, \qquad
        \frac{w_k}{w_{k-1}} = \frac{\beta}{k} \cdot \frac{x - k + 1}{x - k + \theta} \cdot \frac{\mu + \theta}{\mu}

    For :math:`\theta \to \infty` this is the share :math:`x \mu / (\mu + \beta)`, which takes more from a count the
    higher it is. Native counts that spread more than Poisson's (small :math:`\theta`) are the likelier cause of a high
    count: what is taken then stays near :math:`\beta`, however high the count.

    Parameters
    ----------
    x
        Observed counts, non-negative. Zeros stay zero, so that the non-zeros of a sparse matrix are enough. The sum is
        over whole counts: what is expected of a count that was corrected before, and is no longer whole, lies between
        what is expected of the whole numbers below and above, as the count does.
    native, soup
        Expected native and soup counts :math:`\mu` and :math:`\beta` of the same entries, non-negative. Where both are
        0 nothing is known, and the count is left as it is.
    theta
        Inverse dispersion of the native counts, positive; ``inf`` is Poisson's.

    Returns
    -------
    Float64, between 0 and ``x``. The terms are summed until the rest is below 1e-12 of the sum.
    """
    x, native, soup, theta = np.broadcast_arrays(*(np.asarray(v, dtype=np.float64) for v in (x, native, soup, theta)))
    below = np.floor(x)
    expected = _expected_of_whole(below, native, soup, theta)
    part = np.nonzero(x > below)
    if len(part[0]):
        above = _expected_of_whole(below[part] + 1, native[part], soup[part], theta[part])
        expected[part] += (x - below)[part] * (above - expected[part])
    return np.minimum(expected, x)


def draw_native(
    x: np.ndarray, native: np.ndarray, soup: np.ndarray, theta: np.ndarray | float, rng: np.random.Generator
) -> np.ndarray:
    """Draw the native part of counts from the posterior whose mean is :func:`expected_native`.

    Parameters
    ----------
    x, native, soup, theta
        As there; of a count that is no longer whole, its whole part is split.
    rng
        Source of the draws, one for each entry of ``x``.

    Returns
    -------
    Float64, whole numbers between 0 and ``x``.
    """
    terms = _Terms.of(np.floor(x), native, soup, theta)
    uniform = rng.random(terms.x.shape)[terms.where]
    total, _, log_scale = terms.sums()
    goal = np.log(uniform) + np.log(total) + log_scale
    drawn = np.zeros(len(terms.count))
    place, reached, log_weight = np.arange(len(drawn)), np.zeros(len(drawn)), np.zeros(len(drawn))
    k = 0
    while len(place):
        below = (reached < goal[place]) & (k < terms.count[place])
        drawn[place[~below]] = k
        place, reached, log_weight = place[below], reached[below], log_weight[below]
        k += 1
        with np.errstate(divide="ignore"):
            log_weight = log_weight + np.log(terms.ratio(k, place))
        reached = np.logaddexp(reached, log_weight)
    return terms.native(drawn)


def _expected_of_whole(x: np.ndarray, native: np.ndarray, soup: np.ndarray, theta: np.ndarray) -> np.ndarray:
    terms = _Terms.of(x, native, soup, theta)
    total, first, _ = terms.sums()
    return terms.native(np.minimum(first / total, terms.count))


@dataclass(frozen=True)
class _Terms:
    """Weights :math:`w_k` of k soup counts in the entries that may have both parts."""

    x: np.ndarray
    taken: np.ndarray
    where: tuple[np.ndarray, ...]
    count: np.ndarray
    soup: np.ndarray
    theta: np.ndarray
    inflation: np.ndarray

    @classmethod
    def of(cls, x: Any, native: Any, soup: Any, theta: Any) -> _Terms:
        x, native, soup, theta = np.broadcast_arrays(
            *(np.asarray(v, dtype=np.float64) for v in (x, native, soup, theta))
        )
        taken = np.zeros(x.shape)
        taken[(native <= 0) & (soup > 0)] = x[(native <= 0) & (soup > 0)]
        where = np.nonzero((x > 0) & (native > 0) & (soup > 0))
        count, mean, rate, shape = (v[where] for v in (x, native, soup, theta))
        with np.errstate(invalid="ignore"):
            inflation = np.where(np.isinf(shape), 1 / mean, (mean + shape) / (mean * shape))
        return cls(x, taken, where, count, rate, shape, inflation)

    def ratio(self, k: int, place: np.ndarray) -> np.ndarray:
        """``w_k / w_{k-1}`` of some entries."""
        count = self.count[place]
        # (x - k + theta) / theta, so that theta = inf needs no case of its own.
        return self.soup[place] / k * (count - k + 1) / ((count - k) / self.theta[place] + 1) * self.inflation[place]

    def sums(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sums of :math:`w_k` and :math:`k w_k`, both divided by a scale, and the logarithm of that scale."""
        n = len(self.count)
        total, first, log_scale = np.ones(n), np.zeros(n), np.zeros(n)
        place, weight = np.arange(n), np.ones(n)
        k = 0
        while len(place):
            k += 1
            ratio = self.ratio(k, place)
            weight = weight * ratio
            total[place] += weight
            first[place] += k * weight
            huge = weight > 1e200
            if huge.any():
                large = place[huge]
                weight[huge] *= 1e-200
                total[large] *= 1e-200
                first[large] *= 1e-200
                log_scale[large] += np.log(1e200)
            # Past its peak the series falls faster than geometrically from here on.
            negligible = weight * k < 1e-12 * np.maximum(first[place], 1e-300)
            stay = ~((k >= self.count[place]) | ((ratio < 0.5) & negligible))
            place, weight = place[stay], weight[stay]
        return total, first, log_scale

    def native(self, taken: np.ndarray) -> np.ndarray:
        """What is left of the counts when ``taken`` is taken from the entries that have both parts."""
        result = self.taken.copy()
        result[self.where] = taken
        return self.x - result
