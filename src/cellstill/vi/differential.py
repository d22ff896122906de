"""Differential expression of a regularised model: raw counts summed per sample, or posterior draws of z."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from cellstill.data.annotations import gather_obs
from cellstill.data.selection import cell_positions
from cellstill.de import BayesianConfig, DEResult, PseudobulkConfig, bayesian_de, comparison_cells, pseudobulk_de
from cellstill.errors import InvalidArgumentError, check_option
from cellstill.vi.cells import Cells, code_of
from cellstill.vi.criticism import Criticism
from cellstill.vi.evaluation import Block, blocks, expected_means, native_expression, to_numpy
from cellstill.vi.getters import Target
from cellstill.vi.module import RegularizedVAE

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

_REST = "rest"


class Differential(Criticism):
    """Comparison of groups of cells by both regularised models."""

    def differential_expression(
        self,
        groupby: str | None = None,
        group1: str | None = None,
        group2: str | None = None,
        sample_key: str | None = None,
        how: PseudobulkConfig | BayesianConfig | None = None,
        *,
        adata: AnnData | MuData | None = None,
        idx1: np.ndarray | Sequence[int] | None = None,
        idx2: np.ndarray | Sequence[int] | None = None,
        modality: str | None = None,
        transform_batch: Target = None,
        batch_keys: Sequence[str] | str | None = None,
    ) -> DEResult:
        """Compare two groups of cells, with samples as replicates.

        Parameters
        ----------
        groupby, group1, group2
            Column of ``obs``, and the two of its values to compare; fold changes are log2 of group1 over group2.
            Without ``group2``, group1 is compared with all other cells, ``"rest"``.
        sample_key
            Column that names samples or donors: the replicates, of which each group needs at least two.
        how
            :class:`~cellstill.de.PseudobulkConfig` (default): raw counts summed per sample.
            :class:`~cellstill.de.BayesianConfig`: shares of native expression, without background and scaling, at draws
            of z from the posterior of each cell (:func:`~cellstill.vi.differential.posterior_draws`).
        adata
            As in :meth:`get_normalized_expression`.
        idx1, idx2
            Positions or masks of the cells of the two groups, instead of ``groupby``; without ``idx2``, all other cells
            are the second. In the result the groups are called so.
        modality
            Name; may be left out where there is one. Cells that lack it are left out.
        transform_batch
            Categories of the conditioning covariates as which drawn cells are decoded, as in
            :meth:`get_normalized_expression`; several are averaged. ``None`` follows ``how.target_batch``, and without
            one averages over all combinations that the cells have, whose number multiplies the time it takes.
        batch_keys
            Columns with batches, for the design. ``None`` takes ``batch_key`` and the conditioning covariates, apart
            from those that only tell samples apart, or parts of them; an empty list takes none.

        Returns
        -------
        Record with a tidy ``table``, the design and the contrast.

        Raises
        ------
        MissingKeyError
            A column does not exist.
        InvalidArgumentError
            Cells are chosen in two ways or in none, ``sample_key`` is missing, a group or category does not exist, or
            the design cannot tell the groups from the batches (:func:`~cellstill.de.design.make_design`).
        """
        self._require_trained()
        how = how or PseudobulkConfig()
        name = self._modality(modality)
        cells = self._cells(adata, counts=isinstance(how, PseudobulkConfig))
        if sample_key is None:
            raise InvalidArgumentError(
                "sample_key is missing. Name the column of obs with the samples or donors, which are the replicates: "
                "cells of one sample share what is particular to it, and tested as if they were independent they turn "
                "differences between donors into differences between groups."
            )
        automatic = batch_keys is None
        terms = self._batch_columns() if batch_keys is None else _as_list(batch_keys)
        arguments = dict.fromkeys(how.covariate_keys, "covariate_keys") | dict.fromkeys(terms, "batch_keys")
        arguments[sample_key] = "sample_key"
        if groupby is not None:
            arguments[groupby] = "groupby"
        obs = gather_obs(self._require_data() if adata is None else adata, arguments)
        groupby, group1, group2 = _choose(obs, groupby, group1, group2, idx1, idx2)
        has = np.flatnonzero(cells.present[name])
        obs, cells = obs.iloc[has], cells[has]
        if automatic:
            terms = [key for key in terms if key not in (groupby, sample_key) and _spans(obs, key, sample_key)]
        obs = obs.astype(dict.fromkeys(terms, str))
        batch_key = terms[0] if terms else None
        covariates = tuple(dict.fromkeys([*terms[1:], *how.covariate_keys]))
        contrast = {"groupby": groupby, "group1": group1, "group2": group2}
        asked: dict[str, Any] = {**contrast, "sample_key": sample_key, "batch_key": batch_key}
        features = self._features[name]
        asked["config"] = replace(how, covariate_keys=covariates)
        if isinstance(how, PseudobulkConfig):
            return pseudobulk_de(cells.counts[name], obs, features, **asked)
        targets = self._targets(how.target_batch if transform_batch is None else transform_batch)
        targets = targets or _combinations(cells, [code_of(key) for key in self._conditioning()])
        wanted = comparison_cells(obs, **contrast)
        is_first = (obs[groupby].astype(str) == group1).to_numpy()[wanted]
        draws = posterior_draws(self.module, name, cells, wanted, is_first, targets, how)
        return bayesian_de(draws, obs, features, **asked)

    def _conditioning(self) -> list[str]:
        return [column.removeprefix("code/") for column in self.module.config.conditioning]

    def _batch_columns(self) -> list[str]:
        batch = [] if self._keys.batch is None else [self._keys.batch]
        return list(dict.fromkeys([*batch, *self._conditioning()]))


def posterior_draws(
    module: RegularizedVAE,
    name: str,
    cells: Cells,
    wanted: np.ndarray,
    is_first: np.ndarray,
    targets: Sequence[Mapping[str, int]],
    how: BayesianConfig,
) -> Iterator[Iterator[tuple[np.ndarray, np.ndarray]]]:
    r"""Yield draws of the native expression of the ``wanted`` cells, as shares, averaged over the ``targets``.

    In each draw, every cell has a draw of z from its posterior; cells are encoded once. That alone would take the
    decoder for known, and what is left of the counts' noise in its estimate for an effect. In each draw and group, the
    log rate of each feature is therefore moved by :math:`\delta_f \sim \mathrm{Normal}(0, 1 / (1 + I_f))`, with
    the information that the group's cells have about it (a Laplace approximation, with a standard normal prior),

    .. math::
        I_f = \sum_n \frac{(l_n \rho_{nf} y_{nf})^2}{\mu_{nf} + \mu_{nf}^2 / \theta_f}

    which is small where counts are few or most of them background.

    Parameters
    ----------
    module, name, cells
        Model, modality, and cells that have it.
    wanted
        Positions of the cells of the two groups.
    is_first
        Mask of those of the first, shape of ``wanted``.
    targets
        Categories to decode as.
    how
        Number of draws, seed, and cells decoded at a time, on which the draws do not depend.
    """
    subset, group = cells[wanted], np.where(is_first, 0, 1)
    mean, sd = (np.empty((len(subset), module.config.n_latent), dtype=np.float32) for _ in range(2))
    information = np.zeros((2, module.config.modalities[name].n_vars))
    for block in blocks(module, subset, how.batch_size):
        mean[block.rows] = to_numpy(block.latent.mean)
        sd[block.rows] = to_numpy(block.latent.variance.sqrt())
        each = _information(module, name, block)
        first = torch.from_numpy(is_first[block.rows]).to(each)
        information += to_numpy(torch.stack([first, 1 - first]) @ each)
    spread = (1 + information) ** -0.5
    rng = np.random.default_rng(how.seed)
    for _ in range(how.n_samples):
        factors = np.exp(spread * rng.standard_normal(spread.shape)).astype(np.float32)
        yield _draw(module, name, subset, wanted, (mean, sd), (factors, group), targets, how.batch_size, rng)


def _information(module: RegularizedVAE, name: str, block: Block) -> torch.Tensor:
    """Fisher information of each count about the logarithm of its native expression, cells x features."""
    modality, n = module.modality(name), len(block.latent.mean)
    native, background = expected_means(module, name, block)
    expected = native if background is None else native + background
    theta, group = modality.dispersion(block.batch, n)
    theta = theta if group is None else theta[group]
    return native.square() / (expected + expected.square() / theta).clamp(min=torch.finfo(expected.dtype).tiny)


def _draw(
    module: RegularizedVAE,
    name: str,
    cells: Cells,
    positions: np.ndarray,
    posterior: tuple[np.ndarray, np.ndarray],
    moved: tuple[np.ndarray, np.ndarray],
    targets: Sequence[Mapping[str, int]],
    batch_size: int,
    rng: np.random.Generator,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    device = next(module.parameters()).device
    told = {key: values for key, values in cells.per_cell.items() if key in ("continuous", *module.config.conditioning)}
    factors, group = moved
    for start in range(0, len(cells), batch_size):
        rows = slice(start, min(start + batch_size, len(cells)))
        mean, sd = (values[rows] for values in posterior)
        z = torch.from_numpy(mean + sd * rng.standard_normal(mean.shape, dtype=np.float32)).to(device)
        batch = {key: torch.from_numpy(values[rows]).to(device) for key, values in told.items()}
        with torch.inference_mode():
            rates = native_expression(module, name, z, batch, targets)
            rates = rates * torch.from_numpy(factors[group[rows]]).to(device)
            rates = rates / rates.sum(dim=1, keepdim=True)
        yield positions[rows], to_numpy(rates)


def _choose(
    obs: pd.DataFrame,
    groupby: str | None,
    group1: str | None,
    group2: str | None,
    idx1: np.ndarray | Sequence[int] | None,
    idx2: np.ndarray | Sequence[int] | None,
) -> tuple[str, str, str]:
    """Column, and its two values to compare; a column is changed or added in ``obs`` where that takes one."""
    if (groupby is None) == (idx1 is None):
        raise InvalidArgumentError(
            "Choose the cells in one way: by groupby, group1 and group2, or by idx1 and idx2 (positions or masks)."
        )
    if groupby is not None:
        values = obs[groupby].astype(str)
        if group1 is None:
            raise InvalidArgumentError(
                f"group1 is missing. Name the group of obs[{groupby!r}] to compare: {sorted(set(values))[:10]}."
            )
        if group2 is not None:
            return groupby, str(group1), str(group2)
        check_option("group1", str(group1), sorted(set(values)))
        obs[groupby] = np.where(values == str(group1), str(group1), _REST)
        return groupby, str(group1), _REST
    assert idx1 is not None
    first = cell_positions(idx1, len(obs))
    second = np.setdiff1d(np.arange(len(obs)), first) if idx2 is None else cell_positions(idx2, len(obs))
    both = np.intersect1d(first, second)
    if len(both):
        raise InvalidArgumentError(
            f"idx1 and idx2 have {len(both)} cells in common (position {both[0]}, ...). A cell can be in one group."
        )
    groups = np.full(len(obs), "neither", dtype=object)
    groups[first], groups[second] = "idx1", "idx2"
    obs["idx"] = groups
    return "idx", "idx1", "idx2"


def _combinations(cells: Cells, columns: Sequence[str]) -> list[dict[str, int]]:
    """Combinations of categories of some columns of codes that the cells have."""
    if not columns:
        return []
    per_cell = cells.per_cell
    found = np.unique(np.column_stack([per_cell[column] for column in columns]), axis=0)
    return [dict(zip(columns, map(int, codes), strict=True)) for codes in found]


def _spans(obs: pd.DataFrame, key: str, sample_key: str) -> bool:
    """Whether some category has cells of several samples: otherwise the samples stand for all it could tell."""
    return bool(obs.groupby(obs[key].astype(str))[sample_key].nunique().max() > 1)


def _as_list(keys: Sequence[str] | str) -> list[str]:
    return [keys] if isinstance(keys, str) else list(keys)
