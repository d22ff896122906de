"""How to compare pseudobulk sums, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cellstill.de.units import column_names
from cellstill.errors import InvalidArgumentError, check_option

METHODS = ("ttest", "deseq2", "wilcoxon")


@dataclass(frozen=True, kw_only=True)
class PseudobulkConfig:
    """How to compare pseudobulk sums.

    Parameters
    ----------
    method
        - ``"ttest"`` (default): weighted t-test of log counts per million with moderated variances
          (:func:`~cellstill.de.moderated.moderated_t`). Samples of few cells count as much as they are worth; keeps its
          error rate with few samples; a fraction of a second.
        - ``"deseq2"``: negative binomial regression with shrunken dispersions and a Wald test (Love, Huber & Anders,
          Genome Biol. 15:550, 2014), through pydeseq2. Its p-values are those of a normal, which with few samples calls
          a little more than it says.
        - ``"wilcoxon"``: rank tests of log counts per million (:func:`~cellstill.de.ranks.rank_sum`). Assumes least,
          and finds nothing with few samples.
    expression
        ``"raw"``: raw counts, the batch in the design. ``"corrected"``: each count multiplied by what a model says of
        its batch before it is summed, which can undo what a batch does to one cell type and not to another; sums keep
        the depth of their sample, and the batch stays in the design, which takes up the error that the correction has
        in common for the samples of a batch. What it does beyond that is added to the error of fold changes
        (:func:`~cellstill.de.correction.correction_error`), and samples are not taken to be more alike than their
        raw counts are; ``"wilcoxon"`` has no place for either, and says so. Counts are corrected to the mean of the
        batches that have cells of both groups, or of all where none has
        (:func:`~cellstill.de.choice.codes_of_both`). Only models offer it.
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
        check_option("method", self.method, METHODS)
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
