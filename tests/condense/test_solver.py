from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from cellstill.condense import solver as solver_module
from cellstill.condense.cells import LabelledCells
from cellstill.condense.choice import JUDGES, mean_score, validation_score
from cellstill.condense.counts import FORMS, Rendering
from cellstill.condense.evaluators import EVALUATORS
from cellstill.condense.matching import MatchingConfig, as_seen, match_codes
from cellstill.condense.objectives import outcome_loss
from cellstill.condense.solver import Condensed, condense, renderings, unmatched
from cellstill.condense.space import detected, log_library
from cellstill.condense.starts import cluster_means, labels_of_budget, start_codes
from cellstill.errors import InvalidArgumentError
from cellstill.metrics.condensation import classification_scores

QUICK = MatchingConfig(n_steps=8)


@pytest.fixture(autouse=True)
def two_judges(monkeypatch):
    """The quickest; that all are asked is checked below."""
    monkeypatch.setattr(solver_module, "validation_score", partial(validation_score, judges=("logistic", "knn")))


@pytest.fixture(scope="module")
def problem(trained):
    return trained.model.problem


@pytest.fixture(scope="module")
def space(trained):
    return trained.model.space


@pytest.fixture(scope="module")
def auto(problem, space) -> Condensed:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver_module, "validation_score", partial(validation_score, judges=("logistic", "knn")))
        return condense(problem, space, 2, matching=QUICK)


# The space


def test_library_and_detection_are_those_of_each_class(problem, space):
    library, n_genes = log_library(problem.train, 4), detected(problem.train, 4)
    counts = problem.train.counts.toarray()
    for code in range(3):
        own = counts[problem.train.codes == code]
        total = np.log(own.sum(axis=1))
        np.testing.assert_allclose(library[code], [total.mean(), total.std()], rtol=1e-5)
        assert n_genes[code] == np.median((own > 0).sum(axis=1))
    # A class without cells takes what all have.
    np.testing.assert_allclose(library[3], [np.log(counts.sum(axis=1)).mean(), np.log(counts.sum(axis=1)).std()], 1e-5)
    assert n_genes[3] == np.median((counts > 0).sum(axis=1))
    codes = np.repeat([0, 2], 20_000)
    fixed, drawn = space.library(codes), np.log(space.library(codes, seed=1))
    np.testing.assert_allclose(np.log(fixed[[0, -1]]), library[[0, 2], 0])
    assert drawn[:20_000].mean() == pytest.approx(library[0, 0], abs=0.01)
    assert drawn[:20_000].std() == pytest.approx(library[0, 1], rel=0.03)


def test_depth_and_noise_of_a_sample_are_drawn_apart(problem, space, monkeypatch):
    seeds = []
    real = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed=None: seeds.append(str(seed)) or real(seed))
    space.render(Rendering("sampled"), torch.zeros(4, 6), np.array([0, 0, 1, 2]), seed=5)
    assert len(seeds) == len(set(seeds)) == 2


# Starts


def test_labels_follow_the_budget():
    assert labels_of_budget(np.array([2, 0, 3])).tolist() == [0, 0, 2, 2, 2]


def test_cluster_means_are_of_their_class_and_cover_it(problem, space):
    z = space.encode(problem.train)
    one = cluster_means(problem, space, np.array([0, 1, 2]), seed=0)
    for code in range(3):
        torch.testing.assert_close(one[code], z[problem.train.of_class(code)].mean(dim=0), rtol=1e-4, atol=1e-5)
    # As many clusters as cells are the cells themselves.
    rare = problem.train.of_class(2)
    every = cluster_means(problem, space, np.full(len(rare), 2), seed=0)
    torch.testing.assert_close(every, z[rare], rtol=0, atol=0)

    # More clusters lie nearer to the cells.
    def missed(n: int) -> float:
        centres = cluster_means(problem, space, np.zeros(n, dtype=np.int64), seed=0)
        return float(torch.cdist(z[problem.train.of_class(0)], centres).min(dim=1).values.mean())

    assert missed(1) > missed(8) > missed(40)


def test_identical_cells_make_no_hole(problem, space):
    same = LabelledCells(problem.train.counts[np.zeros(6, dtype=int)], np.zeros(6, dtype=np.int64))
    means = cluster_means(replace(problem, train=same), space, np.zeros(3, dtype=np.int64), seed=0)
    torch.testing.assert_close(means, space.encode(same)[:3], rtol=0, atol=1e-5)


def test_starts(problem, space):
    codes = labels_of_budget(problem.budget(2))
    one, same, other = (start_codes("random", problem, space, codes, seed) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    label = torch.from_numpy(codes)
    centroids = start_codes("centroids", problem, space, codes, 0)
    wanted = cluster_means(problem, space, codes, 0)
    made = space.generator(centroids, label)
    # Inverted: what the codes generate is nearer to the centres than what noise generates, by far.
    off = float((made - wanted).square().mean())
    assert off < 0.05 * float((space.generator(one, label) - wanted).square().mean())


# The choice


def test_validation_scores_are_macro_f1_of_each_judge(problem):
    cells = problem.train[np.concatenate([problem.train.of_class(code)[:4] for code in range(3)])]
    scores = validation_score(problem, cells, seed=3)
    assert tuple(scores) == JUDGES
    for name, score in scores.items():
        predicted = EVALUATORS[name].fit(cells, 3, 3).predict(problem.validation.expression())
        assert score == classification_scores(problem.validation.codes, predicted).macro_f1
    assert mean_score(scores) == pytest.approx(sum(scores.values()) / 4)


def test_candidates_are_every_start_and_state_in_the_forms_that_do_best(auto):
    table = auto.choice
    assert list(table) == ["start", "steps", "counts", "logistic", "knn", "mean"]
    names = ["rounded, 1", "rounded, 2", "mixed, 1", "mixed, 2", "expected", "sampled"]
    # The first state in every form, the others in the two that did best on it.
    assert table["counts"][:6].tolist() == names
    best = set(table["mean"][:6].sort_values(ascending=False, kind="stable").index[:2])
    kept = [name for k, name in enumerate(names) if k in best]
    states = [(start, steps) for start in ("centroids", "random") for steps in (0, 2, 8)]
    wanted = [(*states[0], name) for name in names] + [(*state, name) for state in states[1:] for name in kept]
    assert list(table[["start", "steps", "counts"]].itertuples(index=False, name=None)) == wanted
    np.testing.assert_allclose(table["mean"], table[["logistic", "knn"]].mean(axis=1))
    assert list(auto.history) == ["centroids", "random"]
    assert [len(history) for history in auto.history.values()] == [8, 8]


def test_the_first_of_the_best_candidates_is_kept(auto, problem, space):
    best = auto.choice["mean"].idxmax()
    row = auto.choice.loc[best]
    assert (row["start"], row["steps"], row["counts"]) == (auto.start, auto.n_steps, auto.rendering.name)
    # What is kept are the cells of that row: scored again, they score the same.
    scores = validation_score(problem, auto.cells, judges=("logistic", "knn"))
    assert mean_score(scores) == row["mean"]
    label = torch.from_numpy(auto.cells.codes)
    z = space.generator(torch.from_numpy(auto.codes), label)
    again = space.render(auto.rendering, z, auto.cells.codes)
    np.testing.assert_array_equal(again.counts.toarray(), auto.cells.counts.toarray())


def test_a_worse_first_candidate_is_not_kept(problem, space, monkeypatch):
    told = iter([0.3, 0.9, 0.9, 0.1, 0.2, 0.2, 0.7])
    monkeypatch.setattr(solver_module, "validation_score", lambda *_, **__: {"judge": next(told)})
    found = condense(problem, space, 1, counts="rounded", start="random", matching=MatchingConfig(n_steps=2))
    assert found.choice["mean"].tolist() == [0.3, 0.9, 0.9, 0.1]
    assert (found.n_steps, found.rendering.detection) == (0, 2.0)
    assert found.point_choice["points"].tolist() == ["random, 0 steps", "random, 2 steps", "cells"]
    assert found.point_choice["mean"].tolist() == [0.2, 0.2, 0.7]
    np.testing.assert_array_equal(found.points.values, space.encode(found.cells).numpy())


def test_points_are_chosen_by_classifiers_of_the_latent_space(auto, problem, space):
    """Of all states and of the cells, what does best where classifiers see z of the validation cells."""
    table = auto.point_choice
    wanted = [f"{start}, {n} steps" for start in ("centroids", "random") for n in (0, 2, 8)]
    assert table["points"].tolist() == [*wanted, "cells"]
    z = space.encode(problem.validation).numpy()
    np.testing.assert_array_equal(auto.points.encode(problem.validation), z)
    for judge in ("logistic", "knn"):
        predicted = EVALUATORS[judge].fit(auto.points, 3, 0).predict(z)
        reached = classification_scores(problem.validation.codes, predicted).macro_f1
        assert reached == table.loc[table["mean"].idxmax(), judge]
    assert table["mean"].max() > 0.8


@pytest.mark.parametrize("start", ["centroids", "random"])
def test_points_are_what_the_generator_makes_of_codes(problem, space, start):
    found = condense(problem, space, 2, counts="expected", start=start, matching=unmatched())
    codes = torch.from_numpy(found.codes)
    made = {f"{start}, 0 steps": space.generator(codes, torch.from_numpy(found.cells.codes)).detach().numpy()}
    made["cells"] = space.encode(found.cells).numpy()
    best = found.point_choice.loc[found.point_choice["mean"].idxmax(), "points"]
    np.testing.assert_array_equal(found.points.values, made[best])
    np.testing.assert_array_equal(found.points.codes, found.cells.codes)


def test_forms_to_try():
    assert [r.name for r in renderings("auto", 1)] == ["rounded, 1", "rounded, 2", "expected", "sampled"]
    assert [r.name for r in renderings("auto", 2)][2:4] == ["mixed, 1", "mixed, 2"]
    assert [r.name for r in renderings("mixed", 1)] == ["mixed, 1", "mixed, 2"]
    assert [r.name for r in renderings("expected", 3)] == ["expected"]
    assert {r.form for r in renderings("auto", 10)} == set(FORMS)


@pytest.mark.parametrize("form", ["expected", "rounded"])
@pytest.mark.parametrize("start", ["centroids", "random"])
def test_what_is_asked_for_is_what_is_tried(problem, space, form, start):
    found = condense(problem, space, 3, counts=form, start=start, matching=unmatched(QUICK))
    assert (found.rendering.form, found.start, found.n_steps) == (form, start, 0)
    assert set(found.choice["start"]) == {start}
    assert set(found.choice["steps"]) == {0}
    expected = start_codes(start, problem, space, found.cells.codes, 0)
    np.testing.assert_array_equal(found.codes, expected.numpy())
    # A single candidate needs no judge.
    assert list(found.choice)[3:] == (["mean"] if form == "expected" else ["logistic", "knn", "mean"])
    assert found.choice["mean"].isna().all() == (form == "expected")


def test_budget_is_kept_for_small_classes(problem, space):
    sizes = np.bincount(problem.train.codes)
    found = condense(problem, space, 500, counts="expected", start="random", matching=unmatched())
    assert np.bincount(found.cells.codes).tolist() == np.minimum(sizes, 500).tolist()
    assert found.cells.counts.shape == (sizes.sum(), len(problem.genes))


@pytest.mark.parametrize("start", ["centroids", "random"])
def test_matched_codes_beat_their_start_on_the_objective(problem, space, start):
    config = MatchingConfig(n_steps=100, lr=0.03)
    found = condense(problem, space, 1, counts="expected", start=start, matching=config)
    codes = labels_of_budget(problem.budget(1))
    label, n_classes = torch.from_numpy(codes), problem.n_classes

    def outcome(state: torch.Tensor, cells: LabelledCells) -> float:
        made = as_seen(space.decode(state, label)[1])
        real = torch.from_numpy(cells.expression().toarray())
        return float(outcome_loss(real, torch.from_numpy(cells.codes), made, label, n_classes))

    first = start_codes(start, problem, space, codes, 0)
    networks = space.decode, space.autoencoder.classify
    kept, _ = match_codes(first, label, problem.train, n_classes, *networks, config, seed=0)
    with torch.no_grad():
        held_out = [outcome(state, problem.validation) for state in (first, kept[100])]
        fitted = [outcome(state, problem.train) for state in (first, kept[100])]
    assert fitted[1] < 0.97 * fitted[0]
    assert held_out[1] < held_out[0]
    assert found.history[start]["outcome"].iloc[-10:].mean() < found.history[start]["outcome"].iloc[:3].mean()


def test_same_seed_same_cells(auto, problem, space):
    torch.manual_seed(99)
    again = condense(problem, space, 2, matching=QUICK)
    pd.testing.assert_frame_equal(again.choice, auto.choice)
    np.testing.assert_array_equal(again.codes, auto.codes)
    np.testing.assert_array_equal(again.cells.counts.toarray(), auto.cells.counts.toarray())
    other = condense(problem, space, 2, counts="expected", start="random", matching=QUICK, seed=1)
    same = condense(problem, space, 2, counts="expected", start="random", matching=QUICK, seed=0)
    assert not np.array_equal(other.codes, same.codes)


def test_progress_counts_every_phase(problem, space):
    told = []
    condense(
        problem,
        space,
        1,
        counts="rounded",
        start="random",
        matching=MatchingConfig(n_steps=4),
        on_step=lambda *a: told.append(a),
    )
    matching = [("matching, random", k, 4) for k in range(1, 5)]
    assert told == matching + [("choosing", k, 6) for k in range(1, 7)]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"counts": "whole"}, "counts='whole'.*'auto', 'rounded'"),
        ({"start": "zero"}, "start='zero'.*'auto', 'centroids'"),
    ],
)
def test_bad_settings(problem, space, setting, message):
    with pytest.raises(InvalidArgumentError, match=message):
        condense(problem, space, 1, **setting)
