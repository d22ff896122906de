"""Differential expression of a regularised model: raw counts summed per sample, or posterior draws of z."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellstill.data.annotations import gather_obs
from cellstill.de import (
    BayesianConfig,
    Contrast,
    DEResult,
    PseudobulkConfig,
    StratifiedDEResult,
    bayesian_de,
    comparison_cells,
    pseudobulk_de,
    stratify,
)
from cellstill.de.choice import (
    batch_terms,
    check_within,
    choose_cells,
    choose_groups,
    chosen_how,
    codes_of_both,
    require_samples,
)
from cellstill.errors import InvalidArgumentError
from cellstill.vi.cells import Cells, code_of
from cellstill.vi.correction import corrected_ratios
from cellstill.vi.criticism import Criticism
from cellstill.vi.draws import posterior_draws
from cellstill.vi.elsewhere import names_what_to_use
from cellstill.vi.getters import Target

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData


class Differential(Criticism):
    """Comparison of groups of cells by both regularised models."""

    @names_what_to_use
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
        within: str | None = None,
    ) -> DEResult | StratifiedDEResult:
        """Compare two groups of cells, with samples as replicates.

        Parameters
        ----------
        groupby, group1, group2
            Column of ``obs``, and the two of its values to compare; fold changes are log2 of group1 over group2.
            Without ``group2``, group1 is compared with all other cells, ``"rest"``.
        sample_key
            Column that names samples or donors: the replicates, of which each group needs at least two. Only a
            :class:`~cellstill.de.BayesianConfig` does without, and warns.
        how
            :class:`~cellstill.de.PseudobulkConfig` (default): raw counts summed per sample, or with
            ``expression="corrected"`` counts without background, scaling and what conditioning covariates do
            (:func:`~cellstill.vi.correction.corrected_ratios`).
            :class:`~cellstill.de.BayesianConfig`: shares of native expression, without background and scaling, at draws
            of z from the posterior of each cell (:func:`~cellstill.vi.draws.posterior_draws`).
        adata
            As in :meth:`get_normalized_expression`.
        idx1, idx2
            Positions or masks of the cells of the two groups, instead of ``groupby``; without ``idx2``, all other cells
            are the second. In the result the groups are called so.
        modality
            Name; may be left out where there is one. Cells that lack it are left out.
        transform_batch
            Categories of the conditioning covariates as which cells are decoded, or to which their counts are
            corrected, as in :meth:`get_normalized_expression`; several are averaged. ``None`` follows
            ``how.target_batch``, and without one averages over all combinations that cells of both groups have (all
            that there are if none has: :func:`~cellstill.de.choice.codes_of_both`), whose number multiplies the time
            it takes.
        batch_keys
            Columns with batches, for the design. ``None`` takes ``batch_key`` and the conditioning covariates, apart
            from those that only tell samples apart, or parts of them (with ``within``, in each level for itself), and
            without ``sample_key``, with a warning, those whose levels the groups hardly share; an empty list takes
            none.
        within
            Column, such as cell types, inside each level of which the comparison is made; ``None`` compares all cells
            at once.

        Returns
        -------
        Record with a tidy ``table``, the design and the contrast; with ``within``, one for each level
        (:class:`~cellstill.de.StratifiedDEResult`).

        Raises
        ------
        MissingKeyError
            A column does not exist.
        InvalidArgumentError
            Cells are chosen in two ways or in none, ``sample_key`` is missing, a group or category does not exist, or
            the design cannot tell the groups from the batches (:func:`~cellstill.de.design.design_of_units`).
        """
        self._require_trained()
        how = chosen_how(how)
        name = self._modality(modality)
        cells = self._cells(adata)
        if isinstance(how, PseudobulkConfig):
            sample_key = require_samples(sample_key)
        automatic = batch_keys is None
        terms = self._batch_columns() if batch_keys is None else _as_list(batch_keys)
        arguments = dict.fromkeys(how.covariate_keys, "covariate_keys") | dict.fromkeys(terms, "batch_keys")
        named = {"sample_key": sample_key, "groupby": groupby, "within": within}
        arguments |= {column: argument for argument, column in named.items() if column is not None}
        obs = gather_obs(self._require_data() if adata is None else adata, arguments)
        if groupby is not None:
            check_within(obs, within, groupby=groupby, sample_key=sample_key)
        obs, contrast = _choose(obs, groupby, group1, group2, idx1, idx2)
        has = np.flatnonzero(cells.present[name])
        if not len(has):
            raise InvalidArgumentError(
                f"modality={name!r}: no cell has it. Cells have: "
                f"{', '.join(repr(key) for key, present in cells.present.items() if present.any())}."
            )
        obs, cells = obs.iloc[has], cells[has]
        if automatic:
            obs, terms = batch_terms(
                obs, terms, contrast, sample_key=sample_key, within=within, min_cells=how.min_cells_per_sample
            )
        if len(terms) > 1 and isinstance(how, PseudobulkConfig) and how.method == "wilcoxon":
            raise InvalidArgumentError(
                f"method='wilcoxon' ranks samples within one batch column, and the design has {terms}. "
                f"Name one, such as batch_keys={terms[:1]}, or use method='ttest' or 'deseq2'."
            )
        obs = obs.astype(dict.fromkeys(terms, str))
        how = replace(how, covariate_keys=tuple(dict.fromkeys([*terms[1:], *how.covariate_keys])))
        asked: dict[str, Any] = {**contrast.arguments, "sample_key": sample_key}
        asked |= {"batch_key": terms[0] if terms else None, "config": how}
        features = self._features[name]
        if isinstance(how, PseudobulkConfig):
            ratios = None
            if how.expression == "corrected":
                ratios = corrected_ratios(
                    self.module, name, cells, self._decoded_as(transform_batch, cells, obs, contrast)
                )
            return pseudobulk_de(cells.counts[name], obs, features, within=within, ratios=ratios, **asked)
        target = how.target_batch if transform_batch is None else transform_batch

        def compare(rows: np.ndarray | slice) -> DEResult:
            some, some_obs = cells[rows], obs.iloc[rows]
            as_batches = self._decoded_as(target, some, some_obs, contrast)
            wanted = comparison_cells(some_obs, **contrast.arguments)
            is_first = (some_obs[contrast.column] == contrast.group1).to_numpy()[wanted]
            draws = posterior_draws(self.module, name, some, wanted, is_first, as_batches, how)
            return bayesian_de(draws, some_obs, features, counts=some.counts[name], **asked)

        return compare(slice(None)) if within is None else stratify(obs, within, lambda _, rows: compare(rows))

    def _decoded_as(self, target: Target, cells: Cells, obs: pd.DataFrame, contrast: Contrast) -> list[dict[str, int]]:
        """Combinations of categories to decode as; without a target, all that cells of both groups have."""
        columns = [code_of(key) for key in self._conditioning()]
        return self._targets(target) or _combinations(cells, columns, obs[contrast.column], contrast)

    def _conditioning(self) -> list[str]:
        return [column.removeprefix("code/") for column in self.module.config.conditioning]

    def _batch_columns(self) -> list[str]:
        batch = [] if self._keys.batch is None else [self._keys.batch]
        return list(dict.fromkeys([*batch, *self._conditioning()]))


def _choose(
    obs: pd.DataFrame,
    groupby: str | None,
    group1: str | None,
    group2: str | None,
    idx1: np.ndarray | Sequence[int] | None,
    idx2: np.ndarray | Sequence[int] | None,
) -> tuple[pd.DataFrame, Contrast]:
    """Groups by name, or by position as a new column."""
    if (groupby is None) == (idx1 is None):
        raise InvalidArgumentError(
            "Choose the cells in one way: by groupby, group1 and group2, or by idx1 and idx2 (positions or masks)."
        )
    if groupby is not None:
        if group1 is None:
            raise InvalidArgumentError(
                f"group1 is missing. Name the group of obs[{groupby!r}] to compare: "
                f"{sorted(set(obs[groupby].astype(str)))[:10]}."
            )
        return choose_groups(obs, groupby, group1, group2)
    assert idx1 is not None
    return choose_cells(obs, idx1, idx2)


def _combinations(cells: Cells, columns: Sequence[str], groups: pd.Series, contrast: Contrast) -> list[dict[str, int]]:
    """Combinations of categories of some columns of codes that cells of both groups have."""
    if not columns:
        return []
    per_cell = cells.per_cell
    found, code = np.unique(np.column_stack([per_cell[column] for column in columns]), axis=0, return_inverse=True)
    both = found[codes_of_both(code.ravel(), groups, contrast)]
    return [dict(zip(columns, map(int, codes), strict=True)) for codes in both]


def _as_list(keys: Sequence[str] | str) -> list[str]:
    return [keys] if isinstance(keys, str) else list(keys)
