from __future__ import annotations

import sys
import warnings

import numpy as np
import pandas as pd
import pytest

from cellstill.de import PseudobulkConfig, pseudobulk_de, pseudobulk_sums
from cellstill.errors import OptionalDependencyError

TREATED = {"groupby": "condition", "group1": "treated", "group2": "control"}
ONE_BATCH = [(f"d{i}", "treated" if i % 2 else "control", "a") for i in range(8)]
TWO_BATCHES = [(f"d{i}", "treated" if i in {0, 7, 8, 9, 10, 11} else "control", "ab"[i // 6]) for i in range(12)]
DESEQ2 = PseudobulkConfig(method="deseq2")


def test_equals_pydeseq2_called_by_hand(simulate):
    from pydeseq2.dds import DeseqDataSet
    from pydeseq2.ds import DeseqStats

    data = simulate(TWO_BATCHES, n_genes=150, n_cells=20, batch_sd=0.5)
    config = PseudobulkConfig(method="deseq2", min_total_count=1, fdr=0.1)
    ours = pseudobulk_de(
        data.counts, data.obs, data.genes, sample_key="donor", batch_key="batch", config=config, **TREATED
    )
    sums = pd.DataFrame(data.counts.toarray(), data.obs.index, data.genes).groupby(data.obs["donor"]).sum()
    sums = sums.loc[:, sums.sum() > 0]
    metadata = data.obs.groupby("donor").first()
    dds = DeseqDataSet(counts=sums.astype(int), metadata=metadata, design="~batch + condition", quiet=True, n_cpus=1)
    dds.deseq2()
    stats = DeseqStats(dds, contrast=["condition", "treated", "control"], alpha=0.1, quiet=True, n_cpus=1)
    stats.summary()
    table = ours.table.set_index("gene").loc[sums.columns]
    assert ours.design == "~ batch + condition"
    for name, theirs in (
        ("base_mean", "baseMean"),
        ("lfc", "log2FoldChange"),
        ("lfc_se", "lfcSE"),
        ("p_value", "pvalue"),
        ("fdr", "padj"),
    ):
        np.testing.assert_allclose(table[name], stats.results_df[theirs], rtol=1e-6, err_msg=name)


def test_few_cells_per_sample_fall_back_to_size_factors_of_positive_counts(simulate):
    data = simulate(ONE_BATCH, n_genes=80, n_cells=40)
    keep = np.random.default_rng(0).random(data.counts.nnz) < 0.03
    data.counts.data *= keep
    data.counts.eliminate_zeros()
    config = PseudobulkConfig(method="deseq2", min_total_count=1, min_counts_per_sample=0)
    result = pseudobulk_de(data.counts, data.obs, data.genes, sample_key="donor", config=config, **TREATED)
    assert any("poscounts" in note for note in result.notes)
    sums, _ = pseudobulk_sums(data.counts, data.obs, "donor")
    logs = np.log(sums.where(sums > 0))
    reference = logs.fillna(0.0).mean()
    oracle = np.exp((logs - reference).loc[:, reference > 0].median(axis=1))
    oracle /= np.exp(np.log(oracle).mean())
    np.testing.assert_allclose(result.units["size_factor"], oracle)


def test_what_pydeseq2_warns_of_is_noted(simulate):
    data = simulate(ONE_BATCH[:4], n_genes=60, n_cells=20)
    result = pseudobulk_de(data.counts, data.obs, data.genes, sample_key="donor", config=DESEQ2, **TREATED)
    assert any("residual degrees of freedom" in note for note in result.notes)


def test_no_output_and_no_changed_filters(simulate, capfd):
    data = simulate(ONE_BATCH, n_genes=60, n_cells=20)
    before = list(warnings.filters)
    pseudobulk_de(data.counts, data.obs, data.genes, sample_key="donor", config=DESEQ2, **TREATED)
    assert warnings.filters == before
    assert capfd.readouterr() == ("", "")


def test_missing_pydeseq2_says_how_to_install_it(simulate, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydeseq2.dds", None)
    data = simulate(ONE_BATCH, n_genes=20, n_cells=15)
    with pytest.raises(OptionalDependencyError, match=r"pip install 'cellstill\[de\]'"):
        pseudobulk_de(data.counts, data.obs, data.genes, sample_key="donor", config=DESEQ2, **TREATED)


def test_known_fold_changes_are_recovered_and_shrunken_as_apeglm_does(simulate):
    data = simulate(ONE_BATCH, n_genes=200, n_cells=25)
    plain, shrunken = (
        pseudobulk_de(
            data.counts,
            data.obs,
            data.genes,
            sample_key="donor",
            config=PseudobulkConfig(method="deseq2", shrink_lfc=shrink),
            **TREATED,
        ).table
        for shrink in (False, True)
    )
    called = plain["is_de"].to_numpy()
    assert called[data.lfc != 0].mean() > 0.75
    assert (data.lfc[called] == 0).mean() < 0.1
    pd.testing.assert_frame_equal(shrunken[plain.columns], plain)
    tested = plain["lfc"].notna()
    assert shrunken["lfc_shrunken"].notna().equals(tested)
    noise = (data.lfc == 0) & tested
    assert np.square(shrunken["lfc_shrunken"][noise]).mean() < 0.5 * np.square(plain["lfc"][noise]).mean()
    sure = called & (np.abs(plain["lfc"]) > 6 * plain["lfc_se"])
    np.testing.assert_allclose(shrunken["lfc_shrunken"][sure], plain["lfc"][sure], rtol=0.15)
