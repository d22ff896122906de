"""The one place that calls pydeseq2."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd

from cellstill.de.gene_tests import RATIO_NOTE, GeneTests, has_ratio_genes
from cellstill.errors import optional_dependency


def deseq2(
    sums: np.ndarray, matrix: np.ndarray, *, fdr: float, lfc_threshold: float, shrink_lfc: bool = False, n_cpus: int = 1
) -> GeneTests:
    """Test the last coefficient of a design with DESeq2 (Love, Huber & Anders, Genome Biol. 15:550, 2014).

    Size factors are medians of ratios over the genes with counts in every sample; where there are fewer than 10 of
    them (few cells per sample), over the positive counts of all genes ("poscounts"), and a note says so. What pydeseq2
    warns of, mostly that it fell back from one estimator to another, becomes a note too.

    Parameters
    ----------
    sums
        Counts, samples x genes, no gene or sample without counts.
    matrix
        Design, samples x coefficients, of full rank.
    fdr, lfc_threshold, shrink_lfc, n_cpus
        See :class:`~cellstill.de.PseudobulkConfig`.
    """
    ratio = has_ratio_genes(sums)
    names = [f"x{column}" for column in range(matrix.shape[1])]
    samples = [str(number) for number in range(sums.shape[0])]
    genes = [str(number) for number in range(sums.shape[1])]
    # Importing pydeseq2 changes the filters for warnings of the whole process; this undoes it.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            from pydeseq2.dds import DeseqDataSet
            from pydeseq2.ds import DeseqStats
            from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
        except ImportError as error:
            raise optional_dependency("pydeseq2", "de", "PseudobulkConfig(method='deseq2')") from error
        # Matrices of a few coefficients: BLAS threads only wait for each other, several times as long as they work.
        with threadpool_limits(1, user_api="blas"):
            fit = DeseqDataSet(
                counts=pd.DataFrame(sums, samples, genes),
                metadata=pd.DataFrame(index=samples),
                design=pd.DataFrame(matrix, samples, names),
                size_factors_fit_type="ratio" if ratio else "poscounts",
                n_cpus=n_cpus,
                quiet=True,
            )
            fit.deseq2()
            test = DeseqStats(
                fit,
                contrast=np.eye(matrix.shape[1])[-1],
                alpha=fdr,
                lfc_null=lfc_threshold,
                alt_hypothesis="greaterAbs" if lfc_threshold > 0 else None,
                n_cpus=n_cpus,
                quiet=True,
            )
            test.summary()
            theirs = {"lfc": "log2FoldChange", "lfc_se": "lfcSE", "p_value": "pvalue", "fdr": "padj"}
            columns = {ours: test.results_df[name].to_numpy(dtype=float) for ours, name in theirs.items()}
            if shrink_lfc:
                test.lfc_shrink(coeff=names[-1])  # overwrites the fold changes of its results
                columns["lfc_shrunken"] = test.results_df["log2FoldChange"].to_numpy(dtype=float)

    notes = []
    if not ratio:
        notes.append(RATIO_NOTE + "'poscounts' size factors.")
    for message in dict.fromkeys(str(item.message) for item in caught if item.category is UserWarning):
        notes.append(f"pydeseq2: {message}")
    return GeneTests(columns, fit.obs["size_factors"].to_numpy(), notes)
