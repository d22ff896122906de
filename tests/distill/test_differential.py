"""Differential expression of a distiller: which cells and batches are compared; test_truth.py says how well."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from cellstill import Distiller
from cellstill.de import BayesianConfig, PseudobulkConfig, differential_expression, pseudobulk_de
from cellstill.distill.correction import corrected_ratios
from cellstill.errors import CellstillWarning, InvalidArgumentError, MissingKeyError

ASKED = {"groupby": "condition", "group1": "treat", "group2": "ctrl", "sample_key": "donor"}
ASKED_GROUPS = ("treat", "ctrl")
BOTH = pytest.mark.parametrize("how", [PseudobulkConfig(), BayesianConfig(n_samples=3)], ids=["pseudobulk", "bayesian"])


@pytest.fixture(scope="module")
def attach(model, tmp_path_factory):
    """The model with another column of annotation of its cells."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save(folder)

    def attach(**columns) -> Distiller:
        adata = model.adata.copy()
        for name, values in columns.items():
            adata.obs[name] = values
        return Distiller.load(folder, adata)

    return attach


@BOTH
def test_inside_cell_types_each_is_compared_alone(model, attach, how):
    result = model.differential_expression(**ASKED, within="cell_type", how=how)
    kinds, condition = (model.adata.obs[key].astype(str) for key in ("cell_type", "condition"))
    assert list(result.results) == sorted(set(kinds))
    for level in ("type_0", "type_2"):
        others = attach(condition=condition.where(kinds == level, "other"))
        alone = others.differential_expression(**ASKED, how=how)
        assert alone.design == result[level].design == "~ batch + condition"
        assert alone.n_cells == {group: int(((kinds == level) & (condition == group)).sum()) for group in ASKED_GROUPS}
        pd.testing.assert_frame_equal(result[level].table, alone.table)
        if isinstance(how, PseudobulkConfig):
            by_counts = differential_expression(model.adata[(kinds == level).to_numpy()], batch_key="batch", **ASKED)
            pd.testing.assert_frame_equal(by_counts.table, alone.table)


@BOTH
def test_without_a_second_group_the_rest_is_compared(model, attach, how):
    rest = model.differential_expression("cell_type", "type_1", sample_key="donor", how=how)
    assert tuple(rest.contrast) == ("cell_type", "type_1", "rest")
    kinds = model.adata.obs["cell_type"].astype(str)
    by_name = attach(cell_type=kinds.where(kinds == "type_1", "others"))
    named = by_name.differential_expression("cell_type", "type_1", "others", "donor", how)
    pd.testing.assert_frame_equal(rest.table, named.table)
    assert set(model.adata.obs["cell_type"]) == {f"type_{i}" for i in range(4)}


@pytest.mark.parametrize(
    "how",
    [PseudobulkConfig(expression="corrected"), BayesianConfig(n_samples=3)],
    ids=["corrected", "bayesian"],
)
def test_the_rest_of_a_covariate_of_the_model_is_decoded_as_it_is(model, how):
    rest = model.differential_expression("condition", "treat", sample_key="donor", how=how)
    named = model.differential_expression("condition", "treat", "ctrl", "donor", how)
    pd.testing.assert_frame_equal(rest.table, named.table)


def test_batches_of_one_sample_each_are_not_in_the_design(simulated):
    adata = simulated[:300, :40].copy()
    adata.obs["lane"] = adata.obs["donor"].astype(str) + "_lane"
    model = Distiller(adata, batch_key="lane", n_latent=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CellstillWarning)
        model.train(1, 1, accelerator="cpu", progress=False)
    how = PseudobulkConfig(min_cells_per_sample=5)
    assert model.differential_expression(**ASKED, how=how).design == "~ condition"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"sample_key": None}, InvalidArgumentError, "sample_key is missing"),
        ({"sample_key": "patient"}, MissingKeyError, "sample_key='patient' is not in obs"),
        ({"within": "donor"}, InvalidArgumentError, "within and sample_key are both 'donor'"),
        ({"within": "condition"}, InvalidArgumentError, "within and groupby are both 'condition'"),
        ({"within": "kind"}, MissingKeyError, "within='kind' is not in obs"),
        ({"groupby": "kind"}, MissingKeyError, "groupby='kind' is not in obs"),
        ({"group1": "drug"}, InvalidArgumentError, "group1='drug' is not known. Use one of: 'ctrl', 'treat'"),
        ({"how": BayesianConfig(target_batch="x")}, InvalidArgumentError, "target_batch='x' is not known"),
    ],
    ids=[
        "no_samples",
        "unknown_samples",
        "within_samples",
        "within_groups",
        "no_levels",
        "no_column",
        "no_group",
        "no_batch",
    ],
)
def test_bad_input_is_named(model, settings, error, message):
    with pytest.raises(error, match=message):
        model.differential_expression(**{**ASKED, **settings})


def test_without_samples_the_posterior_is_compared_with_a_warning(model):
    how = BayesianConfig(n_samples=2)
    with pytest.warns(CellstillWarning, match="replicate") as caught:
        result = model.differential_expression(**{**ASKED, "sample_key": None}, how=how)
    assert len(caught) == 1
    assert len(result.table) == model.adata.n_vars
    with pytest.warns(CellstillWarning, match="Comparisons within 'cell_type'.*\n.*replicate") as caught:
        result = model.differential_expression(**{**ASKED, "sample_key": None}, how=how, within="cell_type")
    assert len(caught) == 1
    assert len(result.results) == 4
    assert np.isfinite(result.table["lfc_mean"]).all()


def test_cells_are_decoded_as_batches_that_both_groups_were_measured_in(model, attach):
    """One batch has the first group only, another the second: decoded as these, cells would be extrapolated."""
    obs = model.adata.obs
    condition = obs["condition"].astype(str).to_numpy()
    condition = np.where(obs["batch"] == "batch_0", "treat", np.where(obs["batch"] == "batch_2", "ctrl", condition))
    nested = attach(arm=condition)
    asked = {**ASKED, "groupby": "arm"}
    how = BayesianConfig(n_samples=3)
    found = nested.differential_expression(**asked, how=how)
    named = nested.differential_expression(**asked, how=replace(how, target_batch="batch_1"))
    pd.testing.assert_frame_equal(found.table, named.table)
    every = nested.differential_expression(**asked, how=replace(how, target_batch=["batch_0", "batch_1", "batch_2"]))
    assert not np.allclose(every.table["lfc_mean"], found.table["lfc_mean"])

    corrected = nested.differential_expression(**asked, how=PseudobulkConfig(expression="corrected"))
    only = (obs["batch"] == "batch_1").to_numpy()
    fitted = nested._fit_result
    ratios = corrected_ratios(fitted, nested._cells(), [fitted.batch_codes["batch_1"]])
    expected = pseudobulk_de(
        model.adata.X,
        nested.adata.obs,
        model.adata.var_names,
        **asked,
        batch_key="batch",
        ratios=ratios,
        config=PseudobulkConfig(expression="corrected"),
    )
    pd.testing.assert_frame_equal(corrected.table, expected.table)
    for rows, ratio in corrected_ratios(fitted, nested._cells(), [fitted.batch_codes["batch_1"]]):
        np.testing.assert_allclose(ratio[only[rows]], 1, rtol=1e-5)
