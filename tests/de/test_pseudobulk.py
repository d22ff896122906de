from __future__ import annotations

import subprocess
import sys
import tracemalloc

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cellstill.de import PseudobulkConfig, pseudobulk_de, pseudobulk_sums
from cellstill.de.sums import corrected_sums
from cellstill.errors import (
    CellstillWarning,
    InvalidArgumentError,
    InvalidCountsError,
    MissingKeyError,
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "edger"}, r"method='edger' is not known. Use one of: 'ttest', 'deseq2', 'wilcoxon'"),
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


def test_an_empty_sample_is_left_out_aloud(simulate):
    data = simulate(ONE_BATCH, n_genes=20, n_cells=15)
    counts = data.counts.toarray()
    counts[data.obs["donor"] == "d3"] = 0
    config = PseudobulkConfig(min_counts_per_sample=0)
    with pytest.warns(CellstillWarning, match="'d3' in 'treated' .*fewer than 1 counts"):
        result = pseudobulk_de(counts, data.obs, data.genes, sample_key="donor", config=config, **TREATED)
    assert result.n_samples == {"treated": 3, "control": 4}


def test_a_missing_batch_is_an_error_also_within_levels(one_batch):
    obs = one_batch.obs.assign(kind="a")
    obs["batch"] = obs["batch"].where(np.arange(len(obs)) != 7)
    with pytest.raises(InvalidArgumentError, match=r"batch_key='batch': obs\['batch'\] has missing values in 1 of"):
        pseudobulk_de(
            one_batch.counts, obs, one_batch.genes, sample_key="donor", batch_key="batch", within="kind", **TREATED
        )


def test_what_is_no_configuration_is_refused(one_batch):
    with pytest.raises(InvalidArgumentError, match="config='deseq2' is no PseudobulkConfig"):
        pseudobulk_de(one_batch.counts, one_batch.obs, one_batch.genes, sample_key="donor", config="deseq2", **TREATED)


def test_importing_de_is_light():
    code = (
        "import sys, cellstill.de; print(*[m for m in ('torch', 'scanpy', 'anndata', 'pydeseq2') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


@pytest.fixture(scope="module")
def kang_monocytes(real_data):
    adata = ad.read_h5ad(real_data("kang_pbmc.h5ad"))
    known = adata.obs["sample"] != "stim_unassigned"
    return adata[known & (adata.obs["cell_type"] == "CD14+ Monocytes")].copy()


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


def test_corrected_sums_equal_a_loop_over_cells(small):
    counts, obs = small
    rng = np.random.default_rng(0)
    ratios = np.exp(rng.normal(0, 0.5, counts.shape))
    codes = np.where(rng.random(len(obs)) < 0.1, -1, obs["donor"].cat.codes)
    codes = np.unique(codes, return_inverse=True)[1] - 1
    raw = np.stack([counts[codes == unit].sum(axis=0) for unit in range(3)])
    chunks = [(np.arange(start, min(start + 17, 101)), ratios[start : start + 17]) for start in range(0, 101, 17)]
    expected = np.zeros(raw.shape)
    for cell, unit in enumerate(codes):
        if unit >= 0:
            expected[unit] += counts[cell] * ratios[cell]
    expected *= raw.sum(axis=1, keepdims=True) / expected.sum(axis=1, keepdims=True)
    for form in (sp.csr_matrix(counts), counts):
        np.testing.assert_array_equal(corrected_sums(form, codes, raw, iter(chunks)), np.rint(expected))
    with pytest.raises(InvalidArgumentError, match=r"held cell \d+ 0 times"):
        corrected_sums(counts, codes, raw, chunks[1:])
    twice = [(np.append(rows, rows[:1]), np.vstack([ratio, ratio[:1]])) for rows, ratio in chunks]
    with pytest.raises(InvalidArgumentError, match=r"held cell \d+ 2 times"):
        corrected_sums(counts, codes, raw, twice)
    with pytest.raises(InvalidArgumentError, match="ratios have to be finite and positive"):
        corrected_sums(counts, codes, raw, [(rows, 0 * ratio) for rows, ratio in chunks])


def test_a_batch_effect_in_some_cells_only_is_undone_by_ratios(simulate):
    """The true ratio of the two batches for every second cell, which no term of the design can know."""
    data = simulate(TWO_BATCHES, n_genes=120, n_cells=60, share_de=0.2, seed=4)
    rng = np.random.default_rng(0)
    affected = (data.obs["batch"] == "b").to_numpy() & (np.arange(len(data.obs)) % 2 == 0)
    factor = np.exp(rng.normal(0, 0.8, 120))
    counts = data.counts.toarray()
    counts[affected] = rng.poisson(counts[affected] * factor)
    ratios = np.where(affected[:, None], 1 / factor, 1.0)
    config = PseudobulkConfig(expression="corrected")
    arguments = {"sample_key": "donor", **TREATED}
    found = pseudobulk_de(
        counts, data.obs, data.genes, **arguments, ratios=[(np.arange(len(counts)), ratios)], config=config
    )
    raw = pseudobulk_de(counts, data.obs, data.genes, **arguments)
    error = [np.abs(result.table["lfc"] - data.lfc).mean() for result in (found, raw)]
    assert error[0] < 0.6 * error[1]
    assert found.table["is_de"][data.lfc == 0].sum() <= 3


def test_corrected_expression_and_ratios_belong_together(one_batch):
    arguments = {"sample_key": "donor", **TREATED}
    with pytest.raises(InvalidArgumentError, match="expression='corrected' and no ratios: corrected counts come from"):
        pseudobulk_de(
            one_batch.counts,
            one_batch.obs,
            one_batch.genes,
            **arguments,
            config=PseudobulkConfig(expression="corrected"),
        )
    with pytest.raises(InvalidArgumentError, match="expression='raw' and ratios"):
        pseudobulk_de(one_batch.counts, one_batch.obs, one_batch.genes, **arguments, ratios=[])


def test_samples_of_few_counts_are_left_out_aloud(one_batch):
    counts = one_batch.counts.tolil()
    shallow = np.flatnonzero((one_batch.obs["donor"] == "d2").to_numpy())
    counts[shallow[3:]] = 0
    totals = np.asarray(counts.sum(axis=1)).ravel()
    limit = int(totals[shallow].sum()) + 1
    with pytest.warns(CellstillWarning, match=f"'d2' in 'control' .*fewer than {limit} counts"):
        result = pseudobulk_de(
            counts.tocsr(),
            one_batch.obs,
            one_batch.genes,
            sample_key="donor",
            config=PseudobulkConfig(min_counts_per_sample=limit),
            **TREATED,
        )
    assert "d2" not in result.units["donor"].tolist()
    assert result.left_out["reason"].tolist() == [f"fewer than {limit} counts"]
    without = pseudobulk_de(
        counts.tocsr()[(one_batch.obs["donor"] != "d2").to_numpy()],
        one_batch.obs[one_batch.obs["donor"] != "d2"],
        one_batch.genes,
        sample_key="donor",
        **TREATED,
    )
    pd.testing.assert_frame_equal(result.table, without.table)


@pytest.mark.parametrize(
    ("asked", "argument"),
    [
        ({"batch_key": "condition"}, "batch_key"),
        ({"config": PseudobulkConfig(covariate_keys=["condition"])}, "covariate_keys"),
    ],
    ids=["batch", "covariate"],
)
def test_the_groups_themselves_are_no_term_of_the_design(one_batch, asked, argument):
    with pytest.raises(InvalidArgumentError, match=f"{argument}='condition' is the groupby column, whose groups"):
        pseudobulk_de(one_batch.counts, one_batch.obs, one_batch.genes, sample_key="donor", **asked, **TREATED)
