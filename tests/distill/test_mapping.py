from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from scipy import stats

from cellstill.data import simulate_counts
from cellstill.errors import CellstillWarning, GeneMismatchError, InvalidArgumentError, InvalidCountsError

from .conftest import train


@pytest.fixture(scope="module")
def world():
    """Four batches and five types; the model will see three batches and four types."""
    return simulate_counts(
        n_obs=2400, n_vars=300, n_batches=4, n_cell_types=5, library_size_median=3000, batch_sd=0.4, seed=21
    )


def subset(world, batches, kinds):
    return world[(world.obs["batch"].isin(batches) & world.obs["cell_type"].isin(kinds)).to_numpy()].copy()


KINDS = ["type_0", "type_1", "type_2", "type_3"]
SEEN = ["batch_0", "batch_1", "batch_2"]


@pytest.fixture(scope="module")
def reference(world):
    return train(subset(world, SEEN, KINDS), labels_key="cell_type")


def test_new_cells_of_an_unseen_batch_get_their_labels_without_the_teacher(world, reference, monkeypatch):
    monkeypatch.setattr(type(reference.teacher), "teach", None)
    query = subset(world, ["batch_3"], KINDS)
    mapping = reference.map_query(query)
    assert mapping.unseen_batches == ("batch_3",)
    assert mapping.gene_overlap == 1
    assert list(mapping.labels.index) == list(query.obs_names)
    right = mapping.labels["label"].to_numpy() == query.obs["cell_type"].astype(str).to_numpy()
    assert right.mean() > 0.9
    confidence = mapping.labels["confidence"]
    assert ((confidence > 0) & (confidence <= 1)).all()
    assert confidence[right].mean() > confidence[~right].mean()


def test_training_cells_map_onto_themselves(reference):
    mapping = reference.map_query(reference.adata)
    np.testing.assert_array_equal(mapping.latent, reference.latent.student)
    assert (mapping.labels["label"].to_numpy() == reference.adata.obs["cell_type"].astype(str)).mean() > 0.95


def test_no_batch_column_is_needed(world, reference):
    query = subset(world, ["batch_0"], KINDS)
    expected = reference.map_query(query).latent
    del query.obs["batch"]
    mapping = reference.map_query(query)
    np.testing.assert_array_equal(mapping.latent, expected)
    assert mapping.unseen_batches == ()
    decoded = reference.get_normalized_expression(query, return_numpy=True)
    np.testing.assert_allclose(decoded.sum(axis=1), 1, rtol=1e-4)


def test_a_type_that_was_never_seen_is_out_of_reference(world, reference):
    strange = reference.map_query(subset(world, SEEN, ["type_4"])).out_of_reference
    held_out = reference.map_query(reference.adata[reference.test_indices_].copy()).out_of_reference
    assert stats.mannwhitneyu(strange, held_out).statistic / (len(strange) * len(held_out)) > 0.9
    assert 0.3 < np.median(held_out) < 0.7
    known_in_the_dark = reference.map_query(_without(reference.adata[:5].copy(), "condition"))
    assert known_in_the_dark.out_of_reference is not None, "this model has no covariates to miss"


def test_covariates_are_only_needed_for_decoding(model, simulated):
    mapping = model.map_query(_without(simulated[:20].copy(), "condition"))
    np.testing.assert_allclose(mapping.latent, model.latent.student[:20], rtol=1e-4, atol=1e-5)
    assert mapping.out_of_reference is None
    assert model.map_query(simulated[:20].copy()).out_of_reference is not None


def _without(adata, column):
    del adata.obs[column]
    return adata


def test_the_embedding_of_a_new_batch_can_be_learned(world):
    model = train(subset(world, SEEN, KINDS), labels_key="cell_type")
    query = subset(world, ["batch_3"], KINDS)
    known = model.corrected_expression("batch_0")
    before = model.get_normalized_expression(query, return_numpy=True)
    unlike = model.map_query(query).out_of_reference
    tuned = model.map_query(query, fine_tune_batches=True)
    after = model.get_normalized_expression(query, return_numpy=True)

    def log_likelihood(rates):
        library = np.asarray(query.X.sum(axis=1))
        return stats.poisson.logpmf(query.X.toarray(), rates * library).sum(axis=1).mean()

    assert log_likelihood(after) > log_likelihood(before) + 10
    # Nothing else has moved: the known batches decode as before, and "all batches" still means those of training.
    np.testing.assert_array_equal(model.corrected_expression("batch_0"), known)
    assert model.batch_names == SEEN
    as_new = model.corrected_expression("batch_3")
    assert not np.allclose(as_new, known)
    again = model.map_query(query)
    assert (tuned.unseen_batches, again.unseen_batches) == (("batch_3",), ())
    # What was learned counts at once.
    np.testing.assert_array_equal(tuned.out_of_reference, again.out_of_reference)
    assert tuned.out_of_reference.mean() < unlike.mean()


def test_a_learned_batch_is_saved(world, reference, tmp_path):
    query = subset(world, ["batch_3"], KINDS)
    reference.map_query(query, fine_tune_batches=True, n_epochs=2)
    reference.save(tmp_path / "model")
    again = type(reference).load(tmp_path / "model", reference.adata.copy())
    np.testing.assert_array_equal(again.corrected_expression("batch_3"), reference.corrected_expression("batch_3"))
    assert again.map_query(query).unseen_batches == ()


def test_genes_are_matched_by_name(world, reference):
    query = subset(world, ["batch_3"], KINDS)
    expected = reference.map_query(query)
    order = np.random.default_rng(0).permutation(query.n_vars)
    np.testing.assert_array_equal(reference.map_query(query[:, order].copy()).latent, expected.latent)
    with pytest.warns(CellstillWarning, match="20 of the model's 300 genes are missing"):
        partly = reference.map_query(query[:, 20:].copy())
    assert partly.gene_overlap == pytest.approx(280 / 300)
    assert (partly.labels["label"] == expected.labels["label"]).mean() > 0.9
    with pytest.raises(GeneMismatchError, match=r"at least 50% are needed"):
        reference.map_query(query[:, :100].copy())
    with pytest.warns(CellstillWarning, match="200 of"):
        reference.map_query(query[:, :100].copy(), min_gene_overlap=0.3)


def test_bad_queries_are_explained(world, reference):
    query = subset(world, ["batch_3"], KINDS)
    logged = query.copy()
    logged.X = sp.csr_matrix(np.log1p(logged.X))
    with pytest.raises(InvalidCountsError, match="not integers"):
        reference.map_query(logged)
    with pytest.raises(InvalidArgumentError, match="n_neighbors=0"):
        reference.map_query(query, n_neighbors=0)
    del query.obs["batch"]
    with pytest.raises(InvalidArgumentError, match=r"fine_tune_batches=True needs the batch.*no 'batch'"):
        reference.map_query(query, fine_tune_batches=True)
