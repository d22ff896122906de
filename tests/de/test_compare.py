from __future__ import annotations

from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cellstill.de import BayesianConfig, PseudobulkConfig, differential_expression, pseudobulk_de
from cellstill.errors import (
    CellstillWarning,
    GeneMismatchError,
    InvalidArgumentError,
    InvalidCountsError,
    MissingKeyError,
)
from cellstill.io.anndata import open_anndata

ASKED = {"groupby": "condition", "group1": "treated", "group2": "control", "sample_key": "donor"}
DONORS = [(f"d{i}", "treated" if i % 2 else "control", "ab"[i // 4]) for i in range(8)]


@pytest.fixture(scope="module")
def adata(simulate):
    """Counts in a layer, logarithms in X; two types of cells."""
    data = simulate(DONORS, n_genes=80, n_cells=24)
    adata = ad.AnnData(data.counts.log1p(), data.obs.copy(), pd.DataFrame(index=data.genes))
    adata.obs["type"] = pd.Categorical(np.random.default_rng(0).choice(["B", "T"], adata.n_obs))
    adata.layers["counts"] = data.counts
    adata.layers["csc"] = data.counts.tocsc()
    adata.layers["dense"] = data.counts.toarray()
    return adata


@pytest.fixture(scope="module")
def by_hand(adata):
    return pseudobulk_de(adata.layers["counts"], adata.obs, adata.var_names, batch_key="batch", **ASKED)


@pytest.mark.parametrize("layer", ["counts", "csc", "dense"])
@pytest.mark.parametrize("where", ["memory", "backed", "on_disk"])
def test_any_anndata_is_compared_as_its_counts_by_hand(adata, by_hand, tmp_path, layer, where):
    if where == "memory":
        result = differential_expression(adata, layer=layer, batch_key="batch", **ASKED)
    else:
        stored = ad.AnnData(adata.layers[layer], adata.obs, pd.DataFrame(index=adata.var_names))
        stored.write_h5ad(tmp_path / "x.h5ad")
        if where == "backed":
            result = differential_expression(ad.read_h5ad(tmp_path / "x.h5ad", backed="r"), batch_key="batch", **ASKED)
        else:
            with open_anndata(tmp_path / "x.h5ad") as file:
                result = differential_expression(file.to_adata(), batch_key="batch", **ASKED)
    pd.testing.assert_frame_equal(result.table, by_hand.table)
    assert result.design == by_hand.design == "~ batch + condition"


def test_the_rest_is_all_other_cells(adata):
    how = PseudobulkConfig(min_cells_per_sample=2)
    result = differential_expression(adata, groupby="type", group1="B", sample_key="donor", layer="counts", how=how)
    named = differential_expression(
        adata, groupby="type", group1="B", group2="T", sample_key="donor", layer="counts", how=how
    )
    assert tuple(result.contrast) == ("type", "B", "rest")
    pd.testing.assert_frame_equal(result.table, named.table)
    assert set(adata.obs["type"]) == {"B", "T"}


def test_inside_levels_each_is_compared_alone(adata):
    how = PseudobulkConfig(min_cells_per_sample=2, min_total_count=1)
    result = differential_expression(adata, layer="counts", batch_key="batch", within="type", how=how, **ASKED)
    assert result.within == "type"
    for level in "BT":
        alone = adata[adata.obs["type"] == level]
        expected = differential_expression(alone, layer="counts", batch_key="batch", how=how, **ASKED)
        pd.testing.assert_frame_equal(result[level].table, expected.table)
        assert result[level].n_cells == expected.n_cells


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {},
            InvalidCountsError,
            "adata.X holds values that are not integers: no raw counts.*layer='counts', layer='csc', layer='dense'",
        ),
        ({"layer": "raw"}, MissingKeyError, "layer='raw' is not in adata.layers"),
        ({"layer": "counts", "how": BayesianConfig()}, InvalidArgumentError, "needs the posterior of a trained model"),
        ({"layer": "counts", "sample_key": None}, InvalidArgumentError, "sample_key is missing"),
        ({"layer": "counts", "within": "donor"}, InvalidArgumentError, "within and sample_key are both 'donor'"),
        ({"layer": "counts", "within": "condition"}, InvalidArgumentError, "within and groupby are both"),
        ({"layer": "counts", "within": "kind"}, MissingKeyError, "within='kind' is not in obs"),
        ({"layer": "counts", "group1": "drug"}, InvalidArgumentError, "group1='drug' is not known"),
        ({"layer": "counts", "within": "type", "group1": "drug"}, InvalidArgumentError, "group1='drug' is not known"),
    ],
    ids=[
        "logarithms",
        "no_layer",
        "bayesian",
        "no_samples",
        "within_samples",
        "within_groups",
        "no_levels",
        "no_group",
        "no_group_in_any_level",
    ],
)
def test_bad_input_is_named(adata, settings, error, message):
    with pytest.raises(error, match=message):
        differential_expression(adata, **{**ASKED, **settings})


def test_fractions_anywhere_are_refused(adata):
    counts = np.tile(adata.layers["dense"], (2, 1))
    counts[300, 7] += 0.5
    obs = pd.concat([adata.obs] * 2).set_axis([f"c{i}" for i in range(len(counts))])
    bad = ad.AnnData(sp.csr_matrix(counts), obs, pd.DataFrame(index=adata.var_names))
    with pytest.raises(InvalidCountsError, match="in row 300: pseudobulk needs raw counts"):
        differential_expression(bad, **ASKED)


def test_one_gene_twice_and_several_modalities_are_refused(adata):
    twice = adata.copy()
    twice.var_names = ["a", *twice.var_names[1:-1], "a"]
    with pytest.raises(GeneMismatchError, match="1 duplicated gene names"):
        differential_expression(twice, layer="counts", **ASKED)
    with pytest.raises(InvalidArgumentError, match="adata is a MuData. Give one modality, of: 'rna'"):
        differential_expression(SimpleNamespace(mod={"rna": adata}), **ASKED)


def test_interferon_genes_are_found_in_the_types_of_real_cells(real_data):
    adata = ad.read_h5ad(real_data("kang_pbmc.h5ad"), backed="r")
    asked = {"groupby": "condition", "group1": "stim", "group2": "ctrl", "sample_key": "donor"}
    with pytest.warns(CellstillWarning, match="Not compared, .*'Megakaryocytes'") as caught:
        result = differential_expression(adata, within="cell_type", **asked)
    assert len(caught) == 1
    assert {"B cells", "CD14+ Monocytes", "CD4 T cells"} <= set(result.results)
    assert "Megakaryocytes" in set(result.skipped["cell_type"])
    for level in ("CD14+ Monocytes", "CD4 T cells"):
        table = result[level].table.set_index("gene")
        assert (table.loc[["ISG15", "IFI6", "IFIT3", "MX1"], "direction"] == "up").all()
        assert result[level].design == "~ donor + condition"
    assert result.table["cell_type"].nunique() == len(result.results)
    adata.file.close()


def test_first_cells_without_counts_are_no_reason_to_refuse(adata, by_hand):
    """Sorted cells: nothing is known of a matrix whose first rows are empty."""
    counts = sp.vstack([sp.csr_matrix((300, adata.n_vars)), adata.layers["counts"]]).tocsr()
    obs = pd.concat([adata.obs.iloc[:1]] * 300 + [adata.obs]).set_axis([f"c{i}" for i in range(300 + adata.n_obs)])
    late = ad.AnnData(counts, obs, pd.DataFrame(index=adata.var_names))
    late.layers["other"] = counts + counts
    found = differential_expression(late, batch_key="batch", **ASKED)
    np.testing.assert_allclose(found.table["lfc"], by_hand.table["lfc"])


def test_counts_in_raw_are_pointed_at(adata):
    kept = ad.AnnData(adata.layers["counts"], adata.obs, pd.DataFrame(index=adata.var_names))
    kept.raw = kept.copy()
    kept.X = kept.X.log1p()
    with pytest.raises(InvalidCountsError, match=r"adata.raw looks like counts: give adata.raw.to_adata\(\)"):
        differential_expression(kept, **ASKED)
