"""Parameters of a simulation, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from cellstill.errors import InvalidArgumentError, whole_number

Shares = Sequence[float] | Sequence[Sequence[float]] | np.ndarray


@dataclass(frozen=True, kw_only=True)
class SimulationConfig:
    r"""What :func:`simulate_counts` draws; the model and its symbols are written out there.

    Sequences may be given as tuples, lists or arrays; they are kept as tuples.

    Parameters
    ----------
    n_obs, n_vars
        Number of cells and genes.
    n_batches, n_cell_types
        Number of batches (one is allowed: then nothing shifts) and of cell types.
    conditions
        Names of the conditions; the first is the reference. One name means no differential expression.
    n_donors_per_group
        Donors in each batch x condition that has cells. More donors average out ``donor_sd`` and give a test
        more samples.
    batch_fractions
        Share of the cells in each batch, shape ``(n_batches,)``. Default: equal.
    condition_fractions
        Share of each condition in each batch, shape ``(n_batches, n_conditions)``, or one row for all batches.
        Rows that differ confound condition with batch. A share of 0 leaves that condition out of that batch.
        Default: equal.
    cell_type_fractions
        Share of each cell type, shape ``(n_cell_types,)``, or ``(n_batches, n_cell_types)`` for a composition that
        differs between batches. Default: equal.
    base_log_sd
        Standard deviation over genes of the base log-mean. Larger: few genes take most of the counts.
    marker_fraction
        Fraction of the genes that mark each cell type; a gene may mark several.
    marker_log2fc_mean, marker_log2fc_sd
        Normal distribution of the markers' log2 fold changes. Larger means: types further apart.
    batch_sd
        Standard deviation (natural log) of the gene-by-batch shifts. 0: no batch effect.
    batch_gene_fraction
        Fraction of the genes that shift with batch, the same genes in all batches.
    de_fraction
        Fraction of the genes that differ between each condition and the reference.
    min_abs_log2fc, de_log2fc_sd
        Size of such a difference: the minimum plus the absolute value of a normal with this sd; the sign is random.
    donor_sd
        Standard deviation (natural log) of the donors' gene effects. Larger: cells of one donor are less
        independent, and a test that takes cells as replicates finds more that is not there.
    library_size_median, library_size_sigma
        Log-normal depth: its median in counts, and the standard deviation of its natural log. Sigma 0: all equal.
    theta_median, theta_sigma
        Log-normal inverse dispersion over genes. Larger median: closer to Poisson. Sigma 0: one value for all.
    dropout_rate
        Probability, in [0, 1), that a count is replaced by 0 (at mean 0, if ``dropout_decay`` is not 0).
    dropout_decay
        How fast drop-out fades as the mean grows, per count. 0: a constant probability, the usual ZINB.
    ambient_fraction
        Expected share, in [0, 1), of a cell's counts that comes from the ambient RNA of its batch; a number or one
        per batch.

    Raises
    ------
    InvalidArgumentError
        If a value is out of range, shares do not sum to 1, or a sequence has the wrong length.
    """

    n_obs: int = 2000
    n_vars: int = 1000
    n_batches: int = 3
    n_cell_types: int = 5
    conditions: Sequence[str] = ("ctrl", "treat")
    n_donors_per_group: int = 2
    batch_fractions: Sequence[float] | np.ndarray | None = None
    condition_fractions: Shares | None = None
    cell_type_fractions: Shares | None = None
    base_log_sd: float = 1.5
    marker_fraction: float = 0.05
    marker_log2fc_mean: float = 2.0
    marker_log2fc_sd: float = 0.5
    batch_sd: float = 0.3
    batch_gene_fraction: float = 1.0
    de_fraction: float = 0.1
    min_abs_log2fc: float = 0.3
    de_log2fc_sd: float = 0.5
    donor_sd: float = 0.1
    library_size_median: float = 2000.0
    library_size_sigma: float = 0.4
    theta_median: float = 10.0
    theta_sigma: float = 0.5
    dropout_rate: float = 0.0
    dropout_decay: float = 0.0
    ambient_fraction: float | Sequence[float] | np.ndarray = 0.0

    def __post_init__(self) -> None:
        for name in ("n_obs", "n_vars", "n_batches", "n_cell_types", "n_donors_per_group"):
            whole_number(name, getattr(self, name), least=1)
        for name in ("marker_fraction", "batch_gene_fraction", "de_fraction"):
            self._check_real(name, 0, 1, "in [0, 1]")
        for name in ("base_log_sd", "marker_log2fc_sd", "batch_sd", "min_abs_log2fc", "de_log2fc_sd", "donor_sd"):
            self._check_real(name, 0, np.inf, "finite and at least 0")
        for name in ("library_size_sigma", "theta_sigma", "dropout_decay"):
            self._check_real(name, 0, np.inf, "finite and at least 0")
        for name in ("library_size_median", "theta_median"):
            self._check_real(name, np.nextafter(0, 1), np.inf, "finite and above 0")
        self._check_real("marker_log2fc_mean", -np.inf, np.inf, "finite")
        self._check_real("dropout_rate", 0, np.nextafter(1, 0), "in [0, 1)")
        self._check_conditions()
        for name in ("batch_fractions", "condition_fractions", "cell_type_fractions", "ambient_fraction"):
            object.__setattr__(self, name, _as_tuples(name, getattr(self, name)))
        if (self.batch_shares == 0).any():
            raise InvalidArgumentError(f"batch_fractions={self.batch_fractions} leaves a batch empty. Leave it out.")
        for name, shares in (
            ("condition_fractions", self.condition_shares),
            ("cell_type_fractions", self.cell_type_shares),
        ):
            if (shares.sum(axis=0) == 0).any():
                raise InvalidArgumentError(f"{name}={getattr(self, name)} has a column of zeros. Leave it out.")
        if not ((self.ambient_fractions >= 0) & (self.ambient_fractions < 1)).all():
            raise InvalidArgumentError(f"ambient_fraction={self.ambient_fraction} must lie in [0, 1) for every batch.")

    @property
    def batch_shares(self) -> np.ndarray:
        """Share of the cells in each batch, shape ``(n_batches,)``."""
        return _shares("batch_fractions", self.batch_fractions, 1, self.n_batches)[0]

    @property
    def condition_shares(self) -> np.ndarray:
        """Share of each condition in each batch, shape ``(n_batches, n_conditions)``."""
        return _shares("condition_fractions", self.condition_fractions, self.n_batches, len(self.conditions))

    @property
    def cell_type_shares(self) -> np.ndarray:
        """Share of each cell type in each batch, shape ``(n_batches, n_cell_types)``."""
        return _shares("cell_type_fractions", self.cell_type_fractions, self.n_batches, self.n_cell_types)

    @property
    def ambient_fractions(self) -> np.ndarray:
        """Ambient share of each batch, shape ``(n_batches,)``."""
        fractions = np.asarray(self.ambient_fraction, dtype=float)
        if fractions.shape not in {(), (self.n_batches,)}:
            raise InvalidArgumentError(
                f"ambient_fraction has shape {fractions.shape}. Give one number, or one for each of the "
                f"{self.n_batches} batches."
            )
        return np.broadcast_to(fractions, self.n_batches).copy()

    def _check_real(self, name: str, low: float, high: float, allowed: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, Real) or not np.isfinite(float(value)) or not low <= float(value) <= high:
            raise InvalidArgumentError(f"{name}={value!r} must be a number, {allowed}.")

    def _check_conditions(self) -> None:
        names = self.conditions if isinstance(self.conditions, str) else tuple(self.conditions)
        valid = not isinstance(names, str) and all(isinstance(name, str) and name and "/" not in name for name in names)
        if not valid or not names or len(set(names)) < len(names):
            raise InvalidArgumentError(
                f"conditions={names!r} must be a sequence of different names, without '/', the reference first."
            )
        object.__setattr__(self, "conditions", tuple(str(name) for name in names))


def _as_tuples(name: str, value: Any) -> Any:
    """Numbers and nested sequences of numbers as floats and nested tuples of floats; None stays None."""
    if value is None:
        return None
    try:
        plain = np.asarray(value, dtype=float).tolist()
    except (TypeError, ValueError):
        raise InvalidArgumentError(f"{name}={value!r} must hold numbers only, in rows of one length.") from None
    if not isinstance(plain, list):
        return plain
    return tuple(tuple(row) if isinstance(row, list) else row for row in plain)


def _shares(name: str, value: Any, n_rows: int, n_columns: int) -> np.ndarray:
    """Shares as an array of ``n_rows`` rows that sum to 1; equal where ``value`` is None."""
    if value is None:
        return np.full((n_rows, n_columns), 1 / n_columns)
    shares = np.asarray(value, dtype=float)
    if shares.shape not in {(n_columns,), (n_rows, n_columns)}:
        wanted = f"({n_columns},)" if n_rows == 1 else f"({n_rows}, {n_columns}) or ({n_columns},)"
        raise InvalidArgumentError(f"{name} has shape {shares.shape}, but the configuration asks for {wanted}.")
    totals = shares.sum(axis=-1, keepdims=True)
    if not (shares >= 0).all() or not np.allclose(totals, 1, rtol=0, atol=1e-6):
        raise InvalidArgumentError(
            f"{name}={value} must be non-negative and sum to 1 in every row; the sums are {totals.ravel().tolist()}."
        )
    return np.broadcast_to(shares / totals, (n_rows, n_columns))
