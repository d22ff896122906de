from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData
from scipy.spatial.distance import cdist

from cellstill.condense.baselines import BASELINES, baseline
from cellstill.condense.baselines import matching as matching_module
from cellstill.condense.baselines.base import principal_components
from cellstill.condense.baselines.matching import gradient_distance
from cellstill.condense.baselines.profiles import counts_of_profiles, unit_length
from cellstill.condense.cells import LabelledCells
from cellstill.condense.evaluate import evaluate
from cellstill.condense.evaluators import EVALUATORS
from cellstill.condense.problem import CondensationProblem
from cellstill.data.expression import log_expression
from cellstill.errors import InvalidArgumentError, OptionalDependencyError

SELECTING = (
    "random", "herding", "k_center", "geosketch", "scsampler", "scvalue", "kmeans_medoids", "kmeans_pca_medoids",
)  # fmt: skip
MAKING = ("kmeans_centroids", "kmeans_pca", "half_centroids", "metacells", "dc", "dm")
LATENT = ("kmeans_latent", "kmeans_latent_medoids", "generator", "text_distill", "feat_distill")


@pytest.fixture(scope="module")
def problem() -> CondensationProblem:
    """Three classes, the largest of two kinds of cells; the smallest has three training cells."""
    rng = np.random.default_rng(0)
    kind = np.repeat(np.arange(4), [60, 60, 50, 6])
    rate = np.full((len(kind), 80), 0.3)
    for k in range(4):
        rate[np.ix_(kind == k, np.arange(15 * k, 15 * k + 15))] = 2.5
    depth = rng.gamma(4, 0.25, (len(kind), 1))
    obs = pd.DataFrame({"cell_type": np.array(["a", "a", "b", "c"])[kind]})
    adata = AnnData(rng.poisson(rate * depth).astype(np.float32), obs=obs.set_index(obs.index.astype(str)))
    return CondensationProblem.from_anndata(adata, "cell_type", train_size=0.6)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(matching_module, "N_STEPS", 8)


def rows_of(cells: LabelledCells) -> set[bytes]:
    return {row.tobytes() for row in cells.counts.toarray()}


def test_all_are_registered_with_what_is_known_of_them():
    assert set(BASELINES) == {*SELECTING, *MAKING, *LATENT}
    for name, record in BASELINES.items():
        assert record.name == name
        assert record.limits.endswith(".")
        assert len(record.reference) > 15
        assert set(record.trained_with) <= set(EVALUATORS)


def test_a_name_is_given_once():
    with pytest.raises(InvalidArgumentError, match="'random' is taken"):
        baseline("random", reference="", limits="")(lambda problem, samples_per_class, seed: problem.train)


@pytest.mark.parametrize("samples_per_class", [1, 4, 1000], ids=["one", "some", "more_than_there_are"])
@pytest.mark.parametrize("name", [*SELECTING, *MAKING])
def test_budget_is_kept_and_cells_are_counts(problem, name, samples_per_class, monkeypatch):
    # Matching goes on where there is nothing to condense, and is slow there.
    monkeypatch.setattr(matching_module, "N_STEPS", 2)
    cells = BASELINES[name].condense(problem, samples_per_class, 0)
    assert np.array_equal(np.bincount(cells.codes, minlength=3), problem.budget(samples_per_class))
    assert cells.n_vars == problem.train.n_vars
    assert cells.counts.dtype == np.float32
    assert (cells.counts.data >= 0).all()
    assert np.isfinite(cells.counts.data).all()
    assert (cells.counts.sum(axis=1) > 0).all()
    if name in SELECTING:
        for code in range(3):
            mine, own = cells[cells.codes == code], problem.train[problem.train.codes == code]
            assert rows_of(mine) <= rows_of(own)
            assert len(rows_of(mine)) == len(mine), "the same cell twice"


@pytest.mark.parametrize("name", [*SELECTING, *MAKING])
def test_same_seed_same_cells_and_random_states_are_untouched(problem, name):
    state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    first = BASELINES[name].condense(problem, 3, 5).counts.toarray()
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(first, BASELINES[name].condense(problem, 3, 5).counts.toarray())
    seeded = name in ("random", "geosketch", "scsampler", "dc", "dm")
    if seeded:
        assert not np.array_equal(first, BASELINES[name].condense(problem, 3, 6).counts.toarray())


@pytest.mark.parametrize("name", [*SELECTING, *MAKING])
def test_prints_nothing_and_leaves_the_training_cells_alone(problem, name, capsys):
    before = problem.train.counts.copy()
    BASELINES[name].condense(problem, 2, 0)
    assert capsys.readouterr() == ("", "")
    assert abs(problem.train.counts - before).sum() == 0


def test_profiles_come_back_as_the_expression_of_their_counts():
    """Counts of a profile have its direction; those of a real cell are that cell again, at any depth."""
    rng = np.random.default_rng(1)
    profiles = np.maximum(rng.normal(1, 2, (20, 300)), 0)
    seen = log_expression(counts_of_profiles(profiles, 700.0)).toarray()
    cosine = (seen * profiles).sum(axis=1) / np.linalg.norm(seen, axis=1) / np.linalg.norm(profiles, axis=1)
    np.testing.assert_allclose(cosine, 1, atol=1e-6)
    counts = rng.poisson(0.5, (20, 300)).astype(np.float32)
    expression = log_expression(sp.csr_matrix(counts))
    depth = counts.sum(axis=1)
    np.testing.assert_allclose(counts_of_profiles(0.37 * expression.toarray(), depth).toarray(), counts, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e6], ids=["short", "unit", "long"])
@pytest.mark.parametrize("n_vars", [1, 5, 5000], ids=["one_gene", "few_genes", "many_genes"])
def test_depth_is_reached_from_profiles_of_any_length(n_vars, scale):
    profiles = np.random.default_rng(0).random((4, n_vars)) * scale
    depth = np.array([1.0, 50.0, 1e3, 1e5])
    np.testing.assert_allclose(counts_of_profiles(profiles, depth).sum(axis=1).A1, depth, rtol=1e-4)


@pytest.mark.parametrize("fault", [-1.0, np.nan, np.inf, 0.0], ids=["negative", "nan", "infinite", "zeros"])
def test_profiles_that_are_none_are_refused(fault):
    profiles = np.ones((2, 3))
    profiles[1] = fault
    with pytest.raises(InvalidArgumentError, match="profiles has"):
        counts_of_profiles(profiles, 1.0)


def test_one_centroid_is_the_mean_direction_of_the_class(problem):
    cells = BASELINES["kmeans_centroids"].condense(problem, 1, 0)
    for code in range(3):
        own = problem.train[problem.train.codes == code]
        mean = unit_length(own.expression()).mean(axis=0)
        seen = cells[cells.codes == code].expression().toarray()[0]
        assert seen @ mean / np.linalg.norm(seen) / np.linalg.norm(mean) == pytest.approx(1, abs=1e-5)
        depth = np.median(own.counts.sum(axis=1).A1)
        assert cells[cells.codes == code].counts.sum() == pytest.approx(depth, rel=1e-4)


def test_two_centroids_find_the_two_kinds_of_a_class(problem):
    for name in ("kmeans_centroids", "kmeans_pca", "metacells"):
        cells = BASELINES[name].condense(problem, 2, 0)
        two = cells[cells.codes == 0].counts.toarray()
        share = np.stack([two[:, :15].sum(axis=1), two[:, 15:30].sum(axis=1)]) / two.sum(axis=1)
        assert sorted(share.argmax(axis=0)) == [0, 1], name
        assert (share.max(axis=0) > 3 * share.min(axis=0)).all(), name


def test_one_medoid_is_the_real_cell_closest_to_the_centroid(problem):
    space = {
        "kmeans_medoids": unit_length(problem.train.expression()),
        "kmeans_pca_medoids": principal_components(problem)[0],
    }
    for name, points in space.items():
        for code in range(3):
            own = points[problem.train.codes == code]
            assert chosen_of(problem, name, 1, code) == ((own - own.mean(axis=0)) ** 2).sum(axis=1).argmin(), name


def test_half_are_real_cells_beside_the_centroids_of_half_the_clusters(problem):
    centroids = BASELINES["kmeans_centroids"].condense(problem, 3, 0)
    medoids = BASELINES["kmeans_medoids"].condense(problem, 3, 0)
    assert len(rows_of(medoids)) == 9
    half = BASELINES["half_centroids"].condense(problem, 4, 0)
    two = BASELINES["kmeans_centroids"].condense(problem, 2, 0)
    assert rows_of(two[two.codes < 2]) <= rows_of(half)
    real = rows_of(problem.train)
    assert len(rows_of(half[half.codes == 0]) & real) == 2
    odd = BASELINES["half_centroids"].condense(problem, 3, 0)
    assert len(rows_of(odd[odd.codes == 0]) & real) == 1
    assert not rows_of(centroids[centroids.codes == 0]) & real


def test_metacells_are_sums_that_lose_no_count(problem):
    cells = BASELINES["metacells"].condense(problem, 4, 0)
    for code in range(3):
        own = problem.train[problem.train.codes == code].counts.sum(axis=0)
        np.testing.assert_allclose(cells[cells.codes == code].counts.sum(axis=0), own, rtol=1e-5)


def chosen_of(problem: CondensationProblem, name: str, n: int, code: int) -> np.ndarray:
    """Positions within the class of the cells that a baseline chose of it."""
    cells = BASELINES[name].condense(problem, n, 0)
    own = problem.train[problem.train.codes == code].counts.toarray()
    return np.array(
        [np.flatnonzero((own == row).all(axis=1))[0] for row in cells[cells.codes == code].counts.toarray()]
    )


def test_herding_brings_the_mean_closer_than_random_cells_do(problem):
    points = principal_components(problem)[0][problem.train.codes == 0]
    mean = points.mean(axis=0)
    off = np.linalg.norm(points[chosen_of(problem, "herding", 5, 0)].mean(axis=0) - mean)
    rng = np.random.default_rng(0)
    by_chance = [np.linalg.norm(points[rng.permutation(len(points))[:5]].mean(axis=0) - mean) for _ in range(200)]
    assert off < np.quantile(by_chance, 0.05)
    first = chosen_of(problem, "herding", 1, 0)
    assert first == ((points - mean) ** 2).sum(axis=1).argmin()


def test_k_center_goes_farthest_first_and_scsampler_spreads_more_than_random_cells(problem):
    points = principal_components(problem)[0][problem.train.codes == 0]
    rng = np.random.default_rng(0)
    draws = [rng.permutation(len(points))[:6] for _ in range(200)]

    def radius(rows):
        return cdist(points, points[rows]).min(axis=1).max()

    def closest(rows):
        return np.sort(cdist(points[rows], points[rows]) + 1e9 * np.eye(len(rows)))[:, 0].min()

    # Farthest first: no cell is farther from those chosen than these are from each other (Gonzalez 1985).
    chosen = chosen_of(problem, "k_center", 6, 0)
    assert radius(chosen) <= closest(chosen) * (1 + 1e-6)
    assert not any(radius(rows) <= closest(rows) for rows in draws)
    for name in ("scsampler", "k_center"):
        assert closest(chosen_of(problem, name, 6, 0)) > np.quantile([closest(rows) for rows in draws], 0.95)


def test_gradient_distance_is_one_minus_cosine_by_output():
    made = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    true = torch.tensor([[5.0, 0.0], [0.0, -1.0], [1.0, -1.0]])
    assert float(gradient_distance(made, true)) == pytest.approx(0 + 2 + 1)


@pytest.mark.parametrize("name", ["dc", "dm"])
def test_matching_brings_class_means_closer_than_its_start(problem, name, monkeypatch):
    """Random cells are the start of matching: the profiles that it ends with are more like the class means."""
    monkeypatch.setattr(matching_module, "N_STEPS", 60)
    start, end = (BASELINES[of].condense(problem, 1, 0).expression().toarray() for of in ("random", name))
    expression = problem.train.expression()
    means = np.stack([expression[problem.train.codes == code].mean(axis=0).A1 for code in range(3)])
    before, after = (np.linalg.norm(cells - means, axis=1) for cells in (start, end))
    assert after.mean() < 0.9 * before.mean()


@pytest.mark.parametrize("name", ["geosketch", "scvalue"])
def test_a_missing_package_is_named(problem, name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(OptionalDependencyError, match=rf"'{name}'.*cellstill\[condense\]"):
        BASELINES[name].condense(problem, 2, 0)
    asked = []
    with pytest.raises(OptionalDependencyError, match=rf"'{name}'.*cellstill\[condense\]"):
        evaluate(problem, {"first": lambda *args: asked.append(args), name: name}, samples_per_class=[1])
    assert not asked


def test_scvalue_prefers_cells_that_the_forest_gets_right(problem):
    """With mislabelled cells in a class, hardly any of them is among the most valuable of a few."""
    rng = np.random.default_rng(0)
    codes = problem.train.codes.copy()
    swapped = rng.permutation(np.flatnonzero(codes == 1))[:6]
    codes[swapped] = 0
    noisy = dataclasses.replace(problem, train=LabelledCells(problem.train.counts, codes))
    cells = BASELINES["scvalue"].condense(noisy, 5, 0)
    wrong = rows_of(problem.train[swapped])
    assert len(rows_of(cells[cells.codes == 0]) & wrong) <= 1


def test_identical_cells_are_one_cluster(problem):
    counts = problem.train.counts.toarray()
    counts[problem.train.codes == 1] = counts[problem.train.of_class(1)[0]]
    alike = dataclasses.replace(problem, train=LabelledCells(sp.csr_matrix(counts), problem.train.codes))
    for name in ("kmeans_centroids", "kmeans_medoids", "half_centroids", "kmeans_pca"):
        cells = BASELINES[name].condense(alike, 4, 0)
        assert 1 <= (cells.codes == 1).sum() <= 4
        assert (cells.codes == 0).sum() == 4
