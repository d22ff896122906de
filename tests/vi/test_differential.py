"""Differential expression of both models: known fold changes are found, what does not differ is not called."""

from __future__ import annotations

import warnings

import mudata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from cellstill import AmbientRegularizedSCVI, RegularizedMultimodalVI
from cellstill.data import simulate_counts
from cellstill.de import BayesianConfig, PseudobulkConfig, pseudobulk_de
from cellstill.errors import CellstillWarning, InvalidArgumentError, MissingKeyError
from cellstill.vi.correction import corrected_ratios
from cellstill.vi.draws import posterior_draws

pytestmark = pytest.mark.filterwarnings("ignore:From 0.4:FutureWarning")

BOTH = pytest.mark.parametrize(
    "how", [PseudobulkConfig(), BayesianConfig(n_samples=20)], ids=["pseudobulk", "bayesian"]
)


def truth(simulated):
    """True log2 fold changes between the types, and the genes that have one."""
    log_mean = simulated.varm["cell_type_log_mean"]
    var = simulated.var
    lfc = ((log_mean["type_0"] - log_mean["type_1"]) / np.log(2)).to_numpy()
    return lfc, (var["is_marker_type_0"] | var["is_marker_type_1"]).to_numpy()


def expressed(simulated):
    return np.asarray(simulated.X.mean(axis=0)).ravel() > 1


@BOTH
def test_known_fold_changes_are_recovered(trained, two_types, how):
    result = trained.differential_expression("cell_type", "type_0", "type_1", "donor", how)
    table = result.table
    assert table["gene"].tolist() == two_types.var_names.tolist()
    assert result.design == "~ donor + cell_type"
    found = table["lfc" if "lfc" in table else "lfc_mean"].to_numpy()
    true, differs = truth(two_types)
    shown = differs & expressed(two_types)
    fit = stats.linregress(true[shown], found[shown])
    assert fit.rvalue > 0.98
    assert fit.slope == pytest.approx(1, abs=0.1)
    assert stats.spearmanr(true[shown], found[shown]).statistic > 0.98
    called = table["is_de"].to_numpy()
    assert called[shown & (np.abs(true) > 0.7)].all()
    assert (called & ~differs).sum() <= 0.05 * called.sum() + 1
    if "ci_low" in table:
        # Draws of z alone, which take the decoder for known, cover 6 %.
        assert ((table["ci_low"] < true) & (true < table["ci_high"])).mean() > 0.8


@BOTH
def test_nothing_is_called_where_nothing_differs(trained, how):
    result = trained.differential_expression("condition", "treat", "ctrl", "donor", how)
    assert result.design == "~ batch + condition"
    assert result.table["is_de"].sum() <= 1
    assert result.n_samples == {"treat": 4, "ctrl": 4}


@pytest.mark.parametrize("batch_size", [4, 512])
def test_draws_are_native_expression_and_expected_counts_at_draws_of_z(trained, batch_size):
    wanted = np.array([3, 8, 21, 40, 41, 42, 100, 101, 300])
    is_first = np.arange(9) % 2 == 0
    how = BayesianConfig(n_samples=2, batch_size=batch_size, seed=5)
    targets = [{"code/batch": 0}, {"code/batch": 1}]
    module = trained.module
    mean, variance = trained.get_latent_representation(indices=wanted, return_dist=True)
    counted = {"indices": wanted, "library_size": "latent", "return_numpy": True}
    native = trained.get_normalized_expression(**counted)
    whole = trained.get_normalized_expression(**counted, include_background=True)
    own_batch = trained._cells().codes["batch"][wanted]
    theta = module.modality("rna").dispersion.mean.detach().exp().numpy()[own_batch]
    each = native**2 / (whole + whole**2 / theta)
    information = np.stack([each[is_first].sum(axis=0), each[~is_first].sum(axis=0)])
    size = trained.get_latent_library_size(indices=wanted)
    rng = np.random.default_rng(5)
    for draw in posterior_draws(module, "rna", trained._cells(), wanted, is_first, targets, how):
        factors = np.exp(rng.standard_normal(information.shape) / np.sqrt(1 + information))
        rows, rates, counts = (np.concatenate(part) for part in zip(*draw, strict=True))
        np.testing.assert_array_equal(rows, wanted)
        z = torch.from_numpy(mean + np.sqrt(variance) * rng.standard_normal(mean.shape, dtype=np.float32))
        batches = [torch.full((len(wanted),), code) for code in (0, 1)] + [torch.from_numpy(own_batch).long()]
        with torch.no_grad():
            *decoded, own = [module.modality("rna").native(z, {"code/batch": batch}).numpy() for batch in batches]
        moved = np.where(is_first[:, None], *factors)
        expected = np.mean(decoded, axis=0) * moved
        np.testing.assert_allclose(rates, expected / expected.sum(axis=1, keepdims=True), rtol=1e-3)
        np.testing.assert_allclose(counts, own * moved * np.reshape(size, (-1, 1)) + whole - native, rtol=1e-3)


def test_cells_may_be_given_by_position_or_mask(trained):
    obs = trained.adata.obs
    first, second = ((obs["cell_type"] == kind).to_numpy() for kind in ("type_0", "type_1"))
    how = BayesianConfig(n_samples=2)
    by_name = trained.differential_expression("cell_type", "type_0", "type_1", "donor", how)
    by_mask = trained.differential_expression(idx1=first, idx2=np.flatnonzero(second), sample_key="donor", how=how)
    against_rest = trained.differential_expression(idx1=first, sample_key="donor", how=how)
    rest = trained.differential_expression("cell_type", "type_0", sample_key="donor", how=how)
    for other in (by_mask, against_rest, rest):
        np.testing.assert_allclose(other.table["lfc_mean"], by_name.table["lfc_mean"], atol=1e-6)
    assert tuple(by_mask.contrast) == ("idx", "idx1", "idx2")
    assert tuple(rest.contrast) == ("cell_type", "type_0", "rest")


def test_decoding_as_one_batch_can_be_asked_for_in_two_ways(trained):
    def fold_changes(target=None, **settings):
        how = BayesianConfig(n_samples=2, target_batch=target)
        return trained.differential_expression("cell_type", "type_0", "type_1", "donor", how, **settings).table

    one, other = fold_changes("batch_1"), fold_changes(transform_batch={"batch": "batch_1"})
    np.testing.assert_array_equal(one["lfc_mean"], other["lfc_mean"])
    average, both = fold_changes(), fold_changes(transform_batch=["batch_0", "batch_1"])
    np.testing.assert_array_equal(average["lfc_mean"], both["lfc_mean"])
    assert not np.allclose(one["lfc_mean"], average["lfc_mean"], atol=1e-4)


def test_a_batch_named_twice_counts_once(trained):
    once, twice = (
        trained.get_normalized_expression(indices=np.arange(20), transform_batch=names, return_numpy=True)
        for names in (["batch_0", "batch_1"], ["batch_0", "batch_1", "batch_1"])
    )
    np.testing.assert_array_equal(once, twice)


def test_batch_terms_can_be_chosen(trained):
    how = BayesianConfig(n_samples=2)
    none = trained.differential_expression("condition", "treat", "ctrl", "donor", how, batch_keys=[])
    assert none.design == "~ condition"
    named = trained.differential_expression("condition", "treat", "ctrl", "donor", how, batch_keys="batch")
    assert named.design == "~ batch + condition"


@BOTH
def test_inside_cell_types_each_is_compared_alone(trained, how):
    asked = {"groupby": "condition", "group1": "treat", "group2": "ctrl", "sample_key": "donor", "how": how}
    result = trained.differential_expression(within="cell_type", **asked)
    assert list(result.results) == ["type_0", "type_1"]
    for level in result:
        own = trained.adata[trained.adata.obs["cell_type"] == level].copy()
        alone = trained.differential_expression(adata=own, **asked)
        pd.testing.assert_frame_equal(result[level].table, alone.table)
        assert result[level].design == alone.design == "~ batch + condition"
        assert sum(result[level].n_cells.values()) == own.n_obs


@BOTH
def test_inside_levels_batches_are_in_the_design_where_they_span_samples(trained, how):
    adata = trained.adata.copy()
    donors, batch = (adata.obs[key].astype(str) for key in ("donor", "batch"))
    several = donors.isin([sorted(set(donors[batch == name]))[0] for name in sorted(set(batch))])
    # Cells of "few" are those of a single donor in each batch; in them the batch only tells donors apart.
    adata.obs["kind"] = np.where(several & (np.arange(adata.n_obs) % 2 == 0), "few", "many")
    adata.obs["state"] = np.where(np.random.default_rng(0).random(adata.n_obs) < 0.5, "a", "b")
    asked = {"groupby": "state", "group1": "a", "sample_key": "donor", "how": how, "adata": adata}
    result = trained.differential_expression(within="kind", **asked)
    assert {level: found.design for level, found in result.results.items()} == {
        "few": "~ donor + state",
        "many": "~ donor + state",
    }
    assert set(result["few"].units["batch"]) == {"one per sample"}
    assert set(result["many"].units["batch"]) == set(batch)


@pytest.mark.parametrize("within", [None, "cell_type"])
def test_corrected_counts_are_those_of_the_models_ratios(trained, within):
    asked = {"groupby": "condition", "group1": "treat", "group2": "ctrl", "sample_key": "donor"}
    how = PseudobulkConfig(expression="corrected")
    found = trained.differential_expression(how=how, within=within, **asked)
    cells, adata = trained._cells(), trained.adata
    targets = [{"code/batch": 0}, {"code/batch": 1}]
    expected = pseudobulk_de(
        adata.X,
        adata.obs,
        adata.var_names,
        batch_key="batch",
        ratios=corrected_ratios(trained.module, "rna", cells, targets),
        within=within,
        config=how,
        **asked,
    )
    pd.testing.assert_frame_equal(found.table, expected.table)
    raw = trained.differential_expression(within=within, **asked)
    assert not np.allclose(found.table["lfc"], raw.table["lfc"], atol=1e-3, equal_nan=True)
    one = trained.differential_expression(how=how, within=within, transform_batch="batch_1", **asked)
    assert not np.allclose(found.table["lfc"], one.table["lfc"], atol=1e-3, equal_nan=True)


def test_without_samples_the_posterior_is_compared_with_a_warning(trained):
    how = BayesianConfig(n_samples=2)
    with pytest.warns(CellstillWarning, match="replicate") as caught:
        result = trained.differential_expression("cell_type", "type_0", how=how)
    assert len(caught) == 1
    assert np.isfinite(result.table["lfc_mean"]).all()


def test_without_samples_batches_that_are_the_groups_are_left_out_with_a_warning(two_types):
    """As where ``batch_key`` names samples, each of which has one condition."""
    adata = two_types[:, :20].copy()
    adata.obs["sample"] = adata.obs["donor"].astype(str) + "_" + adata.obs["condition"].astype(str)
    AmbientRegularizedSCVI.setup_anndata(adata, batch_key="sample", nn_conditioning_covariate_keys=["batch"])
    model = AmbientRegularizedSCVI(adata, n_hidden=8, n_latent=2, background=False).train(max_epochs=1)
    asked = {"groupby": "condition", "group1": "treat", "group2": "ctrl", "how": BayesianConfig(n_samples=2)}
    with pytest.warns(CellstillWarning) as caught:
        result = model.differential_expression(**asked)
    said = [str(one.message) for one in caught]
    assert [text.split(" ")[0] for text in said] == ["'sample'", "sample_key=None"]
    assert result.design == "~ batch + condition"
    with pytest.warns(CellstillWarning, match="sample_key=None"):
        named = model.differential_expression(**asked, batch_keys=["batch"])
    pd.testing.assert_frame_equal(result.table, named.table)
    with (
        pytest.warns(CellstillWarning, match="sample_key=None"),
        pytest.raises(InvalidArgumentError, match=r"(?s)^sample_key=None: .*agree in 'sample'.*or batch_keys=\[\]"),
    ):
        model.differential_expression(**asked, batch_keys="sample")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"groupby": "cell_type", "group1": "type_0"}, InvalidArgumentError, "sample_key is missing"),
        (
            {"groupby": "cell_type", "group1": "type_0", "sample_key": "donor", "within": "donor"},
            InvalidArgumentError,
            "within and sample_key are both",
        ),
        (
            {"groupby": "cell_type", "group1": "type_0", "sample_key": "donor", "within": "cell_type"},
            InvalidArgumentError,
            "within and groupby are both",
        ),
        (
            {"groupby": "cell_type", "group1": "type_0", "sample_key": "donor", "within": "kind"},
            MissingKeyError,
            "within='kind'",
        ),
        ({"sample_key": "donor"}, InvalidArgumentError, "in one way"),
        ({"groupby": "cell_type", "idx1": [0], "sample_key": "donor"}, InvalidArgumentError, "in one way"),
        ({"groupby": "cell_type", "sample_key": "donor"}, InvalidArgumentError, "group1 is missing"),
        ({"groupby": "cell_type", "group1": "type_9", "sample_key": "donor"}, InvalidArgumentError, "type_0"),
        ({"groupby": "kind", "group1": "a", "sample_key": "donor"}, MissingKeyError, "groupby='kind'"),
        ({"idx1": [0, 1], "idx2": [1, 2], "sample_key": "donor"}, InvalidArgumentError, "1 cells in common"),
        (
            {"groupby": "condition", "group1": "treat", "group2": "ctrl", "sample_key": "donor", "modality": "atac"},
            InvalidArgumentError,
            "modality='atac'",
        ),
    ],
    ids=[
        "no_samples",
        "within_samples",
        "within_groups",
        "no_levels",
        "no_cells",
        "cells_twice",
        "no_group",
        "unknown_group",
        "no_column",
        "overlap",
        "modality",
    ],
)
def test_bad_input_is_named(trained, settings, error, message):
    with pytest.raises(error, match=message):
        trained.differential_expression(**settings)


def test_a_column_of_samples_is_no_batch_term(two_types):
    """Where every sample is its own batch, as is common, the samples stand for the batches."""
    adata = two_types[:, :20].copy()
    adata.obs["lane"] = adata.obs["donor"].astype(str) + "_lane"
    AmbientRegularizedSCVI.setup_anndata(adata, batch_key="lane")
    model = AmbientRegularizedSCVI(adata, n_hidden=8, n_latent=2, background=False).train(max_epochs=1)
    result = model.differential_expression("condition", "treat", "ctrl", "donor")
    assert result.design == "~ condition"


@BOTH
def test_each_modality_is_compared_among_the_cells_that_have_it(how):
    rna = simulate_counts(n_obs=300, n_vars=40, n_batches=1, n_cell_types=2, n_donors_per_group=4, seed=1)
    second = simulate_counts(n_obs=300, n_vars=30, n_batches=1, n_cell_types=2, n_donors_per_group=4, seed=2)
    second.var_names = [f"p{i}" for i in range(30)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        mdata = mudata.MuData({"rna": rna, "protein": second[:200].copy()})
    mdata.obs["condition"], mdata.obs["donor"] = rna.obs["condition"].array, rna.obs["donor"].array
    RegularizedMultimodalVI.setup_mudata(mdata)
    model = RegularizedMultimodalVI(mdata, n_hidden=8, n_latent=2, background=False).train(max_epochs=2)
    result = model.differential_expression("condition", "treat", "ctrl", "donor", how, modality="protein")
    assert len(result.table) == 30
    assert sum(result.n_cells.values()) == 200
    with pytest.raises(InvalidArgumentError, match="modality has to be named"):
        model.differential_expression("condition", "treat", "ctrl", "donor", how)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = mudata.MuData({"rna": rna})
    alone.obs["condition"], alone.obs["donor"] = rna.obs["condition"].array, rna.obs["donor"].array
    with pytest.raises(InvalidArgumentError, match="modality='protein': no cell has it. Cells have: 'rna'"):
        model.differential_expression("condition", "treat", "ctrl", "donor", how, adata=alone, modality="protein")


def test_a_missing_batch_is_no_batch_of_its_own(trained):
    adata = trained.adata.copy()
    adata.obs["lane"] = np.where(np.arange(adata.n_obs) % 2, "a", "b").astype(object)
    adata.obs.loc[adata.obs_names[3], "lane"] = np.nan
    with pytest.raises(InvalidArgumentError, match=r"batch_keys: adata.obs\['lane'\] is missing for 1 of 800 cells"):
        trained.differential_expression(
            "condition", "treat", "ctrl", "donor", PseudobulkConfig(), adata=adata, batch_keys=["lane"]
        )


def test_ranks_take_one_batch_column(trained):
    adata = trained.adata.copy()
    adata.obs["lane"] = np.where(pd.factorize(adata.obs["donor"])[0] % 4 < 2, "a", "b")
    with pytest.raises(
        InvalidArgumentError, match=r"'wilcoxon' ranks samples within one batch column.*'batch', 'lane'"
    ):
        trained.differential_expression(
            "condition",
            "treat",
            "ctrl",
            "donor",
            PseudobulkConfig(method="wilcoxon"),
            adata=adata,
            batch_keys=["batch", "lane"],
        )


@pytest.mark.parametrize(
    "how", [PseudobulkConfig(expression="corrected"), BayesianConfig(n_samples=3)], ids=["corrected", "bayesian"]
)
def test_cells_are_decoded_as_batches_that_both_groups_were_measured_in(trained, how):
    adata = trained.adata.copy()
    condition = adata.obs["condition"].astype(str)
    adata.obs["arm"] = np.where(adata.obs["batch"] == "batch_0", "treat", condition)
    asked = {"adata": adata, "how": how}
    found = trained.differential_expression("arm", "treat", "ctrl", "donor", **asked)
    named = trained.differential_expression("arm", "treat", "ctrl", "donor", **asked, transform_batch="batch_1")
    pd.testing.assert_frame_equal(found.table, named.table)
    every = trained.differential_expression(
        "arm", "treat", "ctrl", "donor", **asked, transform_batch=["batch_0", "batch_1"]
    )
    column = "lfc" if "lfc" in found.table else "lfc_mean"
    assert not np.allclose(every.table[column], found.table[column], equal_nan=True)
