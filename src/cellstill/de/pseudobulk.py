"""Differential expression between groups of samples, from the sums of their raw counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from cellstill.de.borrowing import borrow_strength
from cellstill.de.choice import check_within, require_samples
from cellstill.de.correction import widen
from cellstill.de.deseq2 import deseq2
from cellstill.de.design import Design, design_of_units
from cellstill.de.gene_tests import GeneTests
from cellstill.de.moderated import moderated_t
from cellstill.de.pseudobulk_config import PseudobulkConfig
from cellstill.de.ranks import rank_sum
from cellstill.de.result import Contrast, DEResult, direction
from cellstill.de.stratified import StratifiedDEResult, stratify
from cellstill.de.sums import Ratios, corrected_sums, sum_rows
from cellstill.de.units import Units, check_lengths, comparison_cells, complete_column, make_units, text_column
from cellstill.errors import InvalidArgumentError, InvalidCountsError

RANKS_NOTE = "The error of the correction is not in the p-values, which are too small: ranks have no place for it."
"""Of ``expression="corrected"`` and ``method="wilcoxon"``."""


def pseudobulk_de(
    counts: Any,
    obs: pd.DataFrame,
    gene_names: Sequence[str],
    *,
    groupby: str,
    group1: str,
    group2: str,
    sample_key: str | None,
    batch_key: str | None = None,
    within: str | None = None,
    ratios: Ratios | None = None,
    config: PseudobulkConfig | None = None,
) -> DEResult | StratifiedDEResult:
    """Compare two groups of cells by the summed raw counts of their samples.

    Samples, not cells, are the replicates: the cells of one donor share what is particular to the donor, and testing
    them as if independent calls differences between donors differences between groups (Squair et al., Nat. Commun.
    12:5692, 2021). The unit is a sample within a group. :func:`~cellstill.de.design.make_design` says how the design
    ``~ batch + covariates + condition`` is built, and that donors measured in both groups are compared with themselves.

    Parameters
    ----------
    counts
        Raw counts, shape ``(n_obs, n_vars)``: CSR, CSC, dense, or backed by a file; read once, in chunks.
    obs
        Annotation of the cells, in the order of the rows.
    gene_names
        Names of the genes, shape ``(n_vars,)``.
    groupby, group1, group2
        Column of ``obs``, and the two of its values to compare; fold changes are log2 of group1 over group2.
    sample_key
        Column that names samples or donors. ``None`` is refused: without samples nothing tells how much they vary.
    batch_key
        Column of the batches, or ``None`` for no batch term. A batch effect that is not in the design is attributed to
        the condition as far as the two are unbalanced.
    within
        Column, such as the cell type, inside each level of which the comparison is made. A level that cannot be
        compared is skipped with a warning.
    ratios
        For ``expression="corrected"``: chunks of factors that correct counts
        (:data:`~cellstill.de.sums.Ratios`), as models make them. Each sum is scaled back to the total of its sample
        and rounded.
    config
        See :class:`PseudobulkConfig`.

    Returns
    -------
    One row per gene, in the order given; with ``within``, such a table for each level. Genes that were not tested (too
    few counts) or whose test DESeq2 withholds (outlying counts by Cook's distance) have a NaN ``p_value``, those it
    filters as hopeless only a NaN ``fdr``; none of them is called.

    Warns
    -----
    CellstillWarning
        Samples were left out, or levels of ``within`` skipped.

    Raises
    ------
    MissingKeyError, InvalidArgumentError
        Unknown columns or groups, missing values, fewer than two samples in a group, batch and condition confounded.
    InvalidCountsError
        Values that are not finite, non-negative integers, or no gene with counts enough.
    OptionalDependencyError
        pydeseq2 is not installed.
    """
    config = config or PseudobulkConfig()
    if not isinstance(config, PseudobulkConfig):
        raise InvalidArgumentError(
            f"config={config!r} is no PseudobulkConfig. Write PseudobulkConfig(method='deseq2'), for instance."
        )
    check_lengths("gene_names", gene_names, "columns of counts", counts.shape[1])
    check_lengths("obs", np.arange(len(obs)), "rows of counts", counts.shape[0])
    sample_key = require_samples(sample_key)
    if (ratios is not None) != (config.expression == "corrected"):
        raise InvalidArgumentError(
            f"expression={config.expression!r} and {'no ' if ratios is None else ''}ratios: corrected counts come from "
            "a model, through its differential_expression(how=PseudobulkConfig(expression='corrected'))."
        )
    if config.borrow and within is None:
        raise InvalidArgumentError("borrow=True needs within=, the column whose levels are to learn from each other.")
    contrast = Contrast(groupby, str(group1), str(group2))
    cells = comparison_cells(obs, **contrast.arguments)
    check_within(obs, within, groupby=groupby, sample_key=sample_key)
    terms: dict[str, Any] = {"batch_key": batch_key, "covariate_keys": config.covariate_keys}
    for argument, keys in (("batch_key", [batch_key]), ("covariate_keys", config.covariate_keys)):
        for key in keys:
            if key is not None:
                complete_column(obs.iloc[cells], key, argument)
    arguments = {within: "within", sample_key: "sample_key", groupby: "groupby"}
    by = [key for key in arguments if key is not None]
    labels = pd.DataFrame({key: text_column(obs.iloc[cells], key, arguments[key]) for key in by})
    replicate = labels.groupby(by, sort=True).ngroup().to_numpy()
    codes = np.full(len(obs), -1)
    codes[cells] = replicate
    place = dict(zip(labels.itertuples(index=False, name=None), replicate, strict=True))
    raw = sum_rows(counts, codes, len(set(replicate)))
    sums = raw if ratios is None else corrected_sums(counts, codes, raw, ratios)

    def places_of(units: Units, level: tuple[str, ...]) -> np.ndarray:
        names = units.table[[sample_key, groupby]].itertuples(index=False, name=None)
        return np.array([place[(*level, *name)] for name in names], dtype=int)

    def compare(level: tuple[str, ...], rows: np.ndarray) -> DEResult:
        units = make_units(
            obs.iloc[rows], contrast, sample_key=sample_key, min_cells=config.min_cells_per_sample, **terms
        )
        least = max(config.min_counts_per_sample, 1)
        units = units.keep(sums[places_of(units, level)].sum(axis=1) >= least, f"fewer than {least} counts")
        units, design = design_of_units(units, contrast, sample_key=sample_key, **terms)
        used = places_of(units, level)
        uncorrected = None if ratios is None else raw[used]
        return _test(sums[used], uncorrected, units, design, contrast, config, gene_names)

    if within is None:
        return compare((), np.arange(len(obs)))
    found = stratify(obs.iloc[cells], within, lambda level, rows: compare((level,), cells[rows]))
    return borrow_strength(found) if config.borrow else found


def _test(
    sums: np.ndarray,
    uncorrected: np.ndarray | None,
    units: Units,
    design: Design,
    contrast: Contrast,
    config: PseudobulkConfig,
    gene_names: Sequence[str],
) -> DEResult:
    tested = sums.sum(axis=0) >= config.min_total_count
    if not tested.any():
        raise InvalidCountsError(
            f"No gene has {config.min_total_count} counts in the {len(sums)} samples: nothing to test. "
            "Check that these are raw counts, or lower min_total_count."
        )
    before = None if uncorrected is None else uncorrected[:, tested]
    found = _gene_tests(sums[:, tested], before, design, config)
    table = pd.DataFrame({"gene": np.asarray(gene_names, dtype=object)})
    table["base_mean"] = (sums / found.size_factors[:, None]).mean(axis=0)
    for name, values in found.columns.items():
        table[name] = np.nan
        table.loc[tested, name] = values
    table["is_de"] = table["fdr"].to_numpy() <= config.fdr
    table["direction"] = direction(table["lfc"].to_numpy(), table["is_de"].to_numpy())
    remarks = found.notes
    if not tested.all():
        remarks = [
            f"{(~tested).sum()} genes with fewer than {config.min_total_count} counts were not tested.",
            *remarks,
        ]
    return DEResult(
        table=table,
        contrast=contrast,
        design=design.formula,
        method=config.method,
        units=units.table.assign(n_cells=units.n_cells, total_counts=sums.sum(axis=1), size_factor=found.size_factors),
        left_out=units.left_out,
        params=asdict(config),
        notes=(*design.notes, *remarks),
    )


def _gene_tests(
    sums: np.ndarray, uncorrected: np.ndarray | None, design: Design, config: PseudobulkConfig
) -> GeneTests:
    threshold, shrink_lfc = config.lfc_threshold, config.shrink_lfc
    if config.method == "ttest":
        return moderated_t(
            sums,
            design.matrix,
            design.common,
            lfc_threshold=threshold,
            shrink_lfc=shrink_lfc,
            uncorrected=uncorrected,
        )
    if config.method == "deseq2":
        asked: dict[str, Any] = {"fdr": config.fdr, "lfc_threshold": threshold, "n_cpus": config.n_cpus}
        found = deseq2(sums, design.matrix, shrink_lfc=shrink_lfc, **asked)
        if uncorrected is None:
            return found
        return widen(found, deseq2(uncorrected, design.matrix, **asked), uncorrected, threshold)
    found = rank_sum(sums, design, fdr=config.fdr)
    return found if uncorrected is None else found._replace(notes=[RANKS_NOTE, *found.notes])
