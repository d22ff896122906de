"""Data that change, names that clash, models that share: nothing may go wrong in silence."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from cellstill import Distiller
from cellstill.data import simulate_counts
from cellstill.errors import InvalidArgumentError, InvalidCountsError, StoreError
from cellstill.teachers import TEACHERS, HarmonyTeacher, IdentityTeacher, LatentTeacher, get_teacher

from .conftest import train


@pytest.fixture
def small():
    return simulate_counts(n_obs=200, n_vars=80, n_batches=3, n_cell_types=3, seed=3)


def quick(adata, **settings) -> Distiller:
    return train(adata, epochs=(1, 1), **{"teacher": IdentityTeacher(), "n_latent": 5, **settings})


def test_what_is_written_to_disk_comes_back_open_and_whole(small, tmp_path):
    model = quick(small)
    returned = model.corrected_expression(out=tmp_path / "x.zarr")
    np.testing.assert_array_equal(returned[:], model.corrected_expression())
    assert isinstance(returned, zarr.Array)


def test_data_normalised_after_training_are_not_taken_for_counts(small):
    model = quick(small)
    small.X = np.log1p(small.X)
    with pytest.raises(InvalidCountsError, match="not integers"):
        model.latent.student  # noqa: B018
    untrained = simulate_counts(n_obs=100, n_vars=50, seed=1)
    model = Distiller(untrained, batch_key="batch")
    untrained.X = np.log1p(untrained.X)
    with pytest.raises(InvalidCountsError, match="not integers"):
        model.train(1, 1, progress=False)


def test_two_models_on_one_data_set_do_not_disturb_each_other(small):
    small.obs["half"] = np.where(np.arange(200) % 2, "odd", "even")
    first = Distiller(small, batch_key="batch", teacher="identity", n_latent=5)
    second = Distiller(small, batch_key="half", teacher="identity", n_latent=5)
    for model in (first, second):
        model.train(1, 1, accelerator="cpu", progress=False)
    assert first.batch_names == ["batch_0", "batch_1", "batch_2"]
    assert second.batch_names == ["even", "odd"]
    alone = Distiller(
        simulate_counts(n_obs=200, n_vars=80, n_batches=3, n_cell_types=3, seed=3),
        batch_key="batch",
        teacher="identity",
        n_latent=5,
    ).train(1, 1, accelerator="cpu", progress=False)
    np.testing.assert_array_equal(first.corrected_expression("batch_2"), alone.corrected_expression("batch_2"))


def test_batches_renamed_after_training_are_noticed(small):
    model = quick(small)
    small.obs["batch"] = small.obs["batch"].astype(str).replace("batch_1", "renamed")
    with pytest.raises(InvalidArgumentError, match=r"obs\['batch'\] has changed since the model was trained"):
        model.latent.student  # noqa: B018


@pytest.mark.parametrize("kind", [int, float, bool, str])
def test_batches_of_any_type_survive_saving_and_loading_a_part(small, kind, tmp_path):
    names = {"batch_0": 0, "batch_1": 1, "batch_2": 1 if kind is bool else 2}
    small.obs["batch"] = small.obs["batch"].astype(str).map(names).astype(kind)
    model = quick(small)
    model.save(tmp_path / "model")
    cells = np.flatnonzero(small.obs["batch"].astype(str) == model.batch_names[1])
    loaded = Distiller.load(tmp_path / "model", small[cells].copy())
    assert loaded.batch_names == model.batch_names
    target = kind(1)
    np.testing.assert_allclose(
        loaded.corrected_expression(target), model.corrected_expression(target, indices=cells), rtol=1e-4
    )
    with pytest.raises(InvalidArgumentError, match="nothing to integrate"):
        loaded.train(1, 1, progress=False)


def test_a_part_with_two_of_three_batches_can_be_trained_on(small, tmp_path):
    quick(small, teacher=HarmonyTeacher(), covariate_keys=["condition"]).save(tmp_path / "model")
    part = small[(small.obs["batch"] != "batch_1").to_numpy()].copy()
    model = Distiller.load(tmp_path / "model", part)
    model.teacher = HarmonyTeacher(max_iter=100, tol=1e-2)
    model.train(1, 1, accelerator="cpu", progress=False)
    assert model.batch_names == ["batch_0", "batch_2"]


def test_values_with_the_same_name_are_refused(small):
    small.obs["batch"] = pd.Series([1, "1", "x"] * 66 + [1, "1"], index=small.obs_names, dtype=object)
    with pytest.raises(InvalidArgumentError, match=r"different values have the same name \(\['1', 'x'\]\)"):
        Distiller(small, batch_key="batch")


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_duplicated_cell_names(small, tmp_path):
    small.obs_names = ["same"] * 2 + list(small.obs_names[2:])
    model = quick(small.copy())
    assert model.latent.teacher.shape == (200, 5)
    model.save(tmp_path / "model")
    with pytest.raises(InvalidArgumentError, match="cell names occur twice"):
        Distiller.load(tmp_path / "model", small[::-1].copy()).latent.teacher  # noqa: B018


def test_names_with_line_breaks_survive(small, tmp_path):
    small.obs["cell_type"] = small.obs["cell_type"].astype(str).replace("type_1", "two\nlines")
    small.var_names = ["odd\ngene", *small.var_names[1:]]
    small.obs_names = ["odd\ncell", *small.obs_names[1:]]
    model = quick(small, labels_key="cell_type")
    model.save(tmp_path / "model")
    loaded = Distiller.load(tmp_path / "model", small)
    np.testing.assert_array_equal(loaded.latent.teacher, model.latent.teacher)
    pd.testing.assert_frame_equal(loaded.map_query(small).labels, model.map_query(small).labels)


def test_saving_does_not_delete_what_is_not_ours(small, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "precious.h5ad").write_text("mine")
    model = quick(small)
    with pytest.raises(StoreError, match=r"holds other files \(precious\.h5ad\)"):
        model.save(tmp_path / "results", overwrite=True)
    assert (tmp_path / "results" / "precious.h5ad").read_text() == "mine"


def test_a_damaged_configuration_is_named(small, tmp_path):
    quick(small).save(tmp_path / "model")
    config = tmp_path / "model" / "model.json"
    config.write_text(config.read_text().replace('"design"', '"desing"'))
    with pytest.raises(StoreError, match=r"damaged \('design'\)"):
        Distiller.load(tmp_path / "model")


def test_a_query_with_a_new_condition_is_mapped_but_not_scored(small):
    model = quick(small, labels_key="cell_type", covariate_keys=["condition"])
    query = small.copy()
    query.obs["condition"] = "drug"
    mapping = model.map_query(query)
    assert mapping.out_of_reference is None
    np.testing.assert_array_equal(mapping.latent, model.latent.student)
    query.obs["batch"] = query.obs["batch"].astype(object)
    query.obs.iloc[0, query.obs.columns.get_loc("batch")] = np.nan
    with pytest.raises(InvalidArgumentError, match="batch_key: .* missing for 1 of 200"):
        model.map_query(query)


def test_nothing_is_learned_from_a_query_that_is_refused(small):
    model = quick(small, labels_key="cell_type")
    query = small.copy()
    query.obs["batch"] = "new"
    with pytest.raises(InvalidArgumentError, match="n_neighbors=0"):
        model.map_query(query, fine_tune_batches=True, n_neighbors=0)
    assert model.map_query(query).unseen_batches == ("new",)


@pytest.mark.parametrize("fine_tuning", [{"n_epochs": 1}, {"lr": 1e-4}])
def test_fine_tuning_settings_are_used(small, fine_tuning):
    query = small.copy()
    query.obs["batch"] = "new"
    vectors = []
    for settings in ({}, fine_tuning):
        model = quick(small)
        model.map_query(query, fine_tune_batches=True, **settings)
        vectors.append(model._fitted().query_batches["new"])
    start = model._fitted().decoder.batches.weight.mean(dim=0).numpy()
    assert np.linalg.norm(vectors[1] - start) < 0.5 * np.linalg.norm(vectors[0] - start)


def test_indices_may_be_a_slice_a_mask_or_a_list(small):
    model = quick(small)
    whole = model.latent.student
    mask = np.arange(200) < 7
    for indices in (slice(0, 7), mask, list(range(7))):
        np.testing.assert_allclose(model.get_latent_representation(indices=indices), whole[:7], rtol=1e-4, atol=1e-5)
    with pytest.raises(InvalidArgumentError, match="selects no cell"):
        model.get_latent_representation(indices=[])
    with pytest.raises(IndexError):
        model.get_latent_representation(indices=mask[:10])


def test_numpy_numbers_are_numbers(small, tmp_path):
    teacher = HarmonyTeacher(theta=np.float32(2), max_iter=np.int64(100), tol=np.float64(1e-2))
    model = quick(small, n_latent=np.int64(5), teacher=teacher)
    model.save(tmp_path / "model")
    assert Distiller.load(tmp_path / "model").teacher == teacher
    for wrong in ({"n_latent": 5.0}, {"n_layers": 0}, {"seed": -1}, {"n_batch_embedding": -1}):
        with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
            Distiller(small, batch_key="batch", **wrong)
    with pytest.raises(InvalidArgumentError, match="lr=-1"):
        model.train(lr=-1)


def test_training_settings_are_used(small):
    def run(**settings):
        model = Distiller(small.copy(), batch_key="batch", teacher="identity", n_latent=5)
        model.train(**{"n_epochs_encoder": 40, "n_epochs_decoder": 2, **settings}, accelerator="cpu", progress=False)
        return model

    base = run(early_stopping=False)
    assert len(base.history["encoder"]) == 40
    assert len(run(patience=1, lr=0.1).history["encoder"]) < 40
    for settings in ({"lr": 1e-4}, {"batch_size": 16}, {"weight_decay": 10.0}):
        other = run(early_stopping=False, **settings)
        assert not np.allclose(other.history["decoder"], base.history["decoder"]), settings
    everything = run(train_size=1.0)
    assert list(everything.history["encoder"].columns) == ["train_loss"]
    with pytest.raises(InvalidArgumentError, match=r"split='validation' has 0 cells"):
        everything.get_teacher_agreement()
    untouched = run(n_epochs_encoder=0, n_epochs_decoder=0)
    np.testing.assert_allclose(untouched.latent.student, untouched.latent.teacher, rtol=1e-3, atol=1e-3)


def test_every_batch_is_trained_on_however_small(small):
    small.obs["batch"] = ["tiny", *small.obs["batch"].astype(str)[1:]]
    for seed in range(4):
        model = train(small.copy(), epochs=(0, 0), teacher=IdentityTeacher(), n_latent=5, seed=seed)
        assert 0 in model.train_indices_
        parts = np.concatenate([model.train_indices_, model.validation_indices_, model.test_indices_])
        np.testing.assert_array_equal(np.sort(parts), np.arange(200))


def test_a_latent_teacher_that_does_not_vary_everywhere(small, tmp_path):
    small.obsm["X_odd"] = sp.csr_matrix(np.c_[np.random.default_rng(0).normal(size=200), np.ones(200)])
    model = quick(small, teacher=LatentTeacher("X_odd"))
    assert np.isfinite(model.get_teacher_agreement("test"))
    model.save(tmp_path / "model")
    del small.obsm["X_odd"]
    np.testing.assert_array_equal(Distiller.load(tmp_path / "model", small).latent.student, model.latent.student)


def test_stored_zeros_of_a_gene_without_counts(small):
    counts = small.X.copy()
    counts.data[counts.indices == 3] = 0
    small.X = counts
    assert (small.X.indices == 3).any()
    assert np.isfinite(quick(small, pca_method="pearson_residuals").latent.student).all()


def test_a_teacher_derived_from_another_does_not_take_its_place():
    class Mine(HarmonyTeacher):
        pass

    assert TEACHERS["harmony"] is HarmonyTeacher
    assert type(get_teacher("harmony")) is HarmonyTeacher
    assert Mine().info.name == "harmony"


def test_few_cells_are_enough_for_harmony():
    tiny = simulate_counts(n_obs=12, n_vars=30, n_batches=2, n_cell_types=1, n_donors_per_group=1, seed=0)
    model = train(tiny, epochs=(1, 1), n_latent=3)
    assert model.latent.student.shape == (12, 3)


def test_it_is_at_home_in_scvi_tools(small, tmp_path, capsys):
    from scvi.model.base import BaseModelClass

    model = quick(small)
    assert isinstance(model, BaseModelClass)
    assert "Distiller of the teacher 'identity'" in model.summary_string
    model.view_anndata_setup()
    assert "batch_2" in capsys.readouterr().out
    model.save(tmp_path / "model")
    registry = Distiller.load_registry(tmp_path / "model")
    assert registry["setup_args"]["batch_key"] == "batch"
    Distiller.view_setup_args(tmp_path / "model")
    assert "'batch_key': 'batch'" in capsys.readouterr().out
    mapping = registry["field_registries"]["batch"]["state_registry"]["categorical_mapping"]
    assert list(mapping) == model.batch_names
    with pytest.raises(InvalidArgumentError, match="view of another AnnData"):
        Distiller(small[:100], batch_key="batch")
