"""Differential expression between groups of samples, from the sums of their raw counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cellstill.de.borrowing import borrow_strength
from cellstill.de.choice import check_within, require_samples
from cellstill.de.deseq2 import deseq2
from cellstill.de.design import Design, design_of_units
from cellstill.de.gene_tests import GeneTests
from cellstill.de.moderated import moderated_t
from cellstill.de.ranks import rank_sum
from cellstill.de.result import Contrast, DEResult, direction
from cellstill.de.stratified import StratifiedDEResult, stratify
from cellstill.de.sums import Ratios, corrected_sums, sum_rows
from cellstill.de.units import Units, check_lengths, column_names, comparison_cells, make_units, text_column
from cellstill.errors import InvalidArgumentError, InvalidCountsError, check_option


@dataclass(frozen=True, kw_only=True)
class PseudobulkConfig:
    """How to compare pseudobulk sums.

    Parameters
    ----------
    method
        - ``"ttest"`` (default): weighted t-test of log counts per million with moderated variances
          (:func:`~cellstill.de.moderated.moderated_t`). Samples of few cells count as much as they are worth; keeps its
          error rate with few samples; milliseconds.
        - ``"deseq2"``: negative binomial regression with shrunken dispersions and a Wald test (Love, Huber & Anders,
          Genome Biol. 15:550, 2014), through pydeseq2. Its p-values are those of a normal, which with few samples calls
          a little more than it says.
        - ``"wilcoxon"``: rank tests of log counts per million (:func:`~cellstill.de.ranks.rank_sum`). Assumes least,
          and finds nothing with few samples.
    expression
        ``"raw"``: raw counts, the batch in the design. ``"corrected"``: each count multiplied by what a model says of
        its batch before it is summed, which can undo what a batch does to one cell type and not to another; sums keep
        the depth of their sample, and the batch stays in the design, which takes up the error that the correction has
        in common for the samples of a batch. Only models offer it.
    shrink_lfc
        Add ``lfc_shrunken``, fold changes drawn towards 0 as far as they are uncertain, for ranking and plots: with
        ``"deseq2"`` by apeglm (Zhu, Ibrahim & Love, Bioinformatics 35:2084, 2019) through pydeseq2, with ``"ttest"`` by
        adaptive shrinkage (:func:`~cellstill.de.posterior.shrunken_effect`). Calls do not depend on it.
    borrow
        With ``within``: let each level learn from the effects of the others
        (:func:`~cellstill.de.borrowing.borrow_strength`), which finds more in levels of few cells.
    min_cells_per_sample
        Samples with fewer cells (in their group) are left out. Larger drops noisy samples, and with them replicates.
    min_counts_per_sample
        Samples with fewer counts in all are left out.
    min_total_count
        Genes with fewer counts over all samples used are not tested. Larger spares tests of genes that cannot reach
        significance; at least 1, as a gene without a count cannot be tested.
    fdr
        Genes with a smaller or equal adjusted p-value are called; larger calls more, of which that share is expected
        to be false. It is also what DESeq2's independent filtering optimises.
    lfc_threshold
        Effect floor, log2. Above 0 the test itself is of ``|lfc| > lfc_threshold``, so the FDR is that of effects
        beyond the floor; larger calls fewer genes. Not for ``"wilcoxon"``.
    covariate_keys
        Further columns of ``obs`` for the design, one value per replicate: text and booleans as levels, numbers
        linearly. Not for ``"wilcoxon"``.
    n_cpus
        Processes that pydeseq2 may start. The result does not depend on it.
    """

    method: str = "ttest"
    expression: str = "raw"
    shrink_lfc: bool = False
    borrow: bool = False
    min_cells_per_sample: int = 10
    min_counts_per_sample: int = 200
    min_total_count: int = 10
    fdr: float = 0.05
    lfc_threshold: float = 0.0
    covariate_keys: Sequence[str] = ()
    n_cpus: int = 1

    def __post_init__(self) -> None:
        check_option("method", self.method, _METHODS)
        check_option("expression", self.expression, ("raw", "corrected"))
        for name in ("min_cells_per_sample", "min_total_count", "n_cpus"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name}={getattr(self, name)!r} has to be at least 1.")
        if self.min_counts_per_sample < 0:
            raise InvalidArgumentError(f"min_counts_per_sample={self.min_counts_per_sample!r} cannot be negative.")
        if not 0 < self.fdr < 1:
            raise InvalidArgumentError(f"fdr={self.fdr!r} has to lie between 0 and 1.")
        if not 0 <= self.lfc_threshold < np.inf:
            raise InvalidArgumentError(
                f"lfc_threshold={self.lfc_threshold!r} has to be finite and cannot be negative: it bounds |lfc|."
            )
        object.__setattr__(self, "covariate_keys", column_names("covariate_keys", self.covariate_keys))
        if self.borrow and self.lfc_threshold > 0:
            raise InvalidArgumentError(
                f"lfc_threshold={self.lfc_threshold!r} and borrow=True: effects are borrowed from tests of any effect. "
                "Set lfc_threshold=0."
            )
        if self.method == "wilcoxon":
            given = {"lfc_threshold": self.lfc_threshold, "covariate_keys": self.covariate_keys}
            given |= {"shrink_lfc": self.shrink_lfc, "borrow": self.borrow}
            for name, value in given.items():
                if value:
                    raise InvalidArgumentError(
                        f"{name}={value!r} needs a model of the counts, which method='wilcoxon' does not have. "
                        "Use method='ttest' or 'deseq2'."
                    )


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
        Values that are not finite, non-negative integers, or a sample or data set without counts.
    OptionalDependencyError
        pydeseq2 is not installed.
    """
    config = config or PseudobulkConfig()
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
    cells = comparison_cells(obs, groupby=groupby, group1=contrast.group1, group2=contrast.group2)
    check_within(obs, within, groupby=groupby, sample_key=sample_key)
    strata = [] if within is None else [within]
    labels = pd.DataFrame({key: text_column(obs.iloc[cells], key, "within") for key in strata})
    labels[sample_key] = text_column(obs.iloc[cells], sample_key, "sample_key")
    labels[groupby] = text_column(obs.iloc[cells], groupby, "groupby")
    by_replicate = labels.groupby(list(labels.columns), sort=True)
    codes = np.full(len(obs), -1)
    codes[cells] = by_replicate.ngroup()
    n_replicates = by_replicate.ngroups
    sums = sum_rows(counts, codes, n_replicates)
    if ratios is not None:
        sums = corrected_sums(counts, codes, sums, ratios)
    replicates = pd.Series(np.arange(n_replicates), by_replicate.size().index)

    def compare(level: str | None, rows: np.ndarray) -> DEResult:
        here = obs.iloc[rows]
        units = make_units(
            here,
            contrast,
            sample_key=sample_key,
            batch_key=batch_key,
            covariate_keys=config.covariate_keys,
            min_cells=config.min_cells_per_sample,
        )
        own = replicates if level is None else replicates.xs(level, level=0)
        asked = pd.MultiIndex.from_frame(units.table[[sample_key, groupby]])
        of_units = own.reindex(asked).to_numpy()
        _check_not_empty(sums[of_units], units.table)
        enough = sums[of_units].sum(axis=1) >= config.min_counts_per_sample
        units = units.keep(enough, f"fewer than {config.min_counts_per_sample} counts")
        units, design = design_of_units(
            units, contrast, sample_key=sample_key, batch_key=batch_key, covariate_keys=config.covariate_keys
        )
        asked = pd.MultiIndex.from_frame(units.table[[sample_key, groupby]])
        return _test(sums[own.reindex(asked).to_numpy()], _Comparison(units, design, contrast, config), gene_names)

    if within is None:
        return compare(None, np.arange(len(obs)))
    found = stratify(obs.iloc[cells], within, lambda level, rows: compare(level, cells[rows]))
    return borrow_strength(found) if config.borrow else found


class _Comparison(NamedTuple):
    units: Units
    design: Design
    contrast: Contrast
    config: PseudobulkConfig


def _test(sums: np.ndarray, comparison: _Comparison, gene_names: Sequence[str]) -> DEResult:
    units, design, contrast, config = comparison
    tested = sums.sum(axis=0) >= config.min_total_count
    if not tested.any():
        raise InvalidCountsError(
            f"No gene has {config.min_total_count} counts in the {len(sums)} samples: nothing to test. "
            "Check that these are raw counts, or lower min_total_count."
        )
    found = _METHODS[config.method](sums[:, tested], comparison)
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


def _check_not_empty(sums: np.ndarray, table: pd.DataFrame) -> None:
    empty = table[sums.sum(axis=1) == 0]
    if len(empty):
        raise InvalidCountsError(
            f"These samples have cells without a single count: {empty.iloc[:, 0].tolist()[:5]}. Remove them first."
        )


def _ttest(sums: np.ndarray, comparison: _Comparison) -> GeneTests:
    config = comparison.config
    return moderated_t(sums, comparison.design.matrix, lfc_threshold=config.lfc_threshold, shrink_lfc=config.shrink_lfc)


def _deseq2(sums: np.ndarray, comparison: _Comparison) -> GeneTests:
    config = comparison.config
    return deseq2(
        sums,
        comparison.design.matrix,
        fdr=config.fdr,
        lfc_threshold=config.lfc_threshold,
        shrink_lfc=config.shrink_lfc,
        n_cpus=config.n_cpus,
    )


def _wilcoxon(sums: np.ndarray, comparison: _Comparison) -> GeneTests:
    return rank_sum(sums, comparison.design)


_METHODS: dict[str, Callable[[np.ndarray, _Comparison], GeneTests]] = {
    "ttest": _ttest,
    "deseq2": _deseq2,
    "wilcoxon": _wilcoxon,
}
