"""Differential expression between groups of samples, from the sums of their raw counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellstill.de.deseq2 import GeneTests, deseq2
from cellstill.de.design import make_design
from cellstill.de.result import Contrast, DEResult, direction
from cellstill.de.units import check_lengths, column_names, text_column
from cellstill.errors import InvalidArgumentError, InvalidCountsError, check_option

_CHUNK_SIZE = 4096


@dataclass(frozen=True, kw_only=True)
class PseudobulkConfig:
    """How to compare pseudobulk sums.

    Parameters
    ----------
    method
        ``"deseq2"``: negative binomial regression with shrunken dispersions and a Wald test (Love, Huber & Anders,
        Genome Biol. 15:550, 2014), through pydeseq2.
    min_cells_per_sample
        Samples with fewer cells (in their group) are left out. Larger drops noisy samples, and with them replicates.
    min_total_count
        Genes with fewer counts over all samples used are not tested. Larger spares tests of genes that cannot reach
        significance; at least 1, as a gene without a count cannot be tested.
    fdr
        Genes with a smaller or equal adjusted p-value are called; larger calls more, of which that share is expected
        to be false. It is also what DESeq2's independent filtering optimises.
    lfc_threshold
        Effect floor, log2. Above 0 the test itself is of ``|lfc| > lfc_threshold`` (DESeq2's ``greaterAbs``), so
        the FDR is that of effects beyond the floor; larger calls fewer genes.
    covariate_keys
        Further columns of ``obs`` for the design, one value per replicate: text and booleans as levels, numbers
        linearly.
    n_cpus
        Processes that pydeseq2 may start. The result does not depend on it.
    """

    method: str = "deseq2"
    min_cells_per_sample: int = 10
    min_total_count: int = 10
    fdr: float = 0.05
    lfc_threshold: float = 0.0
    covariate_keys: Sequence[str] = ()
    n_cpus: int = 1

    def __post_init__(self) -> None:
        check_option("method", self.method, _METHODS)
        for name in ("min_cells_per_sample", "min_total_count", "n_cpus"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name}={getattr(self, name)!r} has to be at least 1.")
        if not 0 < self.fdr < 1:
            raise InvalidArgumentError(f"fdr={self.fdr!r} has to lie between 0 and 1.")
        if self.lfc_threshold < 0:
            raise InvalidArgumentError(f"lfc_threshold={self.lfc_threshold!r} cannot be negative: it bounds |lfc|.")
        object.__setattr__(self, "covariate_keys", column_names("covariate_keys", self.covariate_keys))


def pseudobulk_sums(
    counts: Any,
    obs: pd.DataFrame,
    sample_key: str | Sequence[str],
    *,
    gene_names: Sequence[str] | None = None,
    chunk_size: int = _CHUNK_SIZE,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Sum counts over the cells of each sample, reading the matrix once, in chunks of rows.

    Parameters
    ----------
    counts
        Raw counts, shape ``(n_obs, n_vars)``: CSR, CSC, dense, or backed by a file.
    obs
        Annotation of the cells, in the order of the rows.
    sample_key
        Column that names the samples; several columns give one row per combination found, such as donor and cell type.
    gene_names
        Names of the columns of the result; numbers if not given.
    chunk_size
        Rows read at a time; larger is faster on disk and takes more memory.

    Returns
    -------
    sums
        Samples x genes, int64, indexed by sample as text (a ``MultiIndex`` for several columns), sorted.
    metadata
        The same index, with ``n_cells`` and ``total_counts``.

    Raises
    ------
    MissingKeyError, InvalidArgumentError
        A column is absent or has missing values, or lengths disagree.
    InvalidCountsError
        Values that are not finite, non-negative integers.
    """
    keys = column_names("sample_key", [sample_key] if isinstance(sample_key, str) else sample_key)
    labels = pd.DataFrame({key: text_column(obs, key, "sample_key") for key in keys})
    by_sample = labels.groupby(keys[0] if len(keys) == 1 else list(keys), sort=True)
    n_cells = by_sample.size()
    sums = pd.DataFrame(_sum_rows(counts, by_sample.ngroup().to_numpy(), len(n_cells), chunk_size), index=n_cells.index)
    if gene_names is not None:
        check_lengths("gene_names", gene_names, "columns of counts", sums.shape[1])
        sums.columns = pd.Index(gene_names)
    return sums, pd.DataFrame({"n_cells": n_cells, "total_counts": sums.sum(axis=1)})


def pseudobulk_de(
    counts: Any,
    obs: pd.DataFrame,
    gene_names: Sequence[str],
    *,
    groupby: str,
    group1: str,
    group2: str,
    sample_key: str,
    batch_key: str | None = None,
    config: PseudobulkConfig | None = None,
) -> DEResult:
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
        Column that names samples or donors.
    batch_key
        Column of the batches, or ``None`` for no batch term. A batch effect that is not in the design is attributed to
        the condition as far as the two are unbalanced.
    config
        See :class:`PseudobulkConfig`.

    Returns
    -------
    One row per gene, in the order given. Genes that were not tested (too few counts) or whose test DESeq2 withholds
    (outlying counts by Cook's distance) have a NaN ``p_value``, those it filters as hopeless only a NaN ``fdr``;
    none of them is called.

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
    contrast = Contrast(groupby, str(group1), str(group2))
    units, design = make_design(
        obs,
        contrast,
        sample_key=sample_key,
        batch_key=batch_key,
        covariate_keys=config.covariate_keys,
        min_cells=config.min_cells_per_sample,
    )
    sums = _sum_rows(counts, units.codes, len(units.table))
    _check_not_empty(sums, units.table)
    tested = sums.sum(axis=0) >= config.min_total_count
    if not tested.any():
        raise InvalidCountsError(
            f"No gene has {config.min_total_count} counts in the {len(sums)} samples: nothing to test. "
            "Check that these are raw counts, or lower min_total_count."
        )

    columns, size_factors, remarks = _METHODS[config.method](sums[:, tested], design.matrix, config)
    table = pd.DataFrame({"gene": np.asarray(gene_names, dtype=object)})
    table["base_mean"] = (sums / size_factors[:, None]).mean(axis=0)
    for name, values in columns.items():
        table[name] = np.nan
        table.loc[tested, name] = values
    table["is_de"] = table["fdr"].to_numpy() <= config.fdr
    table["direction"] = direction(table["lfc"].to_numpy(), table["is_de"].to_numpy())
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
        units=units.table.assign(n_cells=units.n_cells, total_counts=sums.sum(axis=1), size_factor=size_factors),
        left_out=units.left_out,
        params=asdict(config),
        notes=(*design.notes, *remarks),
    )


def _sum_rows(counts: Any, codes: np.ndarray, n_units: int, chunk_size: int = _CHUNK_SIZE) -> np.ndarray:
    """Sum the rows of each unit, (units x cells) @ (cells x genes) chunk by chunk; code -1 is left out."""
    from cellstill.data.counts import iter_rows  # its package imports torch, which reading a result does not need

    check_lengths("obs", codes, "rows of counts", counts.shape[0])
    sums = np.zeros((n_units, counts.shape[1]), dtype=np.int64)
    for start, rows in iter_rows(counts, chunk_size):
        unit = codes[start : start + rows.shape[0]]
        used = np.flatnonzero(unit >= 0)
        rows = rows[used]
        bad = ~(np.isfinite(rows.data) & (rows.data >= 0) & (rows.data == np.floor(rows.data)))
        if bad.any():
            row = used[np.searchsorted(rows.indptr, np.flatnonzero(bad)[0], side="right") - 1] + start
            raise InvalidCountsError(
                f"counts holds {rows.data[bad][0]:g} in row {row}: pseudobulk needs raw counts, which are finite, "
                "non-negative integers. Choose the layer that holds them."
            )
        indicator = sp.csr_matrix(
            (np.ones(len(used), np.int64), (unit[used], np.arange(len(used)))), (n_units, len(used))
        )
        sums += (indicator @ rows.astype(np.int64)).toarray()
    return sums


def _check_not_empty(sums: np.ndarray, table: pd.DataFrame) -> None:
    empty = table[sums.sum(axis=1) == 0]
    if len(empty):
        raise InvalidCountsError(
            f"These samples have cells without a single count: {empty.iloc[:, 0].tolist()[:5]}. Remove them first."
        )


def _deseq2(sums: np.ndarray, matrix: np.ndarray, config: PseudobulkConfig) -> GeneTests:
    return deseq2(sums, matrix, fdr=config.fdr, lfc_threshold=config.lfc_threshold, n_cpus=config.n_cpus)


_METHODS: dict[str, Callable[[np.ndarray, np.ndarray, PseudobulkConfig], GeneTests]] = {"deseq2": _deseq2}
