from __future__ import annotations

import subprocess
import sys
import tracemalloc
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cellstill.de import PseudobulkConfig, pseudobulk_de, pseudobulk_sums
from cellstill.errors import (
    InvalidArgumentError,
    InvalidCountsError,
    MissingKeyError,
    OptionalDependencyError,
)

TREATED = {"groupby": "condition", "group1": "treated", "group2": "control"}
ONE_BATCH = [(f"d{i}", "treated" if i % 2 else "control", "a") for i in range(8)]
TWO_BATCHES = [(f"d{i}", "treated" if i in {0, 7, 8, 9, 10, 11} else "control", "ab"[i // 6]) for i in range(12)]


@pytest.fixture(scope="module")
def one_batch(simulate):
    return simulate(ONE_BATCH, n_genes=300)


@pytest.fixture(scope="module")
def one_batch_result(one_batch):
    return pseudobulk_de(one_batch.counts, one_batch.obs, one_batch.genes, sample_key="donor", **TREATED)


@pytest.fixture(scope="module")
def small():
    rng = np.random.default_rng(3)
    obs = pd.DataFrame(
        {
            "donor": pd.Categorical(rng.choice(list("xyz"), 101), categories=list("uzyx")),
            "cell type": rng.choice(["B", "T"], 101),
        }
    )
    return rng.poisson(0.7, (101, 13)), obs


def as_backed(counts, tmp_path, form):
    adata = ad.AnnData({"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}[form](counts))
    adata.write_h5ad(tmp_path / "counts.h5ad")
    return ad.read_h5ad(tmp_path / "counts.h5ad", backed="r").X


@pytest.mark.parametrize("keys", ["donor", ["donor", "cell type"]], ids=["one_column", "two_columns"])
@pytest.mark.parametrize("form", ["csr", "csc", "dense", "backed_csr", "backed_csc", "backed_dense"])
@pytest.mark.parametrize("chunk_size", [7, 101, 4096], ids=["last_chunk_short", "one_chunk", "chunk_larger_than_data"])
def test_sums_equal_a_groupby_on_the_dense_matrix(small, tmp_path, keys, form, chunk_size):
    counts, obs = small
    if form.startswith("backed"):
        matrix = as_backed(counts, tmp_path, form.removeprefix("backed_"))
    else:
        matrix = {"csr": sp.csr_matrix, "csc": sp.csc_array, "dense": np.asarray}[form](counts.astype(np.float32))
    sums, metadata = pseudobulk_sums(matrix, obs, keys, chunk_size=chunk_size)
    by_sample = pd.DataFrame(counts).groupby([obs[key].astype(str).to_numpy() for key in np.atleast_1d(keys)])
    pd.testing.assert_frame_equal(sums, by_sample.sum().rename_axis(sums.index.names))
    assert set(sums.dtypes) == {np.dtype(np.int64)}
    assert metadata["n_cells"].tolist() == by_sample.size().tolist()
    assert metadata["total_counts"].tolist() == sums.sum(axis=1).tolist()


def test_sums_beyond_float32_are_exact():
    counts = sp.csr_matrix(np.array([[16777216.0], [1.0], [1.0]], dtype=np.float32))
    sums, _ = pseudobulk_sums(counts, pd.DataFrame({"s": ["a"] * 3}), "s")
    assert sums.iloc[0, 0] == 16777218


def test_summing_takes_the_memory_of_a_chunk():
    counts = sp.random(40_000, 1000, density=0.1, format="csr", random_state=0)
    counts.data[:] = 1
    obs = pd.DataFrame({"s": np.arange(40_000) % 5})
    pseudobulk_sums(counts[:100], obs[:100], "s")
    tracemalloc.start()
    pseudobulk_sums(counts, obs, "s", chunk_size=500)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.15 * (counts.data.nbytes + counts.indices.nbytes)


@pytest.mark.parametrize(("value", "shown"), [(0.5, "0.5"), (-1.0, "-1"), (np.nan, "nan"), (np.inf, "inf")])
def test_values_that_are_not_counts_are_refused_with_their_row(small, value, shown):
    counts, obs = small
    wrong = counts.astype(float)
    wrong[57, 2] = value
    with pytest.raises(InvalidCountsError, match=f"holds {shown} in row 57"):
        pseudobulk_sums(wrong, obs, "donor", chunk_size=10)


def test_known_fold_changes_are_recovered(one_batch, one_batch_result):
    table, true = one_batch_result.table, one_batch.lfc
    assert table["gene"].tolist() == one_batch.genes
    called = table["is_de"].to_numpy()
    assert called[true != 0].mean() > 0.85
    assert (true[called] == 0).mean() < 0.08
    assert (np.sign(table["lfc"][called & (true != 0)]) == np.sign(true[called & (true != 0)])).all()
    tested = table["lfc"].notna().to_numpy()
    assert tested.mean() > 0.99
    lfc = table["lfc"][tested] - table["lfc"][tested & (true == 0)].median()
    assert np.polyfit(true[tested], lfc, 1)[0] == pytest.approx(1, abs=0.08)
    assert (np.abs(lfc - true[tested]) < 1.96 * table["lfc_se"][tested]).mean() > 0.9
    assert set(table["direction"][called & (true > 0)]) == {"up"}
    assert set(table["direction"][called & (true < 0)]) == {"down"}
    assert set(table["direction"][~called]) == {"none"}


def test_equals_pydeseq2_called_by_hand(simulate):
    from pydeseq2.dds import DeseqDataSet
    from pydeseq2.ds import DeseqStats

    data = simulate(TWO_BATCHES, n_genes=150, n_cells=20, batch_sd=0.5)
    config = PseudobulkConfig(min_total_count=1, fdr=0.1)
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


def test_a_batch_unbalanced_over_groups_needs_its_term(simulate):
    data = simulate(TWO_BATCHES, n_genes=200, n_cells=30, share_de=0.1, batch_sd=1.0, seed=1)
    with_batch, without = (
        pseudobulk_de(data.counts, data.obs, data.genes, sample_key="donor", batch_key=key, **TREATED)
        for key in ("batch", None)
    )
    false = [(result.table["is_de"] & (data.lfc == 0)).sum() for result in (without, with_batch)]
    assert false[0] > 20
    assert false[1] <= 3
    assert with_batch.table["is_de"][data.lfc != 0].mean() > 0.6
    assert (without.design, with_batch.design) == ("~ condition", "~ batch + condition")


def test_the_order_of_genes_and_cells_does_not_matter(one_batch, one_batch_result):
    rng = np.random.default_rng(5)
    genes, cells = rng.permutation(one_batch.counts.shape[1]), rng.permutation(one_batch.counts.shape[0])
    shuffled = pseudobulk_de(
        one_batch.counts[cells][:, genes],
        one_batch.obs.iloc[cells],
        np.array(one_batch.genes)[genes],
        sample_key="donor",
        **TREATED,
    )
    back = shuffled.table.set_index("gene").loc[one_batch.genes].reset_index()
    pd.testing.assert_frame_equal(back, one_batch_result.table, rtol=1e-5)


def test_swapping_the_groups_turns_the_signs(one_batch, one_batch_result):
    swapped = pseudobulk_de(
        one_batch.counts,
        one_batch.obs,
        one_batch.genes,
        sample_key="donor",
        groupby="condition",
        group1="control",
        group2="treated",
    )
    np.testing.assert_allclose(swapped.table["lfc"], -one_batch_result.table["lfc"], atol=1e-4)
    np.testing.assert_array_equal(swapped.table["direction"] == "up", one_batch_result.table["direction"] == "down")


def test_genes_without_counts_stay_in_the_table_untested(simulate):
    data = simulate(ONE_BATCH, n_genes=60, n_cells=20)
    data.counts = data.counts.tolil()
    data.counts[:, [0, 59]] = 0
    data.counts[:, 7] = 0
    data.counts[:9, 7] = 1
    result = pseudobulk_de(data.counts.tocsr(), data.obs, data.genes, sample_key="donor", **TREATED)
    assert result.table["gene"].tolist() == data.genes
    untested = result.table.iloc[[0, 7, 59]]
    assert untested[["lfc", "lfc_se", "p_value", "fdr"]].isna().all(axis=None)
    assert not untested["is_de"].any()
    assert untested["base_mean"].iloc[0] == 0
    assert untested["base_mean"].iloc[1] > 0
    assert result.table.drop(index=[0, 7, 59])["lfc"].notna().all()
    assert "3 genes with fewer than 10 counts were not tested." in result.notes


def test_an_effect_floor_is_part_of_the_test(one_batch, one_batch_result):
    config = PseudobulkConfig(lfc_threshold=1.0)
    result = pseudobulk_de(
        one_batch.counts, one_batch.obs, one_batch.genes, sample_key="donor", config=config, **TREATED
    )
    called = result.table["is_de"]
    assert 0 < called.sum() < one_batch_result.table["is_de"].sum()
    assert (np.abs(one_batch.lfc[called]) > 1).mean() > 0.9
    np.testing.assert_allclose(result.table["lfc"], one_batch_result.table["lfc"])
    p_values = np.column_stack([result.table["p_value"], one_batch_result.table["p_value"]])
    assert (p_values[:, 0] >= p_values[:, 1])[~np.isnan(p_values).any(axis=1)].all()


def test_few_cells_per_sample_fall_back_to_size_factors_of_positive_counts(simulate):
    data = simulate(ONE_BATCH, n_genes=80, n_cells=40)
    keep = np.random.default_rng(0).random(data.counts.nnz) < 0.03
    data.counts.data *= keep
    data.counts.eliminate_zeros()
    config = PseudobulkConfig(min_total_count=1)
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
    result = pseudobulk_de(data.counts, data.obs, data.genes, sample_key="donor", **TREATED)
    assert any("residual degrees of freedom" in note for note in result.notes)


def test_no_output_and_no_changed_filters(simulate, capfd):
    data = simulate(ONE_BATCH, n_genes=60, n_cells=20)
    before = list(warnings.filters)
    pseudobulk_de(data.counts, data.obs, data.genes, sample_key="donor", **TREATED)
    assert warnings.filters == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "edger"}, r"method='edger' is not known. Use one of: 'deseq2'"),
        ({"fdr": 0.0}, "fdr=0.0"),
        ({"min_total_count": 0}, "min_total_count=0"),
        ({"min_cells_per_sample": 0}, "min_cells_per_sample=0"),
        ({"lfc_threshold": -1.0}, "lfc_threshold=-1.0"),
        ({"covariate_keys": "age"}, r"covariate_keys='age' is a string. Write \['age'\]"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        PseudobulkConfig(**options)


def test_wrong_lengths_and_columns_are_named(one_batch):
    with pytest.raises(InvalidArgumentError, match="gene_names has 3 entries, but there are 300 columns of counts"):
        pseudobulk_de(one_batch.counts, one_batch.obs, ["a", "b", "c"], sample_key="donor", **TREATED)
    with pytest.raises(InvalidArgumentError, match="obs has 10 entries, but there are 400 rows of counts"):
        pseudobulk_sums(one_batch.counts, one_batch.obs[:10], "donor")
    with pytest.raises(MissingKeyError, match=r"sample_key='patient' is not in obs\. obs has: 'donor', 'condition'"):
        pseudobulk_de(one_batch.counts, one_batch.obs, one_batch.genes, sample_key="patient", **TREATED)


def test_nothing_to_test_is_an_error(simulate):
    data = simulate(ONE_BATCH, n_genes=20, n_cells=15)
    config = PseudobulkConfig(min_total_count=10**6)
    with pytest.raises(InvalidCountsError, match="No gene has 1000000 counts in the 8 samples"):
        pseudobulk_de(data.counts, data.obs, data.genes, sample_key="donor", config=config, **TREATED)


def test_an_empty_sample_is_an_error(simulate):
    data = simulate(ONE_BATCH, n_genes=20, n_cells=15)
    counts = data.counts.toarray()
    counts[data.obs["donor"] == "d3"] = 0
    with pytest.raises(InvalidCountsError, match="'d3'"):
        pseudobulk_de(counts, data.obs, data.genes, sample_key="donor", **TREATED)


def test_missing_pydeseq2_says_how_to_install_it(simulate, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydeseq2.dds", None)
    data = simulate(ONE_BATCH, n_genes=20, n_cells=15)
    with pytest.raises(OptionalDependencyError, match=r"pip install 'cellstill\[de\]'"):
        pseudobulk_de(data.counts, data.obs, data.genes, sample_key="donor", **TREATED)


def test_importing_de_is_light():
    code = (
        "import sys, cellstill.de; print(*[m for m in ('torch', 'scanpy', 'anndata', 'pydeseq2') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


@pytest.fixture(scope="module")
def kang_monocytes(real_data):
    adata = ad.read_h5ad(real_data("kang_pbmc.h5ad"))
    return adata[adata.obs["cell_type"] == "CD14+ Monocytes"].copy()


def test_interferon_genes_are_found_in_real_monocytes(kang_monocytes, real_data):
    adata, config = kang_monocytes, PseudobulkConfig(min_total_count=200)
    by_sample, by_donor = (
        pseudobulk_de(
            adata.X,
            adata.obs,
            adata.var_names,
            groupby="condition",
            group1="stim",
            group2="ctrl",
            sample_key=sample_key,
            batch_key=batch_key,
            config=config,
        )
        for sample_key, batch_key in (("sample", "donor"), ("donor", None))
    )
    assert by_sample.design == by_donor.design == "~ donor + condition"
    assert by_sample.n_samples == {"stim": 8, "ctrl": 8}
    np.testing.assert_allclose(by_sample.table["lfc"], by_donor.table["lfc"], atol=0.01)

    table = by_donor.table.set_index("gene")
    known = ["ISG15", "IFI6", "IFIT1", "IFIT3", "MX1"]
    assert (table.loc[known, "direction"] == "up").all()
    assert (table.loc[known, "lfc"] > 3).all()

    published = pd.read_csv(real_data("kang_published_de.csv.gz"))
    published = published[published["cell_type"] == "CD14+ Monocytes"].drop_duplicates("symbol").set_index("symbol")
    both = table.index[table["is_de"]].intersection(published.index)
    assert len(both) > 100
    agree = np.corrcoef(table.loc[both, "lfc"], published.loc[both, "log2FoldChange"])[0, 1]
    assert agree > 0.9
