"""How a distiller behaves: reproducible, indifferent to the form of its input, careful with bad input."""

from __future__ import annotations

import gc
import warnings
import weakref

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from cellstill import Distiller
from cellstill.data import simulate_counts
from cellstill.errors import (
    CellstillWarning,
    GeneMismatchError,
    InvalidArgumentError,
    InvalidCountsError,
    MissingKeyError,
    NotTrainedError,
)
from cellstill.teachers import HarmonyTeacher, IdentityTeacher, LatentTeacher

from .conftest import train


@pytest.fixture
def small():
    return simulate_counts(n_obs=300, n_vars=120, n_batches=2, n_cell_types=3, seed=3)


def quick(adata, **settings) -> Distiller:
    return train(adata, epochs=(2, 2), **{"teacher": IdentityTeacher(), "n_latent": 8, **settings})


def test_the_published_quick_start_runs_with_the_import_name_changed(tmp_path):
    adata = simulate_counts(n_obs=400, n_vars=150, seed=5)
    adata.obs = adata.obs.rename(columns={"donor": "sample"}).assign(
        condition=adata.obs["condition"].map({"ctrl": "control", "treat": "treatment"}),
        batch=adata.obs["batch"].map(lambda name: name.replace("batch_", "donor_")),
    )
    path = tmp_path / "model"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Harmony stopped at max_iter", category=CellstillWarning)
        from cellstill import Distiller
        from cellstill.de import BayesianConfig, PseudobulkConfig
        from cellstill.teachers import HarmonyTeacher

        model = Distiller(
            adata, batch_key="batch", teacher=HarmonyTeacher(theta=2.0), n_latent=50, use_batch_conditioning=True
        )
        model.train(n_epochs_encoder=100, n_epochs_decoder=100, lr=1e-3)
        assert model.latent.student.shape == model.latent.teacher.shape == (400, 50)
        assert list(model.gene_names) == list(adata.var_names)
        corrected = model.corrected_expression(target_batch="donor_2")
        arguments = {"groupby": "condition", "group1": "treatment", "group2": "control", "sample_key": "sample"}
        table = model.differential_expression(**arguments, how=PseudobulkConfig(method="deseq2")).table
        assert len(table) == 150
        assert len(model.differential_expression(**arguments, how=BayesianConfig(n_samples=5)).table) == 150
        model.save(path)
        again = Distiller.load(path, adata)
    np.testing.assert_array_equal(again.corrected_expression(target_batch="donor_2"), corrected)


def test_two_runs_with_one_seed_agree_bit_for_bit_and_another_seed_differs(small):
    def run(seed: int):
        model = train(small.copy(), epochs=(3, 3), n_latent=8, seed=seed)
        return model.latent.student, model.corrected_expression(), model.history["decoder"]["train_loss"].to_numpy()

    first, again, other = run(0), run(0), run(1)
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


def test_training_does_not_depend_on_or_touch_global_random_state(small):
    import torch

    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    first = quick(small.copy()).latent.student
    torch.manual_seed(2)
    expected = torch.rand(2)
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    second = quick(small.copy()).latent.student
    torch.testing.assert_close(torch.rand(2), expected)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    "form",
    [sp.csc_matrix, sp.csr_array, sp.csc_array, lambda x: x.toarray(), lambda x: x.astype(np.int64)],
    ids=["csc", "csr_array", "csc_array", "dense", "int64"],
)
def test_the_form_of_the_counts_does_not_matter(small, form):
    expected = quick(small.copy())
    other = small.copy()
    other.X = form(other.X)
    before = other.X.copy()
    model = quick(other)
    np.testing.assert_array_equal(model.latent.student, expected.latent.student)
    np.testing.assert_array_equal(model.corrected_expression(), expected.corrected_expression())
    assert type(other.X) is type(before)
    assert np.abs(other.X - before).max() == 0, "the data are not touched"


def test_backed_data_give_the_same_model(small, tmp_path):
    small.write_h5ad(tmp_path / "counts.h5ad")
    model = quick(ad.read_h5ad(tmp_path / "counts.h5ad", backed="r"))
    np.testing.assert_array_equal(model.latent.student, quick(small).latent.student)


def test_setup_first_and_a_layer(small):
    expected = quick(small.copy()).latent.student
    small.layers["umi"] = small.X.copy()
    small.X = np.log1p(small.X)
    Distiller.setup_anndata(small, batch_key="batch", layer="umi", labels_key="cell_type")
    model = Distiller(small, teacher="identity", n_latent=8)
    model.train(2, 2, train_size=0.8, validation_size=0.1, accelerator="cpu", progress=False)
    np.testing.assert_array_equal(model.latent.student, expected)
    assert model.adata_manager.get_state_registry("batch").categorical_mapping.tolist() == ["batch_0", "batch_1"]


def test_a_layer_named_counts_is_found_with_a_warning(small):
    small.layers["counts"] = small.X.copy()
    small.X = np.log1p(small.X)
    with pytest.warns(CellstillWarning, match=r"adata\.layers\['counts'\] is used"):
        model = Distiller(small, batch_key="batch")
    assert model.registry["setup_args"]["layer"] == "counts"


def test_getters_stream_to_arrays_and_disk_in_the_order_asked_for(model, tmp_path):
    whole = model.corrected_expression()
    indices = np.array([700, 3, 1499, 3])
    np.testing.assert_allclose(model.corrected_expression(indices=indices), whole[indices], rtol=1e-5)
    np.testing.assert_allclose(
        model.get_latent_representation(indices=indices), model.latent.student[indices], rtol=1e-4, atol=1e-5
    )
    genes = model.gene_names[[200, 4]].tolist()
    np.testing.assert_allclose(model.corrected_expression(genes=genes), whole[:, [200, 4]], rtol=1e-6)
    mine = np.empty(whole.shape, dtype=np.float32)
    assert model.corrected_expression(out=mine, batch_size=64) is mine
    np.testing.assert_allclose(mine, whole, rtol=1e-5)
    model.corrected_expression(out=tmp_path / "corrected.zarr")
    np.testing.assert_array_equal(zarr.open(tmp_path / "corrected.zarr", mode="r")[:], whole)
    frame = model.get_normalized_expression(gene_list=genes)
    assert list(frame.columns) == genes
    assert frame.index.equals(model.adata.obs_names)


def test_a_cells_own_batch_is_the_default(model, simulated):
    own = model.get_normalized_expression(return_numpy=True)
    for batch in model.batch_names:
        cells = np.flatnonzero(simulated.obs["batch"] == batch)
        decoded = model.get_normalized_expression(indices=cells, transform_batch=batch, return_numpy=True)
        np.testing.assert_allclose(own[cells], decoded, rtol=1e-4, atol=1e-9)


def test_permuted_genes_give_identical_results(model, simulated):
    order = np.random.default_rng(0).permutation(simulated.n_vars)
    permuted = simulated[:, order].copy()
    np.testing.assert_array_equal(model.get_latent_representation(permuted), model.latent.student)
    np.testing.assert_array_equal(
        model.get_normalized_expression(permuted, return_numpy=True),
        model.get_normalized_expression(return_numpy=True)[:, order],
    )


def test_without_batch_conditioning_the_decoder_does_not_know_the_batch(small):
    model = quick(small, use_batch_conditioning=False)
    np.testing.assert_array_equal(model.corrected_expression("batch_0"), model.corrected_expression("batch_1"))


def test_a_student_of_any_embedding_learns_what_is_not_linear(simulated):
    adata = simulated.copy()
    pca = quick(adata, n_latent=12).latent.teacher
    a, b, c = (pca[:, :3] / pca[:, :3].std(axis=0)).T
    adata.obsm["X_other"] = np.c_[a * b, a**2, np.tanh(2 * c), b + 40, 100 * c].astype(np.float32)
    model = train(adata, epochs=(60, 1), teacher=LatentTeacher("X_other"))
    np.testing.assert_array_equal(model.latent.teacher, adata.obsm["X_other"])
    target = adata.obsm["X_other"]
    residual = np.linalg.lstsq(np.c_[pca, np.ones(1500)], target, rcond=None)[1]
    linear = np.mean(1 - residual / np.square(target - target.mean(axis=0)).sum(axis=0))
    assert linear < 0.75
    assert model.get_teacher_agreement("test") > 0.93


def test_unused_categories_and_integer_batches_are_fine(small):
    expected = quick(small.copy())
    small.obs["batch"] = (
        small.obs["batch"].cat.add_categories(["empty"]).cat.reorder_categories(["empty", "batch_0", "batch_1"])
    )
    model = quick(small)
    assert model.batch_names == ["batch_0", "batch_1"]
    np.testing.assert_array_equal(model.corrected_expression(), expected.corrected_expression())
    with pytest.raises(InvalidArgumentError, match=r"target_batch='empty' is not known.*'batch_0', 'batch_1'"):
        model.corrected_expression("empty")
    small.obs["batch"] = small.obs["batch"].map({"batch_0": 0, "batch_1": 1}).astype(int)
    model = quick(small)
    assert model.batch_names == ["0", "1"]
    np.testing.assert_array_equal(model.corrected_expression(), expected.corrected_expression())


def test_confounded_covariates_warn_with_the_table(small):
    small.obs["site"] = small.obs["batch"].map({"batch_0": "here", "batch_1": "there"}).astype(str)
    with pytest.warns(CellstillWarning, match=r"'batch'.*'site' cannot be told apart(.|\n)*there"):
        Distiller(small, batch_key="batch", covariate_keys=["site"])


def test_batches_of_different_depth_point_to_pearson_residuals(small):
    rng = np.random.default_rng(0)
    shallow = (small.obs["batch"] == "batch_1").to_numpy()
    counts = small.X.toarray().astype(int)
    counts[shallow] = rng.binomial(counts[shallow], 0.3)
    counts[:, 0] += 1
    small.X = sp.csr_matrix(counts.astype(np.float32))
    with pytest.warns(CellstillWarning, match=r"differ 3\.\d-fold between batches.*pca_method='pearson_residuals'"):
        quick(small)
    quick(small, pca_method="pearson_residuals")


def test_history_has_both_phases(model):
    assert set(model.history) == {"encoder", "decoder"}
    for frame in model.history.values():
        assert list(frame.columns) == ["train_loss", "validation_loss"]
        assert np.isfinite(frame.to_numpy()).all()
        assert frame["validation_loss"].iloc[-1] < frame["validation_loss"].iloc[0]


def test_nothing_keeps_the_data_alive(small):
    adata = small.copy()
    model = quick(adata)
    alive, ident = weakref.ref(adata), model.id
    del adata, model
    gc.collect()
    assert alive() is None
    assert ident not in Distiller._per_instance_manager_store


def log_normalised(adata):
    adata.X = np.log1p(adata.X)


def negative(adata):
    adata.X.data[0] = -1


def not_finite(adata):
    adata.X.data[0] = np.nan


def empty_cell(adata):
    adata.X = sp.csr_matrix(adata.X.multiply((np.arange(adata.n_obs) != 7)[:, None]))


def nan_batch(adata):
    adata.obs["batch"] = adata.obs["batch"].astype(object)
    adata.obs.iloc[4, adata.obs.columns.get_loc("batch")] = np.nan


def one_batch(adata):
    adata.obs["batch"] = "only"


def duplicated_genes(adata):
    adata.var_names = ["gene_0", *adata.var_names[:-1]]


BAD = {
    "log_normalised": (log_normalised, {}, InvalidCountsError, "not integers.*bring raw counts"),
    "negative": (negative, {}, InvalidCountsError, "negative values"),
    "not_finite": (not_finite, {}, InvalidCountsError, "non-finite values"),
    "empty_cell": (empty_cell, {}, InvalidCountsError, r"without a single count.*filter_cells"),
    "missing_batch_key": (None, {"batch_key": "tech"}, MissingKeyError, r"batch_key='tech'.*adata\.obs has: 'batch'"),
    "missing_covariate": (None, {"covariate_keys": ["sex"]}, MissingKeyError, r"covariate_keys='sex'"),
    "missing_labels": (None, {"labels_key": "celltype"}, MissingKeyError, r"labels_key='celltype'.*'cell_type'"),
    "wrong_layer": (None, {"layer": "raw"}, MissingKeyError, r"layer='raw'.*no keys at all"),
    "nan_batch": (nan_batch, {}, InvalidArgumentError, r"batch_key: adata.obs\['batch'\] is missing for 1 of 300"),
    "one_batch": (one_batch, {}, InvalidArgumentError, "all cells are of the batch 'only'.*nothing to integrate"),
    "duplicated_genes": (duplicated_genes, {}, GeneMismatchError, r"duplicated.*'gene_0'.*var_names_make_unique"),
    "batch_as_covariate": (None, {"covariate_keys": ["batch"]}, InvalidArgumentError, "to be removed, not protected"),
    "unknown_pca": (None, {"pca_method": "ica"}, InvalidArgumentError, "pca_method='ica'.*'standard'"),
    "unknown_teacher": (None, {"teacher": "mnn"}, InvalidArgumentError, "teacher='mnn'.*'harmony'"),
    "dropout_of_one": (None, {"dropout": 1.0}, InvalidArgumentError, "dropout=1.0"),
    "too_many_components": (None, {"n_latent": 120}, InvalidArgumentError, "n_latent=120.*300 cells x 120 genes"),
}


@pytest.mark.parametrize(("break_it", "settings", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_explained(small, break_it, settings, error, message):
    if break_it is not None:
        break_it(small)
    with pytest.raises(error, match=message):
        Distiller(small, **{"batch_key": "batch", **settings}).train(1, 1, progress=False)


def test_wrong_calls_are_explained(small, model):
    untrained = Distiller(small, batch_key="batch")
    for call in (untrained.get_latent_representation, untrained.corrected_expression, lambda: untrained.latent):
        with pytest.raises(NotTrainedError, match=r"Call train\(\) first"):
            call()
    with pytest.raises(InvalidArgumentError, match="give batch_key with them"):
        Distiller(small, layer="umi")
    with pytest.raises(InvalidArgumentError, match=r"genes='nope'"):
        model.corrected_expression(genes=["nope"])
    with pytest.raises(InvalidArgumentError, match="target_batch is empty"):
        model.corrected_expression([])
    with pytest.raises(InvalidArgumentError, match="library_size='latent'.*'observed'"):
        model.get_normalized_expression(library_size="latent")
    with pytest.raises(InvalidArgumentError, match="split='held_out'.*'test'"):
        model.get_teacher_agreement("held_out")


def test_labels_with_missing_values_are_refused(small):
    small.obs["cell_type"] = pd.Categorical(small.obs["cell_type"].astype(str)).remove_categories(["type_0"])
    with pytest.raises(InvalidArgumentError, match=r"labels_key: adata\.obs\['cell_type'\] is missing"):
        Distiller(small, batch_key="batch", labels_key="cell_type")


def test_harmony_is_the_default_teacher(small):
    assert Distiller(small, batch_key="batch").teacher == HarmonyTeacher(theta=2.0, max_iter=10, tol=1e-4)
