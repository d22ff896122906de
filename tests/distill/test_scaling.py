"""Models whose encoder reads counts scaled gene by gene."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from cellstill import Distiller
from cellstill.data import simulate_counts
from cellstill.data.gene_scaling import GeneScaling
from cellstill.errors import CellstillWarning, InvalidArgumentError, StoreError
from cellstill.metrics import ilisi, ilisi_ceiling
from cellstill.teachers import IdentityTeacher

from .conftest import train

METHOD = "scaled_residuals"


@pytest.fixture(scope="module")
def world():
    """Three batches that differ gene by gene; the models see two of them."""
    return simulate_counts(
        n_obs=1500, n_vars=200, n_batches=3, n_cell_types=4, library_size_median=3000, batch_sd=0.5, seed=21
    )


def part(world, *batches):
    return world[world.obs["batch"].isin(batches)].copy()


def quick(adata, method=METHOD, **settings) -> Distiller:
    return train(
        adata, epochs=(2, 2), **{"teacher": IdentityTeacher(), "n_latent": 6, "pca_method": method, **settings}
    )


@pytest.fixture(scope="module")
def reference(world):
    return quick(part(world, "batch_0", "batch_1"), labels_key="cell_type")


def mixing(embedding, batch):
    return ilisi(embedding, batch) / ilisi_ceiling(embedding, batch)


def test_batches_that_differ_gene_by_gene_mix_without_any_shift(reference):
    batch = reference.adata.obs["batch"]
    assert mixing(reference.latent.teacher, batch) > 0.9
    assert mixing(reference.latent.student, batch) > 0.9
    plain = quick(reference.adata.copy(), "pearson_residuals")
    assert mixing(plain.latent.teacher, batch) < 0.1


def test_the_encoder_reads_scaled_counts_and_the_decoder_raw_ones(reference):
    fitted, cells = reference._fit_result, reference._cells()
    expected = GeneScaling.fit(cells.counts, cells.batch).apply(cells.counts, cells.batch)
    np.testing.assert_array_equal(cells.encoded.data, expected.data)
    np.testing.assert_array_equal(cells.counts.data, reference.adata.X.data)
    np.testing.assert_array_equal(reference.latent.teacher, fitted.pca.transform(expected))


def test_a_cell_is_encoded_alike_alone_and_among_others(reference):
    rows = np.array([5, 1, 400])
    np.testing.assert_allclose(
        reference.get_latent_representation(indices=rows), reference.latent.student[rows], atol=1e-5
    )
    np.testing.assert_allclose(
        reference.map_query(reference.adata[rows].copy()).latent, reference.latent.student[rows], atol=1e-5
    )


def test_an_unseen_batch_is_scaled_by_what_its_own_cells_tell(world, reference):
    query = part(world, "batch_2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = reference.map_query(query)
    seen = reference.latent.student
    batch = np.r_[np.zeros(len(seen)), np.ones(len(query))].astype(int).astype(str)
    assert mixing(np.concatenate([seen, found.latent]), batch) > 0.85
    assert (found.labels["label"].to_numpy() == query.obs["cell_type"].astype(str)).mean() > 0.95
    del query.obs["batch"]
    with pytest.warns(CellstillWarning, match="no 'batch'.*without scaling"):
        unscaled = reference.map_query(query).latent
    assert mixing(np.concatenate([seen, unscaled]), batch) < 0.3


def test_a_few_cells_of_an_unseen_batch_are_not_scaled(world, reference):
    query = part(world, "batch_2")[:99].copy()
    with pytest.warns(CellstillWarning, match="fewer than 100 cells.*'batch_2'"):
        found = reference.map_query(query).latent
    cells = reference._cells(reference.adata[:1].copy())
    assert cells.scaled is not None
    del query.obs["batch"]
    with pytest.warns(CellstillWarning, match="without scaling"):
        np.testing.assert_array_equal(found, reference.map_query(query).latent)


def test_covariates_are_not_scaled_away(world):
    rng = np.random.default_rng(0)
    treated = (world.obs["condition"] == "treat").to_numpy()
    kept = np.where(world.obs["batch"] == "batch_0", rng.random(world.n_obs) < np.where(treated, 0.9, 0.1), True)
    kept &= np.where(world.obs["batch"] == "batch_1", rng.random(world.n_obs) < np.where(treated, 0.1, 0.9), True)
    adata = world[kept & (world.obs["batch"] != "batch_2").to_numpy()].copy()

    def error(**settings):
        log = np.log(quick(adata.copy(), **settings)._fit_result.scaling.factors)
        truth = adata.varm["batch_shift"].to_numpy()
        differs = adata.var["is_de_treat"].to_numpy()
        return np.sqrt(np.square(log[0] - log[1] + truth[:, 0] - truth[:, 1])[differs].mean())

    assert error(covariate_keys=["condition"]) < 0.5 * error()


def test_a_query_whose_covariates_are_not_known_is_scaled_with_a_warning(world):
    model = quick(part(world, "batch_0", "batch_1"), covariate_keys=["condition"])
    query = part(world, "batch_2")
    known = model.map_query(query).latent
    query.obs["condition"] = "other"
    with pytest.warns(CellstillWarning, match=r"covariates \['condition'\].*scaled away"):
        other = model.map_query(query).latent
    assert np.isfinite(other).all()
    assert not np.array_equal(known, other)
    of_training = part(world, "batch_0")
    expected = model.get_latent_representation(of_training)
    del of_training.obs["condition"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(model.get_latent_representation(of_training), expected)


def test_models_come_back_bit_for_bit_with_learned_batches(world, tmp_path):
    model = quick(part(world, "batch_0", "batch_1"))
    query = part(world, "batch_2")
    mapped = model.map_query(query, fine_tune_batches=True, n_epochs=2).latent
    np.testing.assert_array_equal(model.get_latent_representation(query), mapped)
    model.save(tmp_path / "model")
    again = Distiller.load(tmp_path / "model", model.adata)
    assert again.pca_method == METHOD
    np.testing.assert_array_equal(again.latent.student, model.latent.student)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        few = query[:50].copy()
        np.testing.assert_array_equal(
            again.get_latent_representation(few), model.get_latent_representation(query, indices=np.arange(50))
        )
    for name, array in model._fit_result.tensors().items():
        np.testing.assert_array_equal(again._fit_result.tensors()[name], array)
    other = quick(part(world, "batch_0", "batch_1"))
    np.testing.assert_array_equal(other.latent.student, model.latent.student)


def test_the_method_is_named_where_another_is_asked_for(world):
    with pytest.raises(InvalidArgumentError, match="pca_method='batch'.*'scaled_residuals'"):
        Distiller(part(world, "batch_0", "batch_1"), "batch", pca_method="batch")


def test_a_learned_batch_of_few_cells_is_scaled_once_there_are_enough(world):
    model = quick(part(world, "batch_0", "batch_1"))
    query = part(world, "batch_2")
    expected = model.get_latent_representation(query)
    with pytest.warns(CellstillWarning, match="fewer than 100 cells"):
        model.map_query(query[:60].copy(), fine_tune_batches=True, n_epochs=1)
    assert list(model._fit_result.query_batches) == ["batch_2"]
    np.testing.assert_array_equal(model.get_latent_representation(query), expected)
    with pytest.warns(CellstillWarning, match="fewer than 100 cells are encoded without scaling: 'batch_2'"):
        model.get_latent_representation(query[:60].copy())


def test_cells_without_a_batch_are_no_batch_of_their_own(world):
    model = quick(part(world, "batch_0", "batch_1"))
    query = part(world, "batch_2")
    expected = model.get_latent_representation(query[200:].copy())
    query.obs["batch"] = query.obs["batch"].astype(object)
    query.obs.iloc[:200, query.obs.columns.get_loc("batch")] = np.nan
    with pytest.warns(CellstillWarning, match=r"200 cells have no 'batch' in adata.obs"):
        found = model.get_latent_representation(query)
    np.testing.assert_allclose(found[200:], expected, atol=1e-5)
    del query.obs["batch"]
    with pytest.warns(CellstillWarning, match=rf"{len(query)} cells have no 'batch'"):
        np.testing.assert_allclose(model.get_latent_representation(query)[:200], found[:200], atol=1e-5)


def test_a_store_without_its_factors_is_damaged(world, tmp_path, monkeypatch):
    model = quick(part(world, "batch_0", "batch_1"))
    whole = type(model._fit_result).tensors
    monkeypatch.setattr(
        type(model._fit_result),
        "tensors",
        lambda self: {name: array for name, array in whole(self).items() if not name.startswith("scaling.")},
    )
    model.save(tmp_path / "model")
    with pytest.raises(StoreError, match="damaged .*scaling"):
        Distiller.load(tmp_path / "model")
