from __future__ import annotations

from itertools import combinations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.optimize import brentq

from cellstill.errors import CellstillWarning, InvalidArgumentError
from cellstill.metrics import (
    Neighbours,
    ari,
    clisi,
    cross_batch_knn_accuracy,
    ilisi,
    ilisi_ceiling,
    integration,
    integration_table,
    knn_accuracy,
    lisi,
    nearest_neighbours,
    nmi,
)


@pytest.fixture
def rng():
    return np.random.default_rng(8)


def clouds(rng, n_obs=600, shift=0.0, n_labels=4, n_batches=3, n_dims=5):
    labels = rng.integers(0, n_labels, n_obs)
    batch = np.minimum(rng.geometric(0.5, n_obs) - 1, n_batches - 1)
    centres = 4 * np.eye(n_labels, n_dims)[labels] + shift * rng.normal(size=(n_batches, n_dims))[batch]
    return centres + rng.normal(size=(n_obs, n_dims)), labels, batch


def lisi_by_loop(neighbours, codes, perplexity):
    def weights(beta, distances):
        kernel = np.exp(-beta * distances)
        return kernel / kernel.sum()

    def entropy(p):
        p = p[p > 0]
        return -(p * np.log(p)).sum()

    result = []
    for indices, distances in zip(neighbours.indices, neighbours.distances, strict=True):
        distances = distances - distances.min()
        beta = brentq(lambda b, d=distances: entropy(weights(b, d)) - np.log(perplexity), 1e-9, 1e4, xtol=1e-12)
        p = weights(beta, distances)
        result.append(1 / sum(p[codes[indices] == category].sum() ** 2 for category in set(codes)))
    return np.array(result)


@pytest.mark.parametrize("perplexity", [2, 7.5, 19])
@pytest.mark.parametrize("scale", [1e-4, 1, 1e4])
def test_lisi_agrees_with_a_loop_and_a_root_finder(rng, perplexity, scale):
    points, labels, _ = clouds(rng, n_obs=120)
    neighbours = nearest_neighbours(points * scale, 20)
    expected = lisi_by_loop(Neighbours(neighbours.indices, neighbours.distances / scale), labels, perplexity)
    assert expected.max() > 1.5
    np.testing.assert_allclose(lisi(neighbours, labels, perplexity), expected, rtol=2e-4)


def test_lisi_is_the_same_in_chunks(rng, monkeypatch):
    points, labels, _ = clouds(rng, n_obs=200)
    neighbours = nearest_neighbours(points, 60)
    whole = lisi(neighbours, labels, 20)
    monkeypatch.setattr("cellstill.metrics._lisi._CHUNK", 33)
    np.testing.assert_allclose(lisi(neighbours, labels, 20), whole, rtol=1e-4)


def test_neighbours_at_one_place_share_the_weight():
    # 12 neighbours at distance 0, more than the perplexity can tell apart, and 6 farther away.
    indices = np.tile(np.arange(18), (18, 1))
    distances = np.tile(np.repeat([0.0, 1.0], [12, 6]), (18, 1))
    codes = np.repeat([0, 1, 2], [3, 9, 6])
    np.testing.assert_allclose(lisi(Neighbours(indices, distances), codes, 5), 1 / (0.25**2 + 0.75**2))
    np.testing.assert_allclose(lisi(Neighbours(indices, 0 * distances), codes, 5), 18**2 / (9 + 81 + 36))


@pytest.mark.parametrize("perplexity", [1, 20, 30])
def test_a_perplexity_out_of_reach_is_an_error(rng, perplexity):
    with pytest.raises(InvalidArgumentError, match=f"perplexity={perplexity} must lie between 1 and the 20 neighbours"):
        lisi(nearest_neighbours(rng.normal(size=(30, 2)), 20), np.arange(30) % 2, perplexity)


def scib_neighbours(points, size=90):
    from scib_metrics.nearest_neighbors import NeighborsResults
    from sklearn.neighbors import NearestNeighbors

    distances, indices = NearestNeighbors(n_neighbors=size).fit(points).kneighbors(points)
    return NeighborsResults(indices=indices, distances=distances)


@pytest.mark.parametrize("shift", [0.0, 1.0, 5.0])
def test_scores_agree_with_scib_metrics_on_simulated_embeddings(rng, shift):
    import scib_metrics

    points, labels, batch = clouds(rng, shift=shift)
    theirs = scib_neighbours(points)
    ours = lisi(nearest_neighbours(points, 89), batch)
    np.testing.assert_allclose(ours, scib_metrics.lisi_knn(theirs, batch), rtol=1e-4)
    assert ilisi(points, batch) == pytest.approx(scib_metrics.ilisi_knn(theirs, batch), abs=1e-4)
    assert clisi(points, labels) == pytest.approx(scib_metrics.clisi_knn(theirs, labels), abs=1e-4)
    fewer = scib_neighbours(points, 40)
    assert ilisi(points, batch, n_neighbors=40) == pytest.approx(scib_metrics.ilisi_knn(fewer, batch), abs=1e-4)


@pytest.fixture(scope="module")
def kang(real_data):
    import scanpy as sc

    adata = ad.read_h5ad(real_data("kang_pbmc.h5ad"))
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    sc.pp.pca(adata, n_comps=20)
    return adata


@pytest.mark.parametrize("batch_key", ["donor", "condition"])
def test_scores_agree_with_scib_metrics_on_real_cells(kang, batch_key):
    import scib_metrics

    points, batch, labels = kang.obsm["X_pca"], kang.obs[batch_key], kang.obs["cell_type"]
    theirs = scib_neighbours(points)
    assert ilisi(points, batch) == pytest.approx(scib_metrics.ilisi_knn(theirs, batch.to_numpy()), abs=1e-4)
    assert clisi(points, labels) == pytest.approx(scib_metrics.clisi_knn(theirs, labels.to_numpy()), abs=1e-4)
    permuted = [scib_metrics.ilisi_knn(theirs, np.random.default_rng(seed).permutation(batch)) for seed in range(10)]
    assert ilisi_ceiling(points, batch) == pytest.approx(np.mean(permuted), abs=0.006)


def test_k_means_scores_are_near_those_of_scib_metrics_on_real_cells(kang):
    import scib_metrics

    points, labels = kang.obsm["X_pca"], kang.obs["cell_type"]
    theirs = scib_metrics.nmi_ari_cluster_labels_kmeans(points, labels.to_numpy())
    assert nmi(points, labels) == pytest.approx(theirs["nmi"], abs=0.05)  # one start of k-means there, ten here
    assert ari(points, labels) == pytest.approx(theirs["ari"], abs=0.05)


@pytest.mark.parametrize(("n_batches", "published"), [(2, 0.90), (3, 0.81), (4, 0.77)])
def test_ceiling_of_equal_batches(rng, n_batches, published):
    ceiling = ilisi_ceiling(rng.normal(size=(2000, 10)), np.arange(2000) % n_batches)
    assert ceiling == pytest.approx(published, abs=0.025)


def test_mixed_batches_reach_the_ceiling_and_separate_ones_the_floor(rng):
    points, _, batch = clouds(rng, n_obs=2000)
    assert ilisi(points, batch) / ilisi_ceiling(points, batch) == pytest.approx(1, abs=0.03)
    assert ilisi(points + 100 * batch[:, None], batch) == pytest.approx(0, abs=1e-9)
    assert ilisi_ceiling(points + 100 * batch[:, None], batch) == pytest.approx(ilisi_ceiling(points, batch), abs=0.01)


def test_pure_labels_score_one_and_scattered_ones_nearly_zero(rng):
    labels = np.arange(2000) % 2
    points = rng.normal(size=(2000, 4))
    assert clisi(points + 100 * labels[:, None], labels) == pytest.approx(1)
    assert clisi(points, labels) < 0.15


def test_ceiling_is_seeded_and_averages_permutations(rng):
    points, _, batch = clouds(rng)
    assert ilisi_ceiling(points, batch, seed=4) == ilisi_ceiling(points, batch, seed=4)
    single = [ilisi_ceiling(points, batch, seed=seed, n_permutations=1) for seed in range(12)]
    many = [ilisi_ceiling(points, batch, seed=seed, n_permutations=25) for seed in range(12)]
    assert np.std(many) < 0.5 * np.std(single)
    with pytest.raises(InvalidArgumentError, match="n_permutations=0"):
        ilisi_ceiling(points, batch, n_permutations=0)


def test_scores_do_not_depend_on_rotation_order_or_names(rng):
    points, labels, batch = clouds(rng, shift=0.7)
    rotation, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    order = rng.permutation(len(points))
    moved = (points @ rotation + 7)[order]
    names = pd.Categorical.from_codes(labels, list("wxyzv")).take(order)  # one category has no cells
    batches = pd.Series(batch, index=np.arange(600) + 5).map({0: "z", 1: "a", 2: "m"}).iloc[order]
    assert ilisi(moved, batches) == pytest.approx(ilisi(points, batch), abs=1e-5)
    assert clisi(moved, names) == pytest.approx(clisi(points, labels), abs=1e-5)
    assert ilisi_ceiling(moved, batches) == pytest.approx(ilisi_ceiling(points, batch), abs=0.01)
    assert nmi(moved, names) == pytest.approx(nmi(points, labels), abs=0.01)
    assert ari(moved, names) == pytest.approx(ari(points, labels), abs=0.01)


def test_k_means_scores_agree_with_their_definitions(rng):
    groups = np.repeat([0, 1, 2], [40, 30, 50])
    labels = groups.copy()
    labels[::7] = rng.integers(0, 3, len(labels[::7]))  # the clusters cannot find these
    points = 50 * np.eye(3)[groups] + rng.normal(size=(120, 3))
    joint = np.array([[np.mean((groups == g) & (labels == c)) for c in range(3)] for g in range(3)])
    outer = np.outer(joint.sum(1), joint.sum(0))
    information = (joint[joint > 0] * np.log(joint[joint > 0] / outer[joint > 0])).sum()
    entropies = [-(p * np.log(p)).sum() for p in (joint.sum(0), joint.sum(1))]
    assert nmi(points, labels) == pytest.approx(information / np.mean(entropies))

    pairs = list(combinations(range(120), 2))
    together = [(groups[i] == groups[j], labels[i] == labels[j]) for i, j in pairs]
    a, b = np.mean([g for g, _ in together]), np.mean([c for _, c in together])
    both = np.mean([g and c for g, c in together])
    assert ari(points, labels) == pytest.approx((both - a * b) / ((a + b) / 2 - a * b))


def test_table_holds_what_the_functions_return_and_searches_once_per_embedding(rng, monkeypatch):
    before, labels, batch = clouds(rng, shift=3.0)
    after, *_ = clouds(np.random.default_rng(8))
    searched = []
    search = integration.nearest_neighbours
    monkeypatch.setattr(integration, "nearest_neighbours", lambda *args: searched.append(1) or search(*args))
    table = integration_table({"before": before, "after": after[:, :4]}, batch, labels, seed=2)
    assert len(searched) == 2
    assert table.index.tolist() == ["before", "after"]
    for name, points in [("before", before), ("after", after[:, :4])]:
        expected = {
            "ilisi": ilisi(points, batch),
            "ilisi_ceiling": ilisi_ceiling(points, batch, seed=2),
            "clisi": clisi(points, labels),
            "cross_batch_knn_accuracy": cross_batch_knn_accuracy(points, labels, batch),
            "knn_accuracy": knn_accuracy(points, labels),
            "nmi": nmi(points, labels, seed=2),
        }
        assert table.loc[name].to_dict() == pytest.approx(expected)
    assert table.loc["before", "ilisi"] < 0.5 * table.loc["after", "ilisi"]
    unlabelled = integration_table({"before": before}, batch, seed=2)
    pd.testing.assert_frame_equal(unlabelled, table.loc[["before"], ["ilisi", "ilisi_ceiling"]])


def test_small_data_shrink_the_neighbourhood_with_a_warning(rng):
    points, labels, batch = clouds(rng, n_obs=40, n_labels=2, n_batches=2)
    with pytest.warns(CellstillWarning, match="n_neighbors=90 is more than the 40 cells; using 40"):
        score = ilisi(points, batch)
    assert score == pytest.approx(np.median(lisi_by_loop(nearest_neighbours(points, 39), batch, 13)) - 1, abs=1e-4)
    with pytest.warns(CellstillWarning):
        assert integration_table({"x": points}, batch, labels).notna().all(axis=None)
    with (
        pytest.warns(CellstillWarning),
        pytest.raises(InvalidArgumentError, match=r"at least 9 cells; found n_neighbors=8 and n_obs=8"),
    ):
        ilisi(points[:8], np.arange(8) % 2)


@pytest.mark.parametrize("score", [ilisi, clisi, ilisi_ceiling, nmi, ari])
def test_one_category_or_a_missing_one_is_an_error_that_names_the_argument(rng, score):
    argument = "batch" if score in (ilisi, ilisi_ceiling) else "labels"
    points = rng.normal(size=(20, 2))
    with pytest.raises(InvalidArgumentError, match=f"{argument} has 1 category"):
        score(points, ["only"] * 20)
    with pytest.raises(InvalidArgumentError, match=rf"{argument} is missing \(NaN\) for 2 of 20 cells"):
        score(points, [None, np.nan] + ["a", "b"] * 9)


def test_table_names_what_does_not_fit(rng):
    points = rng.normal(size=(20, 2))
    with pytest.raises(InvalidArgumentError, match=r"embeddings must have the same cells.*'b': 19"):
        integration_table({"a": points, "b": points[1:]}, np.arange(20) % 2)
    with pytest.raises(InvalidArgumentError, match=r"embeddings\['a'\] has NaN"):
        integration_table({"a": points * np.nan}, np.arange(20) % 2)
    with pytest.raises(InvalidArgumentError, match="embeddings is empty"):
        integration_table({}, np.arange(20) % 2)
