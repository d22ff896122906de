from __future__ import annotations

import os

import numpy as np
import pandas as pd
import pytest

from cellstill import Distiller
from cellstill.errors import (
    CellstillWarning,
    GeneMismatchError,
    InvalidArgumentError,
    InvalidCountsError,
    MissingKeyError,
    StoreError,
)
from cellstill.teachers import HarmonyTeacher


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    model.save(path)
    return path


def test_a_saved_model_is_the_same_model(model, folder, simulated):
    again = Distiller.load(folder, simulated.copy())
    np.testing.assert_array_equal(again.latent.student, model.latent.student)
    np.testing.assert_array_equal(again.latent.teacher, model.latent.teacher)
    np.testing.assert_array_equal(again.corrected_expression("batch_1"), model.corrected_expression("batch_1"))
    assert again.teacher == model.teacher == HarmonyTeacher(max_iter=10)
    assert again.batch_names == model.batch_names
    assert list(again.gene_names) == list(model.gene_names)
    assert again.get_teacher_agreement("test") == model.get_teacher_agreement("test")
    for phase, frame in model.history.items():
        pd.testing.assert_frame_equal(again.history[phase], frame, check_column_type=False, check_index_type=False)
    arguments = {"groupby": "condition", "group1": "treat", "group2": "ctrl", "sample_key": "donor"}
    pd.testing.assert_frame_equal(
        again.differential_expression(**arguments).table, model.differential_expression(**arguments).table
    )


def test_what_is_written_is_safetensors_and_json(folder):
    assert sorted(os.listdir(folder)) == ["model.json", "tensors.safetensors"]


def test_a_loaded_model_can_be_trained_and_saved_again(folder, simulated, tmp_path):
    model = Distiller.load(folder, simulated.copy())
    before = model.latent.student
    with pytest.warns(CellstillWarning, match="Harmony stopped at max_iter=10"):
        model.train(1, 1, accelerator="cpu", progress=False, patience=1)
    assert not np.array_equal(model.latent.student, before)
    model.save(tmp_path / "again")
    np.testing.assert_array_equal(
        Distiller.load(tmp_path / "again", simulated.copy()).latent.student, model.latent.student
    )


def test_without_data_it_is_ready_to_map_and_decode(model, folder, simulated):
    loaded = Distiller.load(folder)
    np.testing.assert_array_equal(loaded.latent.teacher, model.latent.teacher)
    np.testing.assert_array_equal(loaded.get_latent_representation(simulated.copy()), model.latent.student)
    np.testing.assert_array_equal(
        loaded.get_normalized_expression(simulated.copy(), return_numpy=True),
        model.get_normalized_expression(return_numpy=True),
    )
    assert loaded.map_query(simulated[:50].copy()).labels["label"].tolist()
    with pytest.raises(InvalidArgumentError, match=r"loaded without data. Load it with some"):
        loaded.corrected_expression()


def test_permuted_genes_and_cells_are_put_right(model, folder, simulated):
    rng = np.random.default_rng(0)
    cells, genes = rng.permutation(simulated.n_obs), rng.permutation(simulated.n_vars)
    permuted = Distiller.load(folder, simulated[cells][:, genes].copy())
    np.testing.assert_allclose(permuted.latent.student, model.latent.student[cells], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(permuted.latent.teacher, model.latent.teacher[cells])
    assert list(permuted.gene_names) == list(model.gene_names)
    permuted = Distiller.load(folder, simulated[:, genes].copy())
    np.testing.assert_array_equal(permuted.latent.student, model.latent.student)


def test_arrays_have_the_genes_in_the_order_of_their_data(model, folder, simulated, tmp_path):
    """They fit into layers, whichever order the model learned; names that are asked for are given as asked."""
    genes = np.random.default_rng(2).permutation(simulated.n_vars)
    permuted = Distiller.load(folder, simulated[:, genes].copy())
    wanted = model.corrected_expression()[:, genes]
    np.testing.assert_allclose(permuted.corrected_expression(), wanted, rtol=1e-5, atol=1e-5)
    written = permuted.corrected_expression(out=tmp_path / "corrected.zarr")
    np.testing.assert_allclose(written[:], wanted, rtol=1e-5, atol=1e-5)
    of_others = model.get_normalized_expression(simulated[:, genes].copy(), return_numpy=True)
    table = permuted.get_normalized_expression()
    assert table.columns.tolist() == simulated.var_names[genes].tolist()
    np.testing.assert_allclose(of_others, table, rtol=1e-5)
    np.testing.assert_allclose(table[simulated.var_names], model.get_normalized_expression(), rtol=1e-5)
    asked = simulated.var_names[[7, 3]].tolist()
    np.testing.assert_allclose(
        permuted.corrected_expression(genes=asked), model.corrected_expression(genes=asked), rtol=1e-5, atol=1e-5
    )
    missing = pytest.warns(CellstillWarning, match="5 of the model's 300 genes are missing")
    with missing, pytest.warns(CellstillWarning, match="lack 5 of the model's .* in the model's order"):
        found = model.get_normalized_expression(simulated[:, 5:].copy(), return_numpy=True)
    assert found.shape == simulated.shape


def test_missing_genes_warn_and_too_few_are_refused(model, folder, simulated):
    with pytest.warns(CellstillWarning, match="30 of the model's 300 genes are missing"):
        partly = Distiller.load(folder, simulated[:, 30:].copy())
    with pytest.warns(CellstillWarning, match="missing"):
        student = partly.latent.student
    similar = [np.corrcoef(a, b)[0, 1] for a, b in zip(student.T[:5], model.latent.student.T[:5], strict=True)]
    assert min(similar) > 0.9
    with pytest.raises(GeneMismatchError, match=r"Only 100 of the model's 300 genes \(33%\)"):
        Distiller.load(folder, simulated[:, :100].copy())


def test_data_that_do_not_fit_are_refused(folder, simulated):
    other = simulated.copy()
    other.obs["batch"] = other.obs["batch"].astype(str).replace("batch_2", "new")
    with pytest.raises(InvalidArgumentError, match=r"not seen: \['new'\].*map_query"):
        Distiller.load(folder, other)
    del other.obs["batch"]
    with pytest.raises(MissingKeyError, match="batch_key='batch'"):
        Distiller.load(folder, other)
    logged = simulated.copy()
    logged.X = np.log1p(logged.X)
    with pytest.raises(InvalidCountsError, match="not integers"):
        Distiller.load(folder, logged)


def test_codes_are_kept_when_a_batch_is_absent(model, folder, simulated):
    subset = simulated[(simulated.obs["batch"] != "batch_0").to_numpy()].copy()
    loaded = Distiller.load(folder, subset)
    assert loaded.batch_names == ["batch_0", "batch_1", "batch_2"]
    assert set(subset.obs["_scvi_batch"]) == {1, 2}
    positions = np.flatnonzero(simulated.obs["batch"] != "batch_0")
    np.testing.assert_allclose(
        loaded.get_normalized_expression(return_numpy=True),
        model.get_normalized_expression(indices=positions, return_numpy=True),
        rtol=1e-3,
        atol=1e-8,
    )
    with pytest.raises(InvalidArgumentError, match=r"latent\.teacher exists for the cells of training only; 1 of"):
        Distiller.load(folder, _renamed(subset)).latent.teacher  # noqa: B018


def test_an_existing_folder_is_not_overwritten_unasked(model, folder):
    with pytest.raises(StoreError, match="overwrite=True"):
        model.save(folder)


def _renamed(adata):
    adata = adata.copy()
    adata.obs_names = ["stranger", *adata.obs_names[1:]]
    return adata
