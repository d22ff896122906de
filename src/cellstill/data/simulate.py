"""Counts whose truth is known: cell types, batches, conditions, donors, depth, drop-out and ambient RNA."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, vstack
from scipy.special import log_softmax, softmax

from cellstill.data.simulation_config import SimulationConfig
from cellstill.errors import InvalidArgumentError, check_option, whole_number

if TYPE_CHECKING:
    from anndata import AnnData

# Every chunk has its own generator, so another number of rows would draw other data from the same seed.
_CHUNK_ROWS = 256
_MAX_REDRAWS = 1000
# One generator per source of variation: changing one parameter leaves the draws of the others as they were.
_STREAMS = ("base", "marker", "theta", "batch", "condition", "donor", "cell", "count")


def simulate_counts(config: SimulationConfig | None = None, *, seed: int = 0, **overrides: Any) -> AnnData:
    r"""Draw counts from a negative binomial model of cell types, batches, conditions and donors.

    Cell :math:`n` has a cell type :math:`t`, a donor :math:`d`, and through its donor a batch :math:`b` and a
    condition :math:`c`: each donor belongs to one batch and one condition. For gene :math:`g`,

    .. math::

        \alpha_g &\sim N(0, \mathtt{base\_log\_sd}^2), \qquad
        \eta_{tg} = \alpha_g + \ln 2 \cdot m_{tg}, \quad
        m_{tg} \sim N(\mathtt{marker\_log2fc\_mean}, \mathtt{marker\_log2fc\_sd}^2) \text{ for markers, else } 0 \\
        s_{bg} &\sim N(0, \mathtt{batch\_sd}^2) \text{ subject to } \textstyle\sum_b s_{bg} = 0, \qquad
        u_{dg} \sim N(0, \mathtt{donor\_sd}^2) \\
        f_{cg} &= \pm (\mathtt{min\_abs\_log2fc} + |N(0, \mathtt{de\_log2fc\_sd}^2)|)
        \text{ for differential genes, else } 0; \quad f = 0 \text{ in the reference} \\
        \rho_{ng} &= \mathrm{softmax}_g(\eta_{tg} + s_{bg} + \ln 2 \cdot f_{cg} + u_{dg}) \\
        \ell_n &= \mathtt{library\_size\_median} \cdot \exp(N(0, \mathtt{library\_size\_sigma}^2)), \qquad
        \theta_g = \mathtt{theta\_median} \cdot \exp(N(0, \mathtt{theta\_sigma}^2)) \\
        \mu_{ng} &= \ell_n \left((1 - a_b) \rho_{ng} + a_b \chi_{bg}\right), \qquad
        \chi_{bg} = \textstyle\sum_{n \in b} \ell_n \rho_{ng} / \sum_{n \in b} \ell_n \\
        x_{ng} &\sim \mathrm{NB}(\mu_{ng}, \theta_g), \quad
        \mathrm{Var}(x_{ng}) = \mu_{ng} + \mu_{ng}^2 / \theta_g, \quad
        x_{ng} := 0 \text{ with probability } \mathtt{dropout\_rate} \cdot e^{-\mathtt{dropout\_decay} \mu_{ng}}

    The cells of batches, conditions and donors are apportioned exactly (largest remainder); cell types are drawn.
    The shifts are scaled so that each keeps the standard deviation ``batch_sd`` after centring. A cell without any
    count is drawn again until it has one, so that very shallow cells follow the model given a total of at least 1.

    A proportion can only rise where others fall: after normalisation by library size, all fold changes move by about
    the same small constant. ``log2fc_{condition}`` is :math:`f`, exactly 0 for genes that do not differ;
    ``log2fc_proportion_{condition}`` is what an analysis of proportions estimates with slope 1 and intercept 0:
    the log2 ratio of the mean proportions over the overall mixture of cell types, without batch, donor and ambient
    effects.

    Parameters
    ----------
    config
        Parameters of the model. Default: ``SimulationConfig()``.
    seed
        Non-negative integer. The same seed and parameters give the same data bit for bit (with one version of NumPy).
        The truth of the genes does not depend on ``n_obs``, and every source of variation has its own generator.
    **overrides
        Fields of :class:`SimulationConfig` that replace those of ``config``.

    Returns
    -------
    AnnData
        Of shape ``(n_obs, n_vars)``, with

        - ``X``: counts, CSR, float32.
        - ``obs``: ``batch``, ``cell_type``, ``condition``, ``donor`` (categorical; ``donor`` is the sample key) and
          ``library_size`` (:math:`\ell_n`, the expected total before drop-out).
        - ``var``: ``base_log_mean`` (:math:`\alpha`, as the log of proportions), ``theta``,
          ``is_marker_{cell_type}``, and for each condition but the reference ``is_de_{condition}``,
          ``log2fc_{condition}`` and ``log2fc_proportion_{condition}``.
        - ``varm`` (data frames with named columns): ``cell_type_log_mean`` (:math:`\eta`, as the log of
          proportions), ``batch_shift`` (:math:`s`), ``donor_shift`` (:math:`u`) and ``ambient_profile``
          (:math:`\chi`, sums to 1 per batch).
        - ``uns["simulation"]``: all parameters, with shares and ``ambient_fraction`` written out per batch, and
          ``seed``. Without ``seed``, they are arguments of :class:`SimulationConfig`.

    Raises
    ------
    InvalidArgumentError
        If an override is unknown, a parameter is invalid, there are fewer cells than donors need, or depth is so low
        that cells stay without counts.

    Examples
    --------
    Condition partly confounded with batch, 70, 50 and 30 % treated:

    >>> adata = simulate_counts(condition_fractions=((0.3, 0.7), (0.5, 0.5), (0.7, 0.3)), seed=1)
    """
    from anndata import AnnData

    for name in overrides:
        check_option("override", name, [field.name for field in fields(SimulationConfig)])
    config = replace(config or SimulationConfig(), **overrides)
    root = np.random.default_rng(whole_number("seed", seed, least=0))
    streams = dict(zip(_STREAMS, root.spawn(len(_STREAMS)), strict=True))

    donors = _apportion_donors(config)
    genes = _draw_genes(config, len(donors.n_cells), streams)
    shift = genes.donor_shift + genes.batch_shift[donors.batch] + np.log(2) * genes.log2fc[donors.condition]
    donor, cell_type, library_size = _draw_cells(config, donors, streams["cell"])
    ambient = _ambient_profiles(config, genes, donors.batch, shift, donor, cell_type, library_size)
    ambient_fraction = config.ambient_fractions

    def means(rows: slice) -> np.ndarray:
        rho = softmax(genes.cell_type_log_mean[cell_type[rows]] + shift[donor[rows]], axis=1)
        batch = donors.batch[donor[rows]]
        share = ambient_fraction[batch, None]
        return library_size[rows, None] * ((1 - share) * rho + share * ambient[batch])

    chunks = []
    starts = range(0, config.n_obs, _CHUNK_ROWS)
    for start, rng in zip(starts, streams["count"].spawn(len(starts)), strict=True):
        counts = _draw_counts(config, means(slice(start, start + _CHUNK_ROWS)), genes.theta, rng)
        chunks.append(csr_matrix(counts, dtype=np.float32))

    names = {
        "batch": [f"batch_{i}" for i in range(config.n_batches)],
        "cell_type": [f"type_{i}" for i in range(config.n_cell_types)],
        "condition": list(config.conditions),
        "donor": [f"donor_{i}" for i in range(len(donors.n_cells))],
    }
    codes: dict[str, np.ndarray] = {
        "batch": donors.batch[donor],
        "cell_type": cell_type,
        "condition": donors.condition[donor],
        "donor": donor,
    }
    obs = pd.DataFrame(
        {key: pd.Categorical.from_codes(codes[key], pd.Index(names[key])) for key in names},
        index=[f"cell_{i}" for i in range(config.n_obs)],
    )
    obs["library_size"] = library_size
    var = _gene_table(config, genes, names["cell_type"])

    def per_gene(values: np.ndarray, key: str) -> pd.DataFrame:
        return pd.DataFrame(values.T.copy(), index=var.index, columns=names[key])

    varm = {
        "cell_type_log_mean": per_gene(genes.cell_type_log_mean, "cell_type"),
        "batch_shift": per_gene(genes.batch_shift, "batch"),
        "donor_shift": per_gene(genes.donor_shift, "donor"),
        "ambient_profile": per_gene(ambient, "batch"),
    }
    written_out = {
        "conditions": np.array(config.conditions, dtype=object),
        "batch_fractions": config.batch_shares,
        "condition_fractions": config.condition_shares,
        "cell_type_fractions": config.cell_type_shares,
        "ambient_fraction": ambient_fraction,
        "seed": int(seed),
    }
    uns = {"simulation": asdict(config) | written_out}
    return AnnData(X=vstack(chunks, format="csr"), obs=obs, var=var, varm=varm, uns=uns)


class _Donors(NamedTuple):
    """Batch, condition and number of cells of each donor."""

    batch: np.ndarray
    condition: np.ndarray
    n_cells: np.ndarray


class _Genes(NamedTuple):
    """Truth of the genes; genes are the last axis."""

    base_log_mean: np.ndarray
    theta: np.ndarray
    is_marker: np.ndarray
    cell_type_log_mean: np.ndarray
    batch_shift: np.ndarray
    donor_shift: np.ndarray
    log2fc: np.ndarray


def _apportion(total: int, shares: np.ndarray) -> np.ndarray:
    """Split ``total`` into whole numbers by the method of largest remainders."""
    exact = total * shares
    whole = np.floor(exact).astype(np.intp)
    whole[np.argsort(whole - exact, kind="stable")[: total - whole.sum()]] += 1
    return whole


def _apportion_donors(config: SimulationConfig) -> _Donors:
    """Cells per donor: batches first, then conditions within a batch, then donors within both."""
    donors = []
    equal = np.full(config.n_donors_per_group, 1 / config.n_donors_per_group)
    for batch, n_batch in enumerate(_apportion(config.n_obs, config.batch_shares)):
        shares = config.condition_shares[batch]
        for condition, n_group in enumerate(_apportion(n_batch, shares)):
            if shares[condition] > 0:
                donors += [(batch, condition, n_cells) for n_cells in _apportion(n_group, equal)]
    table = _Donors(*np.array(donors).T)
    if (table.n_cells == 0).any():
        raise InvalidArgumentError(
            f"n_obs={config.n_obs} leaves {(table.n_cells == 0).sum()} of {len(donors)} donors without cells. "
            "Ask for more cells or fewer donors, or set shares that are too small to 0."
        )
    return table


def _choose(rng: np.random.Generator, n_vars: int, fraction: float) -> np.ndarray:
    """Mask of a random subset of the genes."""
    mask = np.zeros(n_vars, dtype=bool)
    mask[rng.permutation(n_vars)[: round(fraction * n_vars)]] = True
    return mask


def _draw_genes(config: SimulationConfig, n_donors: int, rng: dict[str, np.random.Generator]) -> _Genes:
    n_vars, n_batches, n_types = config.n_vars, config.n_batches, config.n_cell_types
    base = log_softmax(rng["base"].normal(0, config.base_log_sd, n_vars))

    is_marker = np.stack([_choose(rng["marker"], n_vars, config.marker_fraction) for _ in range(n_types)])
    marker = rng["marker"].normal(config.marker_log2fc_mean, config.marker_log2fc_sd, (n_types, n_vars))
    cell_type_log_mean = log_softmax(base + np.log(2) * np.where(is_marker, marker, 0), axis=1)

    batch_shift = rng["batch"].normal(0, config.batch_sd, (n_batches, n_vars))
    batch_shift -= batch_shift.mean(axis=0)
    batch_shift *= np.sqrt(n_batches / max(n_batches - 1, 1))
    batch_shift *= _choose(rng["batch"], n_vars, config.batch_gene_fraction)

    log2fc = np.zeros((len(config.conditions), n_vars))
    for row in log2fc[1:]:
        size = config.min_abs_log2fc + np.abs(rng["condition"].normal(0, config.de_log2fc_sd, n_vars))
        sign = rng["condition"].choice([-1, 1], n_vars)
        row[:] = np.where(_choose(rng["condition"], n_vars, config.de_fraction), sign * size, 0)

    return _Genes(
        base_log_mean=base,
        theta=config.theta_median * np.exp(rng["theta"].normal(0, config.theta_sigma, n_vars)),
        is_marker=is_marker,
        cell_type_log_mean=cell_type_log_mean,
        batch_shift=batch_shift,
        donor_shift=rng["donor"].normal(0, config.donor_sd, (n_donors, n_vars)),
        log2fc=log2fc,
    )


def _draw_cells(
    config: SimulationConfig, donors: _Donors, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Donor, cell type and library size of every cell, in random order."""
    donor = rng.permutation(np.repeat(np.arange(len(donors.n_cells)), donors.n_cells))
    cumulative = config.cell_type_shares.cumsum(axis=1)[:, :-1]
    cell_type = (rng.random((config.n_obs, 1)) >= cumulative[donors.batch[donor]]).sum(axis=1)
    library_size = config.library_size_median * np.exp(rng.normal(0, config.library_size_sigma, config.n_obs))
    return donor, cell_type, library_size


def _ambient_profiles(
    config: SimulationConfig,
    genes: _Genes,
    batch_of_donor: np.ndarray,
    shift: np.ndarray,
    donor: np.ndarray,
    cell_type: np.ndarray,
    library_size: np.ndarray,
) -> np.ndarray:
    """Pooled expression of the cells of each batch, shape ``(n_batches, n_vars)``."""
    depth = np.zeros((len(shift), config.n_cell_types))
    np.add.at(depth, (donor, cell_type), library_size)
    pooled = np.zeros((config.n_batches, config.n_vars))
    for i, batch in enumerate(batch_of_donor):
        pooled[batch] += depth[i] @ softmax(genes.cell_type_log_mean + shift[i], axis=1)
    return pooled / pooled.sum(axis=1, keepdims=True)


def _draw_counts(config: SimulationConfig, mu: np.ndarray, theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Zero-inflated negative binomial counts with no empty row."""

    def draw(mu: np.ndarray) -> np.ndarray:
        counts = rng.poisson(rng.standard_gamma(theta, mu.shape) * (mu / theta))
        if config.dropout_rate > 0:
            counts[rng.random(mu.shape) < config.dropout_rate * np.exp(-config.dropout_decay * mu)] = 0
        return counts

    counts = draw(mu)
    for _ in range(_MAX_REDRAWS):
        empty = np.flatnonzero(~counts.any(axis=1))
        if not empty.size:
            return counts
        counts[empty] = draw(mu[empty])
    raise InvalidArgumentError(
        f"library_size_median={config.library_size_median} with library_size_sigma={config.library_size_sigma} and "
        f"dropout_rate={config.dropout_rate} leaves cells without counts in {_MAX_REDRAWS} draws. Make cells deeper."
    )


def _gene_table(config: SimulationConfig, genes: _Genes, cell_types: list[str]) -> pd.DataFrame:
    """Per-gene truth, with fold changes before and after normalisation to proportions."""
    mixture = config.batch_shares @ config.cell_type_shares

    def log2_proportions(log2fc: np.ndarray) -> np.ndarray:
        return np.log2(mixture @ softmax(genes.cell_type_log_mean + np.log(2) * log2fc, axis=1))

    table = {"base_log_mean": genes.base_log_mean, "theta": genes.theta}
    table |= {f"is_marker_{name}": mask for name, mask in zip(cell_types, genes.is_marker, strict=True)}
    reference = log2_proportions(genes.log2fc[0])
    for condition, log2fc in zip(config.conditions[1:], genes.log2fc[1:], strict=True):
        table[f"is_de_{condition}"] = log2fc != 0
        table[f"log2fc_{condition}"] = log2fc
        table[f"log2fc_proportion_{condition}"] = log2_proportions(log2fc) - reference
    return pd.DataFrame(table, index=[f"gene_{i}" for i in range(config.n_vars)])
