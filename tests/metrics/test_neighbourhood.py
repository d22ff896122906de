from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import cdist
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from cellstill.errors import CellstillWarning, InvalidArgumentError
from cellstill.metrics import (
    Neighbours,
    cross_batch_knn_accuracy,
    knn_accuracy,
    labels_of_one_batch,
    nearest_neighbours,
)
from cellstill.metrics._search import approximate_search
from cellstill.metrics.neighbourhood import vote_accuracy


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def clouds(rng, n_obs=300, n_labels=4, n_batches=3, n_dims=6, spread=1.2):
    labels = rng.integers(0, n_labels, n_obs)
    batch = rng.integers(0, n_batches, n_obs)
    centres = rng.normal(size=(n_labels, n_dims))
    return centres[labels] + spread * rng.normal(size=(n_obs, n_dims)), labels, batch


def majority(votes):
    """Most votes; between equals, the label that comes first in a list sorted by distance."""
    counts = Counter(votes)
    return max(counts, key=lambda label: (counts[label], -votes.index(label)))


def accuracy_by_loop(points, labels, batch, n_neighbors):
    distances = cdist(points, points)
    hits = []
    for cell, label in enumerate(labels):
        voters = [j for j in np.argsort(distances[cell], kind="stable") if j != cell]
        if batch is not None:
            if not any(labels[j] == label and batch[j] != batch[cell] for j in voters):
                continue
            voters = [j for j in voters if batch[j] != batch[cell]]
        hits.append(majority([labels[j] for j in voters[:n_neighbors]]) == label)
    return np.mean(hits)


@pytest.mark.parametrize("n_dims", [3, 40], ids=["kd_tree", "brute_force"])
@pytest.mark.parametrize("offset", [0, 1e6], ids=["centred", "far_from_origin"])
def test_exact_search_agrees_with_all_pairs(rng, n_dims, offset):
    points = rng.normal(size=(200, n_dims))
    expected = cdist(points, points)
    np.fill_diagonal(expected, np.inf)
    found = nearest_neighbours(points + offset, 12)
    np.testing.assert_array_equal(found.indices, np.argsort(expected, axis=1)[:, :12])
    np.testing.assert_allclose(found.distances, np.sort(expected, axis=1)[:, :12], rtol=1e-6)


@pytest.mark.parametrize("n_dims", [2, 40])
def test_a_cell_is_not_its_own_neighbour_among_duplicates(rng, n_dims):
    points = np.repeat(rng.normal(size=(5, n_dims)), 30, axis=0)
    found = nearest_neighbours(points, 29)
    assert not (found.indices == np.arange(150)[:, None]).any()
    assert (found.indices // 30 == np.arange(150)[:, None] // 30).all()
    np.testing.assert_allclose(found.distances, 0, atol=1e-6)


def test_approximate_search_finds_nearly_all_and_repeats_itself(rng):
    points = rng.normal(size=(1200, 8)) + 100
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    exact, found, again = (nearest_neighbours(points, 30, exact_up_to=size) for size in (1200, 1199, 1199))
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    recall = np.mean([len(set(a) & set(b)) / 30 for a, b in zip(exact.indices, found.indices, strict=True)])
    assert recall > 0.99
    assert not (found.indices == np.arange(1200)[:, None]).any()
    np.testing.assert_allclose(found.distances, exact.distances, rtol=0.1)
    np.testing.assert_array_equal(found.indices, again.indices)


def test_approximate_search_mends_rows_that_were_not_filled(rng, monkeypatch):
    points = rng.normal(size=(50, 4))
    order = np.argsort(cdist(points, points), axis=1)[:, :6]
    graph = order.astype(np.int32), np.take_along_axis(cdist(points, points), order, axis=1).astype(np.float32)
    graph[0][7, 3:] = -1  # too few found
    graph[1][7, 3:] = np.inf
    graph[0][9] = np.roll(graph[0][9], -1)  # others at the same place crowd the cell out
    graph[0][9, -1] = order[0, 0]
    monkeypatch.setattr("pynndescent.NNDescent", lambda *_, **__: type("Index", (), {"neighbor_graph": graph}))
    indices, distances = approximate_search(points, 5, seed=0)
    np.testing.assert_array_equal(indices, order[:, 1:])
    assert np.isfinite(distances).all()


@pytest.mark.parametrize("n_neighbors", [1, 4, 5, 15])
def test_knn_accuracy_agrees_with_a_loop(rng, n_neighbors):
    points, labels, _ = clouds(rng)
    expected = accuracy_by_loop(points, list(labels), None, n_neighbors)
    assert 0.3 < expected < 0.95
    assert knn_accuracy(points, labels, n_neighbors=n_neighbors) == pytest.approx(expected)


def test_knn_accuracy_agrees_with_scikit_learn_where_no_votes_are_equal(rng):
    points, labels, _ = clouds(rng, n_labels=2)
    expected = cross_val_score(KNeighborsClassifier(7), points, labels, cv=LeaveOneOut()).mean()
    assert knn_accuracy(points, labels, n_neighbors=7) == pytest.approx(expected)


def test_equal_votes_go_to_the_label_with_the_nearest_member():
    points = np.array([[0.0], [1.0], [-1.5], [-2.0], [2.1]])
    # The four others of cell 0, nearest first: a b b a.
    assert nearest_neighbours(points, 4).indices[0].tolist() == [1, 2, 3, 4]
    found = Neighbours(np.array([[1, 2, 3, 4]]), np.array([[1.0, 1.5, 2.0, 2.1]]))
    codes = np.array([1, 1, 0, 0, 1])
    assert vote_accuracy(found, codes, np.array([1])) == 1
    assert vote_accuracy(found, codes, np.array([0])) == 0
    assert vote_accuracy(found, 1 - codes, np.array([0])) == 1


@pytest.mark.parametrize("n_neighbors", [1, 6, 15])
@pytest.mark.parametrize("n_dims", [6, 30])
def test_cross_batch_accuracy_agrees_with_a_loop(rng, n_neighbors, n_dims):
    points, labels, batch = clouds(rng, n_dims=n_dims, spread=2)
    points += 0.8 * batch[:, None]
    expected = accuracy_by_loop(points, list(labels), list(batch), n_neighbors)
    assert 0.3 < expected < 0.95
    assert cross_batch_knn_accuracy(points, labels, batch, n_neighbors=n_neighbors) == pytest.approx(expected)


def test_only_cross_batch_accuracy_sees_batches_that_are_pure_but_misaligned(rng):
    labels, batch = np.tile([0, 1], 100), np.repeat([0, 1], 100)
    points = rng.normal(size=(200, 2)) * 0.1
    points[:, 0] += np.where(batch == 0, labels, 1 - labels) * 10  # the labels lie crosswise
    points[:, 1] += batch
    assert knn_accuracy(points, labels) == 1
    assert cross_batch_knn_accuracy(points, labels, batch) == 0


def test_labels_of_one_batch_vote_but_are_left_out_aloud(rng):
    points, labels, batch = clouds(rng)
    names = pd.Categorical(np.array(["T", "B", "NK", "Mono"])[labels], categories=["T", "B", "NK", "Mono", "unused"])
    batch[names == "NK"] = 1
    n_left_out = (names == "NK").sum()
    np.testing.assert_array_equal(labels_of_one_batch(names, batch), names == "NK")
    with pytest.warns(CellstillWarning, match=rf"^{n_left_out} of 300 cells .*one batch only: NK\."):
        accuracy = cross_batch_knn_accuracy(points, names, batch)
    assert accuracy == pytest.approx(accuracy_by_loop(points, list(names), list(batch), 15))
    rest = names != "NK"
    without = accuracy_by_loop(points[rest], list(names[rest]), list(batch[rest]), 15)
    assert accuracy != pytest.approx(without)


def test_a_sample_of_cells_estimates_the_cross_batch_accuracy(rng):
    points, labels, batch = clouds(rng, n_obs=2000)
    whole = cross_batch_knn_accuracy(points, labels, batch)
    estimates = [cross_batch_knn_accuracy(points, labels, batch, max_cells=400, seed=seed) for seed in range(20)]
    error = np.sqrt(whole * (1 - whole) / 400)
    assert 0.5 * error < np.std(estimates) < 1.5 * error
    assert np.mean(estimates) == pytest.approx(whole, abs=error)
    assert estimates[3] == cross_batch_knn_accuracy(points, labels, batch, max_cells=400, seed=3)


def test_accuracies_do_not_depend_on_rotation_order_or_names(rng):
    points, labels, batch = clouds(rng)
    rotation, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    order = rng.permutation(300)
    names = pd.Series(list("zxay"))[labels].to_numpy()
    before = knn_accuracy(points, labels), cross_batch_knn_accuracy(points, labels, batch)
    after = (
        knn_accuracy((points @ rotation)[order], names[order]),
        cross_batch_knn_accuracy((points @ rotation)[order], names[order], pd.Series(batch.astype(str))[order]),
    )
    assert after == before


def test_fewer_cells_than_neighbours_are_all_used_with_a_warning(rng):
    points, labels, batch = clouds(rng, n_obs=12, n_labels=2, n_batches=2)
    with pytest.warns(CellstillWarning, match="n_neighbors=15 is more than the 11 other cells"):
        accuracy = knn_accuracy(points, labels)
    assert accuracy == accuracy_by_loop(points, list(labels), None, 11)
    outside = min(np.bincount(batch))
    with pytest.warns(CellstillWarning, match=f"the {outside} cells outside the largest batch"):
        accuracy = cross_batch_knn_accuracy(points, labels, batch)
    assert accuracy == accuracy_by_loop(points, list(labels), list(batch), outside)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding": np.ones(5)}, r"embedding must be a dense numeric array .* found ndarray of shape \(5,\)"),
        ({"embedding": [[0.0, 1.0], [np.nan, 0.0]] * 2}, r"embedding has NaN or infinite values in 2 of 4 .* row 1"),
        ({"embedding": np.ones((1, 2))}, "embedding has 1 cells"),
        ({"labels": ["a", None, "b", "a"]}, r"labels is missing \(NaN\) for 1 of 4 cells, the first in row 1"),
        ({"batch": pd.Series([1.0, 1.0, 2.0, np.nan])}, r"batch is missing \(NaN\) for 1 of 4"),
        ({"labels": "cell_type"}, "labels must give one category for each of the 4 cells"),
        ({"batch": [1, 2]}, r"batch must give one category .* found shape \(2,\)"),
        ({"batch": list("aaaa")}, "batch has 1 category .'a'., where at least 2 are needed"),
        ({"labels": [0, 0, 1, 1], "batch": [0, 0, 1, 1]}, "share no label"),
        ({"n_neighbors": 0}, "n_neighbors=0 must be at least 1"),
        ({"max_cells": 0}, "max_cells=0"),
    ],
)
def test_unusable_arguments_are_named(change, message):
    good = {"embedding": np.eye(4), "labels": [0, 1, 0, 1], "batch": [0, 0, 1, 1], "n_neighbors": 2}
    with pytest.raises(InvalidArgumentError, match=message):
        cross_batch_knn_accuracy(**{**good, **change})


def test_neighbours_refuse_what_does_not_fit():
    with pytest.raises(InvalidArgumentError, match=r"n_obs - 1 = 3: a cell is not its own neighbour"):
        nearest_neighbours(np.eye(4), 4)
    with pytest.raises(InvalidArgumentError, match=r"found \(3, 2\) and \(2, 3\)"):
        Neighbours(np.ones((3, 2), int), np.ones((2, 3)))
    with pytest.raises(InvalidArgumentError, match="between 1 and 2"):
        nearest_neighbours(np.eye(4), 2).nearest(3)
